"""Least-squares refit: what the kept columns of an output projection can do in the place of the cut ones.

An output projection reads x (hidden channels, or heads) and keeps the columns K of its weight W. The new weight is the
one that loses least of the dense output over the calibration tokens, min |W x - W' x_K|^2 + damping |W' - W_K|^2:

    W' = W_K + W_P C[P, K] (C[K, K] + damping)^-1,     C = sum of x x^T

Only W_P, the cut columns, is redistributed: weight recalling (UKMP, Eq. 12) in closed form, without training, and the
optimum that OBS (Hassibi and Stork, 1993) takes for single weights. Where the projection has a bias, C is taken about
the mean of x, and the bias takes up the mean of what was cut; `refit+bias` gives a bias where there is none. C is
[I, I] per projection, so as many projections are read at once as a bound on memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.data.collate import Batch
from slimvlm.compress.data.questions import masked, stream_of
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.computing import in_passes
from slimvlm.compress.models.experts import expert_of
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import Group, count_parameters
from slimvlm.compress.models.modeling_slim import RECORD, give_bias
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.slicing.cuts import complement, find_cuts
from slimvlm.compress.statistics.by_block import Found, look_by_block
from slimvlm.compress.statistics.collect import read_forward
from slimvlm.compress.statistics.collector import Collector, Side
from slimvlm.compress.statistics.collectors.moments import DAMPING, about_mean
from slimvlm.compress.statistics.rows import STATISTICS

Batches = Sequence[Callable[[], Batch]]
MOST, LEAST = 4 * 2**30, 128 * 2**20  # bytes of sums held at once; between them, a quarter of the fp32 weights


@dataclass(frozen=True)
class Refit:
    """New weights [O, kept] and biases [O] by module path, in the model's dtype; None: the module's own stays.

    Attributes:
        lost_by_cut, lost: share of the projections' output energy over the calibration tokens that the cut loses by
            itself, and after the refit; mean over projections.
    """

    weights: Mapping[str, tuple[Tensor, Tensor | None]]
    lost_by_cut: float
    lost: float

    def put_into(self, model: PreTrainedModel, places: Callable[[str], str] = str) -> PreTrainedModel:
        """Replace the weights of the cut `model`, in place; `places`: where it has the modules of the dense one. What
        gets its first bias is told in the model's record.
        """
        weights = streamed(model)
        put = weights.put if weights else Tensor.copy_
        with torch.no_grad():
            for path, (weight, bias) in self.weights.items():
                place = places(path)
                module = model.get_submodule(place)
                put(module.get_parameter("weight"), weight)
                if bias is not None and module.bias is None:
                    getattr(model.config, RECORD).setdefault("biases", {})[place] = len(give_bias(module))
                if bias is not None:
                    put(module.get_parameter("bias"), bias)
        return model


def refit(  # noqa: PLR0913 (the model with what is known of it, what is kept, what is read)
    model: PreTrainedModel,
    family: Family,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
    batches: Batches,
    *,
    memory: int | None = None,
    progress: Progress = silent,
    biased: bool = False,
    held: dict[str, Tensor] | None = None,
) -> Refit:
    """The refit of the dense `model` for a cut that keeps `keep` (indices by group key). The model is only read.
    Several processes share the samples and the projections; all get the whole refit.

    Args:
        batches: functions that make a padded training batch; called once per pass.
        memory: bound in bytes on the sums held at once (a single projection may need more); default: a quarter of the
            fp32 weights, from 128 MiB to 4 GiB.
        biased: give a bias to projections that have none, too, but to no expert: stacked, they have none.
        held: moments of an earlier refit of the same model by the same batches, which are not read again; to them are
            added as many as `memory` holds.

    Raises:
        CalibrationError: a sum is not finite, or there are no tokens.
    """
    sides, kept = cut_projections(model, family, groups, keep)
    weights, losses, hold = {}, [], keeping(model)

    bound = memory or min(MOST, max(LEAST, count_parameters(model)))
    collector = STATISTICS["moments"].make()

    def found(chosen: Sequence[Side], seen: dict[str, Tensor]) -> None:
        if held is not None:
            _hold(held, chosen, seen, bound)
        solve(chosen, seen)

    def solve(chosen: Sequence[Side], seen: dict[str, Tensor]) -> None:
        # Nothing is known of an expert that no token was sent to.
        known = [side for side in chosen if seen[f"{side.path}:tokens"] or side.expert is None]
        moments = [[seen.pop(key) for key in _moments_of(side)] for side in known]
        for side, (weight, bias, lost) in zip(known, _solve_all(known, kept, biased, moments), strict=True):
            weights[side.path] = hold(weight), None if bias is None else hold(bias)
            losses.append((lost[0].item(), lost[1].item()))

    read = {side.path: side.path in (held or ()) for side in sides}
    solve([side for side in sides if read[side.path]], dict(held or {}))
    unread = [side for side in sides if not read[side.path]]
    look((model, family, batches), collector, unread, found, progress, bound)
    return Refit(weights, *mean_losses(losses))


def _moments_of(side: Side) -> tuple[str, str, str]:
    return side.path, f"{side.path}:sum", f"{side.path}:tokens"


def _hold(held: dict[str, Tensor], chosen: Sequence[Side], seen: Mapping[str, Tensor], bound: int) -> None:
    """Keep of what was seen as much as fits."""
    for side in chosen:
        moments = {key: seen[key] for key in _moments_of(side)}
        if sum(moment.nbytes for moment in (*held.values(), *moments.values())) <= bound:
            held |= moments


refit_with_bias = partial(refit, biased=True)


def cut_projections(
    model: nn.Module, family: Family, groups: Sequence[Group], keep: Mapping[str, Sequence[int]]
) -> tuple[list[Side], dict[str, Tensor]]:
    """(the output projections that lose columns, by path those they keep)."""
    sides: list[Side] = []
    kept: dict[str, Tensor] = {}
    for group in groups:
        for cut in find_cuts(group, torch.tensor(keep[group.key], dtype=torch.int64)):
            if cut.columns is not None:
                stream = masked(stream_of(family, group, group.members[0]))
                expert = expert_of(model, cut.path)
                block = f"{group.home.blocks}.{group.layer}"
                linear = model.get_submodule(cut.path)
                sides.append(Side(cut.path, linear, (1,), stream=stream, block=block, expert=expert))
                kept[cut.path] = cut.columns
    return sides, kept


def look(
    read: tuple[nn.Module, Family, Batches],
    collector: Collector,
    sides: Sequence[Side],
    found: Found,
    progress: Progress,
    bound: int | None = None,
) -> None:
    """Have a model read the batches while `collector` watches, and tell what was `found` of all sides, of as many at
    once as hold no more than `bound` bytes; of a model that is streamed, of a block's, as long as that is there.
    """
    model, family, batches = read
    if streamed(model):
        look_by_block(read, collector, sides, found, partial(progress, "refit"))
        return
    passes = in_passes(sides, collector.bytes_needed, bound)
    share = len(processes.share(len(batches)))
    for number, chosen in enumerate(passes):
        with collector.watch(chosen):
            told = partial(_told, progress, number * share, len(passes) * share)
            read_forward(model, family, batches, collector, told)
            seen = collector.finish(processes.reduce)
        found(chosen, seen)


def _told(progress: Progress, before: int, total: int, done: int) -> None:
    progress("refit", before + done, total)


def keeping(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What holds a new weight until it is put into the cut model: one that is streamed, in files beyond a bound."""
    weights = streamed(model)
    return weights.scratch.keep if weights else lambda weight: weight


