"""Vision encoders as graphs: what the processor makes of images -> features for the language model.

The models' own `get_image_features` splits, pads and loops over images, which an exporter either refuses or silently
fixes to the traced batch; here everything but the number of images is decided before the graph is made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import vision_utils
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.streaming.passage import in_the_place_of
from slimvlm.export.graphs.graph import Model

RESAMPLED = 1.1  # LLaVA-OneVision shrinks feature maps that exceed its maximum by more than this (its own constant)


def vision_encoder(model: Model, kind: str, batch: Mapping[str, Tensor]) -> tuple[nn.Module, tuple[str, ...]]:
    """The module of `kind` (a value of `Export.vision`) and the names of its inputs in `batch`.

    Args:
        batch: as the processor makes it; its image decides tiles and grid.
    """
    build, names = KINDS[kind]
    return build(model, batch), names


class Marked(nn.Module):
    """Features [..., C] of a vision graph -> [..., C + 1], the last of them 1: these are image tokens (see Decoder)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features, fp32."""
        return F.pad(self.inner(*inputs), (0, 1), value=1.0)


class Pooled(nn.Module):
    """Pixels [B, 3, H, W] -> features [B, T, C] by the model's own method, where that is free of loops."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features, fp32."""
        output = self.model.base_model.get_image_features(pixel_values.to(self.model.dtype))
        features: Tensor = output.pooler_output
        return features.float()


class Select(nn.Module):
    """Pixels [B, 3, H, W] -> one or several layers of the tower -> projector -> features [B, T, C]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        inner = model.model
        self.tower, self.projector = inner.vision_tower, inner.multi_modal_projector
        layers = model.config.vision_feature_layer
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.skip_first = model.config.vision_feature_select_strategy == "default"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features, fp32."""
        pixel_values = pixel_values.to(self.tower.dtype)
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        chosen = [states[layer][:, 1:] if self.skip_first else states[layer] for layer in self.layers]
        features: Tensor = self.projector(torch.cat(chosen, dim=-1))
        return features.float()


