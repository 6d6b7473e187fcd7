"""One of several processes is killed: the others end at once, with one sentence, and any number of them goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import Moment, drawn, fault, undisturbed

MOMENTS = (
    Moment(0, r"^round 1 of 2: refit ", 1, resumed=2),
    Moment(1, '"loss"', 3, resumed=1, file="recovery/recovery.jsonl"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("moment", MOMENTS, ids=("round", "training"))
def test_a_killed_process_ends_the_others_and_any_number_goes_on(moment: Moment, tmp_path: Path, whole: Path) -> None:
    assert fault(tmp_path, moment, whole) is None


def test_moments_are_drawn_over_all_stages_by_the_seed() -> None:
    assert drawn(0, 10) == drawn(0, 10) != drawn(1, 10)
    assert {moment.killed for moment in drawn(0, 10)} == {0, 1}
    assert len({moment.pattern for moment in drawn(0, 10)}) == 8
