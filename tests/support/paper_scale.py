"""The paper's model at its real sizes, without weights."""

from __future__ import annotations

import torch
import transformers
from torch import nn


def blip2_flan_t5_xl() -> nn.Module:
    """BLIP-2 with Flan-T5-XL on the meta device; the T5 head is untied, as in that checkpoint."""
    vision = {"hidden_size": 1408, "intermediate_size": 6144, "num_attention_heads": 16, "num_hidden_layers": 39}
    text = {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32}
    layers = {"num_layers": 24, "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu"}
    config = transformers.Blip2Config(
        vision_config={**vision, "image_size": 224, "patch_size": 14},
        qformer_config={"vocab_size": 30523, "encoder_hidden_size": 1408},
        text_config=transformers.T5Config(**text, **layers),
        num_query_tokens=32,
    )
    with torch.device("meta"):
        model = transformers.Blip2ForConditionalGeneration(config)
        # T5Config ties the head always; loading that checkpoint, which has a head of its own, unties it.
        model.language_model.lm_head.weight = nn.Parameter(torch.empty(32128, 2048))
    return model
