"""What each way of recovering gives back: the recovery tables of the README and of docs/recovery.md.

    python benchmarks/recovery.py plan study.jsonl                    # the cuts, once
    python benchmarks/recovery.py measure study.jsonl --shard 0/2     # one line per cell; goes on where it was stopped
    python benchmarks/recovery.py cost study.jsonl                    # seconds, tokens/s and peak memory, one by one
    python benchmarks/recovery.py table study.jsonl                   # Markdown

A cell is a cut (method, ratio), a recipe, the samples it is trained on, and a seed, which draws the calibration
samples, the order of the training samples and the new weights. All cells of a part have the same steps and batch size.
`--split val` is for tuning; the validation split is the demo's own, no image of the test split is ever trained on.
Fresh scenes need `--cache`, a folder for the picture packages of `slimvlm.demo.make_data`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from quality import METHODS, calibration_sets, cut, one_shot_plans, plans_of_rounds

from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, load_samples
from slimvlm.compress.data.splits import Trained, hold_out
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import silent
from slimvlm.compress.recovery.recover import recover
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.demo.scenes import TRAIN_MIX, questions, scenes
from slimvlm.demo.sources import fetch, load_sprites

VALIDATION = 256
BASE = CompressOptions(model=str(MODEL), out=Path("unused"), data=SAMPLES / "train.jsonl", device="cpu")
PLAIN = {"recall": False}
PAPER = {"recover": "lpd+0*hidden", "feature_share": 200 / 475}
# Each recipe with the learning rate that was best of two or three on the validation split, 70 % removed, seed 0.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("no recovery", {}),
    "sft": ("LoRA, task loss (SFT)", {"recover": "sft", "learning_rate": 0.0026, **PLAIN}),
    "sft+kl": ("LoRA, task + KL", {"recover": "sft+kl", "learning_rate": 0.004, **PLAIN}),
    "sft+hidden": ("LoRA, task + hidden states", {"recover": "sft+hidden", "learning_rate": 0.006, **PLAIN}),
    "lpd-no-recall": ("LPD without recall", {"learning_rate": 0.004, **PLAIN}),
    "lpd-no-stages": ("LPD without stages", {"staged": False, "learning_rate": 0.0026}),
    "lpd": ("LPD", {"learning_rate": 0.004}),
    "lpd-paper": ("LPD, the paper's shares and losses", {"learning_rate": 0.004, **PAPER}),
    "lpd-paper+hidden": ("LPD, the paper's, and hidden states", {"learning_rate": 0.004, **PAPER, "recover": "lpd"}),
    "lpd-paper-no-recall": ("LPD, the paper's, without recall", {"learning_rate": 0.004, **PAPER, **PLAIN}),
    "lpd-paper-no-stages": ("LPD, the paper's, without stages", {"staged": False, "learning_rate": 0.0026, **PAPER}),
    "full": ("full fine-tuning, task loss", {"recover": "sft", "train": "full", "learning_rate": 0.0005, **PLAIN}),
    "full-lpd": ("full fine-tuning, LPD's stages and losses", {"train": "full", "learning_rate": 0.0007, **PLAIN}),
}
MAIN = ("none", "sft", "sft+kl", "sft+hidden", "lpd-no-recall", "lpd-no-stages", "lpd", "full")
BATCH = 32
RATIOS = (0.35, 0.5, 0.7)
DATA = ("5%", "all", "fresh")
CUTS = {"random": "random", "magnitude": "magnitude", "taylor": "taylor", "no-refit": "default"}  # method -> column
REFITTED = {
    "random-refit": "random", "magnitude-refit": "magnitude", "taylor-refit": "taylor", "default": "default"
}  # fmt: skip
STUDIED_ON_FEW = ("sft", "sft+hidden", "lpd", "full")


@dataclass(frozen=True)
class Cell:
    """One measurement; `data`: `all`, `5%` or `fresh`."""

    cut: str
    ratio: float
    recipe: str
    data: str
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.cut, self.ratio, self.recipe, self.data, self.seed


PARTS: dict[str, tuple[tuple[str, float, str, str], ...]] = {
    "main": tuple(("default", ratio, recipe, "all") for ratio in (0.7, 0.5, 0.35) for recipe in MAIN),
    "cuts": tuple((cut, 0.5, recipe, "all") for cut in (*CUTS, *REFITTED) for recipe in ("none", "sft", "lpd")),
    "no-refit": tuple(("no-refit", 0.5, recipe, "all") for recipe in MAIN),
    "data": tuple(
        ("default", ratio, recipe, data)
        for data in ("5%", "fresh")
        for ratio in (0.7, 0.5)
        for recipe in STUDIED_ON_FEW
        if data == "5%" or recipe in ("sft+hidden", "lpd")
    ),
}


def cells(parts: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Seed by seed, so that an unfinished study has whole rows."""
    wanted = dict.fromkeys(row for part in parts for row in PARTS[part])
    return (Cell(*row, seed) for seed in range(seeds) for row in wanted)


