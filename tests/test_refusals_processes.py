"""What one of several processes refuses they all refuse, with the same sentence."""

from pathlib import Path

from pairs import run_pair

from slimvlm.demo import MODEL, SAMPLES

WORDS = ["compress", str(MODEL), "--recover", "none", "--samples", "8", "--batch-size", "2", "--rounds", "1"]


JOB = """
import os, sys
from pathlib import Path
from slimvlm.cli import main
from slimvlm.compress.processes import sharing
from slimvlm.demo import MODEL, SAMPLES

sharing.VISIBLE = 0.0
here, what = Path(sys.argv[0]).parent, sys.argv[1]
if what == "version":
    (here / "slimvlm-9.9.dist-info").mkdir()
    (here / "slimvlm-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\\nName: slimvlm\\nVersion: 9.9\\n")
    sys.path.insert(0, str(here))
if what == "elsewhere":
    (here / what).mkdir()
    os.chdir(here / what)
if what == "sharded":
    os.environ["ACCELERATE_USE_FSDP"] = "true"
sys.argv[1:] = ["compress", str(MODEL), "out", "--data", str(SAMPLES / "train.jsonl"), "--recover", "sft"]
main()
"""


def sentences(folder: Path, *different: list[str | Path]) -> list[str]:
    """What `slimvlm compress` says in two processes, each with words of its own: it refuses in one sentence."""
    return refusals(folder, *(["slimvlm", *WORDS, *words] for words in different))


def refusals(folder: Path, *words: list[str | Path]) -> list[str]:
    """What two processes say, which refuse in one sentence."""
    said = []
    for ended in run_pair(folder, *words):
        text = ended.stderr.read_text()
        assert ended.returncode == 3 and "Traceback" not in text, text[-3000:]
        said.append(next(line for line in text.splitlines() if line.startswith("Error:")))
    return said


def test_a_folder_that_only_the_first_process_opens_is_refused_by_both(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("not ours")
    words = [tmp_path / "out", "--data", SAMPLES / "train.jsonl"]
    first, second = sentences(tmp_path, words, words)
    assert first == second and str(tmp_path / "out") in first


def test_data_that_one_process_cannot_read_or_lacks_are_refused_by_the_one_that_computes_already(
    tmp_path: Path,
) -> None:
    (tmp_path / "bad.jsonl").write_text("no json\n")
    for name in ("bad.jsonl", "absent.jsonl"):
        good, bad = ([tmp_path / "out", "--data", data] for data in (SAMPLES / "train.jsonl", tmp_path / name))
        first, second = sentences(tmp_path, good, bad)
        assert first == second and name in first


def test_options_and_samples_that_differ_are_refused_by_both(tmp_path: Path) -> None:
    words = [tmp_path / "out", "--data", SAMPLES / "train.jsonl"]
    first, second = sentences(tmp_path, words, [*words, "--ratio", "0.4"])
    assert first == second and "process 1 on " in first and "--ratio = 0.4, and process 0 has --ratio = 0.5" in first
    first, second = sentences(tmp_path, words, [tmp_path / "out", "--data", SAMPLES / "val.jsonl"])
    assert first == second and "samples = " in first
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_shared_is_refused_by_both(tmp_path: Path) -> None:
    """With another version of slimvlm, or shards of the models in one of them, too."""
    (tmp_path / "job.py").write_text(JOB)
    for name, says in (
        ("version", "slimvlm = 9.9, and process 0 has slimvlm = "),
        (
            "sharded",
            "FSDP in accelerate's configuration = True, and process 0 has FSDP in accelerate's configuration = ",
        ),
        ("elsewhere", "on a disk they share"),
    ):
        first, second = refusals(tmp_path, [tmp_path / "job.py", "here"], [tmp_path / "job.py", name])
        assert first == second and says in first


GROUP = """
import os, signal, sys, threading
from torch import distributed
from slimvlm.compress import processes
from slimvlm.compress.errors import SampleError, SlimvlmError

me, end = int(os.environ["RANK"]), sys.argv[2]
where = {"init_method": f"file://{sys.argv[1]}/meet-{end}", "rank": me, "world_size": 2} if end == "killed" else {}
distributed.init_process_group("gloo", **where)
with processes.joined():
    processes.wait_for_all()
assert distributed.is_initialized()

def work():
    try:
        with processes.joined():
            processes.wait_for_all()
            if me == 1 and end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if me == 1:
                raise SampleError("no samples here")
            processes.wait_for_all()
    except SlimvlmError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        distributed.destroy_process_group()
        os._exit(3)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_processes_that_the_caller_joined_end_together_too(tmp_path: Path) -> None:
    """Each job is their second one, in a thread, as Ray runs it; they meet in a file and by MASTER_ADDR."""
    (tmp_path / "job.py").write_text(GROUP)
    assert refusals(tmp_path, [tmp_path / "job.py", tmp_path, "refused"]) == ["Error: no samples here"] * 2
    first, second = run_pair(tmp_path, [tmp_path / "job.py", tmp_path, "killed"])
    assert (first.returncode, second.returncode) == (3, -9)
    assert "Error: process 1 on " in first.stderr.read_text() and "--resume" in first.stderr.read_text()
