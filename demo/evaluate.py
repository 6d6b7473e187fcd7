"""Measure a demo model on saved samples by generation, and write the model card's table.

`python -m slimvlm.demo.evaluate [--model M] [--samples S] [--limit N]` prints one JSON object; with `--markdown FILE`
the table of such an object, as it stands in the card.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.samples import Sample, load_samples
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.evaluation.quality import Quality, summarize
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.demo.concepts import TASKS

BATCH = 64


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--samples", type=Path, default=SAMPLES)
    parser.add_argument("--limit", type=int, default=None, help="only the first questions of every split")
    parser.add_argument("--markdown", type=Path, default=None, help="print the table of this report instead")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    print(json.dumps(report(options.model, options.samples, options.limit), indent=2))


def report(model: Path, folder: Path, limit: int | None = None) -> dict[str, dict[str, float]]:
    """Per cent of exact answers per task and their mean: `test`, `blind`, `vendor`, `photos` (and test by vendor)."""
    loaded = load_model(str(model), dtype=torch.float32)
    collator = collator_of(loaded)

    def answered(samples: Sequence[Sample]) -> Quality:
        return evaluate(loaded.model, collator, samples, batch_size=BATCH)

    splits = {name: load_samples(folder / f"{name}.jsonl").samples[:limit] for name in ("test", "vendor", "photos")}
    test = answered(splits["test"])
    table = {"test": by_task(test)}
    for vendor in test.vendors:
        rows = [row for row in test.rows if row.vendor == vendor]
        table[f"test {vendor}"] = by_task(summarize(test.kind, rows, blind=False, seconds=0.0))
    table["blind"] = by_task(answered(blind(splits["test"])))
    return table | {name: by_task(answered(splits[name])) for name in ("vendor", "photos")}


def blind(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions about somebody else's picture: images move half-way round the split."""
    shown = list({sample.image: sample for sample in samples}.values())
    half = len(shown) // 2
    other = {one.image: another for one, another in zip(shown, shown[half:] + shown[:half], strict=True)}
    return [sample.showing(other[sample.image]) for sample in samples]


def by_task(quality: Quality) -> dict[str, float]:
    """Per cent right for every task, their mean, and how many questions and images that was."""
    scores = {task: round(100 * means["exact"], 1) for task, means in quality.tasks.items()}
    images = len({row.image for row in quality.rows})
    return {"mean": round(100 * quality.score, 1), **scores, "questions": len(quality.rows), "images": images}


def markdown(table: dict[str, dict[str, float]]) -> str:
    """One row per split, one column per task."""
    columns = ["mean", *TASKS, "questions", "images"]
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(str(row.get(column, "")) for column in columns)] for name, row in table.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
