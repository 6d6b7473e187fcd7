"""Everything `slimvlm export` can be told, as data. No torch: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import STREAM
from slimvlm.export.variants import FULL, QUANTIZED, TRACED, VARIANTS

FORMATS = ("onnx", "torchscript", "pt2")
DTYPES = tuple(TRACED.values())
DYNAMO, TORCHSCRIPT = "dynamo", "torchscript"
EXPORTERS = ("auto", DYNAMO, TORCHSCRIPT)
FUSIONS = ("cpu", "cuda")
OPSETS = range(18, 24)
EXTERNAL_BYTES = 2 * 10**9  # a file of the ONNX format ends at 2 GiB
STREAMED_BYTES = 2**28  # the same, of a model that does not fit into memory: a graph is put together there


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export; the names are the command line's.

    Attributes:
        formats: what to write, of FORMATS.
        dtype: of the weights and the cache of every graph; pixels, embeddings and logits stay fp32.
        quantize: a second variant, of every ONNX graph.
        variants: all variants to write, in the place of `dtype` and `quantize`; graphs are traced once per dtype.
        opset: of the ONNX graphs.
        exporter: `auto` takes the dynamo exporter and, where that fails, the TorchScript-based one.
        fuse: rewrite the ONNX graphs with ONNX Runtime's fused operators for this execution provider.
        image_size: height and width that images are resized to, for families whose vision graph has one fixed grid.
        data: samples to check with; default: generated images and a plain question.
        samples: how many of them are generated for.
        max_new_tokens: longest generation in these checks.
        aoti: also compile the torch.export programs ahead of time (needs a C++ compiler).
        bundle: add a README and the whole folder as `<out>.tar`.
        stream: of STREAM: blocks are read when they are needed, and weights when they are written.
        external_bytes: weights from this size on stand in a file beside their graph.
    """

    formats: tuple[str, ...] = ("onnx",)
    dtype: str = FULL
    quantize: str | None = None
    variants: tuple[str, ...] = ()
    opset: int = 20
    exporter: str = "auto"
    fuse: str | None = None
    image_size: tuple[int, int] | None = None
    data: Path | None = None
    samples: int = 16
    max_new_tokens: int = 16
    seed: int = 0
    aoti: bool = False
    bundle: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    stream: str = "auto"
    external_bytes: int = EXTERNAL_BYTES

    @property
    def written(self) -> tuple[str, ...]:
        """The variants to write, the fullest first."""
        asked = self.variants or (self.dtype, self.quantize)
        return tuple(name for name in VARIANTS if name in asked)

    def checked(self) -> ExportOptions:
        """Itself.

        Raises:
            UnsuitableOptionError: an unknown value, or options that contradict each other.
        """
        known = {
            "dtype": DTYPES,
            "quantize": (None, *QUANTIZED),
            "exporter": EXPORTERS,
            "fuse": (None, *FUSIONS),
            "stream": STREAM,
        }
        for name, accepted in known.items():
            if (value := getattr(self, name)) not in accepted:
                choices = ", ".join(item for item in accepted if item)
                raise UnsuitableOptionError(f"--{name} {value} is unknown; choose one of {choices}")
        if not self.formats or set(self.formats) - set(FORMATS):
            unknown = ", ".join(sorted(set(self.formats) - set(FORMATS))) or "nothing"
            raise UnsuitableOptionError(f"the format {unknown} is unknown; choose from {', '.join(FORMATS)}")
        if self.opset not in OPSETS:
            raise UnsuitableOptionError(f"--opset {self.opset} is not supported; choose {OPSETS[0]} to {OPSETS[-1]}")
        if strange := [name for name in self.variants if name not in VARIANTS]:
            raise UnsuitableOptionError(f"--variants {strange[0]} is unknown; choose from {', '.join(VARIANTS)}")
        if self.variants and (self.quantize or self.dtype != FULL):
            raise UnsuitableOptionError("--variants names all that is written; leave --dtype and --quantize out")
        if "onnx" not in self.formats and (set(self.written) & set(QUANTIZED) or self.fuse):
            raise UnsuitableOptionError(f"{', '.join(QUANTIZED)} and --fuse are for ONNX graphs; add onnx to --format")
        if self.formats != ("onnx",) and not set(self.written) & set(DTYPES):
            raise UnsuitableOptionError(f"graphs of torch are {' or '.join(DTYPES)}; add one of them to --variants")
        if self.aoti and "pt2" not in self.formats:
            raise UnsuitableOptionError("--aoti compiles torch.export programs; add pt2 to --format")
        if self.seed < 0 or (self.image_size is not None and min(self.image_size) < 1):
            raise UnsuitableOptionError("--seed must be 0 or more, and the sides of --image-size 1 or more")
        if self.samples < 1 or self.max_new_tokens < 1:
            raise UnsuitableOptionError("--samples and --max-new-tokens must be 1 or more: an export is always checked")
        return self
