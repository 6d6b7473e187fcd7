"""The tables of what was measured before there was `slimvlm study`, from the lines that were written then.

    python benchmarks/earlier.py quality benchmarks/results/quality.jsonl [ROW ...]
    python benchmarks/earlier.py quality benchmarks/results/candidates.jsonl   (700 questions of the validation split)
    python benchmarks/earlier.py recovery benchmarks/results/recovery.jsonl

Nothing is measured here: `slimvlm study benchmarks/studies/demo.toml OUT` and `demo-recovery.toml` measure such rows
anew.
A cell holds the mean and the range over calibration sets (or seeds) of the exact match (mean of tasks), and the
chance-corrected share of the dense model: 0 % for the model with its images shuffled. A cell whose models are more than
1 % of all parameters off its column says so instead of a share.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

COMPARABLE = 0.01  # of all parameters
METHODS = {
    "default": "gates, 8 rounds (the default then)",
    "gate-refit": "Gates, global, one shot, refitted",
    "ukmi-refit": "UKMI, faithful, steps in proportion, refitted",
    "taylor-refit": "Taylor, global, one shot, refitted",
    "gate-obs-refit": "Gates x greedy OBS, global, one shot, refitted",
    "gate-obs-4": "Gates x greedy OBS, 4 rounds, refitted between them",
    "magnitude-refit": "Magnitude, per layer, refitted",
    "random-refit": "Random, refitted",
    "no-refit": "gates, 8 rounds, without the refit",
    "prefix": "The beginning of a default plan for 60 %",
    "prefix-70": "The beginning of a default plan for 70 %",
    "prefix-no-refit": "The beginning of one for 60 %, without the refit",
    "even": "The beginning of one for 60 % in equal rounds",
    "even-no-refit": "The beginning of one for 60 % in equal rounds, without the refit",
    "ukmi-steps": "UKMI, faithful, steps in proportion",
    "ukmi": "UKMI, faithful to the letter",
    "fisher": "Fisher, global, one shot",
    "gate": "Gates, global, one shot",
    "taylor": "Taylor, global, one shot",
    "taylor-local": "Taylor, per layer (LLM-Pruner's way)",
    "taylor-mlp": "Taylor, MLPs only, per layer",
    "magnitude": "Magnitude, per layer",
    "random": "Random",
}
RECIPES = {
    "none": "no recovery",
    "sft": "LoRA, task loss (SFT)",
    "sft+kl": "LoRA, task + KL",
    "sft+hidden": "LoRA, task + hidden states",
    "lpd-no-recall": "LPD without recall",
    "lpd-no-stages": "LPD without stages",
    "lpd": "LPD",
    "lpd-paper": "LPD, the paper's shares and losses",
    "lpd-paper+hidden": "LPD, the paper's, and hidden states",
    "lpd-paper-no-recall": "LPD, the paper's, without recall",
    "lpd-paper-no-stages": "LPD, the paper's, without stages",
    "full": "full fine-tuning, task loss",
    "full-lpd": "full fine-tuning, LPD's stages and losses",
}
MAIN = ("none", "sft", "sft+kl", "sft+hidden", "lpd-no-recall", "lpd-no-stages", "lpd", "full")
RATIOS = (0.35, 0.5, 0.7)
CUTS = {"random": "random", "magnitude": "magnitude", "taylor": "taylor", "no-refit": "default"}  # method -> column
REFITTED = {
    "random-refit": "random", "magnitude-refit": "magnitude", "taylor-refit": "taylor", "default": "default"
}  # fmt: skip
FEW = ("sft", "sft+hidden", "lpd", "full")  # recipes that were studied on few data too
STEPS, SEEDS = 300, 3


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quality_table(rows: list[dict[str, Any]], methods: Sequence[str] = tuple(METHODS)) -> str:
    """Markdown: a row per method, a column per ratio; mean (lowest-highest) and the chance-corrected mean."""
    base = {row["method"]: row["score"] for row in rows if row["ratio"] is None}
    cells: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
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
        lines.append(f"| {METHODS[method]} | " + " | ".join(columns) + f" | {removed} | {seconds:.0f} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], ratio: float, base: dict[str, float]) -> str:
    if not rows:
        return "not reachable"
    scores = [row["score"] for row in rows]
    kept = 100 * (mean(scores) - base["blind"]) / (base["dense"] - base["blind"])
    off = max(abs(row["removed"] - ratio) for row in rows) > COMPARABLE
    return f"{mean(scores):.1f} ({min(scores):.1f}-{max(scores):.1f}), " + (
        "not comparable" if off else f"{kept:.0f} %"
    )


def print_recovery_tables(out: Path, dense: Path) -> None:
    rows = [row for row in read(out) if row.get("split", "test") == "test"]
    base = {row["method"]: row["score"] for row in read(dense) if row["ratio"] is None}
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if "score" in row:
            steps = 0 if row["recipe"] == "none" else row["steps"]
            found[row["cut"], row["ratio"], row["recipe"], row["data"], steps].append(row["score"])

    def cell(cut: str, ratio: float, recipe: str, data: str, steps: int = STEPS) -> str:
        scores = found.get((cut, ratio, recipe, data, 0 if recipe == "none" else steps))
        if not scores:
            return "-"
        kept = f"{100 * (mean(scores) - base['blind']) / (base['dense'] - base['blind']):.0f} %"
        if len(scores) == 1:
            return f"{scores[0]:.1f}, {kept}, one seed"
        few = "" if len(scores) == SEEDS else f", {len(scores)} seeds"
        return f"{mean(scores):.1f} ({min(scores):.1f}-{max(scores):.1f}), {kept}{few}"

    _markdown("recovery", [f"{100 * ratio:.0f} % removed" for ratio in RATIOS], list(RECIPES),
              lambda recipe, index: cell("default", RATIOS[index], recipe, "all"))  # fmt: skip
    scarce = [(ratio, data) for ratio in (0.5, 0.7) for data in ("5%", "all")]
    _markdown("recovery", [f"{100 * ratio:.0f} %, {data}" for ratio, data in scarce], list(FEW),
              lambda recipe, index: cell("default", scarce[index][0], recipe, scarce[index][1]))  # fmt: skip
    _markdown("50 % cut, not refitted", list(CUTS.values()), MAIN,
              lambda recipe, index: cell(list(CUTS)[index], 0.5, recipe, "all"))  # fmt: skip
    _markdown("50 % cut, refitted", list(REFITTED.values()), ("none", "sft", "lpd"),
              lambda recipe, index: cell(list(REFITTED)[index], 0.5, recipe, "all"))  # fmt: skip
    longer = sorted({key[1:2] + key[3:] for key in found if key[3] == "fresh" or key[4] > STEPS})
    columns = [f"{100 * ratio:.0f} %, {data}, {steps} steps" for ratio, data, steps in longer]
    _markdown("longer", columns, list(RECIPES)[1:],
              lambda recipe, index: cell("default", longer[index][0], recipe, *longer[index][1:]))  # fmt: skip
    print("| recovery | seconds | tokens/s | peak memory |\n|---|---|---|---|")
    for row in rows:
        if "cost" in row:
            figures = f"{row['seconds']:.0f} | {row['tokens_per_second']:.0f} | {row['peak_mb']:.0f} MB"
            print(f"| {RECIPES[row['cost']]} | {figures} |")


def _markdown(corner: str, columns: Sequence[str], recipes: Sequence[str], cell: Callable[[str, int], str]) -> None:
    print(f"| {corner} | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for recipe in recipes:
        values = [cell(recipe, index) for index in range(len(columns))]
        if set(values) != {"-"}:
            print(f"| {RECIPES[recipe]} | " + " | ".join(values) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "recovery"))
    parser.add_argument("file", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of quality; else all")
    arguments = parser.parse_args()
    if arguments.what == "quality":
        print(quality_table(read(arguments.file), arguments.rows or tuple(METHODS)))
    else:
        print_recovery_tables(arguments.file, arguments.file.with_name("quality.jsonl"))


if __name__ == "__main__":
    main()
