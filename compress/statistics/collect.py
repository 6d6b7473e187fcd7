"""Calibration: one pass over sample batches, and everything that is wanted of the data is collected from it.

Gradients and histograms come from the SAME forward (UKMP, AAAI 2025, "importance" and "angle distribution"; the paper's
code reads the data twice). What needs no gradient gets no backward. Full gradient sums can be bounded in memory, at the
price of more passes; same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch
from torch import Tensor, nn

from slimvlm.compress import processes
from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.questions import ask, masked, stream_of, stream_through
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.computing import in_passes, undisturbed
from slimvlm.compress.models.experts import expert_of
from slimvlm.compress.models.families import Family, Tower, find_family
from slimvlm.compress.models.groups import Group, count_parameters, find_groups
from slimvlm.compress.models.projections import Member
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.statistics.by_block import ReadingByBlock
from slimvlm.compress.statistics.collector import Collector, Side
from slimvlm.compress.statistics.loss import loss
from slimvlm.compress.statistics.pools import check_pool, counting, mixed_blocks
from slimvlm.compress.statistics.reading import Batch, Batches, Reading
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions

LEAST = 128 * 2**20  # bytes of activations that are never too many
ACTIVATIONS = 1  # bytes of activations per parameter: a quarter of the fp32 weights


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
    passes = _passes(sides, collectors, options.grad_memory_bytes, by_block=streamed(model) is not None)
    readings = len(passes) + bool(options.tokens.alpha)
    reading = ReadingByBlock if streamed(model) else Reading
    run = reading(model, family, batches, options, progress, readings)
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in options.statistics}
    # What holds nothing sees all sides at once, in the first pass; the rest takes turns.
    large = [collector for collector in collectors if any(map(collector.bytes_needed, sides))]
    with _frozen(model):
        blocks = mixed_blocks(model, family)
        run.counting = counting(options.tokens, blocks, lambda drift: run.read([drift]), processes.reduce)
        for index, chosen in enumerate(passes):
            watching = large if index else collectors
            found, counts = run.collect({one: chosen if one in large else sides for one in watching})
            for name, values in found.items():
                seen[name] |= values
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
) -> None:
    """Have the model read the batches, in forward passes alone, while `collector` watches. Of several processes each
    reads its share, as in `collect`.

    Args:
        told: after every batch how many of its share this process has done.
    """

    with undisturbed(model), torch.no_grad():
        for done, index in enumerate(processes.share(len(batches)), start=1):
            batch = batches[index]
            if (question := ask(model, family, batch() if callable(batch) else batch)) is not None:
                collector.see(question)
                unread = {"logits_to_keep": 1} if "logits_to_keep" in question.inputs else {}  # as few as can be
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
    if streamed(model):  # a block is read once, however many batches go through it
        return 1
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
        modules = nn.ModuleList([*map(model.get_submodule, paths), *linears])
        sides.append(Side(group.key, modules, (), block=f"{group.home.blocks}.{group.layer}"))
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


def _passes(
    sides: Sequence[Side], collectors: Sequence[Collector], bound: int | None, by_block: bool
) -> list[list[Side]]:
    """Consecutive sides, as many as the bound on the collectors' bytes allows in each pass: of all blocks together, or
    of each by itself.
    """

    def need(side: Side) -> int:
        return sum(collector.bytes_needed(side) for collector in collectors)

    for side in sides:
        if bound is not None and need(side) > bound:
            raise CalibrationError(
                f"a gradient bound of {bound} bytes is too small: {side.path} alone needs {need(side)} bytes; "
                "raise the bound, or use the criterion fisher, which holds no gradients"
            )
    if not by_block:
        return in_passes(sides, need, bound)
    blocks: dict[str, list[Side]] = {}
    for side in sides:
        blocks.setdefault(side.block, []).append(side)
    turns = zip_longest(*(in_passes(block, need, bound) for block in blocks.values()), fillvalue=[])
    return [list(chain(*turn)) for turn in turns]
