"""Does a plan that ranks units by measured milliseconds keep more than one by parameters, at equal measured time?

    python benchmarks/targets.py measure benchmarks/results/targets.jsonl    about 12 minutes of one quiet core
    python benchmarks/targets.py table benchmarks/results/targets.jsonl      the table of docs/targets.md

For the demo model, and for a medium decoder behind the demo's eyes (hidden size 1024, random weights): three cuts of a
plan by parameters are measured (time per token); the plan by milliseconds is cut by the closed loop of `compress
--target` until it takes as long; then both run side by side, in turns. A line per pair: what each removes, time per
token of both with the interval of their ratio, importance kept (share of the dense scores' sum; the same scores for
both), and, of the demo, exact match on questions of val.jsonl after the refit, without recovery. Lines that are there
are not measured again. The table of times is kept in the user's cache, as `compress` keeps it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.scoring import Scores
from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.samples import Sample, load_samples
from slimvlm.compress.errors import InfeasibleBudgetError
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.evaluation.quality import Quality, compare
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import build_meta, load_model
from slimvlm.compress.models.computing import load_to_compute
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import silent
from slimvlm.compress.rounds import Planned, plan_in_rounds
from slimvlm.compress.stages.plan import planning_of
from slimvlm.compress.stages.slice import save_cut
from slimvlm.compress.statistics.reading import Batches
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export.running import manifest
from slimvlm.serve.fitting.goals import Goal
from slimvlm.serve.fitting.record import Figures, Trial
from slimvlm.serve.fitting.search import find_cut
from slimvlm.serve.fitting.table import CostTable
from slimvlm.serve.fitting.tabulate import cached_table
from slimvlm.serve.fitting.trials import Workbench
from slimvlm.serve.measuring.device import describe_device
from slimvlm.serve.options import ProfileOptions

PHASE = "tpot"
MOST = 0.6  # of all parameters: what both plans are made for
MEDIUM = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 16}


@dataclass(frozen=True)
class Study:
    """One model, on one device.

    Attributes:
        groups, scores: units of the dense model, and what they are worth in it.
        by: `parameters` and `milliseconds`: the orders in which units leave.
        dense: what the whole model takes.
    """

    name: str
    options: CompressOptions
    bench: Workbench
    table: CostTable
    groups: Sequence[Group]
    scores: Scores
    by: Mapping[str, Order]
    dense: Trial

    def kept(self, plan: Plan) -> float:
        """Share of the importance of all units that stays."""
        whole = left = 0.0
        for group in self.groups:
            worth = self.scores.values[group.key].double() * group.parameters_per_unit
            stays = torch.isin(self.scores.members[group.key], torch.tensor(plan.keep[group.key])).all(1)
            whole, left = whole + float(worth.sum()), left + float(worth[stays].sum())
        return left / whole

    def trial(self, by: str, ratio: float) -> Trial:
        """What a cut takes."""
        return self.bench.try_out(self.by[by].plan_at(ratio), ratio, self.dense.backend, (PHASE,))

    def as_fast(self, trial: Trial) -> Trial | None:
        """The cut of the plan by milliseconds that takes as long; None where none does."""
        order, bench = self.by["milliseconds"], self.bench
        goal = Goal(PHASE, trial.figures[PHASE])
        study = replace(self, bench=replace(bench, goals=(goal,)))

        def foretell(ratio: float) -> Figures:
            return self.table.predict(order.plan_at(ratio), self.groups)

        def try_out(ratio: float, _: str) -> Trial:
            return study.trial("milliseconds", ratio) if ratio else self.dense

        backend = self.dense.backend
        try:
            return find_cut((goal,), (backend,), try_out, {backend: foretell}, order.plan.ratio).trial
        except InfeasibleBudgetError:
            return None

    def cut(self, by: str, ratio: float, folder: Path, samples: Sequence[Sample]) -> None:
        """The cut and refitted checkpoint `folder`."""
        dense = load_to_compute(self.options, self.options.model)
        save_cut(folder, dense, self.options, self.by[by].plan_at(ratio), samples, silent)


def medium(folder: Path, layers: int) -> Path:
    """The demo model with a larger decoder of random weights, saved in `folder`."""
    demo = load_model(str(MODEL))
    config = demo.model.config
    text = {**config.text_config.to_dict(), **MEDIUM, "num_hidden_layers": layers, "head_dim": 64}
    config = transformers.LlavaConfig.from_dict({**config.to_dict(), "text_config": text})
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).float().eval()
    save_checkpoint(folder, model, demo.processor, None)
    return folder


def prepare(name: str, model: Path, asked: argparse.Namespace) -> Study:
    """Both plans, and the table that the one by milliseconds goes by."""
    options = CompressOptions(
        model=str(model),
        out=Path("unused"),
        data=SAMPLES / "train.jsonl",
        ratio=MOST,
        samples=asked.samples,
        device="cpu",
        **({"rounds": asked.rounds} if name == "demo" else {"rounds": 1, "criterion": "magnitude"}),
    )
    workload = ProfileOptions(
        slim=str(model), device="cpu", threads=1, batch_sizes=(1,), cell_seconds=asked.cell_seconds
    )
    bench = Workbench(str(model), workload)
    timed = replace(bench, goals=(Goal(PHASE, math.inf),))
    table = cached_table(timed, asked.backend, progress=tell, widths=asked.widths)
    planning = planning_of(options)
    groups = planning.groups(build_meta(str(model))[0])
    times = table.times(groups, {PHASE: table.dense[PHASE]})
    calibration = calibration_samples(options)
    first: list[Planned] = []
    by = {}
    for ranked_by in ("parameters", "milliseconds"):
        loaded = load_to_compute(options, str(model))
        collator = collator_of(loaded)
        work = collated(collator, calibration, options.batch_size)
        budget = replace(planning.budget, times=times if ranked_by == "milliseconds" else None)
        wanted = replace(planning, budget=budget)
        by[ranked_by] = plan_in_rounds(loaded.model, always(work), wanted, on_round=first.append).order
    dense = bench.try_out(by["parameters"].plan_at(0.0), 0.0, asked.backend, (PHASE,))
    return Study(name, options, bench, table, groups, first[0].scores, by, dense)


def always(work: Batches) -> Callable[[int], Batches]:
    """The same samples in every round."""
    return lambda _: work


def calibration_samples(options: CompressOptions) -> Sequence[Sample]:
    return load_samples(options.data, limit=options.samples, seed=options.seed).samples


def pair(study: Study, ratio: float, asked: argparse.Namespace) -> dict[str, Any]:
    """A cut of the plan by parameters, and the one by milliseconds that takes as long."""
    plain = study.trial("parameters", ratio)
    timed = study.as_fast(plain)
    line: dict[str, Any] = {
        "dense_ms": study.dense.figures[PHASE],
        "asked_ms": plain.figures[PHASE],
        "parameters": described(study, "parameters", ratio),
    }
    if timed is None:
        return {**line, "milliseconds": None}
    ratios = {"parameters": ratio, "milliseconds": timed.ratio}
    line |= {"milliseconds": described(study, "milliseconds", timed.ratio)}
    return line | side_by_side(study, ratios) | (answers(study, ratios, asked) if study.name == "demo" else {})


def described(study: Study, by: str, ratio: float) -> dict[str, float]:
    """What a cut is, whatever the clock says."""
    plan = study.by[by].plan_at(ratio)
    return {"ratio": ratio, "removed": plan.removed_fraction, "importance_kept": study.kept(plan)}


def side_by_side(study: Study, ratios: Mapping[str, float]) -> dict[str, Any]:
    """Milliseconds per token of both, in turns, and by how much the one by milliseconds is faster."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {by: Path(scratch) / by for by in ratios}
        for by, folder in folders.items():
            study.bench.make(study.by[by].plan_at(ratios[by]), folder, study.dense.backend)
        cell = study.bench.compare(folders["milliseconds"], study.dense.backend, folders["parameters"])
    runs = {"parameters": cell.runs["dense"], "milliseconds": cell.runs["slim"]}
    return {"ms": {by: 1000 * run.medians[PHASE] for by, run in runs.items()}, "faster": asdict(cell.ratios[PHASE])}


