"""What a model says: logits of a batch, and greedily generated tokens."""

from __future__ import annotations

import torch


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token logits, or the image-text similarities of a dual encoder."""
    output = model(**batch)
    return output.logits if hasattr(output, "logits") else output.logits_per_image


@torch.no_grad()
def greedy_tokens(model: torch.nn.Module, batch: dict[str, torch.Tensor], count: int = 4) -> list[list[int]]:
    """Exactly `count` new tokens per example, with the KV cache."""
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    ids = model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True)
    return ids[:, -count:].tolist()
