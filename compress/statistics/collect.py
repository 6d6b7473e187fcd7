"""Calibration: one pass over sample batches, and everything that is wanted of the data is collected from it.

Gradients and histograms come from the SAME forward (UKMP, AAAI 2025, "importance" and "angle distribution"; the paper's
code reads the data twice). What needs no gradient gets no backward. Full gradient sums can be bounded in memory, at the
price of more passes; same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor, nn

from slimvlm.compress import processes
from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.questions import Question, Tally, ask, masked, stream_of, stream_through
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.computing import in_passes, undisturbed
from slimvlm.compress.models.experts import expert_of
from slimvlm.compress.models.families import Family, Tower, find_family
from slimvlm.compress.models.groups import Group, count_parameters, find_groups
from slimvlm.compress.models.projections import Member
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.statistics.collector import Collector, Side
from slimvlm.compress.statistics.loss import loss
from slimvlm.compress.statistics.pools import check_pool, choice, counting, mixed_blocks
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions

CHECK_EVERY = 32  # batches between two looks at the non-finite flags: each look waits for the device
LEAST = 128 * 2**20  # bytes of activations that are never too many
ACTIVATIONS = 1  # bytes of activations per parameter: a quarter of the fp32 weights

Batch = Mapping[str, Tensor]
Batches = Sequence[Batch | Callable[[], Batch]]


class _SeenAllError(Exception):
    """Ends a forward; never leaves this module."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration:
    """What was seen.

    Attributes:
        seen: the statistics by name; each has fp32 vectors over the rows or columns of full tensors by `path:dim`, or
            by path.
        samples: that counted; `skipped` ones had no supervised token.
        image_tokens, text_tokens: without padding; for a dual encoder image tokens are patches.
        selected_tokens: answer tokens that gave a gradient (0 for a dual encoder, and without a backward pass).
        passes: times the data was read.
    """

    seen: Mapping[str, Mapping[str, Tensor]]
    samples: int
    skipped: int
    image_tokens: int
    text_tokens: int
    selected_tokens: int
    passes: int


def collect(
    model: nn.Module,
    family: Family,
    groups: Sequence[Group],
    batches: Batches,
    options: CalibrationOptions,
    progress: Progress = silent,
) -> Calibration:
    """Run the model over the batches, backward too if a statistic needs it, and reduce what was seen.

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
        ValueError: nothing is wanted of the data.
    """
    if not options.statistics:
        raise ValueError("no statistic is wanted of the data; score the groups without a calibration")
    batches = batches if isinstance(batches, Sequence) else list(batches)
    if not batches:
        raise CalibrationError("there are no calibration batches; give at least one sample")
    check_pool(options.tokens, family, model.config)
    sides = _whole(model, groups) if options.whole else _sides(model, family, groups)
    collectors = _collectors(options)
    passes = _passes(sides, collectors, options.grad_memory_bytes)
    readings = len(passes) + bool(options.tokens.alpha)
    run = _Run(model, family, batches, options, progress, readings)
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in options.statistics}
    # What holds nothing sees all sides at once, in the first pass; the rest takes turns.
    large = [collector for collector in collectors if any(map(collector.bytes_needed, sides))]
    with _frozen(model):
        blocks = mixed_blocks(model, family)
        run.counting = counting(options.tokens, blocks, lambda drift: run.read([drift]), processes.reduce)
        for index, chosen in enumerate(passes):
            reading = large if index else collectors
            with ExitStack() as stack:
                for collector in reading:
                    stack.enter_context(collector.watch(chosen if collector in large else sides))
                counts = run.read(reading)
                for collector in reading:
                    seen[collector.statistic.name] |= collector.finish(processes.reduce)
    return Calibration(seen=seen, passes=readings, **counts)


def importance_of(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Callable[[], Batches],
    options: CalibrationOptions | None,
    progress: Progress = silent,
) -> dict[str, float] | None:
    """What each group (by key) of the dense `model` is worth as a whole, by the statistic that an allocator asks for;
    None: it asks for none.
    """
    if options is None:
        return None
    (name,) = options.statistics
    read = batches()[: STATISTICS[name].draws or None]

    def told(stage: str, done: int, total: int, _: str = "", /) -> None:
        progress(stage, done, total, "what groups are worth")

    seen = collect(model, find_family(model.config), groups, read, options, told).seen
    return {key: value.item() for key, value in seen[name].items()}


