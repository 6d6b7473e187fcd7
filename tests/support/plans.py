"""Plans made without scores, for tests: random, uniform and keep-all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from slimvlm.compress.models.families import Experts, find_family
from slimvlm.compress.models.groups import Group, count_parameters, dead_blocks, find_blocks, find_groups
from slimvlm.compress.plan import Plan, TowerCount
from slimvlm.compress.slicing.refit import Refit


def make_plan(
    model, choose: Callable[[Group], Iterable[int]], attention_unit: str = "auto", layout: str = "per-layer"
) -> Plan:
    """A plan in which every group keeps the indices `choose` gives; parameters are counted weight by weight."""
    return plan_for(
        model, find_groups(model, find_family(model.config), attention_unit), choose, attention_unit, layout
    )


def keep_blocks(model, leave: Callable[[Group], Iterable[int]], layout: str = "per-layer") -> Plan:
    """A plan in which the blocks that `leave` gives leave every tower."""
    groups = find_blocks(model, find_family(model.config))
    return plan_for(model, groups, lambda group: set(range(group.size)) - set(leave(group)), "auto", layout)


def plan_for(model, groups, choose, attention_unit: str, layout: str) -> Plan:
    family = find_family(model.config)
    keep = {group.key: tuple(sorted(choose(group))) for group in groups}
    before = count_parameters(model)
    dead = dead_blocks(model, family)
    free = sum(one.parameters for one in dead.values())
    removed = {tower.name: 0 for tower in family.towers}
    total = {tower.name: 0 for tower in family.towers}
    for group in groups:
        count = removed_parameters(model, group, keep[group.key])
        removed[group.tower] += count
        total[group.tower] += int(group.parameters.sum())
    return Plan(
        family=family.name,
        model_digest="",
        criterion="random",
        allocator="balanced",
        layout=layout,
        attention_unit=attention_unit,
        rounds=1,
        seed=0,
        ratio=sum(removed.values()) / before,
        calibration_digest="",
        parameters_before=before,
        parameters_after=before - free - sum(removed.values()),
        dropped={name: one.blocks for name, one in dead.items()},
        dropped_parameters=free,
        towers={name: TowerCount(total[name], total[name] - removed[name], 0, 0) for name in total},
        sizes={group.key: group.size for group in groups},
        keep=keep,
        options={},
    )


def removed_parameters(model, group: Group, kept: tuple[int, ...]) -> int:
    """Counted from the member tensors' shapes alone; of a block all but T5's table of biases, which stays."""
    if group.blocks:
        lost = [model.get_submodule(f"{group.path}.{index}") for index in set(range(group.size)) - set(kept)]
        named = (item for block in lost for item in block.named_parameters())
        return sum(weight.numel() for name, weight in named if "relative_attention_bias" not in name)
    kv_kept = {index // group.heads_per_kv for index in kept}
    total = 0
    for member in group.members:
        module, own = model.get_submodule(member.path), group.indices_of(member)
        gone = len(set(own) - (kv_kept if member.heads == "kv" else set(kept))) * member.width
        weight = module.weight
        per_index = 1 if weight.ndim == 1 else weight.shape[1 - member.dim]
        total += gone * per_index
        if member.dim == 0 and getattr(module, "bias", None) is not None:
            total += gone
    return total


def random_choice(seed: int) -> Callable[[Group], list[int]]:
    """Another random number of units in every group (at least one); KV heads keep equally many query heads."""
    generator = random.Random(seed)

    def choose(group: Group) -> list[int]:
        if group.kind == "mlp" and not group.kv_heads:
            return generator.sample(range(group.size), generator.randint(1, group.size))
        everyone = isinstance(group.part, Experts)  # the router knows them all
        kv = generator.sample(
            range(group.kv_heads), group.kv_heads if everyone else generator.randint(1, group.kv_heads)
        )
        per_kv = generator.randint(1, group.heads_per_kv)
        return [
            head * group.heads_per_kv + slot
            for head in kv
            for slot in generator.sample(range(group.heads_per_kv), per_kv)
        ]

    return choose


def random_plan(model, seed: int = 0, attention_unit: str = "auto") -> Plan:
    return make_plan(model, random_choice(seed), attention_unit)


def give_biases(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The cut `model` with another bias on every output projection, its first one where it had none."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for group in find_groups(model, find_family(model.config)):
        weight = model.get_submodule(group.members[-1].path).weight.detach()
        weights[group.members[-1].path] = weight.clone(), 0.1 * torch.randn(len(weight), generator=generator)
    return Refit(weights, 1, 0).put_into(model)


def uniform_plan(model, unit):
    """Half of everything that plain config fields can express."""
    pooled = any(path.endswith("head.mlp") for path, _ in model.named_modules())

    def choose(group):
        if not group.part.fields or (pooled and group.tower == "vision"):
            return range(group.size)
        if group.kind == "mlp":
            return range(group.layer, group.layer + group.size // 2)
        if group.unit == "query-slot":
            return [kv * group.heads_per_kv + group.layer % 2 for kv in range(group.kv_heads)]
        return range(group.heads_per_kv)

    return make_plan(model, choose, unit, "stock")
