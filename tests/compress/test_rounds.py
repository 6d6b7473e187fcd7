"""Planning in rounds tells how far all rounds are, not only the one at hand."""

import pytest
from tiny_models import tiny_model

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.rounds import Planning, plan_in_rounds


def told(**begun) -> list[tuple]:
    tiny, seen = tiny_model("llava"), []
    planning = Planning(Budget(0.3), CRITERIA["gate"], rounds=2)
    planned = []
    plan_in_rounds(
        tiny.model,
        lambda _: [tiny.inputs(1), tiny.inputs(2)],
        planning,
        on_round=planned.append,
        progress=lambda *facts: seen.append(facts),
        **begun,
    )
    return [seen, planned]


def test_progress_counts_the_batches_of_all_rounds_that_are_left():
    seen, planned = told()
    assert seen == [("calibrate", number, 4, f"round {1 + number // 3} of 2") for number in (1, 2, 3, 4)]
    seen, _ = told(done=planned[0].order)
    assert seen == [("calibrate", 1, 2, "round 2 of 2"), ("calibrate", 2, 2, "round 2 of 2")]


def test_an_allocator_that_may_overshoot_makes_one_round():
    with pytest.raises(UnsuitableOptionError, match="the allocator paper takes all in one round, not in 2; give --rou"):
        Planning(Budget(0.3, allocator="paper"), CRITERIA["gate"], rounds=2)
    assert Planning(Budget(0.3, allocator="paper"), CRITERIA["gate"]).rounds == 1