# ------------------------------------------------------------------ cuts and samples


def plan_file(out: Path, cut: str, ratio: float, seed: int) -> Path:
    return out.with_suffix(".plans") / f"{cut}-{round(100 * ratio)}-{seed}.json"


def plan(arguments: argparse.Namespace) -> None:
    for cell in cells(arguments.parts, arguments.seeds):
        make_plan(arguments.out, cell)


def make_plan(out: Path, cell: Cell) -> None:
    """The plan of the cell's cut, if it is not there yet."""
    path = plan_file(out, cell.cut, cell.ratio, cell.seed)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    options = replace(METHODS[cell.cut][1], ratio=cell.ratio)
    if options.rounds > 1:
        found, seconds = plans_of_rounds(options, [cell.ratio], calibration(cell.seed))[cell.ratio]
    else:
        found, seconds = one_shot_plans(options, [cell.ratio], calibration(cell.seed), cell.seed)[cell.ratio]
    if found is None:
        raise SystemExit(f"{cell.cut} cannot reach {cell.ratio}")
    path.write_text(found.to_json())
    print(path.name, f"{seconds:.0f} s", flush=True)


@cache
def packaged_samples() -> Sequence[Sample]:
    return load_samples(SAMPLES / "train.jsonl").samples


@cache
def calibration(seed: int) -> Sequence[Sample]:
    return calibration_sets(seed + 1, BASE.samples)[seed]


def samples_of(data: str, seed: int, count: int, folder: Path | None) -> Trained:
    """`count`: how many a training of the asked steps can use; more is only made of fresh scenes."""
    packaged = packaged_samples()
    training, validation = hold_out(packaged, VALIDATION)
    if data == "5%":
        training = random.Random(seed).sample(training, len(training) // 20)
    elif data == "fresh":
        training = list(fresh(seed, count, folder))
    return Trained(training, validation, "", ())


def fresh(seed: int, count: int, folder: Path | None) -> Iterator[Sample]:
    """Questions about scenes that the packaged set does not hold, as many per image as there."""
    if folder is None:
        raise SystemExit("fresh scenes need --cache")
    fetch(folder)
    stream = scenes(700_000 + seed, load_sprites(folder), TRAIN_MIX, "train")
    rng, made = random.Random(seed), 0
    while made < count:
        scene, image = next(stream)
        buffer = io.BytesIO()
        image.save(buffer, "webp", lossless=True, method=0)
        asked = questions(rng, scene)
        for question in rng.sample(asked, min(9, len(asked))):
            yield Sample(
                Path(f"fresh-{made}"), (Turn(question.text, (question.answer,)),), f"fresh:{made}", question.task,
                scene.vendor, buffer.getvalue(),
            )  # fmt: skip
            made += 1


# ------------------------------------------------------------------ measure


def options_of(cell: Cell, arguments: argparse.Namespace) -> CompressOptions:
    changes = {"train_batch_size": BATCH, "validate_every": max(1, arguments.steps // 4), **RECIPES[cell.recipe][1]}
    changes |= {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in arguments.set)}
    return replace(BASE, ratio=cell.ratio, seed=cell.seed, steps=arguments.steps, **changes)


def run(cell: Cell, arguments: argparse.Namespace) -> tuple[Loaded, dict[str, Any]]:
    """The recovered model and what it cost."""
    found = Plan.from_json(plan_file(arguments.out, cell.cut, cell.ratio, cell.seed).read_text())
    loaded = cut(found, METHODS[cell.cut][1], calibration(cell.seed))
    found = replace(found, model_digest=loaded.digest)
    if cell.recipe == "none":
        return loaded, {"removed": round(found.removed_fraction, 5)}
    options = options_of(cell, arguments)
    data = samples_of(cell.data, cell.seed, arguments.steps * options.train_batch_size, arguments.cache)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder, "cut"), loaded.model, loaded.processor, found)
        result = recover(options, found, Path(folder, "cut"), data, Path(folder, "training"), silent)
    history = result.history.to_dict()
    facts = {name: history[name] for name in ("seconds", "tokens_per_second", "best_step", "helped", "first", "best")}
    return result.loaded, {**facts, "removed": round(found.removed_fraction, 5), "training_samples": len(data.training)}


def measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    test = load_samples(SAMPLES / f"{arguments.split}.jsonl", limit=arguments.limit).samples
    index, count = map(int, arguments.shard.split("/"))
    wanted = [cell for cell in cells(arguments.parts, arguments.seeds) if cell.recipe in (arguments.recipes or RECIPES)]
    wanted = [cell for cell in wanted if cell.ratio in (arguments.ratios or RATIOS)]
    wanted = [cell for cell in wanted if cell.data in (arguments.data or DATA)]
    header = {"split": arguments.split, "steps": arguments.steps, "questions": len(test), "set": arguments.set}
    for cell in wanted[index::count]:
        key = {**vars(cell), **header}
        if any(all(row.get(name) == value for name, value in key.items()) for row in read(arguments.out)):
            continue
        loaded, facts = run(cell, arguments)
        collator = collator_of(loaded)
        quality = evaluate(loaded.model, collator, test, batch_size=128)
        tasks = {task: round(100 * values["exact"], 2) for task, values in quality.tasks.items()}
        row = {**key, **facts, "score": round(100 * quality.score, 2), "tasks": tasks}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*cell.key, row["score"], facts.get("seconds"), facts.get("best_step"), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------ cost


def cost(arguments: argparse.Namespace) -> None:
    """Every recipe in a process of its own, one after the other: so its peak memory and its time can be told."""
    for recipe in MAIN[1:]:
        words = [sys.executable, __file__, "one", arguments.out, recipe, "--steps", arguments.steps, "--threads", 2]
        subprocess.run([str(word) for word in words], check=True)


