"""Who sees which image: told by its bytes, so a copy under another name is the same image."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.data.splits import VALIDATED, hold_out, read_measured, read_trained, validation_of
from slimvlm.compress.errors import SampleError
from slimvlm.compress.evaluation.evaluate import shuffle_images
from slimvlm.compress.options import CompressOptions


def write(folder: Path, names: Iterable[str]) -> Path:
    """A data file with two questions on every named image; the same colour is the same bytes."""
    folder.mkdir(exist_ok=True)
    lines = []
    for name in names:
        colour = int(name.split("-")[0])
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(folder / f"{name}.png")
        lines += [{"image": f"{name}.png", "question": f"{asked} ?", "answer": "x"} for asked in ("what", "who")]
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def options_in(folder: Path, data: Path, **changes: object) -> CompressOptions:
    fixed = {"model": "unused", "out": folder / "out", "train_batch_size": 2, "validation_samples": 2}
    return CompressOptions(data=data, **{**fixed, **changes})


def digests(samples: Iterable) -> set[str]:
    return {sample.digest for sample in samples}


def test_images_of_the_evaluation_are_neither_calibrated_nor_trained_on_under_any_name(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [f"{number}-a" for number in range(10)])
    held = write(tmp_path / "held", ["3-copy", "4-copy", "77-new"])
    options = options_in(tmp_path, data, eval_data=held)
    measured = read_measured(options)
    assert (len(measured.calibration), measured.left_out, measured.held_out) == (16, 4, True)
    assert digests(measured.calibration).isdisjoint(digests(measured.evaluation))
    assert measured.digest != load_samples(data).digest  # of what is calibrated on
    trained = read_trained(options, measured)
    assert trained.left_out == 4
    assert digests((*trained.training, *trained.validation)).isdisjoint(digests(measured.evaluation))


def test_nothing_is_left_out_where_no_image_is_shared(tmp_path: Path) -> None:
    data, held = write(tmp_path / "data", ["1-a", "2-a"]), write(tmp_path / "held", ["3-a"])
    measured = read_measured(options_in(tmp_path, data, eval_data=held))
    assert (len(measured.calibration), measured.left_out) == (4, 0)
    assert measured.digest == load_samples(data).digest


@pytest.mark.parametrize("copied", [False, True])
def test_the_same_file_for_both_is_refused_with_what_to_do(tmp_path: Path, copied: bool) -> None:
    data = held = write(tmp_path / "data", ["1-a", "2-a"])
    if copied:
        held = Path(shutil.copytree(data.parent, tmp_path / "copy"), data.name)
    with pytest.raises(SampleError, match="none is left to calibrate on; give other samples .* leave --eval-data out"):
        read_measured(options_in(tmp_path, data, eval_data=held))


def test_copies_of_an_image_are_held_out_together(tmp_path: Path) -> None:
    names = [f"{number}-{copy}" for copy in "abc" for number in range(6)]
    samples = load_samples(write(tmp_path / "data", names)).samples
    rest, held = hold_out(samples, 12)
    assert digests(rest).isdisjoint(digests(held))
    assert (len(rest), len(held)) == (24, 12)


def test_a_blind_evaluation_gives_no_sample_a_copy_of_its_own_image(tmp_path: Path) -> None:
    samples = load_samples(
        write(tmp_path / "data", [f"{number}-{copy}" for copy in "ab" for number in range(3)])
    ).samples
    for seed in range(20):
        for sample, other in zip(samples, shuffle_images(samples, seed), strict=True):
            assert (sample.identity, sample.turns) == (other.identity, other.turns)
            assert sample.image.read_bytes() != other.image.read_bytes()


@pytest.mark.parametrize("batch", [1, 16, 32])
@pytest.mark.parametrize("steps", [2, 12, 60, 300, 5000, None])
def test_validations_read_at_most_their_share_of_what_the_training_reads(steps: int | None, batch: int) -> None:
    options = options_in(Path(), Path(), steps=steps, train_batch_size=batch, validation_samples=None)
    size, times = validation_of(options, usable=4000)
    read = 4000 if steps is None else steps * batch
    assert (times + 2) * size <= max(VALIDATED * read, 3)  # three of a single sample are the least
    assert 1 <= times <= 8
    assert 1 <= size <= 256
    assert (size >= 64) == (read >= 3 * 64 / VALIDATED)


def test_validations_are_as_many_and_as_large_as_asked() -> None:
    options = options_in(Path(), Path(), steps=12, validate_every=5, validation_samples=24)
    assert validation_of(options, usable=1000) == (24, 3)
    size, times = validation_of(replace(options, validation_samples=None, steps=600), usable=1000)
    assert (size, times) == (1, 120)
    assert validation_of(replace(options, validate_every=None), usable=1000) == (24, 1)


def test_a_large_validation_that_was_asked_for_is_read_on_top_of_what_the_steps_need(tmp_path: Path) -> None:
    names = [f"{number % 256}-{number}" for number in range(1000)]
    options = options_in(tmp_path, write(tmp_path / "data", names), samples=2, eval_samples=2, steps=2)
    options = replace(options, validation_samples=400)
    # A quarter of what is read at most, so of the 4 + 400 + 2 that are asked for.
    assert len(read_trained(options, read_measured(options)).validation) in range(96, 104)
