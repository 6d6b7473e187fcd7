"""Experts apart: transformers stacks the weights of a block's experts in two tensors, here each is an MLP of linears.

What watches, cuts, refits and adapts linears then does so with an expert as with any other MLP, and an expert sees the
tokens that the router sends to it alone. Models are apart inside slimvlm; what is saved or given away never is, and a
`state_dict` has what the unmodified class would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.families import Experts, Family
from slimvlm.compress.models.streaming.lazy import Lazy, read_in

ALIGNED = 8  # of which a width is a multiple: torch's grouped product reads rows of whole 16 bytes
ROWS, OUTPUT = "gate_up_proj", "down_proj"  # [E, 2 I, C], the gates before the others; [E, C, I]


class Expert(nn.Module):
    """A gated MLP.

    Attributes:
        reads: of all tokens that came to the experts last, those that it read, bool [tokens].
    """

    reads: Tensor

    def __init__(self, rows: Tensor, output: Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = _linear(rows), _linear(output)


class ExpertsApart(nn.ModuleList):
    """The experts of a block, which compute what the stacked ones do. All have the same width.

    Args:
        stacked: transformers' module; its weights are shared, not copied.
        chosen: experts that the router picks for a token.
    """

    stacked: Any

    def __init__(self, stacked: Any, chosen: int) -> None:
        rows, output = stacked.gate_up_proj.detach(), stacked.down_proj.detach()
        super().__init__(Expert(*pair) for pair in zip(rows, output, strict=True))
        self.requires_grad_(stacked.gate_up_proj.requires_grad)
        self.share = chosen / len(rows)
        del stacked.gate_up_proj, stacked.down_proj
        self.register_state_dict_post_hook(_stack_entries)
        self.__dict__["stacked"] = stacked  # none of its modules: what is left of it has no weights

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the stacked tensors, by their names."""
        return {name: [len(self), *self[0].get_parameter(f"{name}.weight").shape] for name in (ROWS, OUTPUT)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Args: [tokens, C], the experts of every token and their weights, [tokens, chosen]."""
        if isinstance(next(self.parameters()), Lazy):  # by itself, each would be read with all of them
            with read_in(self, hidden_states.device):
                return self.forward(hidden_states, top_k_index, top_k_weights)
        result = torch.zeros_like(hidden_states)
        expert: Any  # an Expert, or what peft has made of one
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            expert.reads = (top_k_index == number).any(1)
            if len(token) or torch.is_grad_enabled():  # all processes of a training have the same gradients
                inner = self.stacked._apply_gate(expert.gate_up_proj(hidden_states[token]))
                added = expert.down_proj(inner) * top_k_weights[token, place, None]
                result = result.index_add(0, token, added.to(result.dtype))
        return result

    def together(self) -> nn.Module:
        """Transformers' module again; this one is to be thrown away."""
        learns = next(self.parameters()).requires_grad
        for name in (ROWS, OUTPUT):
            weights = torch.stack([expert.get_parameter(f"{name}.weight").detach() for expert in self])
            setattr(self.stacked, name, nn.Parameter(weights, requires_grad=learns))
        self.stacked.intermediate_dim = self.stacked.down_proj.shape[2]
        stacked: nn.Module = self.stacked
        return stacked


def take_apart(model: nn.Module, family: Family) -> None:
    """Replace the stacked experts of `model`, in place.

    Raises:
        UnsupportedModelError: they are stored in another way.
    """
    for tower in family.towers:
        for part in (part for part in tower.parts if isinstance(part, Experts)):
            chosen = getattr(attrgetter(tower.config)(model.config), part.chosen)
            for block in model.get_submodule(tower.blocks).children():
                owner = _owner(block, part.module)
                stacked = getattr(owner, part.module.rpartition(".")[2], None)
                if stacked is None or isinstance(stacked, ExpertsApart):
                    continue
                _check(stacked, family)
                setattr(owner, part.module.rpartition(".")[2], ExpertsApart(stacked, chosen))


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """Inside it, `model` has transformers' own modules in the place of experts that are apart."""
    found = put_together(model)
    try:
        yield
    finally:
        for owner, name, chosen in found:
            setattr(owner, name, ExpertsApart(getattr(owner, name), chosen))


def put_together(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Give transformers' own modules back to `model`, in place, block by block; where, and how many a router picks."""
    found = [
        (owner, name, round(module.share * len(module)))
        for owner in model.modules()
        for name, module in owner.named_children()
        if isinstance(module, ExpertsApart)
    ]
    for owner, name, _ in found:
        setattr(owner, name, getattr(owner, name).together())
    return found


def stacked_names(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Of weights that are apart: name -> (name of the stacked tensor, its entry)."""
    return {
        f"{path}.{number}.{name}.weight": (f"{path}.{name}", number)
        for path, experts in model.named_modules()
        if isinstance(experts, ExpertsApart)
        for number in range(len(experts))
        for name in (ROWS, OUTPUT)
    }


def expert_of(model: nn.Module, path: str) -> Expert | None:
    """The expert whose linear is at `path`; None: it is of none."""
    owner = model.get_submodule(path.rpartition(".")[0])
    return owner if isinstance(owner, Expert) else None


def met_weights(module: nn.Module) -> int:
    """Weights of the linears in a module that a token meets: of experts, as many as are picked for it."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    met = sum(met_weights(child) for child in module.children())
    return round(met * module.share) if isinstance(module, ExpertsApart) else met


def _owner(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None


def _check(stacked: Any, family: Family) -> None:
    plain = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    found = {name: getattr(stacked, name, None) for name in plain}
    if found != plain or getattr(stacked, "has_post_expert_norm", False):
        raise UnsupportedModelError(
            f"the experts of family {family.name!r} are stored in a way that cannot be cut ({type(stacked).__name__})"
        )


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _stack_entries(experts: Any, entries: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """Those of linears that are adapted stay apart."""
    for name in (ROWS, OUTPUT):
        own = [f"{prefix}{number}.{name}.weight" for number in range(len(experts))]
        if all(key in entries for key in own):
            entries[f"{prefix}{name}"] = torch.stack([entries.pop(key) for key in own])
