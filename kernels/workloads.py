"""What kernels are checked and timed on: matrices of real models, the plain torch they replace, bytes counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from slimvlm import kernels
from slimvlm.kernels import dispatch
from slimvlm.kernels.gather.blocked import complement

BINS = 100
TOKENS = 2048  # of a batch: an image's and a prompt's tokens of a few samples


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


class Judge(NamedTuple):
    """How far two results of (ours, eager) are apart, 0 if they are equal, and the largest such error allowed."""

    error: Callable[..., float]
    bound: float


@dataclass(frozen=True, eq=False)
class Workload:
    """One kernel on one shape.

    Attributes:
        ours, eager: the kernel and plain torch, on the same operands.
        operands: of both.
        moved: bytes that must be read and written, each once.
        judge: of their results.
    """

    kernel: str
    ours: Callable[..., object]
    eager: Callable[..., object]
    operands: tuple[Tensor, ...]
    moved: int
    judge: Judge
    shape: Shape
    dtype: str

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
    return [*_sums(make, weight, grad), *_angles(make, weight, tokens), *_gathers(make, weight)]


def _sums(make: Callable[..., Workload], weight: Tensor, grad: Tensor) -> Iterator[Workload]:
    operands, read = (weight, grad), _bytes(weight, grad)
    for dim, name in enumerate(("taylor_sums rows", "taylor_sums columns")):
        ours, eager = partial(kernels.taylor_sums, dim=dim), partial(_plain_sums, dim=dim)
        yield make(name, ours, eager, operands, read + 4 * weight.shape[dim], CLOSE)
    moved = 3 * (read + 4 * weight.shape[0])
    yield make("taylor_sums_batch of a gated MLP", _batched_mlp, _plain_mlp, operands, moved, CLOSE)


def _angles(make: Callable[..., Workload], weight: Tensor, tokens: int) -> Iterator[Workload]:
    inputs = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)
    outputs = torch.nn.functional.linear(inputs, weight)
    lengths, widths = kernels.row_norms(inputs), kernels.row_norms(weight)
    counts = torch.zeros(weight.shape[0], BINS, dtype=torch.int64, device=weight.device)
    plain_norms = partial(torch.linalg.vector_norm, dim=1, dtype=torch.float32)
    yield make("row_norms", kernels.row_norms, plain_norms, (inputs,), _bytes(inputs, lengths), CLOSE)
    operands, moved = (outputs, lengths, widths, counts), _bytes(outputs, lengths, widths) + 2 * _bytes(counts)
    yield make("angle_histogram", _histogram, _plain_histogram, operands, moved, ALIKE)


def _gathers(make: Callable[..., Workload], weight: Tensor) -> Iterator[Workload]:
    rows, cols = (torch.randperm(size, device=weight.device)[: size // 2].sort().values for size in weight.shape)
    gone = [complement(kept, size, weight.device) for kept, size in zip((rows, cols), weight.shape, strict=True)]
    half = rows.numel() * weight.shape[1] * weight.element_size()
    quarter = rows.numel() * cols.numel() * weight.element_size()
    both, all_blocks = (weight, rows, cols), (weight, rows, cols, *gone)
    moved = 2 * quarter + _bytes(rows, cols)
    yield make("gather_2d half of both", kernels.gather_2d, _plain_gather, both, moved, EQUAL)
    ours = partial(kernels.gather_2d, cols=None)
    yield make("gather_2d half of the rows", ours, _plain_rows, (weight, rows), 2 * half + _bytes(rows), EQUAL)
    moved = 2 * _bytes(weight) + _bytes(rows, cols)
    yield make("gather_blocks", _blocks, _plain_blocks, all_blocks, moved, EQUAL)


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


def _plain_rows(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.index_select(0, rows)


def _blocks(weight: Tensor, rows: Tensor, cols: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return kernels.gather_blocks(weight, rows, cols)


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


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


CLOSE = Judge(relative_error, 1e-5)
ALIKE = Judge(_moved_share, 1e-3)  # another rounding puts a value beside the edge of its bin
EQUAL = Judge(_different, 0.0)
