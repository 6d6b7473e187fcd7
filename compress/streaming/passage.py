"""Forwards that go through a model together, block by block, so that one block at a time has to be there.

A passage is one forward of transformers' own, run as a coroutine that stops wherever a block would be computed. All
passages that have come to a block are answered there before the next block is looked at. For gradients, blocks are
computed without a graph, and what they give begins a new one, which holds what is between two blocks; on the way back a
block is computed again from what it had read, with a graph (Chen et al., "Training Deep Nets with Sublinear Memory
Cost", 2016), and what its inputs get is carried through what is between, to the outputs of the blocks before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast  # what blocks are given and give, whatever it is

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.streaming.pages import Pages

Value = TypeVar("Value")
At = Callable[[str], AbstractContextManager[object]]  # around all that is done at the block of a path
See = Callable[[int], object]  # told of a passage, by its number


@dataclass(frozen=True)
class _Call:
    """What a passage asks of a block."""

    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    compute: Callable[..., Any] | None = None  # in the place of the block's forward


@dataclass(frozen=True)
class _Step:
    """What is left of a call: what was read; where its gradients go; and what stands for what came out."""

    path: str
    read: list[Any]
    spec: TreeSpec
    edges: dict[int, GradientEdge]
    given: list[Tensor | None]


class Passage:
    """A forward that stops at every block.

    Attributes:
        result: what the forward gave; None before its end.
    """

    result: Any = None

    def __init__(self, forward: Callable[[], object]) -> None:
        self._inner = greenlet(forward)
        self.call: _Call | None = None
        self.steps: list[_Step] = []

    @property
    def ended(self) -> bool:
        return bool(self._inner.dead)

    def go(self, *output: object) -> None:
        """Run on to the next block or to the end, with the output of the one where it is; it keeps a grad mode of its
        own.
        """
        self.call, mode = None, torch.is_grad_enabled()
        try:
            found = self._inner.switch(*output)
        finally:
            torch.set_grad_enabled(mode)
        if self.ended:
            self.result = found
        else:
            self.call = found

    def close(self) -> None:
        """End it where it is."""
        self.call = None
        self._inner.throw()


class Passages:
    """The passages of some forwards through the blocks of a model.

    Args:
        paths: of all blocks, in the order in which forwards come to them.
        forwards: each makes its inputs and has the model compute them; what it gives is its result. With `learning`
            that begins with a scalar to differentiate.
        pages: where what they hold is while they wait; default: all in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        forwards: Sequence[Callable[[], object]],
        learning: bool,
        pages: Pages | None = None,
    ) -> None:
        self.model, self.learning, self.pages = model, learning, pages or Pages(sys.maxsize)
        self.paths, self.blocks = paths, {path: model.get_submodule(path) for path in paths}
        self.compute = {path: block.forward for path, block in self.blocks.items()}
        self.passages = [Passage(forward) for forward in forwards]

    def asked(self, path: str) -> bool:
        """Whether any passage waits at the block, or has been there and comes back."""
        return any(_stands(passage) == path for passage in self.passages)

    @property
    def results(self) -> list[Any]:
        """Of the forwards, once they have ended."""
        return [passage.result for passage in self.passages]

    def look(self, path: str, see: See) -> None:
        """Have a block compute whatever waits at it, for the hooks on it and inside it alone: nobody goes on with what
        comes out. `see`: told of each passage before.
        """
        block, stop = self.blocks[path], self.blocks[path].__dict__["forward"]
        block.__dict__["forward"] = self.compute[path]
        try:
            for number, passage in enumerate(self.passages):
                if passage.call is not None and passage.call.path == path:
                    see(number)
                    given = passage.call.args, dict(passage.call.kwargs)
                    self.pages.bring(tree_leaves(given))
                    args, kwargs = tree_map(_copied, given)
                    with self.pages:
                        block(*args, **kwargs)
                    self.pages.settle()
        finally:
            block.__dict__["forward"] = stop

    def forward(self, at: At, see: See, seen: See, again: bool = False) -> None:
        """All the way through. `see`, `seen`: before and after a block, by a passage's number.

        Args:
            again: once more through the blocks for those that come back, until all have ended.

        Raises:
            UnsuitableOptionError: forwards come to the blocks in another order, or to one of them again.
        """
        try:
            with _stops(self.blocks), torch.set_grad_enabled(self.learning):
                for passage in self.passages:
                    self._go(passage)
                self._through(at, see, seen)
                while again and any(passage.call is not None for passage in self.passages):
                    self._through(at, see, seen)
                self._check_ended()
        finally:
            for passage in self.passages:
                passage.close()
            if not self.learning:
                self.pages.bring_all()

    def _through(self, at: At, see: See, seen: See) -> None:
        for path in self.paths:
            with at(path):
                for number, passage in enumerate(self.passages):
                    see(number)
                    if passage.call is not None and passage.call.path == path:
                        self._go(passage, self._answer(passage, passage.call))
                    seen(number)

    def backward(self, at: At, see: See, seen: See) -> None:
        """The gradients of all results, back through the blocks; arguments as of `forward`."""
        for path, block in reversed(self.blocks.items()):
            with at(path), torch.enable_grad():
                for number, passage in enumerate(self.passages):
                    see(number)
                    if passage.steps and passage.steps[-1].path == path:
                        self._back(passage, block, passage.steps.pop())
                        self.pages.settle()
                    seen(number)
        self.pages.bring_all()

    def _go(self, passage: Passage, *output: object) -> None:
        """Run on, and put away what need not stay; where it ends, its result is differentiated at once."""
        saving = saved_tensors_hooks(self.pages.pack, self.pages.unpack) if self.learning else nullcontext()
        self.pages.recording = True
        try:
            with self.pages, saving:
                passage.go(*output)
        finally:
            self.pages.recording = False
        if passage.ended:
            if self.learning and passage.result[0].requires_grad:
                self._carry(passage, passage.result[:1], None)
            self.pages.bring(tree_leaves(passage.result))  # which is read elsewhere, where nothing else brings it back
            passage.result = tree_map_only(Tensor, lambda value: value.detach().clone(), passage.result)
        self.pages.settle()

    def _answer(self, passage: Passage, call: _Call) -> object:
        read, spec = tree_flatten((call.args, dict(call.kwargs)))
        self.pages.bring(read)
        with self.pages, torch.no_grad():
            output = (call.compute or self.compute[call.path])(*call.args, **call.kwargs)
        parts, made = tree_flatten(output)
        self.pages.add(parts, seen=read)
        if not self.learning:
            return output
        edges = {place: get_gradient_edge(one) for place, one in enumerate(read) if _learns(one)}
        given = [_begin(part) if _floats(part) else None for part in parts]
        handed = [part if leaf is None else _Handed.apply(leaf, part) for part, leaf in zip(parts, given, strict=True)]
        read = [one.detach() if isinstance(one, Tensor) else one for one in read]
        passage.steps.append(_Step(call.path, read, spec, edges, given))
        return tree_unflatten(handed, made)

    def _back(self, passage: Passage, block: nn.Module, step: _Step) -> None:
        """Compute a block again, and carry the gradients of what it gave to what it had read, and on."""
        leaves = [leaf for leaf in step.given if leaf is not None and leaf.grad is not None]
        self.pages.bring([*step.read, *(leaf.grad for leaf in leaves)])
        read = [
            one.detach().requires_grad_(place in step.edges) if isinstance(one, Tensor) else one
            for place, one in enumerate(step.read)
        ]
        args, kwargs = tree_unflatten(read, step.spec)
        with self.pages:
            parts, _ = tree_flatten(block(*args, **kwargs))
        reached = [
            (part, leaf.grad)
            for part, leaf in zip(parts, step.given, strict=True)
            if leaf is not None and leaf.grad is not None and part.requires_grad
        ]
        if reached:
            made, grads = zip(*reached, strict=True)
            torch.autograd.backward(made, grads)
        onward = [(edge, read[place].grad) for place, edge in step.edges.items() if read[place].grad is not None]
        if onward:
            edges, grads = zip(*onward, strict=True)
            self._carry(passage, edges, grads)

    def _carry(self, passage: Passage, values: Sequence[Any], grads: Sequence[Tensor] | None) -> None:
        """Through what is between blocks, to what they gave: the gradients wait there."""
        leaves = [leaf for step in passage.steps for leaf in step.given if leaf is not None]
        self.pages.bring((leaf.grad for leaf in leaves if leaf.grad is not None), to_change=True)
        torch.autograd.backward(values, grads, retain_graph=True)  # others come through, too; the rest goes
        self.pages.add(leaf.grad for leaf in leaves if leaf.grad is not None)

    def _check_ended(self) -> None:
        for passage in self.passages:
            if passage.call is not None:
                raise UnsuitableOptionError(
                    f"this model comes back to {passage.call.path} after later blocks, so that its blocks cannot be "
                    "read one after the other; give --stream off"
                )


