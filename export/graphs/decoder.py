"""What leaves torch: small modules with flat tensor inputs and outputs, each with the names and axes its file shows.

Names are those of transformers.js: `vision_encoder` (pixels -> image features), `embed_tokens`, `decoder_model_merged`
(one graph for prompt and next tokens; keys and values of every layer go in and come out, each layer with its own
number of heads). Encoder-decoder models: see seq2seq.py. Dual encoders: `vision_model` and `text_model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from slimvlm.compress.models.families import Family
from slimvlm.export.graphs.vision import Patches, vision_encoder
from slimvlm.export.graphs.windows import refuse_windows

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
PATCHES = "num_patches"
EMBEDDING = "embed_tokens"
# Per kind of vision graph: the axes of its inputs, and the first axis of its features.
VISION_AXES = {
    "patches": ({0: PATCHES}, "num_features"),
    "masked_tiles": ({0: BATCH, 1: "num_images"}, "batch_size x num_images"),
}
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_PAST = 2, 3, 4  # all different and none 0 or 1: what is equal is taken for fixed


@dataclass(frozen=True, slots=True)
class Port:
    """One input: a tensor to trace with, and which of its axes vary, by name."""

    name: str
    sample: Tensor
    axes: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graph:
    """One file to be: `module(*samples of inputs)` gives the `outputs` in order; `outputs` name their varying axes.

    `longest` and `unit` bound an axis, by its name: at most this many, a multiple of this many.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: Mapping[str, Mapping[int, str]]
    longest: Mapping[str, int] = field(default_factory=dict)
    unit: Mapping[str, int] = field(default_factory=dict)

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """The tensors to trace with."""
        return tuple(port.sample for port in self.inputs)


def build_graphs(model: Any, family: Family, batch: Mapping[str, Tensor]) -> tuple[Graph, ...]:
    """The graphs of a model, in the order in which generation runs them.

    Args:
        batch: two samples as the model's processor makes them; their image decides the vision graph's fixed sizes.

    Raises:
        UnsupportedModelError: the model has a part that cannot be exported (named).
    """
    refuse_windows(model.config)
    if family.kind == "dual-encoder":
        return _dual_encoder(model, family, batch)
    first = (vision_graph(model, family, batch), _embed_graph(model, embedding_width(model)))
    if family.kind == "encoder-decoder":
        from slimvlm.export.graphs.seq2seq import encoder_decoder_graphs

        return first + encoder_decoder_graphs(model.get_submodule(family.export.text))
    return (*first, _decoder_graph(model, family))


def vision_graph(model: Any, family: Family, batch: Mapping[str, Tensor]) -> Graph:
    """`vision_encoder`: what the processor makes of images -> features, one row per image token."""
    kind = family.export.vision
    module, names = vision_encoder(model, kind, batch)
    axes, output = VISION_AXES.get(kind, ({0: BATCH}, BATCH))
    tensors = {name: batch[name].bool() if name == "pixel_attention_mask" else batch[name] for name in names}
    ports = [Port(name, _two_or_more(tensor, axes), axes) for name, tensor in tensors.items()]
    unit = {PATCHES: module.count} if isinstance(module, Patches) else {}
    return Graph("vision_encoder", module.eval(), tuple(ports), {"image_features": {0: output}}, unit=unit)


