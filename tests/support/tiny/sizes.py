"""The sizes of all tiny models, and batches for them."""

from __future__ import annotations

import torch

VOCAB = 96
IMAGE_TOKEN = 90
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
PACKED = {  # vision parts that lay the patches of all images behind one another
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 48,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def text_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, IMAGE_TOKEN - 1, (batch, length), generator=generator)


def pixels(batch: int, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def decoder_batch(batch: int, image_tokens: int, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`image_tokens` placeholders, then nine text tokens of which the last four are supervised."""
    text = text_ids(batch, 9)
    ids = torch.cat([torch.full((batch, image_tokens), IMAGE_TOKEN), text], dim=1)
    labels = ids.clone()
    labels[:, :-4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}
