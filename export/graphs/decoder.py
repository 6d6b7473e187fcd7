"""What leaves torch: small modules with flat tensor inputs and outputs, each with the names and axes its file shows.

Names are those of transformers.js: `vision_encoder` (pixels -> image features), `embed_tokens`, `decoder_model_merged`
(one graph for prompt and next tokens; keys and values of every layer go in and come out, each layer with its own
number of heads). Encoder-decoder models: see seq2seq.py. Dual encoders: `vision_model` and `text_model`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.models.families import Export, Family
from slimvlm.export.graphs.graph import (
    BATCH,
    PAST,
    ROWS,
    SAMPLE_BATCH,
    SAMPLE_PAST,
    SAMPLE_SEQUENCE,
    SEQUENCE,
    TOTAL,
    Graph,
    Model,
    Port,
    cache_ports,
    cached_tensors,
    filled_cache,
    present,
)
from slimvlm.export.graphs.masks import attention_masks
from slimvlm.export.graphs.sizes import output_shapes
from slimvlm.export.graphs.windows import reaches
from slimvlm.export.running.names import DECODER, EMBED


class Embed(nn.Module):
    """Token ids [B, S] -> embeddings [B, S, width]; beyond the model's own width they are zero (see Decoder).

    Args:
        silent: tokens that are embedded as `pad` is.
    """

    def __init__(self, embedding: Model, width: int, silent: tuple[int, ...] = (), pad: int = 0) -> None:
        super().__init__()
        self.embedding, self.width, self.silent, self.pad = embedding, width, silent, pad

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up, fp32."""
        for token in self.silent:
            input_ids = torch.where(input_ids == token, self.pad, input_ids)
        embeds: Tensor = self.embedding(input_ids).float()
        missing = self.width - embeds.shape[-1]
        return nn.functional.pad(embeds, (0, missing)) if missing > 0 else embeds


class Decoder(nn.Module):
    """A text model with its head and an explicit cache.

    What it must know of images besides travels in the embedding: a client that puts features in the place of image
    tokens needs to know nothing of it. Features of the vision tower that are added after the first layers (DeepStack)
    make `inputs_embeds` [B, S, C * (1 + number of such layers)], zeros at text positions; where the tokens of an image
    see each other, one more number at the end is 1 at theirs.

    Args:
        text: takes `inputs_embeds`, `attention_mask` (4-D, additive, or one for each of its config's `layer_types`),
            `position_ids`, `past_key_values`.
        row: what is true of its family.
        deepstack: number of layers that features are added to.
    """

    def __init__(self, text: Model, head: Model, row: Export, deepstack: int = 0) -> None:
        super().__init__()
        self.text, self.head, self.row, self.deepstack = text, head, row, deepstack
        self.reaches = reaches(text.config)
        self.scale = getattr(text.config, row.scaled, None) if row.scaled else None
        self.cap = getattr(text.config, "final_logit_softcapping", None) if row.capped else None
        if deepstack:
            text._deepstack_process = partial(_add_deepstack, text._deepstack_process)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Embeddings [B, S, C], mask [B, past + S], positions [B, S] or [3, B, S], keys and values [B, K, past, D].

        Returns:
            logits [B, S, V] (fp32), then keys and values [B, K, past + S, D] of every layer.
        """
        inputs_embeds = inputs_embeds.to(self.head.weight.dtype)
        extra, image = {}, None
        if self.row.image_blocks:
            inputs_embeds, image = inputs_embeds[..., :-1], inputs_embeds[..., -1] > 0
        if self.deepstack:
            inputs_embeds, *features = inputs_embeds.chunk(1 + self.deepstack, dim=-1)
            extra = {"visual_pos_masks": attention_mask, "deepstack_visual_embeds": features}
        cache = filled_cache(past)
        hidden = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_masks(attention_mask, inputs_embeds, self.reaches, self.row.prefix, image),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **extra,
        ).last_hidden_state
        logits = self.head(hidden).float()
        if self.scale is not None:
            logits = self.scale * logits
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return (logits, *cached_tensors(cache))


def _add_deepstack(stock: Model, hidden: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """Features [B, S, C] are added as they are; the model's own calls (one row per image token) go to `stock`."""
    return hidden + features if features.ndim == 3 else stock(hidden, positions, features)


def deepstack_layers(model: Model) -> int:
    """How many decoder layers get vision features added."""
    return len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def embedding_width(model: Model, family: Family) -> int:
    """Of `inputs_embeds`: the model's own width, and what travels with it (see Decoder)."""
    width: int = model.get_input_embeddings().weight.shape[1]
    return width * (1 + deepstack_layers(model)) + family.export.image_blocks


def embed_graph(model: Model, family: Family) -> Graph:
    """`embed_tokens`: token ids -> embeddings, as wide as the decoder reads them."""
    embedding, config = model.get_input_embeddings(), model.config
    tokens, pad = (getattr(config, name, None) for name in family.export.silent), config.get_text_config().pad_token_id
    silent = tuple(token for token in tokens if token is not None)
    module = Embed(embedding, embedding_width(model, family), silent, pad or 0)
    ids = torch.arange(SAMPLE_BATCH * SAMPLE_SEQUENCE).view(SAMPLE_BATCH, SAMPLE_SEQUENCE) % embedding.weight.shape[0]
    return Graph(EMBED, module.eval(), (Port("input_ids", ids, ROWS),), {"inputs_embeds": ROWS})


def decoder_graph(model: Model, family: Family) -> Graph:
    """`decoder_model_merged`: embeddings and a cache, which may be empty, -> logits and the cache grown."""
    text, head = model.get_submodule(family.export.text), model.get_submodule(family.export.head)
    layers = deepstack_layers(model)
    module = Decoder(text, head, family.export, layers).eval()
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(SAMPLE_BATCH, SAMPLE_SEQUENCE, embedding_width(model, family), generator=generator)
    positions = torch.arange(SAMPLE_PAST, SAMPLE_PAST + SAMPLE_SEQUENCE).expand(SAMPLE_BATCH, -1).clone()
    position_axes = ROWS
    if family.export.positions == "mrope":
        positions, position_axes = positions.expand(3, -1, -1).clone(), {1: BATCH, 2: SEQUENCE}
    mask = torch.ones(SAMPLE_BATCH, SAMPLE_PAST + SAMPLE_SEQUENCE, dtype=torch.long)
    sizes = _cache_sizes(module, embeds, positions)
    ports = (
        Port("inputs_embeds", embeds, ROWS),
        Port("attention_mask", mask, {0: BATCH, 1: TOTAL}),
        Port("position_ids", positions, position_axes),
        *cache_ports(sizes, "past_key_values.{layer}.{part}", PAST, head.weight.dtype),
    )
    return Graph(DECODER, module, ports, {"logits": ROWS, **present(ports[3:], TOTAL)})


def _cache_sizes(decoder: Decoder, embeds: Tensor, positions: Tensor) -> list[tuple[int, int]]:
    """(K, D) of every layer, measured: after a cut no config states them."""
    shapes = output_shapes(decoder, (embeds, torch.ones(embeds.shape[:2], dtype=torch.long), positions))
    return [(keys[1], keys[3]) for keys in shapes[1::2]]
