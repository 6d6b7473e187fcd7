"""What a model says: logits of a batch, and greedily generated tokens that do not hang on rounding."""

from __future__ import annotations

from typing import Any

import torch

MARGIN = 5e-5  # between the best and the second best; another processor rounds a logit of these models by about 1e-6


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token logits, or the image-text similarities of a dual encoder."""
    output = model(**batch)
    return output.logits if hasattr(output, "logits") else output.logits_per_image


def greedy_tokens(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], count: int = 4, **options: Any
) -> list[list[int]]:
    """Exactly `count` new tokens per example, with the KV cache; every one is sure."""
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    return sure_tokens(model, prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)[
        :, -count:
    ].tolist()


@torch.no_grad()
def sure_tokens(model: torch.nn.Module, prompt: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """What `generate` gives; no token of an unfinished row was a near tie."""
    found = model.generate(**prompt, **options, output_scores=True, return_dict_in_generate=True)
    chosen = found.sequences[:, -len(found.scores) :]
    pad = model.generation_config.pad_token_id
    for place, scores in enumerate(found.scores):
        assert_clear(scores[chosen[:, place] != pad], f"token {place}")
    return found.sequences


def assert_clear(scores: torch.Tensor, what: str) -> None:
    """The best of every row of `scores` leads by MARGIN."""
    lead = scores.float().topk(2, dim=-1).values.diff(dim=-1).abs()
    assert (lead >= MARGIN).all(), f"{what} leads by {lead.min():.1e} only: take other weights or inputs"
