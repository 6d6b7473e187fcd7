"""The family table: everything that is true of one model family, and nowhere else.

A row says where the towers of a transformers model are, which projections form an attention or an MLP, and what must be
patched after a cut. How a family is added: CONTRIBUTING.md. No torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slimvlm.compress.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention of a block. Paths are relative to the block.

    Attributes:
        key: last part of the group key (`attn`, `cross_attn`).
        module: the attention module.
        rows: projections that lose rows, relative to `module`: (q, k, v), or one fused qkv.
        output: projection that loses columns, relative to `module`.
        head_dim: attribute of `module` that holds D.
        norms: norms over all heads of q or k (their RMS is rescaled by the cut).
        patch: attributes of `module` to set after a cut -> `heads`, `kv_heads`, `groups` (H / K) or `width` (H * D).
        forward: name of the replacement forward this attention needs once cut (see modeling_slim.py).
        stock: config fields -> the same quantities, with which the unmodified class builds a uniform cut; empty: none.
    """

    module: str
    rows: tuple[str, ...]
    output: str
    key: str = "attn"
    head_dim: str = "head_dim"
    norms: tuple[str, ...] = ()
    patch: tuple[tuple[str, str], ...] = ()
    forward: str | None = None
    stock: tuple[tuple[str, str], ...] = ()

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """Config fields -> facts of a group (see `stock_fields`) from which the unmodified class builds its size."""
        return () if self.forward else self.stock  # the replaced forward is what the unmodified class lacks

    @property
    def exit(self) -> str:
        """Path, relative to the block, of the linear through which it adds to the residual stream."""
        return f"{self.module}.{self.output}"


@dataclass(frozen=True, slots=True)
class Mlp:
    """One MLP of a block: `rows` lose rows, `output` loses columns; `stock`: the config field of its width, if any."""

    rows: tuple[str, ...]
    output: str
    key: str = "mlp"
    stock: str | None = None

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """As of an attention."""
        return () if self.stock is None else ((self.stock, "size"),)

    @property
    def exit(self) -> str:
        """As of an attention."""
        return self.output


@dataclass(frozen=True, slots=True)
class Tower:
    """One stack of blocks.

    Attributes:
        modality: `vision` or `language`.
        config: attribute path of its config; `depth`: the fields of it that hold the number of blocks.
        states: field of the model's config with the index (or indices) of the hidden states that are read, 0 what goes
            into the first block; blocks behind the last of them are dead. None: the output of the last block is.
        listed: fields of its config with one entry per block, where the text model has them.
        numbered: fields of its config, and attributes of the module that holds the blocks, that name some by number.
        deepstack: where the model's config numbers the vision blocks whose outputs are added behind as many first
            language blocks: these can leave neither here nor there.
        first: (module, table, flag): the first block alone owns `table` of its `module`, and `flag` says that it does.
    """

    name: str
    modality: str
    config: str
    blocks: str
    parts: tuple[Attention | Mlp, ...]
    states: str | None = None
    depth: tuple[str, ...] = ("num_hidden_layers",)
    listed: tuple[str, ...] = ("layer_types", "no_rope_layers")
    numbered: tuple[str, ...] = ()
    deepstack: str | None = None
    first: tuple[str, str, str] | None = None

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """As of an attention."""
        return tuple((name, "size") for name in self.depth)


@dataclass(frozen=True, slots=True)
class Export:
    """How the parts of a model are called and fed once they are graphs (slimvlm/export).

    Attributes:
        vision: how pixels become image features, a key of export/graphs/vision.py: `pooled` (the model's own
            `get_image_features`), `select` (a layer of the tower through the projector), `tiles` (the same on a fixed
            set of tiles), `masked_tiles` (Idefics3) or `patches` (Qwen: one fixed grid of patches).
        text: the module that takes `inputs_embeds`; `head` gives its logits (encoder-decoder: both inside `text`).
        positions: `count` (1-D, from `first_position`) or `mrope` (temporal, height and width rows).
        prefix: the prompt attends to itself in both directions, only what is generated is causal.
        image_output, text_output: what a dual encoder's graphs call their embeddings.
        flat_config: clients read the sizes of the text model at the top of config.json.
        genai: the model type under which onnxruntime-genai knows this model, if it does.
    """

    vision: str = "pooled"
    text: str = "model.language_model"
    head: str = "lm_head"
    positions: str = "count"
    first_position: int = 0
    prefix: bool = False
    image_output: str = "image_embeds"
    text_output: str = "text_embeds"
    flat_config: bool = False
    genai: str | None = None


