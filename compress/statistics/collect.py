"""Calibration: one pass over sample batches collects the saliency of every prunable weight and the angle histograms.

Gradient and histogram come from the SAME forward (UKMP, AAAI 2025, "importance" and "angle distribution"; the paper's
code reads the data twice). Full gradient sums can be bounded in memory, at the price of more passes; same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from slimvlm.compress.criteria.criterion import Criterion
from slimvlm.compress.data.questions import Question, ask, stream_of
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import Group
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.statistics.angles import AngleHistograms
from slimvlm.compress.statistics.calibration import Calibration, CalibrationOptions
from slimvlm.compress.statistics.gates import GateSquares
from slimvlm.compress.statistics.gradients import GradientSums, Side
from slimvlm.compress.statistics.loss import loss

COLLECTORS = {**dict.fromkeys(("first", "vectorized", "second", "mix", "fisher"), GradientSums), "gate": GateSquares}
GRADIENT_SALIENCIES = tuple(COLLECTORS)
CHECK_EVERY = 32  # batches between two looks at the non-finite flags: each look waits for the device

Batch = Mapping[str, Any]


def collect(
    model: nn.Module,
    family: Family,
    groups: Sequence[Group],
    batches: Sequence[Batch | Callable[[], Batch]],
    options: CalibrationOptions,
    progress: Progress = silent,
) -> Calibration:
    """Run the model forward and backward over the batches and reduce what was seen to a vector per tensor side.

    The model is in evaluation mode meanwhile and only the weights of `groups` ask for gradients; afterwards, also after
    an error, its modes, gradient requests, gradients and hooks are what they were. Weights never change. With several
    processes (torch.distributed initialised) batch i goes to process i % world_size and every process returns the same
    statistics; every process must be given all batches.

    Args:
        batches: padded training batches with `labels` (unshifted for decoders), or functions that make one (called once
            per pass, so that a lazily collated set need not stay in memory).
        progress: called after every batch with ("calibrate", batches done, batches in all passes of this process).

    Raises:
        CalibrationError: no batches, no sample with a supervised token, a loss or gradient that is not finite, or a
            gradient bound below the largest weight.
        ValueError: the criterion needs no data.
    """
    criterion = options.criterion
    if criterion.saliency not in GRADIENT_SALIENCIES:
        raise ValueError(f"criterion {criterion.name!r} looks at no data; score the groups without a calibration")
    batches = batches if isinstance(batches, Sequence) else list(batches)
    if not batches:
        raise CalibrationError("there are no calibration batches; give at least one sample")
    started = time.perf_counter()
    passes = _passes(_sides(model, groups), criterion.saliency, options.grad_memory_bytes)
    run = _Run(model, family, batches, criterion, progress, len(passes))
    linears = _row_linears(model, family, groups) if criterion.entropy else {}
    angles = AngleHistograms(linears, faithful=options.faithful)
    saliency: dict[str, Tensor] = {}
    with _frozen(model):
        for index, sides in enumerate(passes):
            with COLLECTORS[criterion.saliency](sides, criterion.saliency, host=options.host_sums) as sums:
                if index == 0:
                    with angles:
                        counts = run.read(sums, angles)
                else:
                    run.read(sums, None)
                saliency |= sums.saliency(counts["micro_batches"], run.reduce)
    return Calibration(
        digest=options.digest,
        num_samples=counts["samples"],
        saliency=saliency,
        entropy=angles.entropy(run.reduce),
        seconds=time.perf_counter() - started,
        skipped_samples=counts["skipped"],
        criterion=criterion.name,
        variant=criterion.saliency,
        threshold=criterion.threshold,
        passes=len(passes),
        **{name: counts[name] for name in ("image_tokens", "text_tokens", "selected_tokens", "micro_batch")},
    )


def bytes_kept(
    model: nn.Module, family: Family, groups: Sequence[Group], batch: Batch, options: CalibrationOptions
) -> int:
    """Bytes that a forward over `batch` keeps for its backward pass, weights aside; 0 if no sample can count."""
    question = ask(model, family, batch)
    if question is None:
        return 0
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    collector = COLLECTORS[options.criterion.saliency](_sides(model, groups), options.criterion.saliency)
    with _frozen(model), collector, torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value, _ = loss(model, question, options.criterion.threshold)
        del value  # until here nothing was freed, so no address came twice
    return sum(size for place, size in kept.items() if place not in weights)


class _Run:
    """The batches of this process, and the sums over all processes."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        batches: Sequence[Batch | Callable[[], Batch]],
        criterion: Criterion,
        progress: Progress,
        passes: int,
    ) -> None:
        self.model, self.family, self.batches, self.criterion = model, family, batches, criterion
        self.joined = distributed.is_available() and distributed.is_initialized()
        first, step = (distributed.get_rank(), distributed.get_world_size()) if self.joined else (0, 1)
        self.indices = range(first, len(batches), step)
        self.device = next(model.parameters()).device
        self.progress = progress
        self.done, self.total = 0, passes * len(self.indices)

    def reduce(self, tensor: Tensor, how: str) -> None:
        """`sum`, `min` or `max` over the processes, in place, on the model's device (the backend can reach that)."""
        if self.joined:
            moved = tensor.to(self.device)
            distributed.all_reduce(moved, getattr(distributed.ReduceOp, how.upper()))
            tensor.copy_(moved)

    def read(self, sums: GradientSums, angles: AngleHistograms | None) -> dict[str, int]:
        """One pass: forward and backward over this process's batches; the counts over all processes."""
        counted = dict.fromkeys(("samples", "skipped", "image_tokens", "text_tokens", "micro_batches"), 0)
        largest = 0
        selected = torch.zeros((), dtype=torch.int64, device=self.device)
        for index in self.indices:
            batch = self.batches[index]
            batch = batch() if callable(batch) else batch
            question = ask(self.model, self.family, batch)
            if question is None:
                counted["skipped"] += len(batch["input_ids"])
            else:
                selected += self._learn(index, question, sums, angles)
                for name, count in asdict(question.tally).items():
                    counted[name] += count
                counted["micro_batches"] += 1
                largest = max(largest, question.tally.samples)
                if not self.joined and counted["micro_batches"] % CHECK_EVERY == 0:
                    sums.require_finite(len(self.batches), self.reduce)
            self._report()
        sums.require_finite(len(self.batches), self.reduce)
        return self._over_processes({**counted, "selected_tokens": int(selected)}, largest)

    def _learn(self, index: int, question: Question, sums: GradientSums, angles: AngleHistograms | None) -> Tensor:
        """Forward and backward of one batch; the number of tokens that gave a gradient."""
        if angles is not None:
            angles.expect(question.masks)
        with torch.enable_grad():
            value, tokens = loss(self.model, question, self.criterion.threshold)
            if value.requires_grad:  # not so where the loss reaches no weight of this pass
                value.backward()
        sums.close_batch(index, value.detach())
        return tokens

    def _report(self) -> None:
        self.done += 1
        self.progress("calibrate", self.done, self.total)

    def _over_processes(self, counted: Mapping[str, int], largest: int) -> dict[str, int]:
        totals, most = torch.tensor(list(counted.values())), torch.tensor(largest)
        self.reduce(totals, "sum")
        self.reduce(most, "max")
        counts = dict(zip(counted, totals.tolist(), strict=True)) | {"micro_batch": int(most)}
        if not counts["samples"]:
            raise CalibrationError(
                f"none of the {counts['skipped']} calibration samples can count: they have no supervised (answer) "
                "token, or, for a dual encoder, every batch holds a single pair; check the answers and the batch size"
            )
        return counts


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradient asked for and none there; everything as before afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in asked:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted, grad in asked:
            parameter.requires_grad_(wanted)
            parameter.grad = grad


