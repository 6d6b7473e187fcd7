"""A file with the options of a command, of `compress` above all: what `--config` reads and `--write-config` writes."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from slimvlm.cli import main
from slimvlm.console.options.recipe import recipe_parameters

COMPRESS = main.commands["compress"]


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, ["compress", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def parsed(*words: object, command: str = "compress") -> dict[str, object]:
    return main.commands[command].make_context(command, [str(word) for word in words]).params


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs; the file is in `kept/`, beside samples and a model."""
    for name in ("kept/train.jsonl", "kept/vlm/config.json", "elsewhere.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder: Path, text: str) -> Path:
    path = folder / "kept" / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_written_file_has_every_option_with_its_default(folder: Path) -> None:
    text = run("--write-config").stdout
    assert not re.findall("^[^#\n]", text, re.MULTILINE)  # nothing was given
    for one in recipe_parameters(COMPRESS):
        assert re.search(rf"^# {max(one.opts, key=len).lstrip('-')} =", text, re.MULTILINE), one.name
    assert {one.name for one in recipe_parameters(COMPRESS)} == {
        one.name for one in COMPRESS.params if one.name not in ("config", "write_config")
    }
    defaults = "".join(line[2:] for line in text.splitlines(keepends=True) if re.match(r"# [a-z-]+ = .", line))
    path = recipe(folder, defaults)
    told, untold = (parsed("kept/vlm", "out", "--data", "elsewhere.jsonl", *more) for more in ((), ("--config", path)))
    assert told == untold


def test_what_was_given_is_written_and_read_again_wherever_the_file_is(folder: Path) -> None:
    given = (
        *("kept/vlm", "out", "--data", "elsewhere.jsonl", "--ratio", 0.3, "--target", "size=3MB", "--no-refit"),
        *("--tower-ratio", "vision=0.2", "--grad-memory", "8GB", "--hidden-states", -1, "--hidden-states", 0),
        *("--export", "onnx,pt2", "--variants", "none", "--targets", 'a"\\b\u007f\n', "--no-profile", "--no-entropy"),
    )
    written = run(*given, "--write-config", "kept/new.toml")
    assert written.exit_code == 0 and "kept/new.toml written" in written.stdout
    before, after = parsed(*given), parsed("--config", "kept/new.toml")
    places = ("model", "out", "data")
    assert [Path(str(before.pop(name))).resolve() for name in places] == [
        Path(str(after.pop(name))).resolve() for name in places
    ]
    assert before == after
    again = run("--config", "kept/new.toml", "--ratio", 0.4, "--write-config")
    assert "\nratio = 0.4\n" in again.stdout and '\nexport = ["onnx", "pt2"]\n' in again.stdout
    assert run("--write-config", "kept/new.toml").exit_code == 3  # it is kept
    assert not (folder / "out").exists()


def test_paths_are_as_seen_from_the_file_and_its_model_leaves_out_to_the_command_line(folder: Path) -> None:
    path = recipe(folder, 'model = "vlm"\ndata = "train.jsonl"\nteacher = "org/name"\nout = "made"')
    told = parsed("--config", path)
    assert (told["model"], told["data"]) == (str(folder / "kept/vlm"), folder / "kept/train.jsonl")
    assert (told["teacher"], told["out"]) == ("org/name", folder / "kept/made")
    assert parsed("--config", path, "out")["out"] == Path("out")
    both = parsed("other", "--config", path, "out")
    assert (both["model"], both["out"]) == ("other", Path("out"))
    alone = recipe(folder, 'data = "train.jsonl"')
    assert parsed("a-model", "out", "--config", alone)["model"] == "a-model"
    assert "Missing argument 'OUT'" in run("a-model", "--config", alone).stderr


def test_the_command_line_comes_before_the_file_whatever_flag_says_it(folder: Path) -> None:
    path = recipe(folder, 'ratio = 0.3\ncompensation = "none"\nprofile = false\ntarget = "size=3MB"\nexport = []')
    given = ("kept/vlm", "out", "--data", "elsewhere.jsonl", "--config", path)
    names = ("ratio", "compensation", "profile", "target", "export")
    assert [parsed(*given)[name] for name in names] == [0.3, "none", False, ("size=3MB",), ()]
    over = parsed(*given, "--ratio", 0.4, "--refit", "--profile", "--target", "drop=1", "--export", "onnx")
    assert [over[name] for name in names] == [0.4, "refit", True, ("drop=1",), ("onnx",)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ration = 0.3", "key 'ration' is unknown; the nearest is ratio; slimvlm compress --write-config shows"),
        ("qqqq = 1", "key 'qqqq' is unknown; known are accumulate, "),
        ("ratio = 1.5", "ratio: 1.5 is not in the range 0<x<1"),
        ("ratio = true", "ratio: True is no value of it"),
        ("rounds = [1, 2]", "rounds: '1,2' is not a valid integer"),
        ("rounds = 1.5", "rounds: '1.5' is not a valid integer"),
        ("rounds = inf", "rounds: 'inf' is not a valid integer"),
        ("hidden-states = [-inf]", "hidden-states: '-inf' is not a valid integer"),
        ("alpha = nan", "alpha: "),
        ("data = 2026-11-27", "data: datetime.date(2026, 11, 27) is no value of it"),
        ("target = [[1], {a = 1}]", "target: "),
        ('criterion = "best"', "criterion: 'best' is not one of 'ukmi'"),
        ("tower-ratio = {vision = 2}", "tower-ratio: 'vision=2' is not NAME=RATIO"),
        ('data = "none.jsonl"', "data: Path 'none.jsonl' does not exist; slimvlm"),
        ("config = 'other.toml'", "key 'config' is unknown"),
        ("ratio = ", "it is not TOML (Invalid value"),
        ("[recovery]\nsteps = 1", "key 'recovery' is unknown; the nearest is recover"),
    ],
)
def test_what_a_file_says_wrongly_is_refused_with_its_place(folder: Path, text: str, says: str) -> None:
    result = run("kept/vlm", "out", "--data", "elsewhere.jsonl", "--config", recipe(folder, text))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "recipe.toml does not fit: " in result.stderr and says in result.stderr
    assert result.stderr.count("\n") == 1 and not (folder / "out").exists()