@dataclass(frozen=True, slots=True)
class Resampler:
    """A module whose learned queries read an image into a fixed number of features (Q-Former).

    Attributes:
        module: its path; `queries`: the parameter [1, queries, width].
        cross: what the attention over the patches is called inside it.
    """

    module: str
    queries: str
    cross: str


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    Attributes:
        kind: `decoder`, `encoder-decoder` or `dual-encoder`; code asks for the facts below instead.
        text_model_type, vision_model_type: tell apart models that differ in their language model, or in their tower.
        projector: modules that carry what one modality's tower says into the space of the other; empty: there are none.
    """

    name: str
    model_type: str
    kind: str
    towers: tuple[Tower, ...]
    text_model_type: str | None = None
    vision_model_type: str | None = None
    projector: tuple[str, ...] = ()
    resampler: Resampler | None = None
    export: Export = Export()

    @property
    def contrastive(self) -> bool:
        """It answers nothing: images and texts are embedded apart, and its loss compares the samples of a batch."""
        return self.kind == "dual-encoder"

    @property
    def own_decoder(self) -> bool:
        """The answer is not in the text that the model reads, but in a decoder of its own."""
        return self.kind == "encoder-decoder"

    @property
    def labels_shifted(self) -> bool:
        """The logits of a token are to give the next one, so its label is one place further on."""
        return self.kind == "decoder"


SEPARATE = ("q_proj", "k_proj", "v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
GROUPS = (("num_key_value_groups", "groups"), ("num_heads", "heads"), ("num_key_value_heads", "kv_heads"))

GQA_STOCK = (("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads"), ("head_dim", "head_dim"))
GATED_MLP = Mlp(GATED, "mlp.down_proj", stock="intermediate_size")
PLAIN_MLP = Mlp(("mlp.fc1",), "mlp.fc2", stock="intermediate_size")
GQA = Attention("self_attn", SEPARATE, "o_proj", patch=GROUPS, stock=GQA_STOCK)
GQA_HIDDEN = Attention(
    "self_attn", SEPARATE, "o_proj", patch=GROUPS
)  # head_dim = hidden_size / heads: no stock head cut
ENCODER = Attention("self_attn", SEPARATE, "out_proj", patch=(("num_heads", "heads"),))
FUSED = Attention("attn", ("qkv",), "proj", patch=(("num_heads", "heads"),))


def _vision(blocks: str, *parts: Attention | Mlp, states: str | None = None) -> Tower:
    return Tower("vision", "vision", "vision_config", blocks, parts or (ENCODER, PLAIN_MLP), states)


def _language(blocks: str, attention: Attention = GQA) -> Tower:
    return Tower("language", "language", "text_config", blocks, (attention, GATED_MLP))


def _decoder(name: str, vision: Tower, language: Tower, projector: tuple[str, ...], export: Export) -> Family:
    return Family(name, name, "decoder", (vision, language), projector=projector, export=export)


QWEN_BLOCKS = "model.visual.blocks"
DEEPSTACK = "vision_config.deepstack_visual_indexes"
VISION_TOWER = "model.vision_tower.encoder.layers"
LANGUAGE_MODEL = "model.language_model.layers"
LANGUAGE = _language(LANGUAGE_MODEL)
IDEFICS = (_vision("model.vision_model.encoder.layers"), _language("model.text_model.layers"))

BLIP2_VISION = _vision(
    "vision_model.encoder.layers",
    Attention("self_attn", ("qkv",), "projection", patch=(("num_heads", "heads"),), forward="blip2_vision"),
    PLAIN_MLP,
)
INTERNVL_VISION = _vision(
    "model.vision_tower.encoder.layer",
    Attention(
        "attention",
        SEPARATE,
        "projection_layer",
        norms=("q_norm", "k_norm"),
        patch=(("num_heads", "heads"), ("embed_dim", "width")),
    ),
    PLAIN_MLP,
    states="vision_feature_layer",
)
OPT = Tower(
    "language",
    "language",
    "text_config",
    "language_model.model.decoder.layers",
    (
        Attention("self_attn", SEPARATE, "out_proj", patch=(("num_heads", "heads"),)),
        Mlp(("fc1",), "fc2", stock="ffn_dim"),
    ),
)


def _t5_attention(module: str, key: str) -> Attention:
    return Attention(
        module,
        ("q", "k", "v"),
        "o",
        key=key,
        head_dim="key_value_proj_dim",
        patch=(("n_heads", "heads"), ("inner_dim", "width")),
        forward="t5_position_bias",  # the layers share one bias over all heads: no stock head cut
    )


def _t5_mlp(layer: int) -> Mlp:
    inner = f"layer.{layer}.DenseReluDense"
    return Mlp((f"{inner}.wi_0", f"{inner}.wi_1"), f"{inner}.wo", stock="d_ff")


T5_BIAS = ("layer.0.SelfAttention", "relative_attention_bias", "has_relative_attention_bias")
T5_ENCODER = Tower(
    "encoder",
    "language",
    "text_config",
    "language_model.encoder.block",
    (_t5_attention("layer.0.SelfAttention", "attn"), _t5_mlp(1)),
    first=T5_BIAS,
)
T5_DECODER = Tower(
    "decoder",
    "language",
    "text_config",
    "language_model.decoder.block",
    (
        _t5_attention("layer.0.SelfAttention", "attn"),
        _t5_attention("layer.1.EncDecAttention", "cross_attn"),
        _t5_mlp(2),
    ),
    depth=("num_decoder_layers", "decoder_layers"),  # the second sizes the cache, else as long as the encoder
    first=T5_BIAS,
)
DUAL_TEXT = Tower("language", "language", "text_config", "text_model.encoder.layers", (ENCODER, PLAIN_MLP))
# SigLIP's pooling head has the width of the vision MLPs: one config field for both, so no stock cut.
SELECTED_VISION = _vision(VISION_TOWER, states="vision_feature_layer")
# DINOv2 makes the width of its MLPs of a ratio: no stock cut of them.
DINOV2_VISION = _vision(
    "model.vision_tower.encoder.layer",
    Attention("attention", SEPARATE, "o_proj", patch=(("num_attention_heads", "heads"),)),
    Mlp(("mlp.fc1",), "mlp.fc2"),
    states="vision_feature_layer",
)
HEADED_VISION = _vision("vision_model.encoder.layers", ENCODER, Mlp(("mlp.fc1",), "mlp.fc2"))

PROJECTOR = ("model.multi_modal_projector",)
MERGER = ("model.visual.merger",)
CONNECTOR = ("model.connector",)
PROJECTION = ("language_projection",)
QFORMER = Resampler("qformer", "query_tokens", "crossattention")

FAMILIES: tuple[Family, ...] = (
    replace(
        _decoder("llava", DINOV2_VISION, LANGUAGE, PROJECTOR, Export("select")),
        name="llava_dinov2",
        vision_model_type="dinov2",
    ),
    _decoder("llava", SELECTED_VISION, LANGUAGE, PROJECTOR, Export("select")),
    _decoder("llava_next", SELECTED_VISION, LANGUAGE, PROJECTOR, Export("tiles")),
    _decoder("llava_onevision", SELECTED_VISION, LANGUAGE, PROJECTOR, Export("tiles")),
    _decoder(
        "qwen2_vl",
        _vision(QWEN_BLOCKS, FUSED, Mlp(("mlp.fc1",), "mlp.fc2")),
        _language(LANGUAGE_MODEL, GQA_HIDDEN),
        MERGER,
        Export("patches", positions="mrope", flat_config=True),
    ),
    _decoder(
        "qwen2_5_vl",
        replace(_vision(QWEN_BLOCKS, FUSED, GATED_MLP), numbered=("fullatt_block_indexes",)),
        _language(LANGUAGE_MODEL, GQA_HIDDEN),
        MERGER,
        Export("patches", positions="mrope", genai="qwen2_5_vl"),
    ),
    _decoder(
        "qwen3_vl",
        replace(
            _vision(QWEN_BLOCKS, FUSED, Mlp(("mlp.linear_fc1",), "mlp.linear_fc2", stock="intermediate_size")),
            numbered=("deepstack_visual_indexes",),
            deepstack=DEEPSTACK,
        ),
        replace(LANGUAGE, deepstack=DEEPSTACK),
        (*MERGER, "model.visual.deepstack_merger_list"),
        Export("patches", positions="mrope", genai="qwen3_vl"),
    ),
    _decoder("smolvlm", *IDEFICS, CONNECTOR, Export("masked_tiles", text="model.text_model")),
    _decoder("idefics3", *IDEFICS, CONNECTOR, Export("masked_tiles", text="model.text_model")),
    _decoder("paligemma", _vision(VISION_TOWER), LANGUAGE, PROJECTOR, Export(first_position=1, prefix=True)),
    _decoder("internvl", INTERNVL_VISION, LANGUAGE, PROJECTOR, Export()),
    Family(
        "blip2_opt",
        "blip-2",
        "decoder",
        (BLIP2_VISION, OPT),
        text_model_type="opt",
        export=Export(text="language_model.model", head="language_model.lm_head"),
        projector=PROJECTION,
        resampler=QFORMER,
    ),
    Family(
        "blip2_t5",
        "blip-2",
        "encoder-decoder",
        (BLIP2_VISION, T5_ENCODER, T5_DECODER),
        text_model_type="t5",
        export=Export(text="language_model"),
        projector=PROJECTION,
        resampler=QFORMER,
    ),
    Family(
        "clip",
        "clip",
        "dual-encoder",
        (_vision("vision_model.encoder.layers"), DUAL_TEXT),
        projector=("visual_projection", "text_projection"),
    ),
    Family(
        "siglip",
        "siglip",
        "dual-encoder",
        (HEADED_VISION, DUAL_TEXT),
        export=Export(image_output="pooler_output", text_output="pooler_output"),
        projector=("vision_model.head", "text_model.head"),
    ),
)


def find_family(config: object) -> Family:
    """The row of a transformers config.

    Raises:
        UnsupportedModelError: no row has this model type; the message lists the known ones.
    """
    model_type = getattr(config, "model_type", None)
    text_type, vision_type = (
        getattr(getattr(config, part, None), "model_type", None) for part in ("text_config", "vision_config")
    )
    for family in FAMILIES:  # the first that fits
        if (
            family.model_type == model_type
            and family.text_model_type in (None, text_type)
            and family.vision_model_type in (None, vision_type)
        ):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    asked = f"{model_type!r}" + (f" with text model {text_type!r}" if text_type else "")
    raise UnsupportedModelError(f"model type {asked} is not supported; known families: {known}")
