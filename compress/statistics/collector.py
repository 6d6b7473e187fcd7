"""The seam of what is collected: a with-block that watches linears or blocks, by hooks, while the data is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any  # a linear or a block; torch types what a block has as tensors or modules

import torch
from torch import Tensor

from slimvlm.compress.data.questions import Question
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.experts import Expert
from slimvlm.compress.statistics.rows import Statistic

Reduce = Callable[[Tensor, str], None]  # (tensor, "sum" | "min" | "max"): in place over all processes


@dataclass(frozen=True, slots=True)
class Side:
    """A prunable linear, the dimensions its scores are wanted for (0: rows, 1: columns), `width`, rows or columns of
    one index (D for heads, 1 for channels), the stream of the tokens it reads (None: not the text model's), `unit`,
    columns that leave together (of query slots, those of one head), the path of the block it is in, and the expert it
    is of, which reads those tokens only that are sent to it, or none. Or a block that may leave, or the linears of a
    group as a list, by its key: those have no dimensions.
    """

    path: str
    module: Any  # nn.Linear, a block, or an nn.ModuleList of linears
    dims: tuple[int, ...]
    width: int = 1
    stream: str | None = None
    unit: int = 1
    block: str = ""
    expert: Expert | None = None


class Collector:
    """What all collectors are: told a statistic, then of some sides and of every question about to be asked.

    A subclass hangs its hooks in `start`; nothing it keeps may be of size tokens x channels.
    """

    seed = 0  # of what is drawn

    def __init__(self, statistic: Statistic, host: bool = False) -> None:
        self.statistic = statistic
        self.host = host
        self.sides: Sequence[Side] = ()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._made: tuple[Tensor, Tensor] | None = None

    def bytes_needed(self, side: Side) -> int:
        """Bytes this holds for `side` while the data is read; where it is not 0, sides may take turns."""
        return 0

    @contextmanager
    def watch(self, sides: Sequence[Side]) -> Iterator[None]:
        """Collect from `sides` meanwhile, from nothing."""
        self.sides = sides
        try:
            self.start()
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._made = None
            self.stop()

    def differentiated(self, sides: Sequence[Side]) -> AbstractContextManager[None]:
        """A with-block in which a forward keeps what the backward pass of this reading needs; nothing is collected."""
        return self.watch(sides)

    def start(self) -> None:
        """Begin with empty sums, and watch `self.sides`."""
        raise NotImplementedError

    def stop(self) -> None:
        """Give up what `start` and the reading left, also after an error."""

    def see(self, question: Question) -> None:
        """The next forward answers `question`."""
        self._masks, self._made = question.masks, None

    def once(self, read: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What `make` gives of what linears read: q, k, v (or gate, up) read one tensor, and it is made once."""
        if self._made is None or self._made[0] is not read:
            self._made = read, make(read)
        return self._made[1]

    def chosen_for(self, stream: str, block: str) -> str:
        """Which of the question's masks says what counts of `stream` in `block`: its own, else that of the stream."""
        return block if block in self._masks else stream

    def mask_of(self, side: Side, tokens: int) -> Tensor | None:
        """Which of the `tokens` that `side` reads count, bool [tokens]; None: all of them.

        Raises:
            CalibrationError: the samples are packed, so that no mask says whose tokens they are.
        """
        mask = None if side.stream is None else self._masks[self.chosen_for(side.stream, side.block)]
        sent = None if side.expert is None else side.expert.reads
        if mask is not None and mask.numel() != (tokens if sent is None else len(sent)):
            raise CalibrationError(
                f"{side.path} reads {tokens} tokens but the batch's mask has {mask.numel()}; "
                "the samples must be padded, not packed"
            )
        return None if mask is None else mask.flatten() if sent is None else mask.flatten()[sent]

    def close_batch(self, batch: int, loss: Tensor) -> None:
        """The backward pass of this batch's loss is over."""

    def perturb(self, batch: int, batches: int, loss: Callable[[], Tensor]) -> None:
        """Ask for the loss of this batch, the number `batch` of `batches`, with weights changed and given back."""

    def require_finite(self, batches: int, reduce: Reduce) -> None:
        """Raise a CalibrationError naming batch and tensor if a sum is not finite (in any process)."""

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """What was seen, by all processes: fp32 vectors on the CPU, keyed `path` or `path:dim`; moments are more."""
        raise NotImplementedError
