"""Words of a command line that nothing can take: refused at once, with exit code 2 or 3, whichever option it is."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from forked import Forked
from fuzz_values import PATHS, WORDS

from slimvlm.cli import main
from slimvlm.compress import processes
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.demo import MODEL, SAMPLES

NUMBERS = {
    (command, parameter.opts[0])
    for command, one in main.commands.items()
    for parameter in one.params
    if isinstance(parameter, click.Option) and isinstance(parameter.type, click.types.IntRange | click.types.FloatRange)
}
NAMES = {
    (command, parameter.name)
    for command, one in main.commands.items()
    for parameter in one.params
    if isinstance(parameter.type, click.Path) or parameter.metavar == "MODEL" or parameter.name == "model"
}


def run(*words: object, **settings: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], **settings)


def convert(command: str, name: str, value: str) -> object:
    """What the parameter makes of a value."""
    parameter = next(one for one in main.commands[command].params if name in (one.name, *one.opts))
    return parameter.type.convert(value, parameter, None)


def test_no_option_is_a_plain_number_of_click() -> None:
    """Those take NaN, infinity, and integers no library can count to."""
    plain = (click.types.IntParamType, click.types.FloatParamType)
    for command, one in main.commands.items():
        for parameter in one.params:
            assert parameter.type.__class__ not in (*plain, click.IntRange, click.FloatRange, click.Path), (
                command,
                parameter.name,
            )


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf", "1e400", str(2**64), "1" * 5000, "x", ""])
@pytest.mark.parametrize(("command", "name"), sorted(NUMBERS))
def test_no_number_is_nan_infinite_or_beyond_counting(command: str, name: str, value: str) -> None:
    if value == str(2**64) and name in ("--alpha", "--epochs", "--learning-rate", "--weight-decay", "--clip"):
        return  # a float that large is one
    try:
        number = convert(command, name, value)
    except click.BadParameter as error:
        assert len(error.message) < 500
    else:
        assert abs(number) <= 2**65
        assert value not in ("nan", "inf", "x", "")


@pytest.mark.parametrize("seed", [-1, 2**32, "nan", 0.5])
@pytest.mark.parametrize("command", ["compress", "evaluate", "plan"])
def test_a_seed_out_of_range_is_refused(command: str, seed: object) -> None:
    with pytest.raises(click.BadParameter):
        convert(command, "--seed", str(seed))


@pytest.mark.parametrize("value", ["", " ", "a" * 300, "a/" * 3000, "\udcff", "x/\udcff"])
@pytest.mark.parametrize(("command", "name"), sorted(NAMES))
def test_a_name_that_no_file_can_have_is_refused(command: str, name: str, value: str) -> None:
    with pytest.raises(click.BadParameter):
        convert(command, name, value)


@pytest.mark.parametrize("kind", ["--data", "PLAN"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = {"--data": ("evaluate", MODEL, "--data"), "PLAN": ("apply", MODEL)}[kind]
    result = run(*words, tmp_path / "pipe", *(("out",) if kind == "PLAN" else ()))
    assert result.exit_code == 2
    assert "neither a file nor a folder" in result.stderr


@pytest.mark.parametrize("value", [word for word in WORDS if "\x00" not in word])
def test_no_word_is_a_bug_of_any_type_of_value(value: str) -> None:
    kinds = {
        type(parameter.type): (command, parameter.name)
        for command, one in main.commands.items()
        for parameter in one.params
    }
    for command, name in kinds.values():
        try:
            convert(command, name, value)
        except click.UsageError:
            continue


@pytest.mark.parametrize("path", PATHS)
def test_no_path_is_a_bug_of_inspect(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("inspect", "--", path)
    assert result.exit_code in (2, 3), result.exception


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("ablation", [("--entropy",), ("--no-entropy",), ("--threshold", "0.5")])
def test_an_ablation_of_a_criterion_that_sees_no_data_is_refused_at_once(
    tmp_path: Path, criterion: str, ablation: tuple[str, ...]
) -> None:
    words = ("--data", SAMPLES / "val.jsonl", "--criterion", criterion, *ablation)
    for command in ("plan", "compress"):
        result = run(command, MODEL, tmp_path / "out", *words)
        assert result.exit_code == 3, result.output
        assert f"{criterion} sees none" in result.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["x", "", "-1", "1.5", "nan", "9" * 30])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_an_environment_of_garbage_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UnsuitableOptionError, match=f"{name}=.* is no number; start several processes by torchrun"):
        processes.numbered(name, 1)


def test_several_processes_that_nobody_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UnsuitableOptionError, match="RANK=nothing.*torchrun"), processes.joined():
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UnsuitableOptionError, match="MASTER_ADDR expected.*torchrun"), processes.joined():
        pass


def test_too_little_memory_is_one_sentence(tmp_path: Path) -> None:
    """The address space ends while the model is loaded."""
    program = (
        "import resource; from slimvlm.cli import main; from PIL import Image\n"
        "Image.init()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, used + 2**23))\n"
        "main()"
    )
    (tmp_path / "program.py").write_text(program)
    words = ("evaluate", MODEL, "--data", SAMPLES / "val.jsonl", "--eval-samples", 64, "--quiet")
    with Forked(tmp_path, tmp_path / "program.py", *words) as process:
        code, said = process.wait(), process.stderr.read_text()
    assert code == 3, said
    assert "memory ended" in said
    assert "Traceback" not in said
