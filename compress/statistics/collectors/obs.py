"""What output projections lose unit by unit, while the units that are left take over what they can.

Optimal Brain Surgeon (Hassibi and Stork, 1993) for structures, greedy, as in ZipLM (Kurtic et al., NeurIPS 2023) and
SlimGPT (Ling et al., NeurIPS 2024). An output projection W reads x with second moments C, about the mean where it has a
bias, which takes that up; C is damped. To take the columns c of one unit out costs, with all others refitted,

    cost(c) = tr(W_c^T W_c ((C^-1)_cc)^-1)

of the output's energy. The cheapest unit goes, the others and C^-1 become what they are without it,

    W -= W_c ((C^-1)_cc)^-1 (C^-1)_c,:      C^-1 -= (C^-1)_:,c ((C^-1)_cc)^-1 (C^-1)_c,:

and so on until none is left: of two units that say the same the first costs nothing and the second everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from slimvlm.compress.data.questions import Question
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Reduce, Side
from slimvlm.compress.statistics.collectors.gates import GateSquares
from slimvlm.compress.statistics.collectors.moments import DAMPING, Moments, about_mean
from slimvlm.compress.statistics.rows import Statistic

FOLDED = 128  # columns that leave between two updates of whole matrices
APART = 2.0**-22  # one unit's value is above the last one's by this share at least: fp32 can tell them apart


class Surgeon(Moments):
    """The cost of every unit when its turn to leave has come, spread evenly over its columns: fp32 on the CPU, by
    `path:1`; rows have none. A value is above those of the units that left before, so that its order is theirs.
    """

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        moments = super().finish(reduce)
        result = {}
        for side in self.sides:
            if 0 in side.dims:
                result[f"{side.path}:0"] = torch.zeros(len(side.module.weight))
            if 1 in side.dims:
                found = (moments.pop(f"{side.path}{part}") for part in ("", ":sum", ":tokens"))
                values = self._values(side, *found)
                result[f"{side.path}:1"] = (values / side.unit).repeat_interleave(side.unit).float().cpu()
        return result

    def _values(self, side: Side, products: Tensor, total: Tensor, count: Tensor) -> Tensor:
        """Of the units of `side`, fp64 [units]."""
        if side.expert is not None and not count:  # no token was sent to it
            return products.new_zeros(len(products) // side.unit, dtype=torch.float64)
        if not (count and products.isfinite().all()):
            raise CalibrationError(f"the inputs of {side.path} are not finite, or there are none; check the data")
        weight = side.module.weight.detach().double()
        second = products.double() if side.module.bias is None else about_mean(products.double(), total, count)
        second.diagonal().add_(DAMPING * second.diagonal().mean().clamp(min=1e-30))
        gram = weight.T @ weight
        own = _blocks(gram * second, side.unit).sum((1, 2)).clamp(min=1e-300)
        order, costs = removal(second, gram, side.unit, self._worth(side, own))
        values = torch.empty_like(costs)
        values[order] = costs.cummax(0).values * (1 + APART * torch.arange(len(costs), device=costs.device))
        return values

    def _worth(self, side: Side, own: Tensor) -> Tensor:
        """What a unit's costs are multiplied by, of the energy that units have by themselves, [units]."""
        return torch.ones_like(own)


class GatedSurgeon(Surgeon):
    """The share of a unit that the others cannot take over when its turn has come, times what its gate says (see
    `GateSquares`). The turn, too, is by that product.
    """

    def __init__(self, statistic: Statistic, host: bool = False) -> None:
        super().__init__(statistic, host)
        self._gates = GateSquares(statistic, host)

    @contextmanager
    def watch(self, sides: Sequence[Side]) -> Iterator[None]:
        with self._gates.watch(sides), super().watch(sides):
            yield

    def differentiated(self, sides: Sequence[Side]) -> AbstractContextManager[None]:
        return self._gates.watch(sides)

    def see(self, question: Question) -> None:
        super().see(question)
        self._gates.see(question)

    def close_batch(self, batch: int, loss: Tensor) -> None:
        self._gates.close_batch(batch, loss)

    def require_finite(self, batches: int, reduce: Reduce) -> None:
        self._gates.require_finite(batches, reduce)

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        self._squares = self._gates.finish(reduce)
        return super().finish(reduce)

    def _worth(self, side: Side, own: Tensor) -> Tensor:
        return self._squares[f"{side.path}:1"].view(-1, side.unit).sum(1).to(own) / own


