"""Which tokens see which, as additive masks; written so that a graph computes them at any length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimvlm.export.graphs.windows import CHUNKED, EVERYTHING, SLIDING, Reach


def attention_masks(
    attention_mask: Tensor,
    queries: Tensor,
    reaches: Sequence[Reach],
    prefix: bool = False,
    image: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """What a text model takes for `attention_mask`: one mask, or one for each kind of layer by its name."""
    masks = {reach.kind: causal_mask(attention_mask, queries, reach, prefix, image) for reach in reaches}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def causal_mask(
    attention_mask: Tensor,
    queries: Tensor,
    reach: Reach = EVERYTHING,
    prefix: bool = False,
    image: Tensor | None = None,
) -> Tensor:
    """Additive mask [B, 1, S, T] of the last S of T positions; `attention_mask` [B, T] is 0 at padding.

    Windows count tokens with their padding, and chunks from the first token that is none, as transformers has it.
    Padding attends to itself, so that no row is empty: a softmax over nothing is NaN, and NaN spreads through values.

    Args:
        queries: [B, S, C].
        prefix: the new tokens attend to each other in both directions, beyond a window, too.
        image: [B, S], which of the new tokens are of images; those of one image attend to each other, too.
    """
    total, count = attention_mask.shape[1], queries.shape[1]
    columns = torch.arange(total, device=queries.device)[None, None, None, :]
    rows = torch.arange(count, device=queries.device)[None, None, :, None] + (total - count)
    allowed = columns <= rows
    if image is not None:
        allowed = allowed | _same_image(image, total)
    if reach.kind == SLIDING:
        allowed = allowed & (columns > rows - reach.size)
    if reach.kind == CHUNKED:
        padding = (attention_mask.cumsum(1) == 0).sum(1)[:, None, None, None]
        allowed = allowed & (_chunk(columns - padding, reach.size) == _chunk(rows - padding, reach.size))
    if prefix:
        allowed = allowed | (columns >= total - count)
    allowed = (allowed & attention_mask[:, None, None, :].bool()) | (columns == rows)
    lowest = torch.full((), torch.finfo(queries.dtype).min, dtype=queries.dtype, device=queries.device)
    return torch.where(allowed, torch.zeros_like(lowest), lowest)


def _same_image(image: Tensor, total: int) -> Tensor:
    """Whether two of the tokens [B, S], the last of `total` T, are of one image: [B, 1, S, T]."""
    new = image.long()
    number = ((1 - new).cumsum(1) + 1) * new  # tokens of one image have as many other tokens before them; 0: no image
    rows, columns = number[:, None, :, None], F.pad(number, (total - image.shape[1], 0))[:, None, None, :]
    return (rows == columns) & (rows > 0)


def _chunk(places: Tensor, size: int) -> Tensor:
    """The number of the chunk; below zero is padding, which runtimes would round in their own ways."""
    return torch.div(places.clamp(min=0), size, rounding_mode="floor")
