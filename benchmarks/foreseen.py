"""What `compress --dry-run` foresees of a run, against what the run then takes; a line per stage, and both sums.

python benchmarks/foreseen.py                                    the demo
python benchmarks/foreseen.py --model ./my-vlm --data train.jsonl --eval-data val.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from slimvlm.compress.options import CompressOptions
from slimvlm.console.progress import progress
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import compress, foresee

VARIANTS = ("fp32", "int8", "q4")  # of the demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--data", type=Path, default=SAMPLES / "train.jsonl")
    parser.add_argument("--eval-data", type=Path, default=SAMPLES / "test.jsonl")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, progress(quiet=False) as tell:
        options = CompressOptions(**vars(arguments), train_batch_size=32, variants=VARIANTS, out=Path(folder) / "out")
        foreseen = foresee(options, tell)
        took = compress(options, tell).seconds
    print(f"{'stage':<10} {'foreseen':>9} {'took':>9} {'error':>7}")
    for step in foreseen.steps:
        said = "" if step.seconds is None else f"{step.seconds:.1f} s"
        error = "" if step.seconds is None else f"{step.seconds / took[step.name] - 1:+.0%}"
        print(f"{step.name:<10} {said:>9} {took[step.name]:>7.1f} s {error:>7}")
    print(f"{'all':<10} {foreseen.seconds:>7.1f} s {sum(took.values()):>7.1f} s")


if __name__ == "__main__":
    main()
