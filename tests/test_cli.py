"""The command line: what it reads, what it refuses, how it ends."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from slimvlm.cli import main
from slimvlm.compress.errors import CheckFailedError, SampleError
from slimvlm.compress.options import CompressOptions, RecoverOptions
from slimvlm.console import printing, show
from slimvlm.console.group import Commands
from slimvlm.console.options.values import Size
from slimvlm.console.progress import progress
from slimvlm.export.options import ExportOptions
from slimvlm.serve.options import ProfileOptions

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(main.commands)
NOT_OPTIONS = {"as_json", "quiet", "config", "write_config", "trust_discovered", "dry_run"}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"image": "none.png", "question": "what?", "answer": "nothing"}\n')
    return path


def parsed(*arguments: object) -> CompressOptions:
    """The options that `slimvlm compress` hands to the library."""
    context = main.commands["compress"].make_context("compress", [str(argument) for argument in arguments])
    return CompressOptions(**{name: value for name, value in context.params.items() if name not in NOT_OPTIONS})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_options(command: str) -> None:
    code, out, _ = run(command, "--help-all" if main.commands[command].first else "--help")
    assert code == 0
    assert main.commands[command].help
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_fits_a_terminal_and_names_what_it_leaves_out(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and "\x1b" not in out
    lines = out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    options = [one for one in main.commands[command].params if isinstance(one, click.Option)]
    if first := main.commands[command].first:
        assert set(first) <= {flag for one in options for flag in one.opts}
        panels = {one.panel for one in options if one.opts[0] not in first}
        assert panels == {line.split("  ")[1] for line in lines[lines.index("All others:") + 1 :]}
        assert "--help-all" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"`slimvlm {command}[ `]", README)


def test_every_command_and_option_of_the_readme_exists() -> None:
    assert set(re.findall(r"(?:`|^    )slimvlm ([a-z]+) ", README, re.MULTILINE)) <= set(COMMANDS)
    known = {
        name
        for command in main.commands.values()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known <= {"--help", "--help-all"}


@pytest.mark.parametrize(
    ("shell", "shows"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --no-files")]
)
def test_every_shell_gets_its_completion_script(shell: str, shows: str) -> None:
    """As docs/commands.md has it."""
    told = {"_SLIMVLM_COMPLETE": f"{shell}_source"}
    script = CliRunner().invoke(main, prog_name="slimvlm", env=told)
    assert script.exit_code == 0 and shows in script.output
    words = {"_SLIMVLM_COMPLETE": f"{shell}_complete", "COMP_WORDS": "slimvlm compress --crit", "COMP_CWORD": "2"}
    found = CliRunner().invoke(
        main, prog_name="slimvlm", env=words | ({"COMP_CWORD": "--crit"} if shell == "fish" else {})
    )
    assert "--criterion" in found.output


def test_help_imports_no_library_that_takes_long() -> None:
    """That makes it fast everywhere: the seconds of one machine say nothing of another."""
    program = (
        "import sys\nfrom slimvlm.cli import main\nmain(['--help'], standalone_mode=False)\n"
        "print(*{name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True)
    libraries = {name for name in found.stderr.split() if not name.startswith("_")}
    assert libraries <= {"click", "safetensors", "slimvlm"}


def test_every_option_of_compress_is_a_field_with_the_same_default(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert parsed("model", out, "--data", data) == CompressOptions(model="model", out=out, data=data)
    parameters = {parameter.name for parameter in main.commands["compress"].params}
    assert parameters - NOT_OPTIONS == {field.name for field in fields(CompressOptions)}


def test_every_option_of_recover_is_one_of_the_recovery_with_the_same_default(tmp_path: Path) -> None:
    command = main.commands["recover"]
    values = command.make_context("recover", [str(tmp_path)]).params
    values = {name: value for name, value in values.items() if name not in NOT_OPTIONS | {"run", "device"}}
    assert (values.pop("max_quality_drop"), values.pop("export")) == (None, None)
    assert values.pop("trust_remote_code") is False  # a run does not remember it
    assert values.pop("stream") == "auto"  # nor how a teacher is read
    assert values == asdict(RecoverOptions())


def test_every_option_of_export_has_the_librarys_default(tmp_path: Path) -> None:
    values = main.commands["export"].make_context("export", [str(tmp_path), "out"]).params
    values = {name: value for name, value in values.items() if name not in NOT_OPTIONS | {"model", "out", "verify"}}
    assert ExportOptions(**values) == ExportOptions()


def test_every_option_of_profile_has_the_librarys_default() -> None:
    values = main.commands["profile"].make_context("profile", ["slim"]).params
    values = {name: value for name, value in values.items() if name not in NOT_OPTIONS}
    assert ProfileOptions(**values) == ProfileOptions(slim="slim")


def test_values_of_a_grid_are_lists() -> None:
    given = "slim --backend torch,onnx:int8 --batch-sizes 1,8 --image-sizes 224x224,448x336 --new-tokens 16"
    values = main.commands["profile"].make_context("profile", given.split()).params
    assert (values["backend"], values["batch_sizes"]) == (("torch", "onnx:int8"), (1, 8))
    assert (values["image_sizes"], values["new_tokens"]) == (((224, 224), (448, 336)), (16,))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--backend", "tensorflow"), 3, "choose from torch, onnx, torchscript"),
        (("--batch-sizes", "one"), 2, "'one' is not a valid integer"),
        (("--image-sizes", "big"), 2, "HEIGHTxWIDTH"),
        ((), 3, "is not a folder"),
    ],
)
def test_what_cannot_be_profiled_is_refused(words: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    found, _, error = run("profile", tmp_path / "none", "--out", tmp_path / "profile.json", *words)
    assert (found, says in error) == (code, True), error


@pytest.mark.parametrize("value", ["onnx,gguf", ""])
def test_an_unknown_format_is_refused_and_the_known_are_listed(value: str, tmp_path: Path) -> None:
    code, _, error = run("export", tmp_path, tmp_path / "out", "--format", value)
    assert code == 3
    assert "torchscript" in error


def test_an_unknown_opset_is_refused_and_the_known_are_listed(tmp_path: Path) -> None:
    code, _, error = run("export", tmp_path, tmp_path / "out", "--opset", "7")
    assert code == 3
    assert "choose 18 to 23" in error


@pytest.mark.parametrize(
    ("given", "formats"), [((), None), (("--export", "none"), ()), (("--export", "pt2"), ("pt2",))]
)
def test_what_is_exported_is_left_to_the_machine_or_given(given, formats, data: Path) -> None:
    assert parsed("model", "out", "--data", data, *given).export == formats


def test_given_options_reach_the_library(data: Path) -> None:
    given = (
        "--ratio 0.3 --criterion ukmi --allocator balanced --rounds 2 "
        "--tower-ratio vision=0.2 --tower-ratio language=0.4 "
        "--kind-ratio attention=0.1 --grad-memory 8GB --no-entropy --taylor mix --threshold 0.5 --layout stock --resume"
    )
    options = parsed("model", "out", "--data", data, *given.split())
    assert (options.ratio, options.criterion, options.allocator, options.rounds) == (0.3, "ukmi", "balanced", 2)
    assert options.tower_ratio == {"vision": 0.2, "language": 0.4}
    assert options.kind_ratio == {"attention": 0.1}
    assert (options.grad_memory, options.entropy, options.taylor) == (8_000_000_000, False, "mix")
    assert (options.threshold, options.layout, options.resume) == (0.5, "stock", True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "1"], "0<x<1"),
        (["--ratio", "0"], "0<x<1"),
        (["--criterion", "best"], "'magnitude'"),
        (["--tower-ratio", "vision"], "NAME=RATIO"),
        (["--tower-ratio", "vision=1.5"], "from 0 to below 1"),
        (["--tower-ratio", "vision=0.1", "--tower-ratio", "vision=0.2"], "given twice"),
        (["--kind-ratio", "norm=0.1"], "attention, mlp"),
        (["--grad-memory", "much"], "8GB"),
        (["--grad-memory", "0"], "8GB"),
        (["--device", "gpu"], "cuda:N"),
        (["--samples", "0"], "x>=1"),
    ],
)
def test_a_value_that_makes_no_sense_is_a_usage_error(arguments: list[str], says: str, data: Path) -> None:
    code, out, err = run("compress", "model", "out", "--data", data, *arguments)
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8g", 8 * 10**9), ("1.5 MiB", 3 * 2**19), ("512MiB", 2**29), ("4096", 4096), ("1kb", 1000)],
)
def test_sizes_are_bytes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (SampleError("no sample could be read"), 3, "Error: no sample could be read\n"),
        (CheckFailedError("quality fell by 9.0 points"), 4, "Error: quality fell by 9.0 points\n"),
        (KeyboardInterrupt(), 130, "Error: interrupted; what was finished is kept\n"),
    ],
)
def test_every_expected_end_has_a_sentence_and_an_exit_code(error: BaseException, code: int, says: str) -> None:
    result = CliRunner().invoke(_ending_with(error))
    assert (result.exit_code, result.stdout, result.stderr.lstrip()) == (code, "", says)


def test_a_bug_keeps_its_traceback() -> None:
    bug = ZeroDivisionError("a bug")
    result = CliRunner().invoke(_ending_with(bug))
    assert result.exception is bug
    assert result.exit_code == 1


def _ending_with(error: BaseException) -> click.Group:
    @click.group(cls=Commands, invoke_without_command=True)
    def group() -> None:
        raise error

    return group


def test_progress_is_one_line_per_stage_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=False) as report:
        report("calibrate", 0, 2)
        report("calibrate", 1, 2)
        report("calibrate", 2, 2)
        report("evaluate", 5, 5)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[:2] for line in err.splitlines()] == [["calibrate", "2/2"], ["evaluate", "5/5"]]


def test_without_a_terminal_a_long_stage_says_how_long_it_still_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slimvlm.console.progress.QUIET_SECONDS", -1)
    with progress(quiet=False) as report:
        report("recover", 1, 4, "task: loss 2.5")
        report("recover", 4, 4, "task: loss 1.5")
    first, last = capsys.readouterr().err.splitlines()
    assert re.search(r"1/4 .* s  about 0 s left  task: loss 2.5", first)
    assert "left" not in last


def test_the_minutes_of_a_long_stage_are_said_after_its_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 100.0, 101.0, 102.5, 104.0, 106.0, 420.0])  # loading takes 100 s, a step 1.5 s
    monkeypatch.setattr("slimvlm.console.progress.time.perf_counter", lambda: next(clock))
    with progress(quiet=False) as report:
        for done in (1, 2, 3, 4, 256):
            report("calibrate", done, 256, "round 1 of 8")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[5] for line in lines] == ["1/256", "3/256", "256/256"]
    assert lines[1].startswith("round 1 of 8: calibrate ") and lines[1].endswith("about 5 min left")


def test_without_a_terminal_every_round_of_a_stage_has_a_line_that_says_which(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress(quiet=False) as report:
        for done in range(1, 7):
            report("calibrate", done, 6, f"round {(done + 1) // 2} of 3")
        for number in (1, 2):  # a stage of its own in each of them
            report("refit", 1, 2, f"round {number} of 3")
            report("refit", 2, 2, f"round {number} of 3")
    lines = [re.sub(r" +[\d.]+ s", "", line).split(maxsplit=5) for line in capsys.readouterr().err.splitlines()]
    said = [(" ".join(words[:5]), *words[5].split()[:1]) for words in lines]
    assert said == [
        ("round 1 of 3: calibrate", "2/6"),
        ("round 2 of 3: calibrate", "4/6"),
        ("round 3 of 3: calibrate", "6/6"),
        ("round 1 of 3: refit", "2/2"),
        ("round 2 of 3: refit", "2/2"),
    ]
    assert "left" in " ".join(lines[0]) and "left" not in " ".join(lines[2])


@pytest.mark.parametrize("quieten", [lambda patch: True, lambda patch: patch.setenv("RANK", "1")])
def test_quiet_and_other_processes_print_nothing(
    quieten: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(quiet=bool(quieten(monkeypatch))) as report:
        report("calibrate", 1, 1)
    assert capsys.readouterr().err == ""


def test_json_is_one_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    printing.print_json({"loss": float("nan"), "path": Path("a/b"), "list": (1, 2.5, float("inf"))})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "path": "a/b", "list": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (2510, "2.51 k"), (2_510_000, "2.51 M"), (7_620_000_000, "7.62 B")]
)
def test_counts_are_readable(number: int, text: str) -> None:
    assert show.count(number) == text
