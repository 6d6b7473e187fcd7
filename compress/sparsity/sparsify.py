"""Make weights zero block by block, each looked at with the zeros of those before it (Wanda, SparseGPT, ECoFLaP).

All samples go through a block before the next one, first as it is, to see what its linears read, then with its zeros.
So the blocks of a model need not be in memory at once, and every block is run as the model runs it, with its own masks,
positions and biases; published code replays blocks with what the first was given, and calibrates T5 without its
position bias and M-RoPE with plain positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.data.questions import masked, stream_of
from slimvlm.compress.models.experts import expert_of
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import Group, count_parameters, find_groups
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.sparsity.counts import linears_of, patterned_zeros, zeros_of
from slimvlm.compress.sparsity.rules import PATTERNS, RULES, Zeros
from slimvlm.compress.statistics.by_block import Look, change_by_block
from slimvlm.compress.statistics.collect import importance_of
from slimvlm.compress.statistics.collector import Side
from slimvlm.compress.statistics.pools import Chosen, check_pool, counting, mixed_blocks
from slimvlm.compress.statistics.reading import Batch
from slimvlm.compress.statistics.rows import ALL, STATISTICS, CalibrationOptions, TokenRule

Batches = Sequence[Batch | Callable[[], Batch]]


@dataclass(frozen=True)
class Asked:
    """What is to become zero.

    Attributes:
        pattern: of PATTERNS.
        ratio: fraction of ALL parameters; of a pattern with a size of its own it says nothing.
        rule: of RULES.
        allocator: `local`, the same share of every group, or one of ALLOCATORS that asks for their importance.
        seed: of what is drawn.
        tokens: that count; every block's own choice is made with the zeros of those before it.
    """

    pattern: str = "unstructured"
    ratio: float = 0.5
    rule: str = "wanda"
    allocator: str = "local"
    seed: int = 0
    tokens: TokenRule = ALL

    def zeros(
        self, model: nn.Module, groups: Sequence[Group], importance: Mapping[str, float] | None
    ) -> dict[str, Zeros]:
        """By path of the linear; see `counts`."""
        pattern = PATTERNS[self.pattern]
        if pattern is not None:
            return patterned_zeros(model, groups, pattern)
        return zeros_of(model, groups, self.ratio, importance)


@dataclass(frozen=True)
class Sparsified:
    """What was done, as the config of the checkpoint records it.

    Attributes:
        pattern, rule, allocator, tokens: that were asked for.
        zeros: share of ALL parameters that were made zero.
        groups: group key -> share of its weights.
        importance: of the groups, where the allocator asked.
    """

    pattern: str
    rule: str
    allocator: str
    tokens: str
    zeros: float
    groups: Mapping[str, float]
    importance: Mapping[str, float] | None = None


def sparsify(
    model: PreTrainedModel, family: Family, batches: Batches, asked: Asked, progress: Progress = silent
) -> Sparsified:
    """Make weights of the linears of all attentions and MLPs of `model` zero, in place.

    Args:
        batches: padded training batches, or functions that make one.

    Raises:
        InfeasibleBudgetError, UnsuitableOptionError: see `counts` and `pools`; found before the data is read.
        CalibrationError: what a linear reads is not finite.
    """
    groups, rule = find_groups(model, family), RULES[asked.rule]
    check_pool(asked.tokens, family, model.config)
    asked.zeros(model, groups, {group.key: 1.0 for group in groups})
    importance = None
    if (asks := ALLOCATORS[asked.allocator].asks) is not None:
        importance = importance_of(
            model, groups, lambda: batches, CalibrationOptions((asks,), seed=asked.seed), progress
        )
    zeros = asked.zeros(model, groups, importance)
    inside: dict[str, list[Group]] = {}
    for group in groups:
        inside.setdefault(_path(group), []).append(group)
    collector, zero, turning = STATISTICS[rule.statistic].make(), Counter[str](), mixed_blocks(model, family)

    def change(path: str, look: Look) -> None:
        if path not in inside:
            return
        sides = _sides(model, family, inside[path])
        mixed = [side for side in turning if side.path == path]
        chosen = counting(asked.tokens, mixed, look, processes.reduce)
        with collector.watch(sides):
            look(Chosen(collector, chosen))
            seen = collector.finish(processes.reduce)
        for side in sides:
            weight = side.module.weight
            weight.copy_(rule.prune(weight.float(), seen.pop(side.path).to(weight.device), zeros[side.path]))
            zero[side.path] = int((weight == 0).sum())
        done.append(path)
        progress("sparsify", len(done), len(inside))

    done: list[str] = []
    change_by_block(model, family, batches, change)
    return _counted(model, groups, asked, importance, zero)


def _path(group: Group) -> str:
    """Of the block that a group is in."""
    return f"{group.home.blocks}.{group.layer}"


def _sides(model: nn.Module, family: Family, groups: Sequence[Group]) -> list[Side]:
    """Every linear of the groups, as something that is read."""
    sides = {}
    for group in groups:
        for member in group.members:
            if not member.norm:
                stream = masked(stream_of(family, group, member))
                linear, expert = model.get_submodule(member.path), expert_of(model, member.path)
                sides[member.path] = Side(member.path, linear, (1,), stream=stream, block=_path(group), expert=expert)
    return list(sides.values())


def _counted(
    model: nn.Module,
    groups: Sequence[Group],
    asked: Asked,
    importance: Mapping[str, float] | None,
    zero: Mapping[str, int],
) -> Sparsified:
    """`zero`: how many weights are, by the path of the linear."""
    shares = {}
    for group in groups:
        linears = linears_of(model, group)
        shares[group.key] = sum(zero[path] for path in linears) / sum(one.weight.numel() for one in linears.values())
    share = sum(zero.values()) / count_parameters(model)
    return Sparsified(asked.pattern, asked.rule, asked.allocator, asked.tokens.name, share, shares, importance)
