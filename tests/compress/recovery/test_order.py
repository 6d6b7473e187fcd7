"""The order of the data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.recovery.training.order import batch_indices, divide

COUNTS, SIZES, SEEDS = st.integers(1, 60), st.integers(1, 20), st.integers(0, 3)


def epoch(count: int, size: int, seed: int, number: int) -> list[list[int]]:
    batches = -(-count // size)
    return [batch_indices(count, size, seed, step) for step in range(number * batches, (number + 1) * batches)]


@given(COUNTS, SIZES, SEEDS)
def test_every_epoch_shows_every_sample(count: int, size: int, seed: int) -> None:
    for number in range(3):
        assert {index for batch in epoch(count, size, seed, number) for index in batch} == set(range(count))


@given(COUNTS, SIZES, SEEDS)
def test_all_batches_are_full_and_hold_no_sample_twice(count: int, size: int, seed: int) -> None:
    for batch in epoch(count, size, seed, 0):
        assert len(batch) == len(set(batch)) == min(size, count)


@given(COUNTS, SIZES, SEEDS)
def test_batches_keep_their_composition_from_epoch_to_epoch(count: int, size: int, seed: int) -> None:
    first, later = (sorted(map(tuple, epoch(count, size, seed, number))) for number in (0, 5))
    assert first == later


def test_the_order_of_batches_changes_from_epoch_to_epoch() -> None:
    orders = {tuple(map(tuple, epoch(40, 4, 0, number))) for number in range(5)}
    assert len(orders) == 5


def test_seeds_give_other_batches() -> None:
    assert epoch(40, 4, 0, 0) != epoch(40, 4, 1, 0)


@given(COUNTS, SIZES, SEEDS, st.integers(0, 500))
def test_a_step_can_be_computed_by_itself(count: int, size: int, seed: int, step: int) -> None:
    alone = batch_indices(count, size, seed, step)
    for earlier in range(max(0, step - 5), step):
        batch_indices(count, size, seed, earlier).clear()  # what a caller does with a batch changes no other
    assert batch_indices(count, size, seed, step) == alone


@given(st.lists(st.integers()), st.integers(1, 9))
def test_parts_follow_one_another_and_are_equally_large(indices: list[int], parts: int) -> None:
    divided = divide(indices, parts)
    assert [index for part in divided for index in part] == indices
    assert len(divided) == parts
    sizes = [len(part) for part in divided]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("count", "size", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_an_impossible_batch_is_refused(count: int, size: int, step: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        batch_indices(count, size, 0, step)