def _two_or_more(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    """A varying axis of size 1 would be taken for fixed."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor] * 3, dim=axis)
    return tensor


class Embed(nn.Module):
    """Token ids [B, S] -> embeddings [B, S, width]; beyond the model's own width they are zero (see Decoder)."""

    def __init__(self, embedding: Any, width: int) -> None:
        super().__init__()
        self.embedding, self.width = embedding, width

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up, fp32."""
        embeds = self.embedding(input_ids).float()
        return (
            nn.functional.pad(embeds, (0, self.width - embeds.shape[-1])) if self.width > embeds.shape[-1] else embeds
        )


class Decoder(nn.Module):
    """A text model with its head and an explicit cache.

    Where features of the vision tower are also added after the first layers (DeepStack), they travel in the embedding:
    `inputs_embeds` is [B, S, C * (1 + number of such layers)], zeros at text positions. A client that puts image
    features in the place of image tokens therefore needs to know nothing of it.

    Args:
        text: takes `inputs_embeds`, `attention_mask` (4-D, additive), `position_ids`, `past_key_values`.
        prefix: the new tokens attend to each other in both directions.
        deepstack: number of layers that features are added to.
    """

    def __init__(self, text: Any, head: Any, prefix: bool = False, deepstack: int = 0) -> None:
        super().__init__()
        self.text, self.head, self.prefix, self.deepstack = text, head, prefix, deepstack
        if deepstack:
            text._deepstack_process = partial(_add_deepstack, text._deepstack_process)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        """Embeddings [B, S, C], mask [B, past + S], positions [B, S] or [3, B, S], keys and values [B, K, past, D].

        Returns:
            logits [B, S, V] (fp32), then keys and values [B, K, past + S, D] of every layer.
        """
        inputs_embeds = inputs_embeds.to(self.head.weight.dtype)
        extra = {}
        if self.deepstack:
            inputs_embeds, *features = inputs_embeds.chunk(1 + self.deepstack, dim=-1)
            extra = {"visual_pos_masks": attention_mask, "deepstack_visual_embeds": features}
        cache = filled_cache(past)
        hidden = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=causal_mask(attention_mask, inputs_embeds, self.prefix),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).last_hidden_state
        return (self.head(hidden).float(), *cached_tensors(cache))


def filled_cache(past: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds keys and values [B, K, P, D], given as key, value of layer 0, then of layer 1, ..."""
    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def cached_tensors(cache: DynamicCache) -> list[Tensor]:
    """Keys and values as `filled_cache` takes them."""
    layers: list[Any] = cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def causal_mask(attention_mask: Tensor, queries: Tensor, prefix: bool = False) -> Tensor:
    """Additive mask [B, 1, S, T] of the last S of T positions; `attention_mask` [B, T] is 0 at padding.

    Padding attends to itself, so that no row is empty: a softmax over nothing is NaN, and NaN spreads through values.
    """
    total, count = attention_mask.shape[1], queries.shape[1]
    columns = torch.arange(total, device=queries.device)[None, None, None, :]
    rows = torch.arange(count, device=queries.device)[None, None, :, None] + (total - count)
    seen = attention_mask[:, None, None, :].bool()
    allowed = (seen if prefix else seen & (columns <= rows)) | (columns == rows)
    lowest = torch.full((), torch.finfo(queries.dtype).min, dtype=queries.dtype, device=queries.device)
    return torch.where(allowed, torch.zeros_like(lowest), lowest)


def _add_deepstack(stock: Any, hidden: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """Features [B, S, C] are added as they are; the model's own calls (one row per image token) go to `stock`."""
    return hidden + features if features.ndim == 3 else stock(hidden, positions, features)


def deepstack_layers(model: Any) -> int:
    """How many decoder layers get vision features added."""
    return len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def cache_ports(sizes: Sequence[tuple[int, int]], name: str, length: str, dtype: torch.dtype) -> list[Port]:
    """Ports of keys and values; `sizes` are (K, D) of every layer, `name` holds `{layer}` and `{part}`."""
    generator = torch.Generator().manual_seed(0)
    return [
        Port(
            name.format(layer=layer, part=part),
            torch.randn(SAMPLE_BATCH, heads, SAMPLE_PAST, width, generator=generator).to(dtype),
            {0: BATCH, 2: length},
        )
        for layer, (heads, width) in enumerate(sizes)
        for part in ("key", "value")
    ]


def embedding_width(model: Any) -> int:
    """Of `inputs_embeds`: the model's own width, and what DeepStack adds (see Decoder)."""
    return model.get_input_embeddings().weight.shape[1] * (1 + deepstack_layers(model))


def _embed_graph(model: Any, width: int) -> Graph:
    embedding = model.get_input_embeddings()
    ids = torch.arange(SAMPLE_BATCH * SAMPLE_SEQUENCE).view(SAMPLE_BATCH, SAMPLE_SEQUENCE) % embedding.weight.shape[0]
    axes = {0: BATCH, 1: SEQUENCE}
    return Graph(EMBEDDING, Embed(embedding, width).eval(), (Port("input_ids", ids, axes),), {"inputs_embeds": axes})


def _decoder_graph(model: Any, family: Family) -> Graph:
    text, head = model.get_submodule(family.export.text), model.get_submodule(family.export.head)
    layers = deepstack_layers(model)
    module = Decoder(text, head, family.export.prefix, layers).eval()
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(SAMPLE_BATCH, SAMPLE_SEQUENCE, embedding_width(model), generator=generator)
    positions = torch.arange(SAMPLE_PAST, SAMPLE_PAST + SAMPLE_SEQUENCE).expand(SAMPLE_BATCH, -1).clone()
    position_axes = {0: BATCH, 1: SEQUENCE}
    if family.export.positions == "mrope":
        positions, position_axes = positions.expand(3, -1, -1).clone(), {1: BATCH, 2: SEQUENCE}
    mask = torch.ones(SAMPLE_BATCH, SAMPLE_PAST + SAMPLE_SEQUENCE, dtype=torch.long)
    sizes = _cache_sizes(module, embeds, positions)
    ports = (
        Port("inputs_embeds", embeds, {0: BATCH, 1: SEQUENCE}),
        Port("attention_mask", mask, {0: BATCH, 1: TOTAL}),
        Port("position_ids", positions, position_axes),
        *cache_ports(sizes, "past_key_values.{layer}.{part}", PAST, head.weight.dtype),
    )
    present = {port.name.replace("past_key_values", "present"): {0: BATCH, 2: TOTAL} for port in ports[3:]}
    return Graph("decoder_model_merged", module, ports, {"logits": {0: BATCH, 1: SEQUENCE}, **present})


@torch.no_grad()
def _cache_sizes(decoder: Decoder, embeds: Tensor, positions: Tensor) -> list[tuple[int, int]]:
    """(K, D) of every layer, measured: after a cut no config states them."""
    outputs = decoder(embeds, torch.ones(embeds.shape[:2], dtype=torch.long), positions)
    return [(keys.shape[1], keys.shape[3]) for keys in outputs[1::2]]


class Encoder(nn.Module):
    """One side of a dual encoder: `get_image_features` or `get_text_features`, as one tensor [B, C]."""

    def __init__(self, model: Any, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: Tensor) -> Tensor:
        """Pixels, or token ids and mask."""
        return getattr(self.model, self.method)(*inputs).pooler_output.float()


def _dual_encoder(model: Any, family: Family, batch: Mapping[str, Tensor]) -> tuple[Graph, ...]:
    row = family.export
    axes = {0: BATCH, 1: SEQUENCE}
    text = tuple(Port(name, batch[name], axes) for name in ("input_ids", "attention_mask") if name in batch)
    image = (Port("pixel_values", batch["pixel_values"], {0: BATCH}),)
    longest = {SEQUENCE: model.config.text_config.max_position_embeddings}
    return (
        Graph("vision_model", Encoder(model, "get_image_features").eval(), image, {row.image_output: {0: BATCH}}),
        Graph("text_model", Encoder(model, "get_text_features").eval(), text, {row.text_output: {0: BATCH}}, longest),
    )
