"""Launches by Triton's own machinery, bound, specialised and compiled for sm_90; only the driver is absent."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from absent_gpu import absent_gpu

from slimvlm.kernels.gather import Blocks
from slimvlm.kernels.gather import gpu as gather
from slimvlm.kernels.histogram import gpu as histogram
from slimvlm.kernels.norms import gpu as norms
from slimvlm.kernels.taylor import Operands
from slimvlm.kernels.taylor import gpu as taylor

DTYPES = [torch.float32, torch.bfloat16]


def launch_taylor(rows: int, cols: int, dtype: torch.dtype) -> None:
    weight, grad = fresh(rows, cols, dtype), fresh(rows, cols, torch.float32)
    taylor.saliency_sums([Operands(weight, grad, None, 0), Operands(weight, grad, None, 1)], "first")


def launch_norms(rows: int, cols: int, dtype: torch.dtype) -> None:
    norms.row_norms(fresh(rows, cols, dtype))


def launch_histogram(rows: int, cols: int, dtype: torch.dtype) -> None:
    counts = torch.zeros(cols, 100, dtype=torch.int64)
    mask = torch.ones(rows, dtype=torch.bool)
    histogram.angle_histogram(fresh(rows, cols, dtype), (torch.ones(rows), torch.ones(cols)), None, counts, mask, False)


def launch_gather(rows: int, cols: int, dtype: torch.dtype) -> None:
    gather.gather_2d(fresh(rows, cols, dtype), torch.arange(rows // 2), None, fresh(rows // 2, cols, dtype))


def launch_blocks(rows: int, cols: int, dtype: torch.dtype) -> None:
    parts = Blocks(*(fresh(height, cols // 2, dtype) for height in (rows // 2, rows - rows // 2) for _ in range(2)))
    gather.gather_blocks(fresh(rows, cols, dtype), torch.arange(rows // 2), torch.arange(cols // 2), parts)


def fresh(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided((rows, cols), (cols, 1), dtype=dtype)  # pages nobody touches take no memory


LAUNCHES = {
    "saliency_kernel": launch_taylor,
    "norms_kernel": launch_norms,
    "histogram_kernel": launch_histogram,
    "gather_kernel": launch_gather,
    "blocks_kernel": launch_blocks,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", LAUNCHES)
def test_the_first_call_of_every_kernel_arrives_at_the_driver(kernel, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a first call, as on a new machine
    with absent_gpu() as gpu:
        LAUNCHES[kernel](64, 96, dtype)
    assert kernel in {launch.kernel for launch in gpu.launches}
    assert all(size > 0 for launch in gpu.launches for size in launch.grid)


def test_eight_rounds_of_a_shrinking_7b_model_compile_a_handful_of_programs():
    """Every round leaves other widths in every layer: what is compiled or tuned must not follow them."""
    with absent_gpu(compiles=False) as gpu:
        for rounds_left in range(8, 0, -1):
            for layer in range(0, 32, 4):
                launch_layer(4096, 11008 * rounds_left // 8 - 13 * layer, 4 * rounds_left * 128)
                if layer < 24:
                    launch_layer(1024, 4096 * rounds_left // 8 - 5 * layer, 2 * rounds_left * 64)
    assert gpu.tuned == 0 and len(gpu.programs) <= 20, sorted(gpu.programs)


def launch_layer(hidden: int, channels: int, heads: int) -> None:
    """What a layer of a bfloat16 model launches: saliency, norms and angles of every matrix, then its cut."""
    batch = []
    for rows, cols, dim in [(channels, hidden, 0), (hidden, channels, 1), (heads, hidden, 0), (hidden, heads, 1)]:
        weight = fresh(rows, cols, torch.bfloat16)
        batch.append(Operands(weight, fresh(rows, cols, torch.float32), None, dim))
        launch_norms(rows, cols, torch.bfloat16)
        launch_norms(600, cols, torch.bfloat16)
        launch_histogram(600, rows, torch.bfloat16)
        kept = torch.arange((rows, cols)[dim] * 7 // 8)
        gone = (rows, cols)[dim] - len(kept)
        index, sizes = ((kept, None), (len(kept), cols)) if dim == 0 else ((None, kept), (rows, len(kept)))
        rest = [(len(kept), 0), (gone, cols), (gone, 0)] if dim == 0 else [(rows, gone), (0, len(kept)), (0, gone)]
        out = fresh(*sizes, torch.bfloat16)
        gather.gather_2d(weight, *index, out)
        gather.gather_blocks(weight, *index, Blocks(out, *(fresh(*size, torch.bfloat16) for size in rest)))
    taylor.saliency_sums(batch, "first")
