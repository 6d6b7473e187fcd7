"""What kernels are checked and timed on: matrices of real models, the plain torch they replace, bytes counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slimvlm import kernels
from slimvlm.kernels import dispatch

BINS = 100
TOKENS = 2048  # of a batch: an image's and a prompt's tokens of a few samples
SUM_BOUND, HISTOGRAM_BOUND = 1e-5, 1e-3  # relative RMS; share of values that another rounding puts beside an edge


@dataclass(frozen=True)
class Shape:
    """A linear [rows, cols] = [out, in] of a published model (sizes from its config)."""

    model: str
    part: str
    rows: int
    cols: int


SHAPES = (
    Shape("BLIP-2 Flan-T5-XL", "language wi", 5120, 2048),
    Shape("BLIP-2 Flan-T5-XL", "vision fc1", 6144, 1408),
    Shape("LLaVA-1.5-7B", "language gate", 11008, 4096),
    Shape("LLaVA-1.5-7B", "vision fc1", 4096, 1024),
    Shape("Qwen2.5-VL-3B", "language gate", 11008, 2048),
    Shape("Qwen2.5-VL-3B", "vision gate", 3420, 1280),
    Shape("SmolVLM-256M", "language gate", 1536, 576),
    Shape("SmolVLM-256M", "vision fc1", 3072, 768),
)


def shapes_of(names: Sequence[str]) -> tuple[Shape, ...]:
    """The shapes of models whose name contains one of these, in any case; all for none.

    Raises:
        ValueError: a name fits no model.
    """
    for name in names:
        if not any(name.lower() in shape.model.lower() for shape in SHAPES):
            known = ", ".join(dict.fromkeys(shape.model for shape in SHAPES))
            raise ValueError(f"no model's name contains {name!r}; there are {known}")
    return tuple(shape for shape in SHAPES if not names or any(name.lower() in shape.model.lower() for name in names))


@dataclass(frozen=True, eq=False)
class Workload:
    """One kernel on one shape.

    Attributes:
        ours, eager: the kernel and plain torch, on the same operands.
        operands: of both.
        moved: bytes that must be read and written, each once.
        error: 0 for equal results of (ours, eager).
        bound: the largest error allowed.
    """

    kernel: str
    shape: Shape
    dtype: str
    ours: Callable[..., object]
    eager: Callable[..., object]
    operands: tuple[Tensor, ...]
    moved: int
    error: Callable[[object, object], float]
    bound: float

    @property
    def operation(self) -> str:
        """The folder of its kernel."""
        return kernels.FOLDERS[self.kernel.split()[0]]

    @property
    def path(self) -> str:
        """What serves its operands."""
        module = dispatch.choose(self.operation, *self.operands)
        return "triton" if module.__name__.endswith("gpu") else "blocked torch"


def make_workloads(shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int = TOKENS) -> list[Workload]:
    """Every kernel on a shape; weights and activations in `dtype`, gradients in fp32."""
    torch.manual_seed(0)
    weight = (torch.randn(shape.rows, shape.cols, device=device) / shape.cols**0.5).to(dtype)
    grad = torch.randn(shape.rows, shape.cols, device=device)
    make = partial(Workload, shape=shape, dtype=str(dtype).removeprefix("torch."))
    return [
        *_sums(make, weight, grad),
        *_angles(make, weight, tokens),
        *_gathers(make, weight),
    ]


def _sums(make: Callable[..., Workload], weight: Tensor, grad: Tensor) -> list[Workload]:
    found = []
    for dim, name in enumerate(("taylor_sums rows", "taylor_sums columns")):
        found.append(
            make(
                kernel=name,
                ours=partial(kernels.taylor_sums, dim=dim),
                eager=partial(_plain_sums, dim=dim),
                operands=(weight, grad),
                moved=_bytes(weight, grad) + 4 * weight.shape[dim],
                error=relative_error,
                bound=SUM_BOUND,
            )
        )
    found.append(
        make(
            kernel="taylor_sums_batch of a gated MLP",
            ours=_batched_mlp,
            eager=_plain_mlp,
            operands=(weight, grad),
            moved=3 * (_bytes(weight, grad) + 4 * weight.shape[0]),
            error=relative_error,
            bound=SUM_BOUND,
        )
    )
    return found


def _angles(make: Callable[..., Workload], weight: Tensor, tokens: int) -> list[Workload]:
    inputs = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)
    outputs = torch.nn.functional.linear(inputs, weight)
    lengths, widths = kernels.row_norms(inputs), kernels.row_norms(weight)
    counts = torch.zeros(weight.shape[0], BINS, dtype=torch.int64, device=weight.device)
    return [
        make(
            kernel="row_norms",
            ours=kernels.row_norms,
            eager=partial(torch.linalg.vector_norm, dim=1, dtype=torch.float32),
            operands=(inputs,),
            moved=_bytes(inputs, lengths),
            error=relative_error,
            bound=SUM_BOUND,
        ),
        make(
            kernel="angle_histogram",
            ours=_histogram,
            eager=_plain_histogram,
            operands=(outputs, lengths, widths, counts),
            moved=_bytes(outputs, lengths, widths) + 2 * _bytes(counts),
            error=_moved_share,
            bound=HISTOGRAM_BOUND,
        ),
    ]


def _gathers(make: Callable[..., Workload], weight: Tensor) -> list[Workload]:
    rows, cols = (torch.randperm(size, device=weight.device)[: size // 2].sort().values for size in weight.shape)
    quarter = rows.numel() * cols.numel() * weight.element_size()
    gone = [_complement(kept, size) for kept, size in zip((rows, cols), weight.shape, strict=True)]
    return [
        make(
            kernel="gather_2d half of both",
            ours=kernels.gather_2d,
            eager=_plain_gather,
            operands=(weight, rows, cols),
            moved=2 * quarter + _bytes(rows, cols),
            error=_different,
            bound=0.0,
        ),
        make(
            kernel="gather_2d half of the rows",
            ours=lambda dense, kept: kernels.gather_2d(dense, kept, None),
            eager=lambda dense, kept: dense.index_select(0, kept),
            operands=(weight, rows),
            moved=2 * rows.numel() * weight.shape[1] * weight.element_size() + _bytes(rows),
            error=_different,
            bound=0.0,
        ),
        make(
            kernel="gather_blocks",
            ours=lambda dense, kept_rows, kept_cols, *_: kernels.gather_blocks(dense, kept_rows, kept_cols),
            eager=_plain_blocks,
            operands=(weight, rows, cols, *gone),
            moved=2 * _bytes(weight) + _bytes(rows, cols),
            error=_different,
            bound=0.0,
        ),
    ]


def _plain_sums(weight: Tensor, grad: Tensor, dim: int) -> Tensor:
    return (weight.float() * grad).abs().sum(1 - dim)


def _batched_mlp(weight: Tensor, grad: Tensor) -> Tensor:
    """Gate, up and the transposed down projection: all three by intermediate channel."""
    down = (weight.t(), grad.t())
    return torch.stack(kernels.taylor_sums_batch([weight, weight, down[0]], [grad, grad, down[1]], [0, 0, 1]))


def _plain_mlp(weight: Tensor, grad: Tensor) -> Tensor:
    sums = [_plain_sums(weight, grad, 0) for _ in range(2)]
    return torch.stack([*sums, _plain_sums(weight.t(), grad.t(), 1)])


def _histogram(outputs: Tensor, lengths: Tensor, widths: Tensor, counts: Tensor) -> Tensor:
    kernels.angle_histogram(outputs, lengths, widths, None, counts)
    return counts


def _plain_histogram(outputs: Tensor, lengths: Tensor, widths: Tensor, counts: Tensor) -> Tensor:
    cosine = outputs.float() / (lengths[:, None] * widths)
    index = ((cosine + 1) / 2 * BINS).long().clamp(0, BINS - 1).t()
    return counts.scatter_add_(1, index, torch.ones_like(index))


def _plain_gather(weight: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    return weight.index_select(0, rows).index_select(1, cols)


def _plain_blocks(
    weight: Tensor, rows: Tensor, cols: Tensor, gone_rows: Tensor, gone_cols: Tensor
) -> tuple[Tensor, ...]:
    halves = [weight.index_select(0, index) for index in (rows, gone_rows)]
    return tuple(half.index_select(1, index) for half in halves for index in (cols, gone_cols))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of the expectation; NaN counts as infinite."""
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)
    return float(error.nan_to_num(nan=torch.inf))


def _moved_share(found: Tensor, expected: Tensor) -> float:
    """Share of values counted in another bin; infinite if a row lost or gained one."""
    if not torch.equal(found.sum(1), expected.sum(1)):
        return float("inf")
    return float((found - expected).abs().sum() / 2 / expected.sum().clamp_min(1))


def _different(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Number of tensors that are not equal bit for bit."""
    pairs = zip(*((result,) if isinstance(result, Tensor) else result for result in (found, expected)), strict=True)
    return float(sum(not torch.equal(one, other) for one, other in pairs))


def _complement(kept: Tensor, size: int) -> Tensor:
    missing = torch.ones(size, dtype=torch.bool, device=kept.device)
    missing[kept] = False
    return missing.nonzero().flatten()


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
