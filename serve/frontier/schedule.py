"""In which order points are measured, so that whatever there is time for says the most. No torch."""

from __future__ import annotations

from collections.abc import Sequence


def informative_order(ratios: Sequence[float]) -> tuple[float, ...]:
    """The dense model, which everything is compared with, then the middle, then what is farthest from all so far.

    >>> informative_order((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    (0.0, 0.4, 0.7, 0.2, 0.1, 0.3, 0.5, 0.6)
    """
    left = sorted(set(ratios) - {0.0})
    order = [0.0]
    if left:
        order.append(left.pop(len(left) // 2))
    while left:
        # Of equals the smaller cut, which more people want.
        order.append(max(left, key=lambda ratio: (round(min(abs(ratio - one) for one in order), 9), -ratio)))
        left.remove(order[-1])
    return tuple(order)


def fits(spent: float, costs: Sequence[float], budget: float | None) -> bool:
    """Whether another ratio as dear as the dearest so far ends within the budget (seconds); the first two always do."""
    return budget is None or len(costs) < 2 or spent + max(costs) <= budget
