"""`optimum-cli slimvlm` is slimvlm: the same commands, options, results and exit codes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_folders import write_tiny

from slimvlm.cli import main
from slimvlm.compress.card import read_card

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="needs slimvlm[dev] as it is now")


def optimum(monkeypatch, capsys, *words):
    """Exit code and outputs of `optimum-cli`, in this process."""
    from optimum.commands.optimum_cli import main as optimum_main

    monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        optimum_main()
    told = capsys.readouterr()
    return ended.value.code or 0, told.out, told.err


def test_optimums_own_program_finds_it():
    program = Path(sys.executable).with_name("optimum-cli")
    done = subprocess.run([program, "slimvlm", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.partition(",")[0]) == (0, "optimum-cli slimvlm"), done.stderr


def test_it_is_listed_and_costs_a_start_of_optimum_nothing():
    program = "import sys; from optimum.commands.optimum_cli import main; sys.argv[1:] = ['--help']\ntry: main()\n"
    program += "finally: assert not {'slimvlm', 'click', 'torch'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Compress, export and profile a vision-language model." in done.stdout


@pytest.mark.parametrize("name", [None, *main.commands])
def test_help_is_that_of_the_command(monkeypatch, capsys, name):
    monkeypatch.setattr("click.formatting.FORCED_WIDTH", 80)  # as the runner of click's has it
    words = [name] if name else []
    own = CliRunner().invoke(main, [*words, "--help"], prog_name="optimum-cli slimvlm").output
    assert optimum(monkeypatch, capsys, "slimvlm", *words, "--help") == (0, own, "")


def test_a_model_is_cut_and_exported_with_the_commands_own_options(monkeypatch, capsys, tmp_path):
    model, data = write_tiny(tmp_path, samples=8)
    cut = ("--criterion", "magnitude", "--rounds", 1, "--ratio", 0.2, "--recover", "none", "--no-refit")
    rest = ("--export", "none", "--no-profile", "--quiet", "--json")
    monkeypatch.setattr("slimvlm.serve.report.write_report", lambda run: run)  # its drawings are tested elsewhere
    code, out, err = optimum(
        monkeypatch, capsys, "slimvlm", "compress", *cut, model, tmp_path / "out", "--data", data, *rest
    )
    assert code == 0, err
    assert json.loads(out)["removed_of_all"] == pytest.approx(0.2, abs=0.01)
    assert read_card(tmp_path / "out" / "model").told.measured.whole.questions == 8
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["command"][:3] == ["optimum-cli", "slimvlm", "compress"]
    asked = ("--format", "onnx", "--exporter", "torchscript", "--samples", 2, "--max-new-tokens", 4, "-q")
    code, _, err = optimum(
        monkeypatch, capsys, "slimvlm", "export", tmp_path / "out" / "model", tmp_path / "exported", *asked
    )
    assert code == 0, err
    assert (tmp_path / "exported" / "onnx" / "decoder_model_merged.onnx").is_file()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("profile",), 2, "Missing argument 'SLIM'"),
        (("compress", "--nonsense"), 2, "No such option"),
        (("export", "no/such/folder", "out"), 3, "no/such/folder"),
        (("nonsense",), 2, "No such command 'nonsense'"),
    ],
)
def test_refusals_are_those_of_the_command(monkeypatch, capsys, tmp_path, words, code, said):
    monkeypatch.chdir(tmp_path)
    ended, _, err = optimum(monkeypatch, capsys, "slimvlm", *words)
    assert ended == code and said in err
