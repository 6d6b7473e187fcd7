"""Targets: what can be written, and what is refused in one sentence."""

import pytest

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.serve.fitting.goals import QUANTITIES, Goal, read_goals


@pytest.mark.parametrize(
    ("written", "amount", "shown"),
    [
        ("size=3MB", 3e6, "size 3 MB"),
        ("size=2MiB", 2**21, "size 2.1 MB"),
        ("memory = 1.5 gb", 1.5e9, "memory 1.5 GB"),
        ("params=1.2M", 1.2e6, "params 1.2M parameters"),
        ("params=900", 900, "params 900 parameters"),
        ("ttft=0.2s", 200, "ttft 200 ms"),
        ("tpot=15ms", 15, "tpot 15 ms"),
        ("vision=800us", 0.8, "vision 0.8 ms"),
        ("drop=1.0", 1, "drop 1 points"),
    ],
)
def test_an_amount_is_read_in_its_unit_and_said_again(written, amount, shown):
    (goal,) = read_goals([written])
    assert (goal.amount, str(goal)) == (pytest.approx(amount), shown)


@pytest.mark.parametrize(
    "targets",
    [
        ["speed=3"],
        ["size"],
        ["size=3parsec"],
        ["tpot=15"],  # milliseconds or seconds?
        ["drop=1ms"],
        ["size=0MB"],
        ["size=-3MB"],
        ["params=nan"],
        ["tpot=1e999ms"],
        ["size=" + "9" * 5000],
        ["size=3MB", "size=4MB"],
    ],
)
def test_what_is_no_target_is_refused_in_one_sentence(targets):
    with pytest.raises(UnsuitableOptionError) as refused:
        read_goals(targets)
    assert refused.value.exit_code == 3 and len(str(refused.value)) < 300 and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_times_or_peaks_target_is_met_within_three_percent_and_a_countable_one_exactly(name):
    goal, measured = Goal(name, 100), name in ("memory", "vision", "ttft", "tpot")
    assert goal.is_met(100) and goal.is_met(102.9) == measured and not goal.is_met(103.1)


@pytest.mark.parametrize("name", QUANTITIES)
def test_the_example_of_every_row_can_be_written(name):
    assert read_goals([f"{name}={QUANTITIES[name].example}"])[0].name == name
