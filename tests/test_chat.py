"""`slimvlm chat`: one question, or line after line, of one model or two."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from slimvlm.cli import main
from slimvlm.demo import MODEL, SAMPLES

IMAGES = SAMPLES / "images"
IMAGE, OTHER = IMAGES / "test-000000.webp", IMAGES / "test-000001.webp"
QUESTION = "what is at the top right ?"


def chat(*words: object, lines: str | None = None) -> Result:
    result = CliRunner().invoke(main, ["chat", *map(str, words)], input=lines)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_one_question_is_one_line_on_stdout_and_its_speed_on_stderr() -> None:
    result = chat(MODEL, IMAGE, QUESTION)
    assert (result.exit_code, result.stdout) == (0, "bus\n")
    assert "tokens, the first after" in result.stderr
    assert chat(MODEL, IMAGE, QUESTION, "--quiet").stderr == ""


def test_both_answers_are_shown_with_the_names_of_the_models() -> None:
    result = chat(MODEL, IMAGE, QUESTION, "--against", MODEL)
    assert result.stdout == f"{MODEL}: bus\n" * 2


def test_without_a_question_lines_are_asked_until_one_is_empty() -> None:
    lines = f"{QUESTION}\n/image none.png\n/image {OTHER}\nhow many things are there ?\n\nnever asked ?\n"
    result = chat(MODEL, IMAGE, lines=lines)
    assert (result.exit_code, result.stdout.split("\n")) == (0, ["bus", "four", ""])
    assert "none.png is not a file" in result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((MODEL, "none.png"), "none.png is not a file"),
        ((MODEL, Path(__file__)), "is not an image"),
        ((IMAGES, IMAGE), "neither a checkpoint (config.json) nor an export"),
        ((MODEL, IMAGE, "--backend", "onnx"), "is a checkpoint, which runs on torch only"),
        ((MODEL, IMAGE, "--against", "none"), "none is not a folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(words: tuple[object, ...], says: str) -> None:
    model, image, *options = words
    result = chat(model, image, QUESTION, *options)
    assert (result.exit_code, result.stdout) == (3, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