def read_forward(
    model: nn.Module,
    family: Family,
    batches: Batches,
    collector: Collector,
    told: Callable[[int], None] = lambda done: None,
    until: nn.Module | None = None,
) -> None:
    """Have the model read the batches, in forward passes alone, while `collector` watches. Of several processes each
    reads its share, as in `collect`.

    Args:
        told: after every batch how many of its share this process has done.
        until: a pass ends once this module has run.
    """

    def end(*_: object) -> None:
        raise _SeenAllError

    with ExitStack() as stack, undisturbed(model), torch.no_grad():
        if until is not None:
            stack.enter_context(until.register_forward_hook(end))
        for done, index in enumerate(processes.share(len(batches)), start=1):
            batch = batches[index]
            if (question := ask(model, family, batch() if callable(batch) else batch)) is not None:
                collector.see(question)
                unread = {"logits_to_keep": 1} if "logits_to_keep" in question.inputs else {}  # as few as can be
                with suppress(_SeenAllError):
                    model(**{**question.inputs, **unread})
            told(done)


def calibration_batch(
    loaded: Loaded, collator: Collator, samples: Sequence[Sample], options: CalibrationOptions, wanted: int
) -> int:
    """Samples of a calibration batch: `wanted`, or fewer on a CPU, so that activations stay small in host memory.

    Only where a batch is no part of what is measured: squares of gradients are taken per batch, and a contrastive loss
    compares the samples of one. On a GPU small batches are slow, and its memory is the user's to divide (--batch-size).
    Follows from shapes, so the same every time.
    """
    model, family = loaded.model, loaded.family
    per_batch = family.contrastive or any(STATISTICS[name].per_batch for name in options.statistics)
    if model.device.type != "cpu" or per_batch:
        return wanted
    longest = max(samples, key=lambda sample: sum(len(turn.prompt) + len(turn.target) for turn in sample.turns))
    kept = bytes_kept(model, family, find_groups(model, family), collator.training([longest]), options)
    return max(1, min(wanted, max(LEAST, ACTIVATIONS * count_parameters(model)) // max(kept, 1)))


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

    learning = [collector for collector in _collectors(options) if collector.statistic.reads == "backward"]
    sides = _sides(model, family, groups)
    with _frozen(model), ExitStack() as stack, torch.enable_grad():
        for collector in learning:
            stack.enter_context(collector.differentiated(sides))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value, _ = loss(model, question, options.tokens.threshold)
        del value  # until here nothing was freed, so no address came twice
    return sum(size for place, size in kept.items() if place not in weights)


class _Run:
    """The batches of this process, and the sums over all processes."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        batches: Sequence[Batch | Callable[[], Batch]],
        options: CalibrationOptions,
        progress: Progress,
        passes: int,
    ) -> None:
        self.model, self.family, self.batches, self.threshold = model, family, batches, options.tokens.threshold
        self.counting = choice("all")
        self.indices = processes.share(len(batches))
        self.device = next(model.parameters()).device
        self.progress = progress
        self.done, self.total = 0, passes * len(self.indices)

    def read(self, collectors: Sequence[Collector]) -> dict[str, int]:
        """One pass over this process's batches; the counts over all processes."""
        counted = dict.fromkeys((field.name for field in fields(Tally)), 0)
        asked = 0
        selected = torch.zeros((), dtype=torch.int64, device=self.device)
        for index in self.indices:
            batch = self.batches[index]
            batch = batch() if callable(batch) else batch
            question = ask(self.model, self.family, batch)
            if question is None:
                counted["skipped"] += len(batch["input_ids"])
            else:
                question = replace(question, masks=self.counting(asked, question))
                selected += self._answer(index, question, collectors)
                for name, count in asdict(question.tally).items():
                    counted[name] += count
                asked += 1
                if processes.count() == 1 and asked % CHECK_EVERY == 0:
                    self._require_finite(collectors)
            self.done += 1
            self.progress("calibrate", self.done, self.total)
        self._require_finite(collectors)
        return self._over_processes({**counted, "selected_tokens": int(selected)})

    def _answer(self, index: int, question: Question, collectors: Sequence[Collector]) -> Tensor:
        """Forward of one batch, and backward where a collector reads it; the number of tokens that gave a gradient."""
        for collector in collectors:
            collector.see(question)
        if all(collector.statistic.reads == "perturbed" for collector in collectors):
            with torch.no_grad():
                for collector in collectors:
                    collector.perturb(index, len(self.batches), lambda: loss(self.model, question, None)[0])
            return torch.zeros((), dtype=torch.int64, device=self.device)
        learning = [collector for collector in collectors if collector.statistic.reads == "backward"]
        with torch.set_grad_enabled(bool(learning)):
            value, tokens = loss(self.model, question, self.threshold)
            if value.requires_grad:  # not so where the loss reaches no weight of this pass
                value.backward()
        for collector in learning:
            collector.close_batch(index, value.detach())
        return tokens

    def _require_finite(self, collectors: Sequence[Collector]) -> None:
        for collector in collectors:
            collector.require_finite(len(self.batches), processes.reduce)

    def _over_processes(self, counted: Mapping[str, int]) -> dict[str, int]:
        totals = torch.tensor(list(counted.values()))
        processes.reduce(totals, "sum")
        counts = dict(zip(counted, totals.tolist(), strict=True))
        if not counts["samples"]:
            raise CalibrationError(
                f"none of the {counts['skipped']} calibration samples can count: they have no supervised (answer) "
                "token, or, for a dual encoder, every batch holds a single pair; check the answers and the batch size"
            )
        return counts


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """`undisturbed`, with no gradient asked for and none there."""
    with undisturbed(model):
        model.requires_grad_(False)
        model.zero_grad()
        yield


def _collectors(options: CalibrationOptions) -> list[Collector]:
    return [STATISTICS[name].make(options.host_sums, options.seed) for name in options.statistics]


def _whole(model: nn.Module, groups: Sequence[Group]) -> list[Side]:
    """The linears of every group together; of blocks all that are in them."""
    sides = []
    for group in groups:
        inside = (model.get_submodule(path).modules() for path in group.block_paths)
        linears = [module for modules in inside for module in modules if isinstance(module, nn.Linear)]
        paths = dict.fromkeys(member.path for member in group.members if not member.norm)
        sides.append(Side(group.key, nn.ModuleList([*map(model.get_submodule, paths), *linears]), ()))
    return sides


def _sides(model: nn.Module, family: Family, groups: Sequence[Group]) -> list[Side]:
    """Every prunable linear once (the parts of a fused one are one tensor), or every block that may leave, in the order
    of the groups.
    """
    blocks = [
        Side(path, model.get_submodule(path), (), stream=masked(stream_through(family, group.part)), block=path)
        for group in groups
        if isinstance(group.part, Tower)
        for path in group.block_paths
    ]
    dims: dict[str, set[int]] = {}
    first: dict[str, tuple[Group, Member]] = {}
    for group in groups:
        for member in group.members:
            if not member.norm:
                dims.setdefault(member.path, set()).add(member.dim)
                first.setdefault(member.path, (group, member))
    if not (dims or blocks):
        raise ValueError("there is no prunable weight in these groups")
    return blocks + [
        Side(
            path,
            model.get_submodule(path),
            tuple(sorted(dims[path])),
            member.width,
            masked(stream_of(family, group, member)),
            group.head_dim * (1 if group.slots else group.indices_per_unit),
            f"{group.home.blocks}.{group.layer}",
            expert_of(model, path),
        )
        for path, (group, member) in first.items()
    ]


def _passes(sides: Sequence[Side], collectors: Sequence[Collector], bound: int | None) -> list[list[Side]]:
    """Consecutive sides, as many as the bound on the collectors' bytes allows in each pass."""

    def need(side: Side) -> int:
        return sum(collector.bytes_needed(side) for collector in collectors)

    for side in sides:
        if bound is not None and need(side) > bound:
            raise CalibrationError(
                f"a gradient bound of {bound} bytes is too small: {side.path} alone needs {need(side)} bytes; "
                "raise the bound, or use the criterion fisher, which holds no gradients"
            )
    return in_passes(sides, need, bound)
