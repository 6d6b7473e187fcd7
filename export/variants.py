"""The precisions that graphs are written in, a row each. No torch: the command line and the report read them, too."""

from __future__ import annotations

from dataclasses import dataclass

from slimvlm.compress.options import ROUNDED


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What is accepted of a variant.

    Attributes:
        relative, cosine: error of a graph's outputs relative to the largest one, and their cosine. Where weights are
            rounded those of embeddings that are compared with each other: errors inside a language model grow with its
            depth, and what they cost is seen in its answers.
        divergence: of what comes next from what torch says, along torch's answers: mean KL(torch || variant), in nats a
            token; as much may the cross-entropy of the stored answer rise.
        agreement: least share of torch's tokens that are the variant's own choice.
        right: fall of the share of right answers; one sample is always accepted, two where weights are rounded.
    """

    relative: float
    cosine: float
    divergence: float
    agreement: float
    right: float = 0.02


@dataclass(frozen=True, slots=True)
class TorchForm:
    """How torchao holds the linears of a checkpoint: `name`, of IN_TORCH, is said behind `torch:`."""

    name: str
    tolerance: Tolerance


@dataclass(frozen=True, slots=True)
class Variant:
    """How the numbers of a graph are kept.

    Attributes:
        suffix: of file names, as transformers.js asks for them.
        dtype: torch's name of what the graph is traced in, which its activations and its cache keep.
        weight_bytes: of one weight of a matrix, its part of a scale included.
        writer: of ONNX graphs alone, `module:function`: (traced model, the variant, a folder for files in between) ->
            rewritten model, which may be the same one; none where the graph is written as it was traced.
        bits: of a weight, for writers that can be told.
        torch: what a checkpoint has instead of graphs; None where there is no such thing.
    """

    name: str
    suffix: str
    dtype: str
    weight_bytes: float
    tolerance: Tolerance
    writer: str | None = None
    bits: int = 8
    torch: TorchForm | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether its weights are codes, with a scale for many."""
        return self.writer is not None

    @property
    def value_bytes(self) -> int:
        """Of a value in the cache."""
        return {"float32": 4, "float16": 2}[self.dtype]


WEIGHT_ONLY = "slimvlm.export.writers.weight_only:quantize_weights"

# fp32: what reordered sums give. The others are other numbers, and measured by what they cost: three times as much as
# the most that any model has shown, or more (docs/export.md; `python benchmarks/variants.py`).
_ROWS = (
    Variant("fp32", "", "float32", 4, Tolerance(1e-4, 0.99999, 1e-3, 0.75)),
    Variant("fp16", "_fp16", "float16", 2, Tolerance(5e-2, 0.999, 0.01, 0.75)),
    Variant(
        *("int8", "_int8", "float32", 1, Tolerance(0.5, 0.98, 1.0, 0.4, right=0.05)),
        writer="slimvlm.export.writers.onnx_rewriting:quantize_int8",
        torch=TorchForm("int8", Tolerance(0.1, 0.998, 0.01, 0.75)),
    ),
    Variant(
        "q8",
        "_quantized",
        "float32",
        1.125,
        Tolerance(0.1, 0.998, 0.05, 0.75, right=0.05),
        WEIGHT_ONLY,
        bits=ROUNDED["q8"],
    ),
    Variant(
        *("q4", "_q4", "float32", 0.625, Tolerance(0.6, 0.9, 2.0, 0.3, right=0.15), WEIGHT_ONLY),
        bits=ROUNDED["q4"],
        torch=TorchForm("int4", Tolerance(0.6, 0.9, 0.2, 0.3)),
    ),
    Variant("q4f16", "_q4f16", "float16", 0.5625, Tolerance(0.6, 0.9, 2.0, 0.3, right=0.15), WEIGHT_ONLY, bits=4),
    Variant("q2", "_q2", "float32", 0.375, Tolerance(3.0, 0.1, 5.0, 0.0, right=0.3), WEIGHT_ONLY, bits=ROUNDED["q2"]),
)
VARIANTS = {row.name: row for row in _ROWS}
FULL = "fp32"  # the variant that needs no name
TRACED = {row.dtype: row.name for row in _ROWS if row.writer is None}  # dtype -> the variant that is written so
TORCH_FORMS = {row.torch.name: row.torch for row in _ROWS if row.torch is not None}
QUANTIZED = tuple(row.name for row in _ROWS if row.is_rounded)
