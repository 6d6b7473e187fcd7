"""Encoder-decoder models as graphs: the encoder also gives the keys and values that every decoder layer reads of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache

from slimvlm.export.graphs.graph import (
    BATCH,
    PAST,
    ROWS,
    SAMPLE_BATCH,
    SAMPLE_SEQUENCE,
    TOTAL,
    Graph,
    Model,
    Port,
    cache_ports,
    cached_tensors,
    filled_cache,
    present,
)
from slimvlm.export.graphs.masks import causal_mask
from slimvlm.export.running.names import DECODER, ENCODER

ENCODED = "encoder_sequence_length"
SAMPLE_ENCODED = 6


class Encoder(nn.Module):
    """Embeddings [B, S, C] and mask [B, S] -> hidden states [B, S, C] and, per decoder layer, keys and values."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Returns the last hidden state, then [B, H, S, D] keys and values of every cross attention."""
        embeds = inputs_embeds.to(self.decoder.embed_tokens.weight.dtype)
        hidden = self.encoder(
            inputs_embeds=embeds, attention_mask=_padding_mask(attention_mask, embeds)
        ).last_hidden_state
        outputs = [hidden.float()]
        for block in self.decoder.block:
            attention = block.layer[1].EncDecAttention
            for projection in (attention.k, attention.v):
                states = projection(hidden).unflatten(-1, (-1, attention.key_value_proj_dim))
                outputs.append(states.transpose(1, 2))
        return tuple(outputs)


class Decoder(nn.Module):
    """The decoder and head of a T5, with its own cache and the encoder's keys and values as inputs."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.decoder, self.head = model.decoder, model.lm_head
        self.scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(self, inputs_embeds: Tensor, encoder_attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Embeddings [B, S, C], mask [B, T], then of every layer own key and value, then of every layer the encoder's.

        Returns:
            logits [B, S, V] (fp32), then the own keys and values [B, H, past + S, D].
        """
        embeds = inputs_embeds.to(self.head.weight.dtype)
        own, given = past[: len(past) // 2], past[len(past) // 2 :]
        cache = EncoderDecoderCache(filled_cache(own), filled_cache(given))
        cache.is_updated = dict.fromkeys(range(len(own) // 2), True)
        every = torch.ones(embeds.shape[0], own[0].shape[2] + embeds.shape[1], dtype=torch.long, device=embeds.device)
        hidden = self.decoder(
            inputs_embeds=embeds,
            attention_mask=causal_mask(every, embeds),
            # Only its length is read: keys and values are in the cache.
            encoder_hidden_states=encoder_attention_mask[..., None].to(embeds.dtype),
            encoder_attention_mask=_padding_mask(encoder_attention_mask, embeds),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return (self.head(hidden * self.scale).float(), *cached_tensors(cache.self_attention_cache))


def encoder_decoder_graphs(model: Model) -> tuple[Graph, Graph]:
    """`encoder_model` and `decoder_model_merged` of a T5 with language modelling head."""
    encoder, decoder = Encoder(model).eval(), Decoder(model).eval()
    width, dtype = model.lm_head.weight.shape[1], model.lm_head.weight.dtype
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(SAMPLE_BATCH, SAMPLE_ENCODED, width, generator=generator)
    mask = torch.ones(SAMPLE_BATCH, SAMPLE_ENCODED, dtype=torch.long)
    encoded = {0: BATCH, 1: ENCODED}
    with torch.no_grad():
        given = encoder(embeds, mask)[1:]
    sizes = [(keys.shape[1], keys.shape[3]) for keys in given[::2]]
    own = [
        (block.layer[0].SelfAttention.n_heads, block.layer[0].SelfAttention.key_value_proj_dim)
        for block in model.decoder.block
    ]
    past = cache_ports(own, "past_key_values.{layer}.decoder.{part}", PAST, dtype)
    cross = cache_ports(sizes, "past_key_values.{layer}.encoder.{part}", ENCODED, dtype)
    cross = [Port(port.name, tensor, port.axes) for port, tensor in zip(cross, given, strict=True)]
    inputs = (Port("inputs_embeds", embeds, encoded), Port("attention_mask", mask, encoded))
    steps = (
        Port("inputs_embeds", embeds[:, :SAMPLE_SEQUENCE].clone(), ROWS),
        Port("encoder_attention_mask", mask, encoded),
        *past,
        *cross,
    )
    return (
        Graph(ENCODER, encoder, inputs, {"last_hidden_state": encoded, **present(cross, ENCODED)}),
        Graph(DECODER, decoder, steps, {"logits": ROWS, **present(past, TOTAL)}),
    )


def _padding_mask(attention_mask: Tensor, queries: Tensor) -> Tensor:
    """Additive [B, 1, S, T]."""
    padding = (attention_mask[:, None, None, :] == 0).expand(-1, 1, queries.shape[1], -1)
    return padding.to(queries.dtype) * (torch.finfo(queries.dtype).min / 2)
