"""Where the blocks of a model are, and one of them with random weights and arguments that it takes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any  # blocks and configs of transformers

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

POSITIONS = 6
MODALITIES = {"vision_config": "vision", "text_config": "language"}
Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of blocks: its path, and the part of the model's config that describes it (of MODALITIES)."""

    path: str
    section: str


@dataclass(frozen=True, slots=True)
class Specimen:
    """One block with random weights, and arguments for it."""

    block: nn.Module
    arguments: Arguments

    def run(self) -> list[Tensor]:
        """All tensors that the block hands on."""
        with torch.inference_mode():
            outputs = self.block(**self.arguments)
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def find_stacks(model: nn.Module) -> list[Stack]:
    """The lists of blocks of the vision and text towers, in the order of the model. Lists inside blocks are none, nor
    those of modules that read no hidden states (mergers), nor those of another part of the config (a Q-Former)."""
    stacks: list[Stack] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack.path}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_is_block, module)):
            section = _section(model, path)
            if section:
                stacks.append(Stack(path, section))
    return stacks


def _is_block(module: nn.Module) -> bool:
    linears = sum(isinstance(one, nn.Linear) for one in module.modules())
    return linears > 1 and "hidden_states" in inspect.signature(module.forward).parameters


def _section(model: nn.Module, path: str) -> str | None:
    """The part of the config that the nearest module around `path` was built from."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        for name in MODALITIES if isinstance(config, PreTrainedConfig) else ():
            if type(config) is type(getattr(model.config, name, None)):
                return name
        if config is not None:
            return None
    return None


def specimen_of(block: nn.Module, config: Any) -> Specimen:
    """A real copy of a block on the meta device that was built from `config`, with arguments it was tried with.

    Raises:
        ValueError: it cannot be called; the message says why.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = copy.deepcopy(block).to_empty(device="cpu").float().eval()
        _fill(block)
        why = ""
        for arguments in _arguments(block, config):
            specimen = Specimen(block, arguments)
            try:
                first = specimen.run()[0]
            except Exception as error:  # somebody else's block, called on suspicion
                why = why or f"{type(error).__name__}: {error}"  # the first way is the likeliest
                continue
            hidden_states: Tensor = arguments["hidden_states"]
            if first.shape == hidden_states.shape and first.isfinite().all():
                return specimen
            why = why or "it gives no hidden states of the size of those it takes"
    raise ValueError(" ".join(why.split())[:200])


def _fill(block: nn.Module) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        for buffer in block.buffers():
            buffer.copy_(torch.rand(buffer.shape) if buffer.is_floating_point() else torch.zeros_like(buffer))


def _arguments(block: nn.Module, config: Any) -> Iterator[Arguments]:
    """Arguments to try, by the names under which transformers' blocks ask for them.

    Raises:
        ValueError: the block asks for something else.
    """
    asked = inspect.signature(block.forward).parameters
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    packed = "cu_seqlens" in asked  # all images of a batch in one row of patches
    for width in dict.fromkeys(module.in_features for module in linears):
        hidden_states = torch.randn(POSITIONS, width) if packed else torch.randn(1, POSITIONS, width)
        known: Arguments = {
            "hidden_states": hidden_states,
            "attention_mask": None,
            "position_ids": torch.arange(POSITIONS)[None],
            "cu_seqlens": torch.tensor([0, POSITIONS], dtype=torch.int32),
            "encoder_hidden_states": torch.randn(1, POSITIONS + 2, width),
        }
        needed = [
            name
            for name, one in asked.items()
            if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        ]
        for name in needed:
            if name not in {*known, "position_embeddings"}:
                raise ValueError(f"it asks for {name!r}, which no block known so far does")
        given = {name: value for name, value in known.items() if name in asked}
        if "position_embeddings" not in asked:
            yield given
            continue
        for angles in _angles(block, config, packed):
            yield {**given, "position_embeddings": (angles.cos(), angles.sin())}
        yield {**given, "position_embeddings": None}


def _angles(block: nn.Module, config: Any, packed: bool) -> Iterator[Tensor]:
    """Of rotary embeddings, [S, D] or [1, S, D], of head sizes that the attentions or the config name."""
    owners = (*map(vars, block.modules()), config.to_dict())  # a config may refuse to name what differs by layer
    named = [owner.get("head_dim") for owner in owners]
    for size in dict.fromkeys(size for size in named if isinstance(size, int)):
        half = torch.rand(POSITIONS, size // 2)
        angles = torch.cat([half, half], dim=-1)
        yield from (angles, angles[None]) if packed else (angles[None], angles)
