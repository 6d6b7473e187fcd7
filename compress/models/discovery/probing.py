"""Which linears of a block read what another one writes, by disturbing it while all others are held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from slimvlm.compress.models.discovery.blocks import Specimen

STEP = 4.0  # outputs of random blocks are of size one: a step that no activation's flat side hides
CHANGED = 1e-4  # of the largest change
PLACE = 2  # the position that is disturbed: positions before it and behind it tell a query from a key
OUTSIDE = ""  # what the block hands on, among those who read

Seen = Mapping[str, Tensor]


class Probe:
    """A block whose `nodes` (linears, and norms over what they give) go on giving what they gave undisturbed.

    Hence what changes when one of them is disturbed is what reads it, with no other node between.
    """

    def __init__(self, specimen: Specimen) -> None:
        self.specimen = specimen
        modules = dict(specimen.block.named_modules())
        self.linears = {path: module for path, module in modules.items() if isinstance(module, nn.Linear)}
        self.norms = {
            path: module
            for path, module in modules.items()
            if [one.ndim for one in module.parameters()] in ([1], [1, 1]) and not list(module.children())
        }
        self.nodes: dict[str, nn.Module] = dict(self.linears)
        self.held: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        with self._watched():
            first = self.specimen.run()
        self.once = {path for path, calls in self.calls.items() if calls == 1}
        self.still = {**self.inputs, OUTSIDE: _flat(first)}

    def hold(self, norms: Iterable[str]) -> None:
        """Count these norms as nodes from now on."""
        self.nodes |= {path: self.norms[path] for path in norms}

    def readers(self, node: str, column: int | None = None) -> dict[str, Tensor]:
        """Who reads `node`: module path, or OUTSIDE -> bool [positions, columns], what of its input changes.

        Args:
            column: which output of it is disturbed, at PLACE; None: all of them.
        """
        changes: dict[str, Tensor] = {}
        for sign in (STEP, -STEP):
            with self._watched(node, column, sign):
                outputs = self.specimen.run()
            for path, after in {**self.inputs, OUTSIDE: _flat(outputs)}.items():
                before = self.still[path]
                if after.shape == before.shape:
                    change = (after - before).abs()
                    changes[path] = torch.maximum(changes.get(path, change), change)
        found = {path: change > CHANGED * change.max() for path, change in changes.items() if change.max() > CHANGED}
        return {path: seen for path, seen in found.items() if path != node}

    @contextmanager
    def _watched(self, disturbed: str | None = None, column: int | None = None, step: float = 0.0) -> Iterator[None]:
        """Inputs are written down; with a node to disturb, all nodes are held and it is disturbed."""
        self.inputs, self.calls = {}, {}

        def before(path: str, arguments: tuple[Tensor, ...]) -> None:
            if arguments:
                self.inputs[path] = arguments[0].detach().reshape(-1, arguments[0].shape[-1])

        def after(path: str, output: Tensor) -> Tensor | None:
            self.calls[path] = self.calls.get(path, 0) + 1
            if disturbed is None:
                self.held[path] = output.detach().clone()
                return None
            if path not in self.nodes:
                return None
            held = self.held[path].clone()
            if path == disturbed:
                held.view(-1, held.shape[-1])[PLACE, slice(None) if column is None else column] += step
            return held

        with ExitStack() as hooks:
            for path, module in (self.linears | self.norms).items():
                for handle in (
                    module.register_forward_pre_hook(lambda _, given, path=path: before(path, given)),
                    module.register_forward_hook(lambda _, given, output, path=path: after(path, output)),
                ):
                    hooks.callback(handle.remove)
            yield


def _flat(outputs: list[Tensor]) -> Tensor:
    """What the block hands on first, its hidden states, [positions, C]."""
    return outputs[0].reshape(-1, outputs[0].shape[-1])