def _sides(model: nn.Module, groups: Sequence[Group]) -> list[Side]:
    """Every prunable linear once (the parts of a fused one are one tensor), in the order of the groups."""
    dims: dict[str, set[int]] = {}
    widths: dict[str, int] = {}
    for member in chain.from_iterable(group.members for group in groups):
        if not member.norm:
            dims.setdefault(member.path, set()).add(member.dim)
            widths[member.path] = member.width
    if not dims:
        raise ValueError("there is no prunable weight in these groups")
    return [
        Side(path, cast(nn.Linear, model.get_submodule(path)), tuple(sorted(wanted)), widths[path])
        for path, wanted in dims.items()
    ]


def _row_linears(model: nn.Module, family: Family, groups: Sequence[Group]) -> dict[str, tuple[nn.Linear, str]]:
    """The row-cut linears of the language modality, with the stream of tokens each reads."""
    return {
        member.path: (cast(nn.Linear, model.get_submodule(member.path)), stream_of(family, group, member))
        for group in groups
        if group.modality == "language"
        for member in group.members
        if member.dim == 0 and not member.norm
    }


def _passes(sides: Sequence[Side], saliency: str, bound: int | None) -> list[list[Side]]:
    """Consecutive sides, as many as the bound on gradient bytes allows in each pass."""
    passes: list[list[Side]] = []
    room = 0
    for side in sides:
        need = side.gradient_bytes(saliency)
        if bound is not None and need > bound:
            raise CalibrationError(
                f"a gradient bound of {bound} bytes is too small: {side.path} alone needs {need} bytes; "
                "raise the bound, or use the criterion fisher, which holds no gradients"
            )
        if not passes or (bound is not None and need > room):
            passes.append([])
            room = bound or 0
        passes[-1].append(side)
        room -= need
    return passes