@pytest.mark.parametrize(
    ("command", "text", "told"),
    [
        ("plan", 'model = "vlm"\ndata = "train.jsonl"\nratio = 0.3', {"ratio": 0.3}),
        ("export", 'model = "vlm"\nformat = ["pt2"]\nsamples = 3', {"formats": ("pt2",), "samples": 3}),
        ("evaluate", 'model = "vlm"\ndata = "train.jsonl"\nagainst = "org/name"', {"against": "org/name"}),
        ("profile", 'slim = "vlm"\nbackend = ["onnx"]\nmax-ttft-ms = 3', {"max_ttft_ms": 3.0}),
    ],
)
def test_other_commands_read_files_of_their_own_options(
    folder: Path, command: str, text: str, told: dict[str, object]
) -> None:
    path = recipe(folder, text)
    out = ("out",) if command in ("plan", "export") else ()
    found = parsed("--config", path, *out, command=command)
    assert told.items() <= found.items() and found.get("model", found.get("slim")) == str(folder / "kept/vlm")
    assert found.get("out") == (Path("out") if out else None)
    over = parsed("other", "--config", path, *out, command=command)
    assert over.get("model", over.get("slim")) == "other"
    written = CliRunner().invoke(main, [command, "--config", str(path), "--write-config"]).stdout
    assert parsed("--config", recipe(folder, written), *out, command=command) == found


def test_the_record_of_a_run_says_what_to_plan_and_nothing_of_what_does_not_begin_one(folder: Path) -> None:
    result = CliRunner().invoke(main, ["export", "out", "made", "--config", str(folder / "run.json")])
    assert result.exit_code == 2  # it is not there
    (folder / "run.json").write_text("{}")
    result = CliRunner().invoke(main, ["export", "out", "made", "--config", str(folder / "run.json")])
    assert (
        result.exit_code == 3 and "has the options of slimvlm compress, which are not those of export" in result.stderr
    )


def test_a_file_that_is_none_is_refused(folder: Path) -> None:
    (folder / "kept/bytes.toml").write_bytes(b"ratio = \xff")
    assert "it is not UTF-8 (byte 8)" in run("out", "--config", "kept/bytes.toml").stderr
    (folder / "run.json").write_text('{"schema": 1}')
    damaged = run("out", "--config", "run.json")
    assert damaged.exit_code == 3 and "run.json does not fit" in damaged.stderr
    assert run("out", "--config", "kept").exit_code == 2


def test_a_value_of_the_command_line_is_refused_before_a_file_is_written(folder: Path) -> None:
    result = run("--ratio", 2, "--write-config", "new.toml")
    assert result.exit_code == 2 and "0<x<1" in result.stderr
    assert not (folder / "new.toml").exists()


def test_completion_reads_and_writes_no_file(folder: Path) -> None:
    words = ["--config", "none.toml", "--write-config", "new.toml"]
    with COMPRESS.make_context("compress", words, resilient_parsing=True) as context:
        assert isinstance(context, click.Context)
    assert not (folder / "new.toml").exists()
