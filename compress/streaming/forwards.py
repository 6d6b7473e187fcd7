"""Forward passes of a model whose blocks are read one after the other: see passage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from torch import nn

from slimvlm.compress.models.families import Family
from slimvlm.compress.streaming.blocks import Blocks, blocks_of, with_tables
from slimvlm.compress.streaming.pages import Pages
from slimvlm.compress.streaming.passage import Passages

Result = TypeVar("Result")
Around = Callable[[str, Passages], AbstractContextManager[object]]


def through_blocks(
    model: nn.Module,
    family: Family,
    forwards: Sequence[Callable[[], Result]],
    around: Around = lambda *_: nullcontext(),
    again: bool = False,
) -> list[Result]:
    """What functions give that have the model compute, without gradients: all go through a block before the next one is
    read, and what they hold meanwhile is put away beyond a bound, see pages. They stop inside of the model, so that
    modes of torch are the caller's to set, and not theirs.

    Args:
        around: all that is done at a block, by its path, while it is in memory.
        again: forwards may come back to a block, which is then read once more for all that do.

    Raises:
        UnsuitableOptionError: forwards come to the blocks in another order, or to one of them again.
    """
    passages = Passages(model, with_tables(model, family), forwards, learning=False, pages=Pages())
    with Blocks(model, blocks_of(model, family)) as blocks:

        @contextmanager
        def at(path: str) -> Iterator[None]:
            if not passages.asked(path):
                yield
                return
            with blocks.held(path), around(path, passages):
                yield

        passages.forward(at, lambda _: None, lambda _: None, again)
    return passages.results
