"""The closed loop on costs that are known: what it finds, what it says where nothing meets, and how much it tries."""

import pytest

from slimvlm.compress.errors import InfeasibleBudgetError, UnsuitableOptionError
from slimvlm.serve.fitting.goals import read_goals
from slimvlm.serve.fitting.record import Trial
from slimvlm.serve.fitting.search import FINEST, MOST_TRIALS, find_cut
from slimvlm.serve.fitting.smallest import STEP, find_smallest

FP32, INT8, Q4 = BACKENDS = ("onnx:fp32", "onnx:int8", "onnx:q4")
BYTES = {FP32: 4.0, INT8: 1.3, Q4: 0.9}
SPEED = {FP32: 1.0, INT8: 0.5, Q4: 0.4}
LOST = {FP32: 0.0, INT8: 0.2, Q4: 0.5}
PARAMETERS = 2.5e6


def device(ratio: float, backend: str) -> Trial:
    """Bytes as parameters, times with a part that no cut takes away, and not linear in the parameters."""
    left = PARAMETERS * (1 - ratio)
    time = SPEED[backend] * (0.3 + 0.7 * (1 - ratio) ** 1.5)
    figures = {"params": left, "size": BYTES[backend] * left + 1e5, "memory": 5e7 + 8 * left}
    drop = LOST[backend] + 100 * ratio**2
    return Trial(ratio, backend, {**figures, "tpot": 10 * time, "ttft": 60 * time, "drop": drop})


def parameters_only(ratio):
    """Foretells everything by the parameters."""
    return dict.fromkeys(("params", "size", "memory", "tpot", "ttft", "vision"), 1 - ratio)


def find(*targets, backends=BACKENDS, most=0.9, try_out=device):
    return find_cut(read_goals(targets), backends, try_out, dict.fromkeys(backends, parameters_only), most)


@pytest.mark.parametrize(
    ("targets", "backend"), [(("size=11MB",), FP32), (("size=3.5MB", "tpot=9ms"), INT8), (("tpot=4.1ms",), Q4)]
)
def test_what_meets_the_targets_whole_is_not_cut_and_the_most_exact_precision_is_taken(targets, backend):
    found = find(*targets)
    assert (found.trial.ratio, found.trial.backend) == (0, backend)
    assert len(found.trials) == 1 + BACKENDS.index(backend)


@pytest.mark.parametrize(
    ("targets", "backends"),
    [
        (("size=1MB",), BACKENDS),
        (("tpot=2.5ms",), BACKENDS),
        (("ttft=20ms", "size=2MB"), BACKENDS),
        (("params=800k",), BACKENDS),
        (("memory=60MB",), BACKENDS),
        (("params=800k",), (FP32,)),
        (("memory=60MB",), (FP32,)),
        (("ttft=30ms", "size=9MB"), (FP32,)),
    ],
)
def test_the_tightest_target_is_met_and_hardly_undercut(targets, backends):
    goals = read_goals(targets)
    found = find(*targets, backends=backends)
    used = [goal.excess(found.trial.figures[goal.name]) for goal in goals]
    assert all(goal.is_met(found.trial.figures[goal.name]) for goal in goals)
    assert max(used) >= 0.97 or not all(
        goal.is_met(device(found.trial.ratio - 2 * FINEST, found.trial.backend).figures[goal.name]) for goal in goals
    )
    assert all(sum(trial.backend == backend for trial in found.trials) <= MOST_TRIALS for backend in backends)


def test_of_precisions_that_all_need_a_cut_the_one_that_needs_least_is_taken_and_hopeless_ones_are_not_tried():
    found = find("size=0.9MB")
    assert found.trial.backend == Q4 and {trial.backend for trial in found.trials if trial.ratio} == {Q4}
    alike = find("tpot=2ms", backends=(INT8, Q4), try_out=lambda *one: Trial(*one, device(one[0], INT8).figures))
    assert {trial.backend for trial in alike.trials if trial.ratio} == {INT8, Q4}
    assert alike.trial.ratio == min(one.ratio for one in alike.trials if one.figures["tpot"] <= 2 * 1.03)


def test_steps_and_a_few_percent_of_noise_end_in_a_cut_that_was_measured_to_meet_the_target():
    def rough(ratio, backend):
        trial = device(ratio, backend)
        step = 10 * round(trial.figures["tpot"] / 10, 2) * (1 + 0.02 * (-1) ** round(ratio * 1000))
        return Trial(ratio, backend, {**trial.figures, "tpot": step})

    found = find("tpot=5ms", backends=(FP32,), try_out=rough)
    assert found.trial in found.trials and found.trial.figures["tpot"] <= 5 * 1.03 and len(found.trials) <= MOST_TRIALS


