"""A tiny config per text model that goes into many families, by its model type (see TEXTS in slimvlm).

Grouped-query attention is real wherever the text model has it: 4 query heads on 2 key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf
from tiny.sizes import TEXT, VOCAB

HEADS = {**TEXT, "head_dim": 8}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

TEXTS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**TEXT),
    "mistral": lambda: tf.MistralConfig(**HEADS),
    "ministral3": lambda: tf.Ministral3Config(**HEADS),
    "qwen2": lambda: tf.Qwen2Config(**TEXT),
    "qwen3": lambda: tf.Qwen3Config(**HEADS),
    "gemma": lambda: tf.GemmaConfig(**HEADS),
    "gemma2": lambda: tf.Gemma2Config(**HEADS, query_pre_attn_scalar=8),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**HEADS, query_pre_attn_scalar=8),
    "granite": lambda: tf.GraniteConfig(**TEXT),
    "smollm3": lambda: tf.SmolLM3Config(**TEXT),
    "olmo": lambda: tf.OlmoConfig(**TEXT),
    "olmo2": lambda: tf.Olmo2Config(**TEXT),
    "olmo3": lambda: tf.Olmo3Config(**TEXT),
    "ernie4_5": lambda: tf.Ernie4_5Config(**HEADS),
    "exaone4": lambda: tf.Exaone4Config(**HEADS),
    "helium": lambda: tf.HeliumConfig(**HEADS),
    "hunyuan_v1_dense": lambda: tf.HunYuanDenseV1Config(**HEADS, rope_parameters=ROPE),
    "seed_oss": lambda: tf.SeedOssConfig(**HEADS),
    "cohere": lambda: tf.CohereConfig(**TEXT, use_qk_norm=True),
    "cohere2": lambda: tf.Cohere2Config(**HEADS),
    "arcee": lambda: tf.ArceeConfig(**TEXT),
    "nemotron": lambda: tf.NemotronConfig(**TEXT),
    "phi": lambda: tf.PhiConfig(**TEXT),
    "starcoder2": lambda: tf.Starcoder2Config(**TEXT),
    "phi3": lambda: tf.Phi3Config(**TEXT),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "t5": lambda: tf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    ),
}
