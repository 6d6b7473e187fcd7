"""The recovery tables of docs/recovery.md: what was measured before there was `slimvlm study`.

    python benchmarks/earlier.py benchmarks/results/recovery.jsonl

Nothing is measured here: `slimvlm study benchmarks/studies/demo-recovery.toml OUT` measures such rows anew.
A cell holds the mean and the range over seeds of the exact match (mean of tasks), and the chance-corrected share of the
dense model: 0 % for the model with its images shuffled.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

METHODS = {  # what chose the units
    "default": "gates, 8 rounds (the default then)",
    "no-refit": "gates, 8 rounds, without the refit",
    "taylor": "Taylor, global, one shot",
    "taylor-refit": "Taylor, global, one shot, refitted",
    "magnitude": "Magnitude, per layer",
    "magnitude-refit": "Magnitude, per layer, refitted",
    "random": "Random",
    "random-refit": "Random, refitted",
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


def base_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The score of the model without a cut, `dense` and `blind`."""
    return {row["base"]: row["score"] for row in rows if "base" in row}


def print_tables(file: Path) -> None:
    rows = [row for row in read(file) if row.get("split", "test") == "test"]
    base = base_of(rows)
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        if "recipe" in row and "score" in row:
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
    parser.add_argument("file", type=Path)
    print_tables(parser.parse_args().file)


if __name__ == "__main__":
    main()
