"""The evaluate stage of a run: `quality.json`, the dense, the cut and the slim model on the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from slimvlm.compress.collate import Collator
from slimvlm.compress.computing import load_to_compute
from slimvlm.compress.evaluate import compare, evaluate
from slimvlm.compress.files import write_text
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.quality import Quality
from slimvlm.compress.runs import RunFolder
from slimvlm.compress.samples import Sample
from slimvlm.compress.splits import Measured
from slimvlm.compress.stages.recover import CUT

Progress = Callable[..., None]  # stage, done, total, note


def evaluate_stage(
    run: RunFolder, options: CompressOptions, data: Measured, progress: Progress
) -> tuple[Quality, Quality | None, Quality]:
    """Quality of the dense, the cut (where a recovery followed) and the slim model on the same questions."""
    path = options.out / "quality.json"
    if run.finished("evaluate"):
        document = json.loads(path.read_text())
        read = {name: Quality.from_dict(document[name]) for name in ("dense", "cut", "slim") if name in document}
        return read["dense"], read.get("cut"), read["slim"]
    with run.stage("evaluate") as facts:
        facts.update(samples=len(data.evaluation), held_out=data.held_out)
        folders = {"dense": options.model, "cut": options.out / CUT, "slim": options.out / "model"}
        if not (options.out / CUT).is_dir():
            del folders["cut"]
        found = {
            name: evaluate_model(options, str(folder), data.evaluation, progress) for name, folder in folders.items()
        }
        comparison = compare(found["dense"], found["slim"], options.seed).to_dict()
        document = {**{name: quality.to_dict() for name, quality in found.items()}, "comparison": comparison}
        write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
    return found["dense"], found.get("cut"), found["slim"]


def evaluate_model(options: CompressOptions, name: str, samples: Sequence[Sample], progress: Progress) -> Quality:
    """Quality of the checkpoint `name` on `samples`."""
    loaded = load_to_compute(options, name)
    collator = Collator(loaded.processor, loaded.family, loaded.model.config)
    return evaluate(
        loaded.model,
        collator,
        samples,
        batch_size=options.batch_size * 4,
        progress=lambda done, total: progress("evaluate", done, total),
    )
