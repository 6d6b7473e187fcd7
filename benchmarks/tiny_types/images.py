"""One image of 16 x 16 pixels in the form that a model type takes it in."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

SIDE = 16


def default(config: Any, pixels: Tensor, takes: set[str]) -> dict[str, Tensor]:
    """As the inputs of the model's forward tell: a grid of patches, tiles, masked tiles or plain pixels."""
    if "image_grid_thw" in takes:
        return grid(config, pixels)
    if "image_sizes" in takes and getattr(config, "image_grid_pinpoints", None):
        return tiles(config, pixels)
    if "image_sizes" in takes:
        return sized(config, pixels)
    if "pixel_attention_mask" in takes:
        mask = torch.ones(1, 1, SIDE, SIDE, dtype=torch.long)
        return {"pixel_values": pixels[None, None], "pixel_attention_mask": mask}
    return plain(config, pixels)


def plain(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels [1, 3, 16, 16]."""
    return {"pixel_values": pixels[None]}


def tiles(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """The whole image and one tile."""
    return {"pixel_values": torch.stack([pixels, pixels.flip(-1)])[None], "image_sizes": torch.tensor([[SIDE, SIDE]])}


def grid(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Flat patches [16, C * T * P * P] and their grid."""
    size = config.vision_config.patch_size
    size = size if isinstance(size, int) else size[0]
    vision = config.vision_config
    frames: int = getattr(vision, "temporal_patch_size", getattr(vision, "patch_temporal", 1))
    patches = pixels.unfold(1, size, size).unfold(2, size, size).flatten(1, 2)  # 3 N P P
    flat = patches.transpose(0, 1)[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)
    return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, SIDE // size, SIDE // size]])}


def square_patches(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Patches [16, 3, P, P] and their grid."""
    found, size = grid(config, pixels), config.vision_config.patch_size
    return {**found, "pixel_values": found["pixel_values"][:, : 3 * size**2].unflatten(1, (3, size, size))}


def flat(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Patches [1, 16, 48] in the order of their pixels (Fuyu)."""
    return {"pixel_values": _patches(pixels, config.patch_size)[None]}


def two_sizes(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels for two towers."""
    return {"pixel_values": pixels[None], "high_res_pixel_values": pixels[None]}


def listed(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """One tile, and that it is there."""
    return {"pixel_values": pixels[None, None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def merged(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """A grid of patches, and how many of them become one."""
    return {**grid(config, pixels), "image_merge_sizes": torch.tensor([2])}


def sized(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels and their size."""
    return {"pixel_values": pixels[None], "image_sizes": torch.tensor([[SIDE, SIDE]])}


def placed(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Flat patches [1, N, P * P * 3] and the column and row of each (Gemma 4)."""
    size = 8 if config.model_type == "gemma4_unified" else 4
    side = SIDE // size
    places = torch.stack([torch.arange(side).repeat(side), torch.arange(side).repeat_interleave(side)], dim=-1)
    return {"pixel_values": _patches(pixels, size)[None], "image_position_ids": places[None]}


def shaped(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Flat patches [1, 16, 48], their rows and columns, and that all of them are real (LFM2)."""
    mask, shape = torch.ones(1, 16, dtype=torch.int64), torch.tensor([[4, 4]])
    return {"pixel_values": _patches(pixels, 4)[None], "spatial_shapes": shape, "pixel_attention_mask": mask}


def two_tiles(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """An image of two tiles (Mllama)."""
    tiles, mask = torch.stack([pixels, pixels.flip(-1)])[None, None], torch.ones(1, 1, 2, dtype=torch.int64)
    return {"pixel_values": tiles, "aspect_ratio_ids": torch.tensor([[2]]), "aspect_ratio_mask": mask}


def in_a_row(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Patches side by side [1, 3, 4, 64] and how many rows and columns they are (MiniCPM-V)."""
    strip = pixels.unfold(1, 4, 4).unfold(2, 4, 4).permute(0, 3, 1, 2, 4).flatten(2)
    return {"pixel_values": strip[None], "target_sizes": torch.tensor([[4, 4]], dtype=torch.int32)}


def pooled(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Patches of one crop [1, 16, 48], and which four of them become one (Molmo 2)."""
    order = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    grids = torch.tensor([[2, 2, 0, 0]])
    return {"pixel_values": _patches(pixels, 4)[None], "image_token_pooling": order, "image_grids": grids}


def _patches(pixels: Tensor, size: int) -> Tensor:
    """[N, size * size * 3], row by row."""
    return pixels.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).permute(1, 2, 3, 0).flatten(1)


def questioned_frames(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """As `questioned`, of a video of four equal frames."""
    return {**questioned(config, pixels), "pixel_values": pixels.expand(1, 4, -1, -1, -1)}


def questioned(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Pixels, and the question once more for the Q-Former."""
    ids = torch.tensor([[5, 6, 7]])
    return {"pixel_values": pixels[None], "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}


def inputs_of(model: Any) -> set[str]:
    """Names of what its forward takes, but of an image only what its features are made of."""
    takes = set(inspect.signature(type(model).forward).parameters)
    if (features := getattr(type(model), "get_image_features", None)) is not None:
        takes -= {"image_sizes", "pixel_attention_mask"} - set(inspect.signature(features).parameters)
    return takes
