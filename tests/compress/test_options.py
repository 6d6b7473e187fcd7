"""What an option is that nobody gave, and that a given one stays."""

from pathlib import Path

import pytest

from slimvlm.compress.options import CompressOptions

TRAINING = ("samples", "train_batch_size", "learning_rate", "warmup", "schedule", "clip", "reset_optimizer")
OURS = (512, 16, None, 10, "cosine", 1.0, None)


def training(**given) -> tuple:
    options = CompressOptions(model="m", out=Path("o"), data=Path("d"), **given).resolved()
    return tuple(getattr(options, name) for name in TRAINING)


def test_what_was_not_given_is_ours_or_the_script_of_the_paper_for_this_ratio():
    assert training() == training(ratio=0.2) == OURS
    assert training(faithful=True) == (1000, 20, 2e-5, 50, "constant", 0.0, True)
    assert training(faithful=True, ratio=0.35) == training(faithful=True)
    assert training(faithful=True, ratio=0.2) == (1000, 10, 1e-5, 100, "constant", 0.0, True)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize(("name", "value"), [pair for pair in zip(TRAINING, OURS, strict=True) if pair[1] is not None])
def test_a_given_value_stays_though_it_is_our_default(name, value, ratio):
    assert training(faithful=True, ratio=ratio, **{name: value})[TRAINING.index(name)] == value


def test_a_run_that_is_taken_up_again_keeps_the_paper_s_training():
    options = CompressOptions(model="m", out=Path("o"), data=Path("d"), faithful=True, ratio=0.2)
    again = CompressOptions.of_run(Path("o"), options.identity())
    assert again.recovery_identity() == options.recovery_identity()
    changed = CompressOptions.of_run(Path("o"), options.identity(), train_batch_size=16)
    assert (changed.train_batch_size, changed.warmup) == (16, 100)


def test_the_paper_s_method_is_spelled_out_as_rows_and_what_they_need():
    def rows(**given) -> tuple:
        options = CompressOptions(model="m", out=Path("o"), data=Path("d"), faithful=True, **given).resolved()
        assert (options.rounds, options.compensation) == (1, "none")
        return options.criterion, options.allocator, options.recover

    assert rows(allocator="local") == ("ukmi", "paper", "lpd-paper")
    assert rows(recover="0.5*kl + lpd") == ("ukmi", "paper", "0.5*kl +lpd-paper")
    assert rows(recover="none")[2] == "none"
