"""Options of a training, and the stage and learning rate of every step."""

import pytest
from train_options import train_options

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.recovery.distillation.recipe import Stage
from slimvlm.compress.recovery.training.schedule import Schedule, check_training

STAGES = (Stage("a", (), {"kl": 1.0}, 0.4), Stage("b", (), {"sft": 1.0}, 0.6))


def rates(**options) -> list[float]:
    options = {"steps": 10, "train_batch_size": 1, "learning_rate": 1.0, **options}
    schedule = Schedule(STAGES, train_options(**options))
    return [round(schedule.learning_rate(step), 6) for step in range(options["steps"])]


def test_stages_begin_where_their_shares_end() -> None:
    schedule = Schedule(STAGES, train_options(steps=10, train_batch_size=1))
    assert [schedule.index(step) for step in range(10)] == [0] * 4 + [1] * 6
    assert [step for step in range(10) if schedule.starts_stage(step)] == [0, 4]


def test_the_rate_grows_linearly_then_stays() -> None:
    assert rates(warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]


def test_a_cosine_is_halved_in_the_middle_and_ends_above_zero() -> None:
    cosine = rates(warmup=2, schedule="cosine")
    assert cosine[:3] == [0.5, 1, 1]
    assert cosine[6] == 0.5
    assert cosine[9] == pytest.approx(0.5 * (1 - 0.9238795), abs=1e-6)


def test_a_fresh_optimiser_per_stage_warms_up_again() -> None:
    assert rates(warmup=2, reset_optimizer=True) == [0.5, 1, 1, 1, 0.5, 1, 1, 1, 1, 1]
    assert rates(schedule="cosine", reset_optimizer=True)[4] == 1


def test_a_warm_up_longer_than_its_stage_ends_with_it() -> None:
    assert rates(warmup=100, reset_optimizer=True)[3] == rates(warmup=100)[9] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "linear"}, "cosine, constant"),
        ({"precision": "fp8"}, "no, bf16, fp16"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"clip": -1.0}, "clip"),
        ({"patience": 0}, "patience"),
    ],
)
def test_an_unsuitable_option_is_refused_by_name(options, says) -> None:
    with pytest.raises(UnsuitableOptionError, match=says):
        check_training(train_options(**{"steps": 1, "train_batch_size": 1, **options}))