def mean_losses(losses: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of (by the cut alone, after all) per projection."""
    by_cut, after = torch.tensor(losses or [(0.0, 0.0)]).mean(0).tolist()
    return by_cut, after


Solved = tuple[Tensor, Tensor | None, Tensor]  # weight, bias, [lost by the cut alone, after all]


def _solve_all(
    sides: Sequence[Side], kept: Mapping[str, Tensor], biased: bool, found: Sequence[Sequence[Tensor]]
) -> list[Solved]:
    """Each by one of the processes, which then tells the others."""
    for side, (products, _, count) in zip(sides, found, strict=True):
        if not (count and products.isfinite().all()):
            raise CalibrationError(f"the inputs of {side.path} are not finite, or there are none; check the data")
    mine = processes.share(len(sides))
    solved = []
    for turn, (side, moments) in enumerate(zip(sides, found, strict=True)):
        solve = _solve if turn in mine else _unsolved
        has_bias = side.module.bias is not None or (biased and side.expert is None)
        solved.append(solve(side.module, kept[side.path], has_bias, *moments))
    for turn, values in enumerate(solved):
        for value in values:
            if value is not None:
                processes.tell(value, turn % processes.count())
    return solved


def _unsolved(linear: nn.Linear, columns: Tensor, biased: bool, *_: Tensor) -> Solved:
    """Room for what another process solves."""
    weight = linear.weight.detach()
    room = weight.new_empty(len(weight), len(columns)), weight.new_empty(len(weight)) if biased else None
    return *room, weight.new_empty(2, dtype=torch.float32)


def _solve(linear: nn.Linear, columns: Tensor, biased: bool, products: Tensor, total: Tensor, count: Tensor) -> Solved:
    """Of an input's moments."""
    weight, tokens = linear.weight.detach().float(), int(count)
    mean = total / max(tokens, 1)
    kept, dropped = (index.to(weight.device) for index in (columns, complement(columns, weight.shape[1])))
    energy = _energy(weight, products).clamp(min=1e-30)
    by_cut = _energy(weight[:, dropped], products[dropped][:, dropped]) / energy
    if biased:
        products = about_mean(products, total, tokens)
    inner = products[kept][:, kept]
    inner.diagonal().add_(DAMPING * products.diagonal().mean().clamp(min=1e-30))
    new = weight[:, kept] + torch.linalg.solve(inner, products[kept][:, dropped] @ weight[:, dropped].T).T
    change = weight.clone()
    change[:, kept] -= new
    lost = _energy(change, products) / energy
    dtype, shift = linear.weight.dtype, weight @ mean - new @ mean[kept]
    return new.to(dtype), shifted(linear.bias, shift, dtype) if biased else None, torch.stack([by_cut, lost])


def shifted(bias: Tensor | None, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias (None: there is none) with `shift` added in fp32."""
    return (shift if bias is None else shift + bias.detach().float()).to(dtype)


def _energy(weight: Tensor, products: Tensor) -> Tensor:
    """Sum over tokens of |weight x|^2."""
    return ((weight @ products) * weight).sum()
