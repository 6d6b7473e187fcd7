"""What each way of choosing costs in quality, without recovery: the table of the README.

`python benchmarks/quality.py measure study.jsonl` appends one line per cell and continues where it was stopped;
`--methods` and `--ratios` select cells, `--split val` is for tuning. `python benchmarks/quality.py table study.jsonl`
prints Markdown: mean and range over calibration sets of the exact match (mean of tasks), and the chance-corrected share
of the dense model, where the blind model (images shuffled) is 0 % and the dense one 100 %. A cell whose models are more
than 1 % of all parameters off its column says so instead of a share.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from slimvlm.compress.allocate.budget import plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.allocate.pool import proportional_steps
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.samples import Sample, batches, load_samples
from slimvlm.compress.errors import InfeasibleBudgetError
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import Loaded, load_model
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.rounds import plan_in_rounds
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.stages.plan import planning_of
from slimvlm.compress.statistics.collect import collect
from slimvlm.demo import MODEL, SAMPLES

DEFAULT = CompressOptions(model=str(MODEL), out=Path("unused"), data=SAMPLES / "train.jsonl")
ONE_SHOT = replace(DEFAULT, rounds=1, allocator="global", compensation="none")
FAITHFUL = replace(DEFAULT, faithful=True).resolved()
LOCAL = replace(ONE_SHOT, allocator="local")
EVEN = replace(DEFAULT, equal_rounds=True)
METHODS: dict[str, tuple[str, CompressOptions]] = {
    "default": ("slimvlm default", DEFAULT),
    "gate-refit": ("Gates, global, one shot, refitted", replace(ONE_SHOT, criterion="gate", compensation="refit")),
    "ukmi-refit": ("UKMI, faithful, steps in proportion, refitted", replace(FAITHFUL, compensation="refit")),
    "taylor-refit": ("Taylor, global, one shot, refitted", replace(ONE_SHOT, criterion="taylor", compensation="refit")),
    "obs-refit": ("Greedy OBS, global, one shot, refitted", replace(ONE_SHOT, criterion="obs", compensation="refit")),
    "gate-obs-refit": (
        "Gates x greedy OBS, global, one shot, refitted",
        replace(ONE_SHOT, criterion="gate-obs", compensation="refit"),
    ),
    "gate-obs-4": (
        "Gates x greedy OBS, 4 rounds, refitted between them",
        replace(DEFAULT, criterion="gate-obs", rounds=4, compensate_rounds=True),
    ),
    "gate-4": ("Gates, 4 rounds, refitted between them", replace(DEFAULT, rounds=4, compensate_rounds=True)),
    "gate-8": ("Gates, 8 rounds, refitted between them", replace(DEFAULT, compensate_rounds=True)),
    "ukmi-4": (
        "UKMI, 4 rounds, refitted between them",
        replace(DEFAULT, criterion="ukmi", allocator="balanced", rounds=4, compensate_rounds=True),
    ),
    "magnitude-refit": ("Magnitude, per layer, refitted", replace(LOCAL, criterion="magnitude", compensation="refit")),
    "random-refit": ("Random, refitted", replace(ONE_SHOT, criterion="random", compensation="refit")),
    "no-refit": ("slimvlm default, without the refit", replace(DEFAULT, compensation="none")),
    "prefix": ("The beginning of a default plan for 60 %", DEFAULT),
    "prefix-70": ("The beginning of a default plan for 70 %", DEFAULT),
    "prefix-no-refit": ("The beginning of one for 60 %, without the refit", replace(DEFAULT, compensation="none")),
    "even": ("The beginning of one for 60 % in equal rounds", EVEN),
    "even-no-refit": (
        "The beginning of one for 60 % in equal rounds, without the refit",
        replace(EVEN, compensation="none"),
    ),
    "ukmi-steps": ("UKMI, faithful, steps in proportion", FAITHFUL),
    "ukmi": ("UKMI, faithful to the letter", FAITHFUL),
    "fisher": ("Fisher, global, one shot", replace(ONE_SHOT, criterion="fisher")),
    "gate": ("Gates, global, one shot", replace(ONE_SHOT, criterion="gate")),
    "taylor": ("Taylor, global, one shot", replace(ONE_SHOT, criterion="taylor")),
    "taylor-local": ("Taylor, per layer (LLM-Pruner's way)", replace(LOCAL, criterion="taylor")),
    "taylor-mlp": ("Taylor, MLPs only, per layer", replace(LOCAL, criterion="taylor", kind_ratio={"attention": 0.0})),
    "magnitude": ("Magnitude, per layer", replace(LOCAL, criterion="magnitude")),
    "random": ("Random", replace(ONE_SHOT, criterion="random")),
}
README = ("default", "gate-refit", "ukmi-refit", "taylor-refit", "no-refit", "ukmi-steps", "ukmi")
PROPORTIONAL = ("ukmi-steps", "ukmi-refit")  # the paper's steps are made for 233 times as many units
PREFIXES = {"prefix": 0.6, "prefix-70": 0.7, "prefix-no-refit": 0.6, "even": 0.6, "even-no-refit": 0.6}  # of so much
COMPARABLE = 0.01  # of all parameters: a model that lost more or less than its column says is not compared
RATIOS = (0.2, 0.35, 0.5, 0.6)


@dataclass(frozen=True)
class Study:
    """Where the samples come from and how many are calibrated on."""

    sets: tuple[Sequence[Sample], ...]
    test: Sequence[Sample]
    batch_size: int


def calibration_sets(count: int, size: int) -> tuple[Sequence[Sample], ...]:
    """Disjoint sets of `size` samples; the samples of one image stay together."""
    samples = load_samples(SAMPLES / "train.jsonl").samples
    if count * size > len(samples):
        raise SystemExit(f"{count} sets of {size} samples need more than the {len(samples)} there are")
    return tuple(samples[index * size : (index + 1) * size] for index in range(count))


def dense() -> Loaded:
    loaded = load_model(str(MODEL))
    loaded.model.float()
    return loaded


def collated(loaded: Loaded, samples: Sequence[Sample], batch_size: int) -> list:
    collator = collator_of(loaded)
    return [partial(collator.training, batch) for batch in batches(samples, batch_size)]


def one_shot_plans(
    options: CompressOptions, ratios: Sequence[float], samples: Sequence[Sample], seed: int, proportional: bool = False
) -> dict[float, tuple[Plan | None, float]]:
    """One calibration serves every ratio; a plan that the floors forbid is None."""
    loaded = dense()
    planning = planning_of(options)
    started = time.perf_counter()
    groups = find_groups(loaded.model, loaded.family, planning.attention_unit)
    steps = proportional_steps(sum(group.num_units for group in groups)) if proportional else None
    calibration = None
    if planning.calibration.statistics:
        work = collated(loaded, samples, options.batch_size)
        calibration = collect(loaded.model, loaded.family, groups, work, planning.calibration)
    scores = score_groups(groups, planning.criterion, calibration, loaded.model, seed)
    seconds = time.perf_counter() - started
    plans: dict[float, tuple[Plan | None, float]] = {}
    for ratio in ratios:
        try:
            budget = replace(planning.budget, ratio=ratio, steps=steps)
            plans[ratio] = plan_units(groups, scores, budget, facts_of(loaded.model, groups)), seconds
        except InfeasibleBudgetError:
            plans[ratio] = None, seconds
    return plans


def order_of_rounds(options: CompressOptions, samples: Sequence[Sample]) -> tuple[Order, float]:
    loaded = dense()
    started = time.perf_counter()
    work = collated(loaded, samples, options.batch_size)
    planned = plan_in_rounds(loaded.model, lambda _: work, planning_of(options))
    return planned.order, time.perf_counter() - started


def plans_of_rounds(
    options: CompressOptions, ratios: Sequence[float], samples: Sequence[Sample], largest: float | None = None
) -> dict[float, tuple[Plan | None, float]]:
    """A plan for each ratio; with `largest` one plan for that, and its beginnings."""
    found: dict[float, tuple[Plan | None, float]] = {}
    for asked in ratios if largest is None else [largest]:
        order, seconds = order_of_rounds(replace(options, ratio=asked), samples)
        found |= {ratio: (order.plan_at(ratio), seconds) for ratio in (ratios if largest else [asked])}
    return found


def score(loaded: Loaded, study: Study, blind_seed: int | None = None) -> dict:
    collator = collator_of(loaded)
    quality = evaluate(loaded.model, collator, study.test, batch_size=128, blind_seed=blind_seed)
    tasks = {task: round(100 * values["exact"], 2) for task, values in quality.tasks.items()}
    return {"score": round(100 * quality.score, 2), "tasks": tasks}


def cut(plan: Plan, options: CompressOptions, samples: Sequence[Sample]) -> Loaded:
    """The cut model, refitted on the calibration samples where the options say so."""
    loaded = dense()
    groups = find_groups(loaded.model, loaded.family, plan.attention_unit)
    work = collated(loaded, samples, options.batch_size)
    fitted = COMPENSATIONS[options.compensation](loaded.model, loaded.family, groups, plan.keep, work)
    apply_plan(loaded.model, plan)
    if fitted is not None:
        fitted.put_into(loaded.model)
    return loaded


def measure(arguments: argparse.Namespace) -> None:
    study = Study(
        calibration_sets(arguments.sets, arguments.samples),
        load_samples(SAMPLES / f"{arguments.split}.jsonl", limit=arguments.limit).samples,
        arguments.batch_size,
    )
    done = {(row["method"], row["ratio"], row["set"]) for row in read(arguments.out)}
    header = {"split": arguments.split, "samples": arguments.samples, "questions": len(study.test)}

    def write(method: str, ratio: float | None, index: int | None, facts: dict) -> None:
        row = {"method": method, "ratio": ratio, "set": index, **header, **facts}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(method, ratio, index, *(facts.get(name) for name in ("score", "removed", "plan_seconds")), flush=True)

    for method, seed in (("dense", None), ("blind", 0)):
        if (method, None, None) not in done:
            write(method, None, None, {**score(dense(), study, seed), "versions": installed_versions()})
    plans: dict[tuple, tuple[Plan | None, float]] = {}
    scores: dict[tuple, dict] = {}  # the letter of the paper, and magnitudes, give the same plan more than once
    for method in arguments.methods:
        options = replace(METHODS[method][1], batch_size=arguments.batch_size)
        for index, samples in enumerate(study.sets):
            missing = [ratio for ratio in arguments.ratios if (method, ratio, index) not in done]
            made = method in PROPORTIONAL, PREFIXES.get(method)
            same = repr(replace(options, compensation="none")), made, index  # the refit changes no plan
            if unplanned := [ratio for ratio in missing if (*same, ratio) not in plans]:
                if options.rounds > 1:
                    found = plans_of_rounds(options, unplanned, samples, PREFIXES.get(method))
                else:
                    found = one_shot_plans(options, unplanned, samples, index, method in PROPORTIONAL)
                plans |= {(*same, ratio): value for ratio, value in found.items()}
            for ratio in missing:
                plan, seconds = plans[*same, ratio]
                facts = {"plan_seconds": round(seconds, 1), "score": None}
                if plan is not None:
                    cell = repr(plan.keep), index if options.compensation != "none" else None
                    if cell not in scores:
                        scores[cell] = score(cut(plan, options, samples), study)
                    facts |= {**scores[cell], "removed": round(plan.removed_fraction, 5)}
                write(method, ratio, index, facts)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict], methods: Sequence[str] = tuple(METHODS)) -> str:
    """Markdown: a row per method, a column per ratio; mean (lowest-highest) and the chance-corrected mean."""
    base = {row["method"]: row["score"] for row in rows if row["ratio"] is None}
    cells: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for row in rows:
        if row["ratio"] is not None and row["score"] is not None:
            cells[row["method"], row["ratio"]].append(row)
    ratios = sorted({ratio for _, ratio in cells})
    lines = [
        f"dense {base['dense']:.1f}, blind {base['blind']:.1f} (exact match, mean of tasks)",
        "",
        "| method | "
        + " | ".join(f"{100 * ratio:.0f} % removed" for ratio in ratios)
        + " | removed, % | seconds per plan |",
        "|---|" + "---|" * (len(ratios) + 2),
    ]
    for method in methods:
        found = [cells.get((method, ratio), []) for ratio in ratios]
        if not any(found):
            continue
        columns = [_cell(cell, ratio, base) for ratio, cell in zip(ratios, found, strict=True)]
        removed = ", ".join(f"{100 * mean(row['removed'] for row in cell):.1f}" if cell else "-" for cell in found)
        seconds = mean(row["plan_seconds"] for cell in found for row in cell)
        lines.append(f"| {METHODS[method][0]} | " + " | ".join(columns) + f" | {removed} | {seconds:.0f} |")
    return "\n".join(lines)


def _cell(rows: list[dict], ratio: float, base: dict[str, float]) -> str:
    if not rows:
        return "not reachable"
    scores = [row["score"] for row in rows]
    kept = 100 * (mean(scores) - base["blind"]) / (base["dense"] - base["blind"])
    off = max(abs(row["removed"] - ratio) for row in rows) > COMPARABLE
    return f"{mean(scores):.1f} ({min(scores):.1f}-{max(scores):.1f}), " + (
        "not comparable" if off else f"{kept:.0f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("measure")
    run.add_argument("out", type=Path)
    run.add_argument("--split", default="test", choices=("val", "test", "vendor"))
    run.add_argument("--limit", type=int, default=None, help="questions to evaluate on (default: the whole split)")
    run.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    run.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    run.add_argument("--sets", type=int, default=3)
    run.add_argument("--samples", type=int, default=DEFAULT.samples)
    run.add_argument("--batch-size", type=int, default=DEFAULT.batch_size)
    run.add_argument("--threads", type=int, default=2)
    show = commands.add_parser("table")
    show.add_argument("file", type=Path)
    show.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(read(arguments.file), arguments.methods))
        return
    torch.set_num_threads(arguments.threads)
    measure(arguments)


if __name__ == "__main__":
    main()
