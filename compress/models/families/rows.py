"""What a row of the family table says: where the blocks of a model are, which projections form an attention or an MLP,
what must be patched after a cut, and how a tower and a text model are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention of a block. Paths are relative to the block.

    Attributes:
        key: last part of the group key (`attn`, `cross_attn`).
        module: the attention module.
        rows: projections that lose rows, relative to `module`: (q, k, v), or one fused qkv.
        output: projection that loses columns, relative to `module`.
        head_dim: attribute of `module` that holds D; empty: it holds the number of heads only, as `patch` says.
        norms: norms over all heads of q or k (their RMS is rescaled by the cut).
        patch: attributes of `module` to set after a cut -> `heads`, `kv_heads`, `groups` (H / K) or `width` (H * D);
            `config.NAME` is what it reads in the model's config and gets of its own.
        forward: name of the replacement forward this attention needs once cut (see modeling_slim.py).
        stock: config fields -> the same quantities, with which the unmodified class builds a uniform cut; empty: none.
        optional: only some of the tower's blocks have it.
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
    optional: bool = False

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """Config fields -> facts of a group (see `stock_values`) from which the unmodified class builds its size."""
        return () if self.forward else self.stock  # the replaced forward is what the unmodified class lacks

    @property
    def exit(self) -> str:
        """Path, relative to the block, of the linear through which it adds to the residual stream."""
        return f"{self.module}.{self.output}"


@dataclass(frozen=True, slots=True)
class Mlp:
    """One MLP of a block: `rows` lose rows (one, where gate and up are fused), `output` loses columns; `stock`: the
    config field of its width, if any, or with `ratio`, of how many times as wide as the block it is; `optional` as of
    an attention.
    """

    rows: tuple[str, ...]
    output: str
    key: str = "mlp"
    stock: str | None = None
    ratio: bool = False
    optional: bool = False

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """As of an attention."""
        return () if self.stock is None else ((self.stock, "ratio" if self.ratio else "size"),)

    @property
    def exit(self) -> str:
        """As of an attention."""
        return self.output


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a block: gated MLPs of one width, of which a router, which stays as it is, picks some for a token.

    Attributes:
        module: path, in the block, of the module that has their weights, stacked.
        chosen: field of the tower's config: experts that are picked for a token.
        stock: the config field of their width, if any.
        optional: as of an attention.
    """

    module: str
    chosen: str
    key: str = "experts"
    stock: str | None = None
    optional: bool = False

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """As of an attention."""
        return () if self.stock is None else ((self.stock, "per_head"),)

    @property
    def exit(self) -> str:
        """As of an attention; here of the module that holds one for every expert."""
        return self.module


@dataclass(frozen=True, slots=True)
class Mixer:
    """What some blocks have in the place of an attention and is not cut inside: a convolution, a linear attention.

    Attributes:
        exit: as of an attention.
    """

    exit: str
    optional: bool = True


Part = Attention | Mlp | Experts | Mixer


@dataclass(frozen=True, slots=True)
class Tower:
    """One stack of blocks: a vision tower, or (one of) those of a text model.

    Attributes:
        blocks: path of its blocks, in a row of TOWERS or TEXTS from the module that its config builds, in a family from
            the model.
        modality: `vision` or `language`.
        config: attribute path of its config; `depth`: the fields of it that hold the number of blocks (empty: unknown,
            so none can leave).
        states: field of the model's config with the index (or indices) of the hidden states that are read, 0 what goes
            into the first block; blocks behind the last of them are dead. None: the output of the last block is.
        listed: fields of its config with one entry per block, where the text model has them.
        numbered: fields of its config, and attributes of the modules around the blocks, that name some by number.
        stepped: where every so manieth block is of another kind: the field of its config that says how manieth, and one
            of `numbered` with those that are not so all the same.
        deepstack: where the model's config numbers the vision blocks whose outputs are added behind as many first
            language blocks: these can leave neither here nor there.
        first: (module, table, flag): the first block alone owns `table` of its `module`, and `flag` says that it does.
        pooled: field of its config that, where it is set, gives it a pooling head whose MLP is as wide as those of the
            blocks: one config field for both, so no stock cut of them.
        before: parameters of the module with the tokens that stand before those of the patches.
        windows: fields of its config with the side in pixels of the windows in which a block attends, and with the
            numbers of the blocks that attend to all of an image.
        root: path of the module in the model; in a row of its own, empty.
    """

    name: str
    modality: str
    config: str
    blocks: str
    parts: tuple[Part, ...]
    states: str | None = None
    depth: tuple[str, ...] = ("num_hidden_layers",)
    listed: tuple[str, ...] = ("layer_types", "no_rope_layers")
    numbered: tuple[str, ...] = ()
    stepped: tuple[str, str] | None = None
    deepstack: str | None = None
    first: tuple[str, str, str] | None = None
    pooled: str | None = None
    before: tuple[str, ...] = ()
    windows: tuple[str, str] | None = None
    root: str = ""

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """As of an attention."""
        return tuple((name, "size") for name in self.depth)


