"""Nothing that is not ours is ever deleted or replaced, and an earlier run stays until another one is in its place."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from forked import Forked
from run_records import edit_record

from slimvlm.cli import main
from slimvlm.compress.files.locks import LOCK, locked_file, locked_folder
from slimvlm.demo import MODEL, SAMPLES

CHEAP = (
    *("--criterion", "magnitude", "--rounds", "1", "--samples", "8", "--eval-samples", "12", "--recover", "none"),
    *("--no-refit", "--export", "none", "--no-profile", "--quiet"),
)


def slimvlm(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def compress(model: object, out: Path, *more: object, data: Path = SAMPLES / "train.jsonl") -> Result:
    return slimvlm("compress", model, out, "--data", data, *CHEAP, *more)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result: Result, *says: str) -> None:
    assert result.exit_code == 3, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for words in says:
        assert words in result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert compress(MODEL, out, "--ratio", "0.3").exit_code == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run, with files of somebody else among its own."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "notes.txt").write_text("mine")
    (out / "exported").mkdir()
    (out / "exported" / "model.onnx").write_text("mine")
    return out


@pytest.fixture
def bad_data(tmp_path: Path) -> Path:
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    return tmp_path / "bad.jsonl"


@pytest.mark.parametrize("flags", ((), ("--overwrite",)), ids=("plain", "overwrite"))
def test_what_can_be_refused_leaves_the_earlier_run_untouched(run, bad_data, flags):
    inside = Path(shutil.copy(bad_data, run / "samples.jsonl"))
    before = tree(run)
    for words, says in (
        ((run.parent / "mistyped",), "mistyped is not a folder"),
        ((MODEL, "--ratio", "0.99"), "largest possible"),
        ((MODEL, "--device", "cuda:63"), "cuda:63"),
        ((MODEL, "--taylor", "second"), "--taylor"),
        ((run / "model",), "lies in"),
        ((run,), "lies in"),
        ((MODEL, "--eval-data", inside), f"eval-data {inside} lies in"),
        ((MODEL, "--recover", "kl", "--teacher", run / "model"), "teacher"),
        ((MODEL, "--recover", "kl", "--teacher", run.parent / "nobody"), "nobody is not a folder"),
        ((MODEL, "--recover", "sft", "--recover-data", bad_data), "bad.jsonl"),
    ):
        result = compress(words[0], run, "--ratio", "0.4", *words[1:], *flags)
        assert_refused(result, says if flags or "lies in" in says else "")
        assert tree(run) == before
    assert_refused(compress(MODEL, run, *flags, data=bad_data))
    assert tree(run) == before


def test_what_is_only_refused_once_begun_brings_the_earlier_run_back(run, tmp_path):
    before, model = tree(run), Path(shutil.copytree(MODEL, tmp_path / "model"))
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert_refused(compress(model, run, "--overwrite"), "model.safetensors")
    assert tree(run) == before


def test_overwrite_replaces_the_run_and_leaves_what_is_not_its_own(run):
    (run / "model" / "notes.txt").write_text("mine")
    before = tree(run)
    assert_refused(compress(MODEL, run, "--ratio", "0.4", "--overwrite"), "model/notes.txt is not of the run")
    assert tree(run) == before
    (run / "model" / "notes.txt").unlink()
    assert compress(MODEL, run, "--ratio", "0.4", "--overwrite").exit_code == 0
    assert json.loads((run / "run.json").read_text())["options"]["ratio"] == 0.4
    assert {name for name, content in tree(run).items() if content == b"mine"} == {
        *("notes.txt", "exported/model.onnx")
    }


@pytest.mark.parametrize("content", ("{}", '{"schema": 1, "options": {}, "stages": {}, "command": [], "versions": {}}'))
def test_a_folder_with_another_run_json_is_no_run(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    before = tree(tmp_path)
    for flag in ("--overwrite", "--resume"):
        assert_refused(compress(MODEL, tmp_path / "out", flag), "run.json")
    assert tree(tmp_path) == before


def test_a_run_that_was_changed_by_hand_is_not_overwritten(run):
    record = json.loads((run / "run.json").read_text())
    record["stages"]["plan"]["calibration_samples"] += 1
    (run / "run.json").write_text(json.dumps(record))
    before = tree(run)
    for words in (("compress", MODEL, run, "--data", SAMPLES / "train.jsonl", *CHEAP, "--overwrite"), ("report", run)):
        assert_refused(slimvlm(*words), "changed since it was written")
    assert {name: content for name, content in tree(run).items() if "report" not in name} == {
        name: content for name, content in before.items() if "report" not in name
    }


def test_a_second_run_is_told_who_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path):
    out = tmp_path / "out"
    words = ["slimvlm", "compress", MODEL, out, "--data", SAMPLES / "train.jsonl", *CHEAP, "--criterion", "gate"]
    held = rf"out is in use by process (\d+) on {re.escape(socket.gethostname())} since 20"
    with Forked(tmp_path, *words) as first:
        while not (out / "run.json").exists():
            assert first.runs()
        for second in (compress(MODEL, out, "--resume"), compress(MODEL, out, "--overwrite"), slimvlm("recover", out)):
            assert_refused(second)
            assert int(re.search(held, second.stderr)[1]) == first.pid
        assert first.kill() == -signal.SIGKILL
    assert (out / LOCK).exists()
    assert compress(MODEL, out, "--criterion", "gate", "--resume").exit_code == 0
    assert not (out / LOCK).exists()


HOLD = "import sys\nfrom pathlib import Path\nfrom slimvlm.compress.files.locks import {lock}\n"
HOLD += "with {lock}(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"


@pytest.mark.parametrize("command", ("plan", "demo", "apply", "export", "report", "profile"))
def test_every_command_that_writes_says_who_holds_its_place(run, tmp_path, command):
    out, data = tmp_path / "new", SAMPLES / "train.jsonl"
    words, place, lock = {
        "plan": (("plan", MODEL, out, "--data", data), out, locked_folder),
        "demo": (("demo", out), out, locked_folder),
        "apply": (("apply", MODEL, run / "plan.json", out), tmp_path / ".new.partial", locked_folder),
        "export": (
            ("export", MODEL, out, "--samples", "1", "--max-new-tokens", "1"),
            tmp_path / ".new.partial",
            locked_folder,
        ),
        "report": (("report", run), run / "report.html", locked_file),
        "profile": (("profile", MODEL, "--out", tmp_path / "new.json"), tmp_path / "new.json", locked_file),
    }[command]
    program = [sys.executable, "-c", HOLD.format(lock=lock.__name__), place]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert_refused(slimvlm(*words), f"in use by process {holder.pid} on ")
        holder.stdin.close()


def test_a_profile_replaces_nothing_but_a_profile(run, tmp_path):
    (tmp_path / "device").symlink_to("/dev/null")
    for path in (
        run / "model" / "config.json",
        run / "run.json",
        run,
        tmp_path / "device",
        tmp_path / "no" / "where.json",
    ):
        before = tree(run)
        assert_refused(slimvlm("profile", run, "--out", path), path.name)
        assert tree(run) == before


def test_apply_writes_into_an_empty_folder_only_and_says_so_first(run, tmp_path):
    for out in (run, run / "model", tmp_path / "link"):
        if out.name == "link":
            out.symlink_to(run)
        before = tree(run)
        assert_refused(slimvlm("apply", tmp_path / "mistyped", run / "plan.json", out), out.name)
        assert tree(run) == before


EVIL = """
from pathlib import Path
from transformers import LlavaConfig
Path({marker!r}).touch()
class EvilConfig(LlavaConfig):  # of its own: transformers marks the class it finds as foreign, for the whole process
    pass
"""


@pytest.mark.parametrize("flag", (False, True), ids=("without", "with"))
def test_a_run_lends_no_trust_to_foreign_code(run, tmp_path, flag):
    marker, foreign = tmp_path / "marker", Path(shutil.copytree(MODEL, tmp_path / "foreign"))
    config = json.loads((foreign / "config.json").read_text())
    config = {**config, "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "evil.py").write_text(EVIL.format(marker=str(marker)))

    def point_to_it(record):
        record["options"]["model"] = str(foreign)
        record["stages"]["plan"]["status"] = "running"

    edit_record(run, point_to_it)
    recover = ("recover", run, "--recover", "sft", "--steps", "1", "--validation-samples", "4", "--train", "projector")
    slimvlm(*recover, "--quiet", *(["--trust-remote-code"] if flag else []))
    assert marker.exists() == flag
    edit_record(run, lambda record: record["options"].update(trust_remote_code=True))
    assert_refused(slimvlm(*recover), "options: unknown key 'trust_remote_code'")
