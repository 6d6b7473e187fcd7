"""How much work a phase is, counted from shapes, and how close a measurement came to what the device can give.

Work is the least that must be done: two operations per multiply-accumulate of every matrix product and of attention
(over the whole square of queries and keys, as profilers count it; element-wise work is left out), and every weight,
every kept key and value and every looked-up row moved once per pass. Intermediate results are not counted: they may
stay in a cache. Williams et al., "Roofline", CACM 2009.

Every matrix of a model is one `Product` that is applied to tokens of one kind; every attention compares tokens of two
kinds. How many tokens of each kind there are is a matter of the workload. No torch: shapes.py reads models.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from slimvlm.export.variants import VARIANTS
from slimvlm.serve.profile import Device, Run

# Parts of a model, as they are spoken of. The cut narrows the towers, their attention, and maybe the cache.
VISION, PROJECTOR, LANGUAGE, ATTENTION, CACHE, EMBEDDINGS, HEAD = PARTS = (
    *("vision tower", "projector", "language model", "attention over the context", "key-value cache"),
    *("embeddings", "output head"),
)
# Kinds of tokens: `pixel` patches as they come in, `patch` with the tokens before them, `feature` what the projector
# gives, `query` of a resampler, `beside` patches and queries, `image` one per image; `encoder`, `decoder`, `text` of
# language models, `head` those that get logits, `pooled` one per text, `memory` encoder states of which a decoder makes
# keys. Those attended to only: `context` a decoder's past and present, `source` all encoder states.

# Bytes of a weight and of a value in the cache: of what exports are written in, and of what torch computes in besides.
ELEMENT_BYTES = {
    **{name: (row.weight_bytes, row.value_bytes) for name, row in VARIANTS.items()},
    "bf16": (2, 2),
    "int4": (VARIANTS["q4"].weight_bytes, 2),
}

ONE_PASS = ("vision", "text", "prefill", "tpot")  # phases that are one pass over the weights; the others add them up

Tokens = dict[str, tuple[int, float]]  # kind -> sequences, tokens in each


@dataclass(frozen=True, slots=True)
class Product:
    """Weights and what sees them.

    Attributes:
        seen: kind of the tokens.
        macs: multiply-accumulates per token; 0 for norms and the like.
        parameters: read once, however many tokens there are.
        looked_up: of an embedding: values read per token.
    """

    part: str
    seen: str
    macs: int = 0
    parameters: int = 0
    looked_up: int = 0


@dataclass(frozen=True, slots=True)
class Attended:
    """One attention: tokens of kind `queries` (`width` = H D values each) compared with tokens of kind `keys`.

    Attributes:
        kept: values per token that stay in the cache (keys and values, 2 K D); 0 where nothing is kept.
        window: patches that attend to each other, if not all of an image.
    """

    queries: str
    keys: str
    width: int
    kept: int = 0
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Shapes:
    """A model as a list of products and attentions.

    Attributes:
        kind: of the family: `decoder`, `encoder-decoder` or `dual-encoder`.
        patch: height and width of a patch in pixels.
        class_tokens: tokens of an image besides its patches; `class_features`: those of them that become features.
        merged: patches that become one feature.
        queries: features per image where a resampler makes them; 0: none does.
        widths: inner widths of the prunable parts (channels; heads times D), in the order of the groups.
    """

    family: str
    kind: str
    parameters: int
    products: tuple[Product, ...]
    attended: tuple[Attended, ...]
    patch: tuple[int, int]
    class_tokens: int
    merged: int
    queries: int
    widths: tuple[int, ...]
    class_features: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides how much work a workload is.

    Attributes:
        pixels: shape of the processor's `pixel_values`: [B, 3, H, W], [B, N, 3, H, W] or [patches, width] (one image
            per sample); None without images.
        prompt_tokens: S, as the language model sees them: image features included.
        first_logits: tokens of the prompt that get logits; a model needs 1, an exported graph computes all S.
    """

    batch_size: int
    pixels: tuple[int, ...] | None
    prompt_tokens: int
    new_tokens: int
    first_logits: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations and bytes of one phase, by part of the model (PARTS); `matmuls`: how many matrix
    products that is, two for an attention.
    """

    flops: Mapping[str, float]
    bytes: Mapping[str, float]
    matmuls: float

    @property
    def total_flops(self) -> float:
        """Of all parts."""
        return math.fsum(self.flops.values())

    @property
    def total_bytes(self) -> float:
        """Of all parts."""
        return math.fsum(self.bytes.values())

    def plus(self, other: Work, times: float = 1) -> Work:
        """This one, and the other so many times."""
        flops, moved = (
            {part: mine.get(part, 0.0) + times * more.get(part, 0.0) for part in {**mine, **more}}
            for mine, more in ((self.flops, other.flops), (self.bytes, other.bytes))
        )
        return Work(flops, moved, self.matmuls + times * other.matmuls)


def count_costs(shapes: Shapes, sizes: Sizes, dtype: str) -> dict[str, Work]:
    """Phase (profile.PHASES) -> work. Without pixels there is no vision, and `ttft` is `prefill`.

    Raises:
        ValueError: a dtype that is not one of ELEMENT_BYTES, or pixels of another shape.
    """
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype is {dtype!r}; accepted is one of {', '.join(ELEMENT_BYTES)}")
    phases = {}
    if sizes.pixels is not None:
        phases["vision"] = _cost(shapes, _image_tokens(shapes, sizes), dtype)
    if shapes.kind == "dual-encoder":
        batch = sizes.batch_size
        return phases | {"text": _cost(shapes, {"text": (batch, sizes.prompt_tokens), "pooled": (batch, 1)}, dtype)}
    phases["prefill"] = _cost(shapes, _prompt_tokens(shapes, sizes), dtype)
    phases["ttft"] = phases["prefill"].plus(phases["vision"]) if "vision" in phases else phases["prefill"]
    if sizes.new_tokens > 1:
        phases["tpot"] = _cost(shapes, _step_tokens(shapes, sizes), dtype)
        phases["end_to_end"] = phases["ttft"].plus(phases["tpot"], sizes.new_tokens - 1)
    else:
        phases["end_to_end"] = phases["ttft"]
    return phases


def image_features(shapes: Shapes, pixels: tuple[int, ...]) -> int:
    """Tokens that the images of a sample, with pixels as in `Sizes`, are in the text."""
    images, each = _image_tokens(shapes, Sizes(1, pixels, 0, 1))["query" if shapes.queries else "feature"]
    return images * int(each)


def kv_bytes_per_token(shapes: Shapes, dtype: str) -> int:
    """Bytes of keys and values that one more token leaves in the cache, over all layers."""
    return sum(one.kept for one in shapes.attended if one.keys == "context") * ELEMENT_BYTES[dtype][1]


# ------------------------------------------------------------------ tokens of every kind


def _image_tokens(shapes: Shapes, sizes: Sizes) -> Tokens:
    images, patches = _images(shapes, sizes)
    return {
        "pixel": (images, patches),
        "patch": (images, patches + shapes.class_tokens),
        "feature": (images, patches // shapes.merged + shapes.class_features),
        "query": (images, shapes.queries),
        "beside": (images, patches + shapes.class_tokens + shapes.queries),
        "image": (images, 1),
    }


def _images(shapes: Shapes, sizes: Sizes) -> tuple[int, int]:
    """Images (or tiles) of the whole batch, and patches of each."""
    pixels = sizes.pixels or ()
    if len(pixels) == 2:
        return sizes.batch_size, pixels[0] // sizes.batch_size
    if len(pixels) not in (4, 5):
        raise ValueError(f"pixels have shape {pixels}; accepted is [B, 3, H, W], [B, N, 3, H, W] or [patches, width]")
    height, width = (side // patch for side, patch in zip(pixels[-2:], shapes.patch, strict=True))
    return math.prod(pixels[:-3]), height * width


def _prompt_tokens(shapes: Shapes, sizes: Sizes) -> Tokens:
    batch, prompt = sizes.batch_size, sizes.prompt_tokens
    if shapes.kind == "encoder-decoder":
        read = {kind: (batch, prompt) for kind in ("encoder", "memory", "source")}
        return {**read, **{kind: (batch, 1) for kind in ("decoder", "context", "head")}}
    return {"decoder": (batch, prompt), "context": (batch, prompt), "head": (batch, sizes.first_logits)}


def _step_tokens(shapes: Shapes, sizes: Sizes) -> Tokens:
    """One token after the first; its context is the mean over all of them: work is linear in it."""
    batch, prompt = sizes.batch_size, sizes.prompt_tokens
    before = 1 if shapes.kind == "encoder-decoder" else prompt
    step: Tokens = {"decoder": (batch, 1), "head": (batch, 1), "context": (batch, before + sizes.new_tokens / 2)}
    return step | ({"source": (batch, prompt)} if shapes.kind == "encoder-decoder" else {})


def _cost(shapes: Shapes, tokens: Tokens, dtype: str) -> Work:
    weight_bytes, value_bytes = ELEMENT_BYTES[dtype]
    flops, moved, matmuls = defaultdict[str, float](float), defaultdict[str, float](float), 0
    for product in shapes.products:
        count = math.prod(tokens.get(product.seen, (0, 0)))
        if count:
            flops[product.part] += 2.0 * product.macs * count
            moved[product.part] += weight_bytes * product.parameters + value_bytes * product.looked_up * count
            matmuls += product.macs > 0
    for one in shapes.attended:
        if one.queries in tokens and one.keys in tokens:
            sequences, span = tokens[one.keys]
            seen = min(span, one.window or span)
            queries = math.prod(tokens[one.queries])
            flops[ATTENTION] += 4.0 * one.width * queries * seen
            matmuls += 2
            if one.kept:
                moved[CACHE] += value_bytes * one.kept * sequences * span
    return Work(flops, moved, matmuls)


# ------------------------------------------------------------------ against the device


def rate_run(run: Run, costs: Mapping[str, Work], device: Device, dtype: str) -> Run:
    """The run with `flops` and `bytes` of its measured phases, and `mfu` and `mbu` of those that are one pass over the
    weights; `medians` must be there. A share above 1 is possible: reading can be faster than the copying it is
    compared with.
    """
    phases = [phase for phase in run.medians if phase in costs]
    single = [phase for phase in phases if phase in ONE_PASS]
    matmul = device.matmul_flops_per_second.get(dtype)
    return replace(
        run,
        flops={phase: costs[phase].total_flops for phase in phases},
        bytes={phase: costs[phase].total_bytes for phase in phases},
        mfu=None if matmul is None else {p: costs[p].total_flops / (run.medians[p] * matmul) for p in single},
        mbu={p: memory_seconds(costs[p], device) / run.medians[p] for p in single},
    )


def memory_seconds(cost: Work, device: Device) -> float:
    """Time to move the bytes of `cost` at the copy bandwidth measured for so many bytes: a model that fits into a
    cache is read from there.
    """
    rates = sorted((int(size), rate) for size, rate in device.copy_bytes_per_second.items())
    rate = next((rate for size, rate in rates if size >= cost.total_bytes), rates[-1][1])
    return cost.total_bytes / rate


def compute_seconds(cost: Work, device: Device, dtype: str) -> float | None:
    """Time of the operations of `cost` at the measured matmul rate; None where that is not known."""
    matmul = device.matmul_flops_per_second.get(dtype)
    return None if matmul is None else cost.total_flops / matmul


def ideal_seconds(cost: Work, device: Device, dtype: str) -> float:
    """The roof: what moving and computing take at least, whichever is longer."""
    return max(memory_seconds(cost, device), compute_seconds(cost, device, dtype) or 0.0)
