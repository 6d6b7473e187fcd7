"""Calibrate, plan, cut and save a random model with SmolVLM-256M's configuration; prints seconds and peak memory.

`python benchmarks/smolvlm.py --samples 32 --ratio 0.5 --criterion gate --out FOLDER`
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from real_shapes.shapes import IDS, SHAPES
from transformers import SmolVLMForConditionalGeneration

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import load
from slimvlm.compress.models.groups import count_parameters
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.compress.slicing.apply import apply_plan

IMAGE_TOKEN = IDS["<image>"]
IMAGE_TOKENS = 64  # one 512-pixel tile: 32 x 32 patches, shuffled 4 x 4
TEXT_TOKENS = 64


def smolvlm_256m() -> SmolVLMForConditionalGeneration:
    """SmolVLM-256M-Instruct's shapes with seeded random weights."""
    torch.manual_seed(0)
    return SmolVLMForConditionalGeneration(SHAPES["smolvlm-256m"].config()).eval()


def batches(samples: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of one sample: one tile, 64 text tokens of which the last 16 are supervised."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(samples):
        text = torch.randint(len(IDS), 49000, (1, TEXT_TOKENS), generator=generator)
        ids = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE_TOKEN), text], dim=1)
        labels = ids.clone()
        labels[:, :-16] = -100
        pixels = torch.randn(1, 1, 3, 512, 512, generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--criterion", default="gate", choices=sorted(CRITERIA))
    parser.add_argument("--grad-memory", type=int, default=None, help="bytes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    model = smolvlm_256m()
    weights = 4 * count_parameters(model)
    started = time.perf_counter()
    planning = Planning(
        budget=Budget(ratio=options.ratio),
        criterion=CRITERIA[options.criterion],
        grad_memory_bytes=options.grad_memory,
    )
    planned = plan_in_rounds(model, lambda _: list(batches(options.samples)), planning)
    decided = time.perf_counter()
    apply_plan(model, planned.plan)
    cut = time.perf_counter()
    save_checkpoint(options.out, model, None, planned.plan, "per-layer")
    saved = time.perf_counter()
    peak = peak_bytes()
    del model
    load(options.out)
    report = {
        "parameters": [planned.plan.parameters_before, planned.plan.parameters_after],
        "criterion": options.criterion,
        "samples": options.samples,
        "calibrate_and_plan_seconds": round(decided - started, 2),
        "cut_seconds": round(cut - decided, 3),
        "save_seconds": round(saved - cut, 2),
        "weights_fp32_bytes": weights,
        "peak_rss_bytes": peak,
        "peak_over_weights": round(peak / weights, 2),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
