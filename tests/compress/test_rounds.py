"""Planning in rounds tells how far all rounds are, not only the one at hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import Scores
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.options import PlanOptions
from slimvlm.compress.rounds import Planning, plan_in_rounds, score_units
from slimvlm.compress.stages.plan import planning_of
from slimvlm.demo import MODEL as DEMO


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


@pytest.mark.parametrize(("power", "shares"), [(1.0, (1 / 3, 2 / 3, 1)), (1.5, (0.456, 0.808, 1))])
def test_the_power_of_a_schedule_says_how_much_of_the_ratio_each_round_takes(power, shares):
    planning = Planning(Budget(0.4), CRITERIA["magnitude"], rounds=3, power=power)
    order = plan_in_rounds(tiny_model("smolvlm").model, lambda _: [], planning).order
    gone = order.parameters.sum(1).cumsum()[[count - 1 for count in order.rounds]] + order.plan.dropped_parameters
    assert planning.power == planning_of(PlanOptions(model="", data=Path(), equal_rounds=power == 1)).power
    assert gone / order.plan.parameters_before == pytest.approx([0.4 * share for share in shares], abs=0.01)


@pytest.mark.parametrize("name", FACTORIES)
def test_scores_that_were_kept_give_the_plan_of_the_data_without_reading_it(name, tmp_path):
    tiny, file = tiny_model(name), tmp_path / "scores.safetensors"
    planning = Planning(Budget(0.2), CRITERIA["gate"])
    batches = [tiny.inputs(1), tiny.inputs(2)]
    score_units(tiny.model, planning.groups(tiny.model), lambda: batches, planning).save(file)
    known = Scores.read(file, planning.criterion)
    assert plan_in_rounds(tiny.model, unread, replace(planning, known=known)).plan == (
        plan_in_rounds(tiny.model, lambda _: batches, planning).plan
    )


def unread(_: int) -> list:
    raise AssertionError("the data was read")


def test_kept_scores_are_those_of_their_criterion(tmp_path):
    kept = Scores(CRITERIA["gate"], {"a": torch.ones(2)}, {"a": torch.arange(2)[:, None]}, {"a": 0.1})
    kept.save(tmp_path / "scores.safetensors")
    assert Scores.read(tmp_path / "scores.safetensors", CRITERIA["gate"]).importance == {"a": 0.1}
    with pytest.raises(ValueError, match="not by taylor"):
        Scores.read(tmp_path / "scores.safetensors", CRITERIA["taylor"])


@pytest.mark.parametrize("name", ["llava", "blip2_t5"])
def test_compensated_rounds_look_at_the_refitted_model_and_a_killed_plan_goes_on_to_the_same_bytes(name):
    def planned(between: str, done=None) -> list:
        tiny, seen = tiny_model(name), []
        batches = [{"labels": tiny.inputs(3)["input_ids"].clone(), **tiny.inputs(3)}]
        planning = Planning(Budget(0.4, allocator="global"), CRITERIA["gate"], rounds=3, between=between)
        plan_in_rounds(tiny.model, lambda _: batches, planning, done=done, on_round=seen.append)
        return seen

    plain, found = planned("none"), planned("refit")
    assert plain[0].order.plan.keep == found[0].order.plan.keep
    assert all(
        any(not torch.equal(one.scores.values[key], other.scores.values[key]) for key in one.scores.values)
        for one, other in zip(plain[1:], found[1:], strict=True)
    )
    assert found[-1].plan.options["between"] == "refit" and "between" not in plain[-1].plan.options
    for rounds in (1, 2):
        again = planned("refit", found[rounds - 1].order)
        assert len(again) == 3 - rounds and again[-1].order.digest == found[-1].order.digest
        for key, values in found[-1].scores.values.items():
            assert torch.equal(again[-1].scores.values[key], values)


def test_rounds_compensate_as_the_end_does_unless_they_are_told_not_to():
    asked = PlanOptions(model="", data=Path())
    assert planning_of(asked).between == "refit"
    assert planning_of(replace(asked, compensation="none")).between == "none"
    assert planning_of(replace(asked, compensate_rounds=False)).between == "none"


def test_what_an_allocator_asks_is_asked_once_of_the_dense_model_also_by_a_run_that_goes_on():
    def planned(**begun):
        tiny, told = tiny_model("llava"), []
        planning = Planning(Budget(0.3, allocator="ecoflap-first"), CRITERIA["wanda-sp"], rounds=2)
        kept = []
        plan_in_rounds(
            tiny.model,
            lambda _: [tiny.inputs(2)],
            planning,
            on_round=kept.append,
            progress=lambda *facts: told.append(facts),
            **begun,
        )
        return kept, told

    (first, last), told = planned()
    assert [note for *_, note in told] == ["what groups are worth", "round 1 of 2", "round 2 of 2"]
    (again,), _ = planned(done=first.order)
    assert again.order.digest == last.order.digest
    assert again.scores.importance == first.scores.importance == last.scores.importance


@pytest.mark.parametrize("ratio", [0.35, 0.5])
def test_rounds_of_a_stock_layout_leave_the_fine_steps_that_the_last_one_needs(ratio):
    model = load_model(DEMO).model  # of its heads it can lose a half or three quarters, in all layers at once
    planning = Planning(Budget(ratio, allocator="global", layout="stock"), CRITERIA["random"], rounds=4)
    plan = plan_in_rounds(model, lambda _: [], planning).plan
    assert (plan.rounds, plan.ratio) == (4, ratio)
    assert plan.removed_fraction == pytest.approx(ratio, abs=0.001)
