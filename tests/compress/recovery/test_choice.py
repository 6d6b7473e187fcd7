"""Which state of a training is kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.evaluation.quality import Row, summarize
from slimvlm.compress.recovery.training.choice import Validation, as_good_as, validation_of
from slimvlm.compress.recovery.training.history import History

FIGURES = st.tuples(st.floats(0.0, 1.0), st.floats(-5.0, 0.0))
DOUBTS = st.tuples(st.floats(0.0, 0.3), st.floats(0.0, 1.0))
STATES = st.lists(
    st.builds(lambda score, by: Validation(score, (score[0] - by[0], score[1] - by[1])), FIGURES, DOUBTS),
    min_size=1,
    max_size=10,
)


def kept(states: list[Validation]) -> int:
    """Number of the state that is kept after all validations."""
    history = History()
    for number, state in enumerate(states):
        history.steps = number
        assert history.add_validation(state, last_stage=True) == (history.best_step == number)
    assert history.best == states[history.best_step].score
    assert (history.first, history.last, history.validations) == (states[0].score, states[-1].score, len(states))
    return history.best_step


def answered(right: int, of: int, loss: float) -> Validation:
    """So many right answers; half of the tokens cost twice the mean loss, the others nothing."""
    rows = [
        Row(str(number), "all", None, "", float(number < right), 0.0, loss * 2 * (number % 2), 1)
        for number in range(of)
    ]
    return validation_of(summarize("generation", rows, blind=False, seconds=0.0))


@given(STATES)
def test_the_kept_state_is_not_measurably_worse_than_any_before_it(states: list[Validation]) -> None:
    number = kept(states)
    assert all(as_good_as(states[number].score, before.least) for before in states[:number])


@given(STATES)
def test_every_state_after_the_kept_one_is_measurably_worse_than_one_before_it(states: list[Validation]) -> None:
    for number in range(kept(states) + 1, len(states)):
        assert not all(as_good_as(states[number].score, before.least) for before in states[:number])


@given(STATES)
def test_a_state_that_is_better_by_both_figures_than_all_before_is_kept(states: list[Validation]) -> None:
    best = tuple(max(state.score[part] for state in states) for part in (0, 1))
    assert kept([*states, Validation(best, best)]) == len(states)


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0.0, 9.0))
def test_an_interval_holds_its_figure_and_shrinks_with_the_questions(of: int, right: int, loss: float) -> None:
    right = min(right, of)
    one, nine = answered(right, of, loss), answered(9 * right, 9 * of, loss)
    assert all(least <= score for least, score in zip(one.least, one.score, strict=True))
    assert nine.least[0] >= one.least[0]


def test_a_training_is_not_undone_for_two_lucky_questions_and_is_for_many_wrong_ones() -> None:
    assert kept([answered(250, 256, 0.044), answered(248, 256, 0.046)]) == 1  # a cut of 20 % of the demo
    assert kept([answered(250, 256, 0.044), answered(240, 256, 0.030)]) == 0
    assert kept([answered(200, 256, 0.40), answered(200, 256, 0.80)]) == 0  # surer of its wrong answers


def test_where_nothing_is_right_the_loss_decides() -> None:
    assert kept([answered(0, 40, 5.0), answered(0, 40, 4.0), answered(0, 40, 50.0)]) == 1


def test_a_dual_encoder_is_judged_by_its_ranks() -> None:
    def ranked(right: int) -> Validation:
        rows = [Row(str(n), "all", None, image_to_text=1 + (n >= right), text_to_image=1) for n in range(100)]
        return validation_of(summarize("retrieval", rows, blind=False, seconds=0.0))

    assert ranked(50).score == pytest.approx((0.75, 0.0))
    assert kept([ranked(50), ranked(90), ranked(88), ranked(20)]) == 2