class Tiles(Select):
    """Pixels [B, tiles, 3, H, W], first the whole image, then its tiles row by row -> packed features [B, T, C].

    The tiles' features are put together to one map, cut to the image's aspect ratio, and every row gets a newline.

    Args:
        image_size: height and width of the images before they were tiled; all images must have it.
    """

    def __init__(self, model: Model, image_size: tuple[int, ...]) -> None:
        super().__init__(model)
        vision = model.config.vision_config
        self.side = vision.image_size // vision.patch_size
        self.newline = model.model.image_newline
        self.grid = get_anyres_image_grid_shape(image_size, model.config.image_grid_pinpoints, vision.image_size)
        self.box = self._covered(image_size)
        ratio = getattr(model.config, "vision_aspect_ratio", "")
        self.most = int(ratio.removeprefix("anyres_max_")) if ratio.startswith("anyres_max_") else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features, fp32."""
        tiles = 1 + self.grid[0] * self.grid[1]
        features = super().forward(pixel_values.flatten(0, 1))
        features = features.unflatten(0, (-1, tiles))  # B tiles T C
        base, rest = features[:, 0], features[:, 1:]
        rows, columns = self.grid
        grid = rest.unflatten(2, (self.side, self.side)).unflatten(1, (rows, columns))  # B rows columns h w C
        image = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # B C height width
        top, left, height, width = self.box
        image = self._shrink(image[:, :, top : top + height, left : left + width])
        last = torch.arange(image.shape[3] + 1) == image.shape[3]
        image = F.pad(image, (0, 1)) + last * self.newline.float()[None, :, None, None]  # a column of newlines
        return torch.cat([base, image.flatten(2).transpose(1, 2)], dim=1)

    def _covered(self, image_size: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part of the map that the image covers, found with numbers for features."""
        height, width = self.grid[0] * self.side, self.grid[1] * self.side
        place = unpad_image(torch.arange(height * width).view(1, height, width), image_size)[0]
        return (*divmod(int(place[0, 0]), width), *place.shape)

    def _shrink(self, image: Tensor) -> Tensor:
        if self.most is None:
            return image
        height, width = image.shape[2:]
        ratio = math.sqrt(height * width / (self.most * self.side**2))
        if ratio <= RESAMPLED:
            return image
        return F.interpolate(image, [int(height // ratio), int(width // ratio)], mode="bilinear")


class MaskedTiles(nn.Module):
    """Pixels [B, N, 3, H, W] and mask [B, N, H, W] of real pixels -> features [B * N, T, C] (Idefics3, SmolVLM).

    Whole images of padding give features too; whoever puts them into the text leaves those out.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tower, self.connector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        """Features, fp32."""
        pixels = pixel_values.flatten(0, 1).to(self.tower.dtype)
        patch = self.tower.patch_size
        seen = (
            pixel_attention_mask.flatten(0, 1).float().unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
        )  # B h p w p
        real = seen.amax((2, 4)) > 0  # B h w
        embeddings = self.tower.embeddings
        hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(self._places(real))
        padding = ~real.flatten(1)[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
        mask = padding.to(hidden.dtype) * (torch.finfo(hidden.dtype).min / 2)
        hidden = self.tower.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        features: Tensor = self.connector(self.tower.post_layernorm(hidden))
        return features.float()

    def _places(self, real: Tensor) -> Tensor:
        """Rows of the position table for patches [B, h, w]: the table is stretched over the real part of an image."""
        side = self.tower.embeddings.num_patches_per_side
        bounds = torch.arange(1 / side, 1.0, 1 / side)

        def bucket(count: Tensor, size: int) -> Tensor:
            place = torch.arange(size, dtype=torch.float32) * (1.0 / count.float())[:, None]
            return (place.clamp(max=1.0 - 1e-6)[..., None] >= bounds).sum(-1)

        rows = bucket(real[:, :, 0].sum(1), real.shape[1])
        columns = bucket(real[:, 0, :].sum(1), real.shape[2])
        places: Tensor = rows[:, :, None] * side + columns[:, None, :]
        return (places * real).flatten(1)


class Patches(nn.Module):
    """Patches [B * N, width] of images of one grid, N = T * H * W -> features [B * N / merge**2, C] (Qwen VL).

    Images attend only within themselves, and in windowed layers only within their window, so a batch axis and one
    fixed mask [N, N] replace the sequence lengths of the model's own forward. Features for later decoder layers
    (DeepStack) are appended along the width.
    """

    places: Tensor
    back: Tensor
    cos: Tensor
    sin: Tensor
    frames: Tensor | None
    windows: Tensor | None
    learned: Tensor | None

    def __init__(self, model: Model, grid: Tensor) -> None:
        super().__init__()
        self.tower = model.model.visual
        config = self.tower.config
        merge, grid = config.spatial_merge_size, grid.view(1, 3)
        self.count, unit = int(grid.prod()), merge**2
        order, window_ends = torch.arange(self.count // unit), None
        self.full = set(range(len(self.tower.blocks)))
        if hasattr(config, "fullatt_block_indexes"):
            self.full = set(config.fullatt_block_indexes)
            order, window_ends = vision_utils.get_vision_window_index(
                grid, spatial_merge_size=merge, window_size=config.window_size, patch_size=config.patch_size
            )
        places = (order[:, None] * unit + torch.arange(unit)).flatten()
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("back", torch.argsort(order), persistent=False)
        positions = vision_utils.get_vision_position_ids(grid, merge)
        cos, sin = self.tower.rotary_pos_emb(torch.zeros(1), positions)
        self.register_buffer("cos", cos.float()[places], persistent=False)
        self.register_buffer("sin", sin.float()[places], persistent=False)
        frames = vision_utils.get_vision_cu_seqlens(grid)
        self.register_buffer("frames", _blocks(frames), persistent=False)
        self.register_buffer("windows", None if window_ends is None else _blocks(window_ends), persistent=False)
        self.register_buffer("learned", self._learned_positions(grid, merge), persistent=False)
        self.deepstack = list(getattr(config, "deepstack_visual_indexes", ()))

    @torch.no_grad()
    def _learned_positions(self, grid: Tensor, merge: int) -> Tensor | None:
        table = getattr(self.tower, "pos_embed", None)
        if table is None:
            return None
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=self.tower.num_grid_per_side,
            mode=self.tower.interpolation_mode,
            align_corners=self.tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        corners: Tensor = table(indices) * weights[:, :, None]
        return corners.sum(1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features, fp32."""
        hidden = self.tower.patch_embed(pixel_values.to(self.tower.dtype)).unflatten(0, (-1, self.count))  # B N C
        if self.learned is not None:
            hidden = hidden + self.learned.to(hidden.dtype)
        hidden, deep = hidden[:, self.places], []
        for index, block in enumerate(self.tower.blocks):
            mask = self.frames if index in self.full else self.windows
            hidden = in_the_place_of(block, partial(self._block, block), hidden, mask)
            if index in self.deepstack:
                merger = self.tower.deepstack_merger_list[self.deepstack.index(index)]
                deep.append(self._merge(merger, hidden))
        return torch.cat([self._merge(self.tower.merger, hidden), *deep], dim=-1).float()

    def _block(self, block: Model, hidden: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden + self._attend(block.attn, block.norm1(hidden), mask)
        computed: Tensor = hidden + block.mlp(block.norm2(hidden))
        return computed

    def _merge(self, merger: nn.Module, hidden: Tensor) -> Tensor:
        merged: Tensor = merger(hidden.flatten(0, 1)).unflatten(0, (-1, self.back.shape[0]))
        return merged[:, self.back].flatten(0, 1)

    def _attend(self, attention: Model, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden [B, N, C]; the fused projection gives query, key and value of H heads of size D."""
        parts = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 B H N D
        query, key, value = parts.unbind(0)
        query, key = (_rotate(part, self.cos, self.sin) for part in (query, key))
        bias = None if mask is None else mask.to(hidden.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scaling)
        projected: Tensor = attention.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Single(nn.Module):
    """What the processor makes of one image -> its features [T, C], by the model's own method with everything but its
    pixels (`names`, what is floating point) fixed: for towers that lay all images behind one another.
    """

    def __init__(self, model: Model, batch: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model.base_model
        taken = inspect.signature(type(self.model).get_image_features).parameters
        images = len(batch["input_ids"])
        given = {name: batch[name].unflatten(0, (images, -1)) for name in taken if name in batch}
        self.names = tuple(name for name, rows in given.items() if rows.is_floating_point())
        for name in given.keys() - set(self.names):
            _same(given[name].flatten(1), name)
        self.one = {name: rows[0] for name, rows in given.items()}

    def forward(self, *pixels: Tensor) -> Tensor:
        """Features, fp32."""
        cast = (one.to(self.model.dtype) for one in pixels)
        given = {**self.one, **dict(zip(self.names, cast, strict=True))}
        features = self.model.get_image_features(**given).pooler_output
        features = torch.cat(list(features)) if isinstance(features, list | tuple) else features.flatten(0, -2)
        whole: Tensor = features.float()
        return whole


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [B, H, N, D], in fp32 as the model does."""
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


def _blocks(ends: Tensor) -> Tensor | None:
    """Additive mask [N, N] that keeps attention within consecutive blocks; None if there is only one block."""
    if len(ends) <= 2:
        return None
    block = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.long().diff())
    outside = block[:, None] != block[None, :]
    return torch.zeros(outside.shape).masked_fill(outside, torch.finfo(torch.float16).min)


def _tiles(model: Model, batch: Mapping[str, Tensor]) -> Tiles:
    return Tiles(model, _same(batch["image_sizes"], "image size"))


def _patches(model: Model, batch: Mapping[str, Tensor]) -> Patches:
    return Patches(model, torch.tensor(_same(batch["image_grid_thw"], "grid of patches")))


def _same(rows: Tensor, what: str) -> tuple[int, ...]:
    first, *others = [tuple(row) for row in rows.tolist()]
    if any(other != first for other in others):
        raise UnsupportedModelError(f"the images differ in {what} ({first}, {others[0]}); this family's graph has one")
    return first


KINDS: dict[str, tuple[Callable[[Model, Mapping[str, Tensor]], nn.Module], tuple[str, ...]]] = {
    "pooled": (lambda model, batch: Pooled(model), ("pixel_values",)),
    "select": (lambda model, batch: Select(model), ("pixel_values",)),
    "tiles": (_tiles, ("pixel_values",)),
    "masked_tiles": (lambda model, batch: MaskedTiles(model), ("pixel_values", "pixel_attention_mask")),
    "patches": (_patches, ("pixel_values",)),
    "single": (Single, ("pixel_values",)),
}