def removal(second: Tensor, gram: Tensor, width: int, worth: Tensor) -> tuple[Tensor, Tensor]:
    """(the units in the order they leave, int64 [units]; what each costs then, times its `worth`, fp64 [units]).

    All costs divided by their worth add up to the energy of the output, tr(second gram).

    Args:
        second: moments of the inputs, positive definite, fp64 [I, I]; a unit is `width` columns.
        gram: W^T W, fp64 [I, I].
        worth: of the units. [I / width]
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    left, order, costs = torch.arange(len(worth), device=worth.device), [], []
    while len(left):
        step = _Step(inverse, gram, width, worth[left])
        gone, spent = step.take()
        order.append(left[gone])
        costs.append(spent)
        stay = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stay[gone] = False
        inverse, gram = step.without(stay.repeat_interleave(width))
        left = left[stay]
    return torch.cat(order), torch.cat(costs)


class _Step:
    """Some units leave. What that does to the whole of the matrices is kept as a few rows until `without`; only the
    block of every unit is kept up to date, as its cost needs it.
    """

    def __init__(self, inverse: Tensor, gram: Tensor, width: int, worth: Tensor) -> None:
        self.inverse, self.gram, self.width, self.worth = inverse, gram, width, worth
        self.blocks, self.grams = _blocks(inverse, width).clone(), _blocks(gram, width).clone()
        self.units = min(max(1, FOLDED // width), len(worth))  # that leave
        self.rows = inverse.new_empty(3, self.units * width, len(inverse))  # read, moved and shifted, see `_leave`
        self.known = 0  # rows of each

    def take(self) -> tuple[Tensor, Tensor]:
        """The units that leave now, in their order, and their costs."""
        gone, costs = [], []
        present = torch.zeros_like(self.worth)
        for _ in range(self.units):
            inverted = 1 / self.blocks if self.width == 1 else torch.linalg.inv(self.blocks)
            spent = (self.grams * inverted).sum((1, 2)).clamp(min=0) * self.worth
            unit = int((spent + present).argmin())
            gone.append(unit)
            costs.append(spent[unit])
            present[unit] = torch.inf
            self._leave(unit, inverted[unit])
        return torch.tensor(gone, device=present.device), torch.stack(costs)

    def _leave(self, unit: int, inverted: Tensor) -> None:
        """Of W - W_c moved, which is what W becomes, the Gram matrix is gram - moved^T shifted - shifted^T moved; the
        inverse becomes inverse - read^T moved.
        """
        place = slice(unit * self.width, (unit + 1) * self.width)
        all_read, all_moved, all_shifted = self.rows[:, : self.known]
        read = self.inverse[place] - all_read[:, place].T @ all_moved
        moved = inverted @ read
        gram = self.gram[place] - all_moved[:, place].T @ all_shifted - all_shifted[:, place].T @ all_moved
        shifted = gram - gram[:, place] @ moved / 2
        units = [rows.view(self.width, -1, self.width) for rows in (read, moved, shifted)]
        self.blocks -= torch.einsum("aui,auj->uij", units[0], units[1])
        cross = torch.einsum("aui,auj->uij", units[1], units[2])
        self.grams -= cross + cross.mT
        self.blocks[unit] = torch.eye(self.width).to(read)  # it has left: nothing is asked of it again
        self.rows[:, self.known : self.known + self.width] = torch.stack((read, moved, shifted))
        self.known += self.width

    def without(self, stay: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse and the Gram matrix of the columns that `stay`, bool [I]."""
        read, moved, shifted = self.rows[:, :, stay]
        cross = moved.T @ shifted
        return self.inverse[stay][:, stay] - read.T @ moved, self.gram[stay][:, stay] - cross - cross.T


def _blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks on the diagonal, a view [units, width, width]."""
    units = len(matrix) // width
    return matrix.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
