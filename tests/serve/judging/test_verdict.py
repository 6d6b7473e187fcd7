"""Verdicts follow from work, times and the device's rates by the stated rule, and name what was not cut."""

from dataclasses import replace

import pytest
from profiles import DEVICE, example_cell, example_profile

from slimvlm.serve.judging.roofline import EMBEDDINGS, HEAD, LANGUAGE, Shapes, Work
from slimvlm.serve.judging.verdict import Judged, judge_cell, nothing_faster
from slimvlm.serve.profile import Cell, Ratio

LARGE = 2.0**30  # bytes that no cache holds: 1e10 bytes per second on this device; 1e11 operations per second
SHAPES = Shapes("llava", "decoder", 1, (), (), (4, 4), 0, 1, 0, widths=(32, 33, 48))


def cell_of(dense: float, slim: float, relation: str = "faster", phase: str = "tpot", **changes: object) -> Cell:
    ratio = Ratio(slim, dense, dense / slim, 0.9 * dense / slim, 1.1 * dense / slim, relation)
    return replace(example_cell(), ratios={phase: ratio}, **changes)


def judged(language: tuple[float, float], head: tuple[float, float] = (0, 0), **changes: object) -> dict[str, Judged]:
    """(operations, bytes) of the slim model; the dense one has twice the language model and the same head."""
    costs = {}
    for name, times in (("dense", 2), ("slim", 1)):
        flops, moved = ({LANGUAGE: times * language[at], HEAD: head[at], EMBEDDINGS: 1.0} for at in (0, 1))
        costs[name] = Judged({"tpot": Work(flops, moved, 100)}, replace(SHAPES, **changes))
    return costs


def only(cell: Cell, models: dict[str, Judged], device=DEVICE):
    (verdict,) = judge_cell(cell, models, device)
    return verdict


def test_a_phase_that_takes_as_long_as_moving_its_bytes_is_memory_bound() -> None:
    verdict = only(cell_of(0.24, 0.12), judged((1e6, LARGE)))
    assert (verdict.bound, verdict.phase) == ("memory", "tpot")
    assert (verdict.ideal, verdict.measured) == pytest.approx((2, 2))
    assert verdict.reached == pytest.approx(1)
    assert "uses 89 % of the measured copy bandwidth" in verdict.because[0]


def test_a_phase_that_takes_as_long_as_its_operations_is_compute_bound() -> None:
    assert only(cell_of(0.24, 0.12), judged((1e10, 1e6))).bound == "compute"


def test_a_phase_far_from_both_roofs_is_overhead_bound_and_says_what_starting_costs() -> None:
    verdict = only(cell_of(1.0, 1.0, "same"), judged((1e10, 1e6)))
    assert verdict.bound == "overhead"
    assert verdict.reached == pytest.approx(0, abs=1e-6)
    assert "100 matrix products (dense: 100), which take 0.5 ms to start" in " ".join(verdict.because)


def test_the_share_reached_is_of_the_gain_not_of_the_time() -> None:
    assert only(cell_of(0.18, 0.12), judged((1e6, LARGE))).reached == pytest.approx(0.5)
    assert only(cell_of(0.12, 0.24, "slower"), judged((1e6, LARGE))).reached == pytest.approx(-0.5)


def test_without_work_left_out_no_share_is_made_up() -> None:
    models = judged((1e6, LARGE))
    verdict = only(cell_of(0.12, 0.12, "same"), {"dense": models["slim"], "slim": models["slim"]})
    assert verdict.reached is None
    assert verdict.ideal == 1


def test_what_was_not_cut_is_named_with_its_share() -> None:
    verdict = only(cell_of(0.2, 0.15), judged((1e6, LARGE), head=(1e6, LARGE)))
    assert verdict.ideal == pytest.approx(1.5)
    assert "Not cut, of the slim model's bytes in this phase: output head (50 %)." in verdict.because


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [("cuda", "bf16", "1 of 3 inner widths are no multiple of 8"), ("cpu", "fp32", None)],
)
def test_odd_widths_are_named_where_they_matter(kind: str, dtype: str, expected: str | None) -> None:
    device = replace(DEVICE, kind=kind, matmul_flops_per_second={dtype: 1e11})
    words = " ".join(only(cell_of(0.24, 0.12, dtype=dtype), judged((1e10, 1e6)), device).because)
    assert (expected or "multiple") in words if expected else "multiple" not in words


def test_a_slim_model_that_uses_the_device_worse_is_told_so() -> None:
    words = " ".join(only(cell_of(0.24, 0.2), judged((1e6, LARGE))).because)
    assert "comes to 54 % of its roof, the dense one to 89 % of its own" in words
    assert "roof" not in " ".join(only(cell_of(0.24, 0.12), judged((1e6, LARGE))).because)


def test_a_dtype_without_a_matmul_rate_is_judged_by_its_bytes() -> None:
    verdict = only(cell_of(0.24, 0.12, dtype="int8"), judged((1e6, LARGE)))
    assert verdict.bound == "memory"
    assert "is not known for this dtype" in verdict.because[0]


def test_noise_is_said_and_sums_of_phases_are_not_judged() -> None:
    noisy = only(cell_of(0.2, 0.19, "too noisy"), judged((1e6, LARGE)))
    assert "too noisy to decide" in " ".join(noisy.because)
    assert noisy.reached is None
    models = judged((1e6, LARGE))
    assert judge_cell(cell_of(0.2, 0.1, phase="end_to_end"), models, DEVICE) == ()
    assert judge_cell(cell_of(0.2, 0.1), {"slim": models["slim"]}, DEVICE) == ()


def test_when_nothing_got_faster_the_reason_is_given() -> None:
    profile = example_profile()
    assert nothing_faster(profile) is None  # most phases did
    cell = cell_of(1.0, 1.0, "same")
    slow = replace(profile, cells=(cell, cell_of(1.0, 2.0, "slower")), verdicts=())
    said = nothing_faster(slow)
    assert said.startswith("Nothing got measurably faster: of 2 phases 1 slower, 1 same. The work") and "shapes" in said
    busy = replace(slow, verdicts=judge_cell(cell, judged((1e10, 1e6)), DEVICE))
    assert "ideally 2.00 times as fast), but 1 of 1 judged phases are overhead-bound" in nothing_faster(busy)
    models = judged((1e6, LARGE))
    same = judge_cell(cell, {"dense": models["slim"], "slim": models["slim"]}, DEVICE)
    assert "left almost all work of these phases in place" in nothing_faster(replace(slow, verdicts=same))
    sparse = {**slow.models, "slim": replace(slow.models["slim"], zeros=0.458)}
    assert nothing_faster(replace(slow, models=sparse)).endswith(
        "46 % of the slim model's parameters are zeros, which are stored and multiplied as any other number: no less "
        "work is left."
    )
    assert nothing_faster(replace(profile, cells=(replace(cell, ratios={}),))) is None
    loud = replace(profile, cells=(cell_of(1.0, 0.5, "too noisy"),))
    assert nothing_faster(loud).endswith("of 1 phases 1 too noisy. Measure on a quiet machine.")