def answers(study: Study, ratios: Mapping[str, float], asked: argparse.Namespace) -> dict[str, Any]:
    """Exact match of both after the refit, and the interval of the difference."""
    questions = load_samples(SAMPLES / "val.jsonl", limit=asked.questions, seed=0).samples
    calibration, found = calibration_samples(study.options), dict[str, Quality]()
    for by, ratio in ratios.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            study.cut(by, ratio, folder, calibration)
            loaded = load_to_compute(study.options, str(folder))
            found[by] = evaluate(loaded.model, collator_of(loaded), questions, batch_size=study.options.batch_size)
    gained = compare(found["parameters"], found["milliseconds"])
    return {
        "exact": {by: 100 * quality.score for by, quality in found.items()},
        "gained": {name: 100 * getattr(gained, name) for name in ("difference", "low", "high")},
        "questions": len(questions),
    }


def measure(asked: argparse.Namespace) -> None:
    """Append the lines that are missing."""
    torch.set_num_threads(1)
    path: Path = asked.file
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    device = f"{describe_device(torch.device('cpu'))['name']}, one thread"
    for name in asked.models:
        cells = [{"model": name, "backend": asked.backend, "asked": ratio} for ratio in asked.ratios]
        cells = [cell for cell in cells if not any(cell.items() <= line.items() for line in known)]
        with tempfile.TemporaryDirectory() as scratch:
            model = MODEL if name == "demo" else medium(Path(scratch) / "medium", asked.layers)
            if not cells:
                continue
            study = prepare(name, model, asked)
            for cell in cells:
                found = cell | pair(study, cell["asked"], asked)
                line = json.dumps(found | {"device": device, "versions": installed_versions(manifest.VERSIONED)})
                with path.open("a") as file:
                    file.write(f"{line}\n")
                print(f"{time.perf_counter() - STARTED:7.1f} s  {line}", flush=True)