def test_an_unreachable_target_is_refused_with_the_best_there_is():
    with pytest.raises(InfeasibleBudgetError, match=r"tpot 1 ms .* best .* is 2\.\d+ ms, with 50%.* in onnx:q4"):
        find("tpot=1ms", most=0.5)


def test_a_figure_this_model_does_not_have_is_no_target():
    with pytest.raises(UnsuitableOptionError, match="vision"):
        find("vision=3ms")


def overhead(ratio, backend):
    """Nearly all of the time is none of multiplications: what a tiny model is on a fast device."""
    trial = device(ratio, backend)
    return Trial(ratio, backend, {**trial.figures, "tpot": 1 + 0.1 * SPEED[backend] * (1 - ratio)})


def test_times_that_hardly_shrink_are_found_out_by_the_largest_cut_of_each_precision():
    tried = []

    def try_out(*one):
        tried.append(one)
        return overhead(*one)

    with pytest.raises(InfeasibleBudgetError):
        find("tpot=0.7ms", most=0.5, try_out=try_out)
    assert [one for one in tried if one[0]] == [(0.5, backend) for backend in (Q4, INT8, FP32)]


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
@pytest.mark.parametrize("name", ["tpot", "size"])
def test_a_cut_is_found_with_four_candidates_besides_the_whole_model(share, name):
    asked = share * device(0, FP32).figures[name]
    unit = {"tpot": "ms", "size": "B"}[name]
    assert len(find(f"{name}={asked:f}{unit}", backends=(FP32,)).trials) <= 5


def test_beside_a_cost_a_precision_that_loses_too_much_by_itself_is_left_out():
    whole = find("size=3.5MB", "drop=0.1")
    assert whole.trial.backend == FP32 and whole.trial.ratio > 0
    assert {trial.backend for trial in whole.trials if trial.ratio} == {FP32}
    assert find("size=3.5MB", "drop=0.3").trial == device(0, INT8)
    with pytest.raises(InfeasibleBudgetError, match=r"drop 0.1 points .* onnx:int8 loses least, 0.2 points"):
        find("size=1MB", "drop=0.1", backends=(INT8, Q4))


def smallest(drop, backends=BACKENDS, most=0.5, try_out=device):
    return find_smallest(read_goals([f"drop={drop}"])[0], backends, try_out, parameters_only, most)


@pytest.mark.parametrize(("drop", "backend"), [(1.0, Q4), (5.0, Q4), (0.4, INT8), (0.1, FP32)])
def test_the_smallest_artefact_within_a_loss_is_the_largest_cut_of_the_smallest_precision_that_has_it(drop, backend):
    found = smallest(drop)
    largest = ((drop - LOST[backend]) / 100) ** 0.5
    assert found.trial.backend == backend and largest - STEP <= found.trial.ratio <= largest
    assert {trial.backend for trial in found.trials if trial.ratio} == {backend}  # no other could be smaller
    assert len(found.trials) <= 3 + 6


def test_where_any_cut_is_within_the_loss_the_largest_is_taken():
    assert (smallest(90).trial.ratio, smallest(90).trial.backend) == (0.5, Q4)


def test_nothing_is_cut_for_hardly_any_bytes():
    assert smallest(0.51).trial == device(0, Q4)


def test_a_more_exact_precision_is_cut_where_that_is_smaller_than_the_coarse_one_whole():
    def near(ratio, backend):  # q4 uses the bound up by itself, and is hardly smaller than int8
        loses, size = (1.95, 0.9e6) if backend == Q4 else (0.0, 1e6)
        return Trial(ratio, backend, {"size": size * (1 - ratio), "drop": loses + 100 * ratio**2})

    found = smallest(2.0, backends=(INT8, Q4), try_out=near)
    assert found.trial.backend == INT8 and 0.02**0.5 - STEP <= found.trial.ratio <= 0.02**0.5


def test_a_loss_that_every_precision_exceeds_is_refused_with_the_least():
    with pytest.raises(InfeasibleBudgetError, match=r"drop 0.1 points .* onnx:int8 loses least, 0.2 points"):
        smallest(0.1, backends=(INT8, Q4))
