"""The kernels, by the path they are launched on, against plain torch; and the statistics made of them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.evaluation.equality import relative_error
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.computing import cast
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.statistics.collect import Calibration, collect
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.kernels.bench import check_workload
from slimvlm.kernels.dispatch import why_not_triton
from slimvlm.kernels.workloads import SHAPES, make_workloads
from slimvlm.selfcheck.ground import Ground, full_precision
from slimvlm.selfcheck.outcome import WrongError

CALIBRATED = ("gate", "ukmi", "taylor", "fisher")
SAMPLES_SEEN, BATCH = 24, 8
BOUND = 1e-3  # of sums over some thousand products, fp32 against fp64


def check_triton(ground: Ground) -> str:
    """Triton's first launch: its compiler, its launcher, the driver."""
    ground.need_gpu("Triton's kernels run on GPUs")
    started = time.perf_counter()
    if reason := why_not_triton(ground.device):
        raise WrongError(f"{reason}; plain torch takes the kernels' place")
    return f"the first launch took {time.perf_counter() - started:.1f} s and gave the right result"


def check_kernel(ground: Ground, operation: str) -> str:
    """The kernels of one operation, on matrices of real models: all of them on a GPU, a small one on a CPU."""
    shapes = [shape for shape in SHAPES if ground.gpu or shape.model.startswith("SmolVLM")]
    dtypes = (torch.bfloat16, torch.float32) if ground.gpu else (torch.float32,)
    done, worst, paths = 0, 0.0, set()
    for shape in shapes:
        for dtype in dtypes:
            for workload in make_workloads(shape, dtype, ground.device):
                if workload.operation != operation:
                    continue
                check = check_workload(workload)
                if not check.passed:
                    where = f"{check.kernel} on {check.model} {check.part} in {check.dtype}"
                    raise WrongError(f"{where}: error {check.error:.1e}, accepted is {check.bound:.0e}")
                done, worst = done + 1, max(worst, check.error)
                paths.add(workload.path)
    return f"{done} results equal plain torch's, largest error {worst:.1e} ({', '.join(sorted(paths))})"


def check_calibration(ground: Ground) -> str:
    """The demo model's statistics on this device, for every criterion that reads data, against float64 on the CPU."""
    worst = 0.0
    for criterion in CALIBRATED:
        with full_precision():
            found = calibrate(criterion, ground.device, torch.float32)
        expected = calibrate(criterion, torch.device("cpu"), torch.float64)
        for name, statistic in expected.seen.items():
            worst = max(worst, largest_error(found.seen[name], statistic, BOUND))
    return f"{', '.join(CALIBRATED)} on {SAMPLES_SEEN} samples; largest difference from float64 {worst:.1e}"


def calibrate(criterion: str, device: torch.device, dtype: torch.dtype) -> Calibration:
    """The statistics of the packaged model."""
    loaded = load_model(str(MODEL), device=device)
    model = cast(loaded.model, dtype)
    samples = load_samples(SAMPLES / "val.jsonl", limit=SAMPLES_SEEN, seed=0).samples
    batches = collated(collator_of(loaded), samples, BATCH)
    options = CRITERIA[criterion].calibration()
    return collect(model, loaded.family, find_groups(model, loaded.family), batches, options)


def largest_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> float:
    """Largest relative error (of norms) over tensors by name.

    Raises:
        WrongError: other names, or an error over `bound`; it names the tensor.
    """
    if found.keys() != expected.keys():
        raise WrongError(f"other tensors than expected: {', '.join(sorted(found.keys() ^ expected.keys())[:3])}")
    errors = {name: relative_error(value, found[name].cpu()) for name, value in expected.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    if not errors[worst] <= bound:
        raise WrongError(f"{worst} differs by {errors[worst]:.1e} (relative), accepted is {bound:.0e}")
    return errors[worst]