def table(asked: argparse.Namespace) -> None:
    """Markdown."""
    print("| model | ms per token | removed | importance kept | exact match | of the time |")
    print("|---|---|---|---|---|---|")
    for line in map(json.loads, asked.file.read_text().splitlines()):
        dense, plain, timed = line["dense_ms"], line["parameters"], line["milliseconds"]
        head = f"| {line['model']} | {line['asked_ms']:.3g} (dense {dense:.3g})"
        if timed is None:
            print(f"{head} | {plain['removed']:.1%}, not reached by milliseconds | | | |")
            continue
        removed, kept = (f"{plain[name]:.1%} / {timed[name]:.1%}" for name in ("removed", "importance_kept"))
        exact, faster = "", line["faster"]
        if "exact" in line:
            gained = "{difference:+.1f}, {low:+.1f} to {high:+.1f}".format(**line["gained"])
            exact = f"{line['exact']['parameters']:.1f} / {line['exact']['milliseconds']:.1f} ({gained})"
        share = f"{1 / faster['value']:.3f} ({1 / faster['high']:.3f} to {1 / faster['low']:.3f})"
        print(f"{head} | {removed} | {kept} | {exact} | {share} |")


def tell(stage: str, done: int, total: int, note: str = "", /) -> None:
    """A line now and then."""
    if stage == "table" or done == total:
        print(f"{time.perf_counter() - STARTED:7.1f} s  {stage} {done}/{total} {note}", flush=True)


STARTED = time.perf_counter()


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "table"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", nargs="+", choices=("demo", "medium"), default=["demo", "medium"])
    parser.add_argument("--backend", default="onnx:fp32")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.35, 0.5], help="Of the plan by parameters.")
    parser.add_argument("--widths", nargs="+", type=float, default=[0.75, 0.5, 0.25], help="Of the table of times.")
    parser.add_argument("--layers", type=int, default=2, help="Of the medium decoder.")
    parser.add_argument("--cell-seconds", type=float, default=4.0)
    parser.add_argument("--questions", type=int, default=840)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()
    {"measure": measure, "table": table}[asked.command](asked)


if __name__ == "__main__":
    main()