def one(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    arguments.set, arguments.cache = [], None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, facts = run(Cell("default", 0.5, arguments.recipe, "all", 0), arguments)
    facts |= {
        "wall": time.perf_counter() - started,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    row = {"cost": arguments.recipe, "steps": arguments.steps, **facts, "before_mb": before / 1024}
    with arguments.out.open("a") as file:
        file.write(json.dumps({**row, "versions": installed_versions()}) + "\n")
    print(arguments.recipe, facts, flush=True)


# ------------------------------------------------------------------ table


def table(arguments: argparse.Namespace) -> None:
    rows = [row for row in read(arguments.out) if row.get("split", "test") == "test"]
    base = {row["method"]: row["score"] for row in read(arguments.dense) if row["ratio"] is None}
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if "score" in row:
            steps = 0 if row["recipe"] == "none" else row["steps"]
            found[row["cut"], row["ratio"], row["recipe"], row["data"], steps].append(row["score"])

    def cell(cut: str, ratio: float, recipe: str, data: str, steps: int = arguments.steps) -> str:
        scores = found.get((cut, ratio, recipe, data, 0 if recipe == "none" else steps))
        if not scores:
            return "-"
        kept = f"{100 * (mean(scores) - base['blind']) / (base['dense'] - base['blind']):.0f} %"
        if len(scores) == 1:
            return f"{scores[0]:.1f}, {kept}, one seed"
        few = "" if len(scores) == arguments.seeds else f", {len(scores)} seeds"
        return f"{mean(scores):.1f} ({min(scores):.1f}-{max(scores):.1f}), {kept}{few}"

    _markdown("recovery", [f"{100 * ratio:.0f} % removed" for ratio in RATIOS], list(RECIPES),
              lambda recipe, index: cell("default", RATIOS[index], recipe, "all"))  # fmt: skip
    few = [(ratio, data) for ratio in (0.5, 0.7) for data in ("5%", "all")]
    _markdown("recovery", [f"{100 * ratio:.0f} %, {data}" for ratio, data in few], list(STUDIED_ON_FEW),
              lambda recipe, index: cell("default", few[index][0], recipe, few[index][1]))  # fmt: skip
    _markdown("50 % cut, not refitted", list(CUTS.values()), MAIN,
              lambda recipe, index: cell(list(CUTS)[index], 0.5, recipe, "all"))  # fmt: skip
    _markdown("50 % cut, refitted", list(REFITTED.values()), ("none", "sft", "lpd"),
              lambda recipe, index: cell(list(REFITTED)[index], 0.5, recipe, "all"))  # fmt: skip
    longer = sorted({key[1:2] + key[3:] for key in found if key[3] == "fresh" or key[4] > arguments.steps})
    columns = [f"{100 * ratio:.0f} %, {data}, {steps} steps" for ratio, data, steps in longer]
    _markdown("longer", columns, list(RECIPES)[1:],
              lambda recipe, index: cell("default", longer[index][0], recipe, *longer[index][1:]))  # fmt: skip
    print("| recovery | seconds | tokens/s | peak memory |\n|---|---|---|---|")
    for row in rows:
        if "cost" in row:
            figures = f"{row['seconds']:.0f} | {row['tokens_per_second']:.0f} | {row['peak_mb']:.0f} MB"
            print(f"| {RECIPES[row['cost']][0]} | {figures} |")


def _markdown(corner: str, columns: Sequence[str], recipes: Sequence[str], cell: Callable[[str, int], str]) -> None:
    print(f"| {corner} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for recipe in recipes:
        values = [cell(recipe, index) for index in range(len(columns))]
        if set(values) != {"-"}:
            print(f"| {RECIPES[recipe][0]} | " + " | ".join(values) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("plan", "measure", "cost", "one", "table"):
        one_command = commands.add_parser(name)
        one_command.add_argument("out", type=Path)
        one_command.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
        one_command.add_argument("--seeds", type=int, default=3)
        one_command.add_argument("--threads", type=int, default=1)
        if name == "measure":
            one_command.add_argument("--split", default="test", choices=("val", "test", "vendor"))
            one_command.add_argument("--limit", type=int, help="questions to evaluate on (default: the whole split)")
            one_command.add_argument("--recipes", nargs="+", choices=list(RECIPES))
            one_command.add_argument("--ratios", nargs="+", type=float)
            one_command.add_argument("--data", nargs="+", choices=DATA)
            one_command.add_argument("--steps", type=int, default=300)
            one_command.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th cell from the I-th on")
            one_command.add_argument("--cache", type=Path, help="folder of picture packages, for fresh scenes")
            one_command.add_argument(
                "--set", nargs="*", default=[], metavar="OPTION=JSON", help="tuning: change an option"
            )
        if name in ("cost", "one"):
            one_command.add_argument("--steps", type=int, default=60)
        if name == "one":
            one_command.add_argument("recipe", choices=list(RECIPES))
        if name == "table":
            one_command.add_argument("--steps", type=int, default=300)
            one_command.add_argument("--dense", type=Path, default=Path(__file__).parent / "results/quality.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"plan": plan, "measure": measure, "cost": cost, "one": one, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    main()
