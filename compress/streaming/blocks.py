"""The blocks of a model, one of which at a time is there while it is streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn

from slimvlm.compress.models.families import Family
from slimvlm.compress.models.projections import resolve
from slimvlm.compress.models.streaming.lazy import places_of, read
from slimvlm.compress.models.streaming.weights import streamed, tables_of

Here = dict[nn.Parameter, nn.Parameter]  # what is there, by what stands for it otherwise


def blocks_of(model: nn.Module, family: Family) -> list[str]:
    """Their paths, tower by tower: the order in which a forward comes to them."""
    return [
        f"{tower.blocks}.{index}"
        for tower in family.towers
        for index in range(len(resolve(model, tower.blocks, family)))
    ]


def with_tables(model: nn.Module, family: Family) -> list[str]:
    """The blocks, before each tower the embeddings of tokens and after all the head, where these are not in memory
    either (`Holding`).
    """
    ends = [path for path in tables_of(model) if places_of(model.get_submodule(path))]
    before = [path for path in ends if isinstance(model.get_submodule(path), nn.Embedding)]
    blocks = blocks_of(model, family)
    first = {f"{tower.blocks}.0" for tower in family.towers}
    parts = [[*before, path] if path in first else [path] for path in blocks]
    return [*(path for part in parts for path in part), *(path for path in ends if path not in before)]


class Blocks:
    """Reads the weights of a streamed model's blocks, of one while another is worked with. Within `with`; of a model
    that is in memory all blocks are there anyway.

    Args:
        order: of the paths in which blocks will be asked for; one that comes twice in a row is read once. What is not
            among them may be asked for in between.
    """

    def __init__(self, model: nn.Module, order: Sequence[str]) -> None:
        self.model, self.order, self.place = model, order, 0
        self.device = next(model.parameters()).device
        self._coming: dict[str, Future[Here]] = {}

    def __enter__(self) -> Self:
        self._reader = ThreadPoolExecutor(1, "blocks")
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ask_for(self.order[:1])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._coming.clear()

    @contextmanager
    def held(self, path: str, changed: bool = False) -> Iterator[None]:
        """The weights of this block are in memory meanwhile, where the model computes, and ask for no gradient.

        Args:
            changed: what is done to them there is to stay.

        Raises:
            OutputError: what is to stay has no room on the disk.
        """
        following = self._after(path)
        self._ask_for([path])
        coming = self._coming.pop(path)
        here = coming.result()
        if path in self.order:
            self._coming.clear()  # of one that nobody came to
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
            for parameter in here.values():
                parameter.data.record_stream(torch.cuda.current_stream(self.device))
        if path not in following:
            self._ask_for(following)
        else:
            self._coming[path] = coming
        places = places_of(self.model.get_submodule(path))
        for module, name, lazy in places:
            module._parameters[name] = here[lazy]
        del here, coming
        try:
            yield
            weights = streamed(self.model)
            if changed and weights:
                for module, name, lazy in places:
                    weights.put(lazy, module.get_parameter(name))
        finally:
            for module, name, lazy in places:
                module._parameters[name] = lazy

    def _after(self, path: str) -> Sequence[str]:
        """What comes after it, if it is known."""
        if path not in self.order:
            return ()
        left = self.order[self.place :]
        if path not in left:  # once more from the first one on
            self.place, left = 0, self.order
        self.place += left.index(path) + 1
        return self.order[self.place : self.place + 1]

    def _ask_for(self, paths: Iterable[str]) -> None:
        for path in paths:
            if path not in self._coming:
                self._coming[path] = self._reader.submit(self._read, path)

    @torch.no_grad()
    def _read(self, path: str) -> Here:
        """The weights of a block; on a GPU once `_copies` has got there."""
        lazy = list(dict.fromkeys(parameter for _, _, parameter in places_of(self.model.get_submodule(path))))
        values = read(lazy)
        if self._copies is None:
            values = [value.to(self.device) for value in values]
        else:
            with torch.cuda.stream(self._copies):
                values = [value.pin_memory().to(self.device, non_blocking=True) for value in values]
        return {one: nn.Parameter(value, requires_grad=False) for one, value in zip(lazy, values, strict=True)}
