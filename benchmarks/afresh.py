"""Draw the weights of a cut checkpoint anew, in its place: what a training makes of its shape alone.

    slimvlm compress demo/model RUN --data demo/samples/train.jsonl --eval-data demo/samples/val.jsonl \
        --ratio 0.7 --recover none --export none
    python benchmarks/afresh.py RUN/model
    slimvlm recover RUN --train full --no-recall --steps 3000 --train-batch-size 32 --export none
"""

import argparse
from pathlib import Path

import torch

from slimvlm.compress.models.checkpoint import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    cut = load_model(options.checkpoint).model
    torch.set_default_dtype(cut.dtype)
    type(cut)(cut.config).save_pretrained(options.checkpoint)


if __name__ == "__main__":
    main()
