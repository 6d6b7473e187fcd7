"""What one of several processes refuses they all refuse, with the same sentence."""

from pathlib import Path

from pairs import run_pair

from slimvlm.demo import MODEL, SAMPLES

WORDS = ["compress", str(MODEL), "--recover", "none", "--samples", "8", "--batch-size", "2", "--rounds", "1"]


def sentences(folder: Path, *different: list[str | Path]) -> list[str]:
    """What `slimvlm compress` says in two processes, each with words of its own: it refuses in one sentence."""
    said = []
    for ended in run_pair(folder, *(["slimvlm", *WORDS, *words] for words in different)):
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


def test_data_that_one_process_cannot_read_are_refused_by_the_one_that_computes_already(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no json\n")
    good, bad = ([tmp_path / "out", "--data", data] for data in (SAMPLES / "train.jsonl", tmp_path / "bad.jsonl"))
    first, second = sentences(tmp_path, good, bad)
    assert first == second and "bad.jsonl" in first