def _stands(passage: Passage) -> str | None:
    """The block at which a passage waits, or, on the way back, that it comes to next."""
    if passage.call is not None:
        return passage.call.path
    return passage.steps[-1].path if passage.ended and passage.steps else None


@contextmanager
def _stops(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside it the blocks are not computed: whoever calls one waits for what it is answered."""
    before = {path: block.__dict__.get("forward") for path, block in blocks.items()}
    try:
        for path, block in blocks.items():
            block.__dict__["forward"] = partial(_stop, path)
        yield
    finally:
        for path, block in blocks.items():
            del block.__dict__["forward"]
            if before[path] is not None:
                block.__dict__["forward"] = before[path]


def _stop(path: str, *args: object, **kwargs: object) -> object:
    return _wait(_Call(path, args, kwargs))


def _wait(call: _Call) -> object:
    mode = torch.is_grad_enabled()
    answer = cast(greenlet, getcurrent().parent).switch(call)
    torch.set_grad_enabled(mode)
    return answer


def in_the_place_of(block: nn.Module, compute: Callable[..., Value], *args: object) -> Value:
    """What a function gives that computes with the weights of a block in another way than the block itself: a passage
    without gradients stops here, too.
    """
    stop = block.__dict__.get("forward")
    if isinstance(stop, partial) and stop.func is _stop:
        return cast(Value, _wait(_Call(stop.args[0], args, {}, compute)))
    return compute(*args)


class _Handed(torch.autograd.Function):
    """The value as the output of a leaf that has its shape and no memory: its gradient is the leaf's."""

    @staticmethod
    def forward(_ctx: Any, _leaf: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> tuple[Any, None]:
        return grads[0], None


def _begin(value: Tensor) -> Tensor:
    return value.new_zeros(()).expand(value.shape).requires_grad_()


def _copied(value: object) -> object:
    """Blocks may write into what they are given."""
    return value.clone() if isinstance(value, Tensor) else value


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _learns(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
