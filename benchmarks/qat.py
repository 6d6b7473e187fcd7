"""Whether a recovery should know the export's precision: the table of docs/recovery.md ("Trained as it is exported").

    python benchmarks/qat.py measure qat.jsonl           # one line per training; goes on where it was stopped
    python benchmarks/qat.py table qat.jsonl             # Markdown

A training has a cut (the default's plan for a ratio), what is trained (`lora`, `full`), and the variant it is trained
as; all else is the same. It is scored by torch on the demo's validation questions, in fp32 and with the weights of each
variant, which are those in ONNX files (a test says so). Activations are not rounded, as ONNX Runtime does besides.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from earlier import read

from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.samples import Sample, load_samples
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.computing import load_to_compute
from slimvlm.compress.options import CutOptions
from slimvlm.compress.progress import silent
from slimvlm.compress.recovery.adapters.rounding import rounded
from slimvlm.compress.runs import MODEL as RUN_MODEL
from slimvlm.compress.stages.cut import cut_by_plan
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.serve.study.making import Makings
from slimvlm.serve.study.study import Bed, Cell, said_of

SCORED = ("fp32", "q4", "q2")
BED = Bed("demo", str(MODEL), SAMPLES / "train.jsonl", SAMPLES / "val.jsonl")
WAYS: dict[str, dict[str, Any]] = {  # what is trained -> options of the recovery
    "none": {"recover": "none"},
    "lora": {"learning_rate": 0.004},
    "full": {"train": "full", "learning_rate": 0.0007, "recall": False},
}


@dataclass(frozen=True)
class Training:
    """What sets one training apart; `none` for no recovery, `fp32` for one that knows of no variant."""

    seed: int
    ratio: float
    trained: str
    variant: str

    def cell(self, steps: int) -> Cell:
        options = CutOptions(
            model=BED.model, data=BED.data, eval_data=BED.val, out=Path(), device="cpu", ratio=self.ratio,
            seed=self.seed, steps=steps, train_batch_size=32, validate_every=max(1, steps // 4),
            recover_as=None if self.variant == "fp32" else self.variant, **WAYS[self.trained],
        )  # fmt: skip
        return Cell(BED, "qat", options, self.ratio, said_of(options, self.ratio, Path()))


def run(cell: Cell, makings: Makings) -> tuple[Loaded, dict[str, Any]]:
    """The cut and trained model, and what the training says of itself."""
    plan, _ = makings.plan(cell)
    with tempfile.TemporaryDirectory() as folder:
        training = cache(partial(makings.trained, cell))
        made = cut_by_plan(Path(folder, "run"), cell.options, plan, makings.samples(cell), training, silent)
        loaded = load_to_compute(cell.options, str(made.path / RUN_MODEL))
    told = ("seconds", "tokens_per_second", "best_step", "helped", "first", "best")
    facts = {name: value for name, value in made.facts("recover").items() if name in told}
    return loaded, {**facts, "removed": round(plan.removed_fraction, 5)}


def trainings(arguments: argparse.Namespace) -> Iterator[Training]:
    for seed in arguments.seeds:
        for trained in arguments.trained:
            for ratio in arguments.ratios:
                for variant in ("fp32",) if trained == "none" else arguments.variants:
                    yield Training(seed, ratio, trained, variant)


def measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    samples = load_samples(SAMPLES / "val.jsonl", limit=arguments.limit).samples
    makings = Makings(arguments.out.with_suffix(".plans"))
    for training in trainings(arguments):
        key = {**asdict(training), "steps": arguments.steps, "questions": len(samples)}
        done = read(arguments.out) if arguments.out.is_file() else []
        if any(all(row[name] == value for name, value in key.items()) for row in done):
            continue
        loaded, facts = run(training.cell(arguments.steps), makings)
        scores = {variant: score(loaded, variant, samples) for variant in SCORED}
        where = {"cpu": platform.machine(), "threads": arguments.threads, "versions": installed_versions()}
        with arguments.out.open("a") as file:
            file.write(json.dumps({**key, **facts, "scores": scores, **where}) + "\n")
        print(*asdict(training).values(), scores, facts.get("seconds"), facts.get("best_step"), flush=True)


def score(loaded: Loaded, variant: str, samples: Sequence[Sample]) -> dict[str, float]:
    """Percent exactly right (mean of tasks), and the mean cross-entropy of the right answers' tokens."""
    with rounded(loaded.model, None if variant == "fp32" else variant):
        quality = evaluate(loaded.model, collator_of(loaded), samples, batch_size=128)
    return {"exact": round(100 * quality.score, 2), "loss": round(quality.scores["token_loss"], 4)}


def table(arguments: argparse.Namespace) -> None:
    found: dict[tuple[str, str, float, str], list[float]] = defaultdict(list)
    for row in read(arguments.out):
        for variant, values in row["scores"].items():
            found[row["trained"], row["variant"], row["ratio"], variant].append(values["exact"])
    columns = [(ratio, variant) for ratio in arguments.ratios for variant in SCORED]
    heads = " | ".join(f"{100 * ratio:.0f} % removed, {variant}" for ratio, variant in columns)
    print(f"| trained | as | {heads} |\n|---|---|{'---|' * len(columns)}")
    for trained, variant in dict.fromkeys(key[:2] for key in found):
        scores = [found.get((trained, variant, *column), []) for column in columns]
        print(f"| {trained} | {variant} | {' | '.join(map(_span, scores))} |")


def _span(scores: Sequence[float]) -> str:
    if not scores:
        return "-"
    return f"{mean(scores):.1f}" + (f" ({min(scores):.1f}-{max(scores):.1f})" if len(scores) > 1 else ", one seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "table"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--trained", nargs="+", default=["none", "lora"], choices=list(WAYS))
    parser.add_argument("--variants", nargs="+", default=["fp32", "q4", "q2"])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--limit", type=int, help="questions to score on (default: all of the split)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    {"measure": measure, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    main()
