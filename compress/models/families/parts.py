"""The attentions and MLPs that many towers and text models share, as transformers names their projections."""

from __future__ import annotations

from slimvlm.compress.models.families.rows import Attention, Mlp

SEPARATE = ("q_proj", "k_proj", "v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
HEADS = (("num_heads", "heads"),)
GROUPS = (("num_key_value_groups", "groups"), *HEADS, ("num_key_value_heads", "kv_heads"))
GQA_STOCK = (("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads"), ("head_dim", "head_dim"))

GQA = Attention("self_attn", SEPARATE, "o_proj", patch=GROUPS, stock=GQA_STOCK)
GQA_HIDDEN = Attention(
    "self_attn", SEPARATE, "o_proj", patch=GROUPS
)  # head_dim = hidden_size / heads: no stock head cut
ENCODER = Attention("self_attn", SEPARATE, "out_proj", patch=HEADS)
FUSED = Attention("attn", ("qkv",), "proj", patch=HEADS)

GATED_MLP = Mlp(GATED, "mlp.down_proj", stock="intermediate_size")
PLAIN_MLP = Mlp(("mlp.fc1",), "mlp.fc2", stock="intermediate_size")
FUSED_MLP = Mlp(("mlp.gate_up_proj",), "mlp.down_proj", stock="intermediate_size")
RATIO_MLP = Mlp(("mlp.fc1",), "mlp.fc2", stock="mlp_ratio", ratio=True)