Stacks = Tower | tuple[Tower, ...]  # of a vision tower: one, or several after another


@dataclass(frozen=True, slots=True)
class Export:
    """How the parts of a model are called and fed once they are graphs (slimvlm/export).

    Attributes:
        vision: how pixels become image features, a key of export/graphs/vision.py: `pooled` (the model's own
            `get_image_features`), `select` (a layer of the tower through the projector), `tiles` (the same on a fixed
            set of tiles), `masked_tiles` (Idefics3), `patches` (Qwen: one fixed grid of patches) or `single` (the
            model's own method on one image of one size).
        text: the module that takes `inputs_embeds`; `head` gives its logits (encoder-decoder: both inside `text`).
        positions: `count` (1-D, from `first_position`) or `mrope` (temporal, height and width rows).
        prefix: the prompt attends to itself in both directions, only what is generated is causal.
        image_blocks: the tokens of an image attend to each other in both directions, within their window.
        silent: fields of the config with tokens that stand for no text, which are embedded as padding is.
        scaled: field of the text model's config with what its logits are multiplied by, before they are capped.
        capped: its logits are capped as the text model's config says (`final_logit_softcapping`).
        image_output, text_output: what a dual encoder's graphs call their embeddings.
        flat_config: clients read the sizes of the text model at the top of config.json.
        genai: the model type under which onnxruntime-genai knows this model, if it does.
        refused: why no graph of it can be made; None: one can.
    """

    vision: str = "pooled"
    text: str = "model.language_model"
    head: str = "lm_head"
    positions: str = "count"
    first_position: int = 0
    prefix: bool = False
    image_blocks: bool = False
    silent: tuple[str, ...] = ()
    scaled: str = ""
    capped: bool = False
    image_output: str = "image_embeds"
    text_output: str = "text_embeds"
    flat_config: bool = False
    genai: str | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Resampler:
    """A module whose learned queries read an image into a fixed number of features (Q-Former, perceiver).

    Attributes:
        module: its path; `queries`: the parameter [..., queries, width].
        cross: what the attention over the patches is called inside it; `rows`: the projections of an attention.
        beside: the queries attend to themselves beside the patches.
        projected: it reads what has been through the projector, and not the other way round.
    """

    module: str
    queries: str
    cross: str
    rows: tuple[str, str, str] = ("query", "key", "value")
    beside: bool = False
    projected: bool = False

    @property
    def reads(self) -> str:
        """The kind of tokens that it attends to, as serve/judging/roofline.py counts them."""
        return "beside" if self.beside else "patch"


@dataclass(frozen=True, slots=True)
class Text:
    """A text model.

    Attributes:
        towers: its stacks of blocks.
        kind: `decoder` or `encoder-decoder`.
        base: what the class with the language model's head calls the module that it is put on; empty: it has none.
        ungraphed: why no graph of it can be made; None: one can.
    """

    towers: tuple[Tower, ...]
    kind: str = "decoder"
    base: str = "model"
    ungraphed: str | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """What makes one model of a vision tower and a text model.

    Attributes:
        names: what a family of this tower and this text model (keys of TOWERS and TEXTS) is called; others are called
            after all three, `llava (dinov2, qwen2)`.
        vision, language: paths of the modules that are the tower and the text model; no `vision`: what reads the image
            has no stack of blocks (it is convolutional, or there is none) and stays whole.
        texts: the only text models that it runs with; empty: any.
        projector, resampler, cropped, features, export: as of a family.
        headed: the text model brings its own head.
        contrastive: images and texts are embedded apart.
        states: as of a tower, of the vision tower.
        shared: the projector is as wide inside as the MLPs of the text model, by the same config field: these have no
            stock cut.
        doubled: names of the towers from whose config another tower is built, so that they keep widths and depth.
    """

    names: Mapping[tuple[str, str], str]
    vision: str
    language: str
    projector: tuple[str, ...]
    export: Export = Export()
    resampler: Resampler | None = None
    cropped: str = ""
    features: str | None = None
    headed: bool = False
    contrastive: bool = False
    texts: tuple[str, ...] = ()
    states: str | None = None
    shared: bool = False
    doubled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """A tower, a text model, and what joins them.

    Attributes:
        kind: `decoder`, `encoder-decoder` or `dual-encoder`; code asks for the facts below instead.
        former: what it was called in plans that were made when its tower and its text model were not asked for.
        projector: modules that carry what one modality's tower says into the space of the other; empty: there are none.
        cropped: `default` where the first token of the tower is no feature, or the field of the config that says so.
        features: field of the config with the number of features of an image, whatever the number of its patches.
    """

    name: str
    model_type: str
    kind: str
    towers: tuple[Tower, ...]
    former: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    resampler: Resampler | None = None
    cropped: str = ""
    features: str | None = None
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
