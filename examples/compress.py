"""Compress a vision-language model from Python.

    python examples/compress.py ./my-vlm samples.jsonl out --ratio 0.5

MODEL is a checkpoint folder, DATA a file of samples (image, question, answer), OUT the run folder: out/model is the
slim checkpoint, out/report.html says what was removed and what it cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import slimvlm
from slimvlm.compress.options import CompressOptions
from slimvlm.pipeline import compress


def main() -> None:
    """Compress, and say what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of ALL parameters to remove")
    parser.add_argument("--steps", type=int, help="of the recovery; default: one pass over the samples")
    asked = parser.parse_args()
    # Every option of the command line is a field here; what is left out has the command line's default. Exporting and
    # profiling have scripts of their own (measure_export.py), so this job ends after the evaluation.
    options = CompressOptions(**vars(asked), export=(), profile=False)
    result = compress(options, lambda stage, done, total, note="": print(f"{stage} {done}/{total} {note}"))
    plan, comparison = result.plan, result.comparison
    print(f"{plan.parameters_before:,} -> {plan.parameters_after:,} parameters ({plan.removed_fraction:.1%} removed)")
    if comparison is not None:
        low, high = 100 * comparison.low, 100 * comparison.high
        print(
            f"{comparison.metric}: {comparison.dense:.1%} -> {comparison.slim:.1%} ({low:+.1f} to {high:+.1f} points)"
        )
    # The checkpoint is an ordinary one: a transformers model in eval mode and its processor.
    model, processor = slimvlm.load(asked.out / "model")
    print(f"{type(model).__name__} and {type(processor).__name__} load from {asked.out / 'model'}")


if __name__ == "__main__":
    main()
