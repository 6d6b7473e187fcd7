"""Forty of the hostile command lines of `make fuzz`."""

from pathlib import Path

from forked import Forked

FUZZ = Path(__file__).parent / "support" / "fuzz.py"


def test_forty_hostile_command_lines_end_in_no_traceback_no_hang_and_change_no_input(tmp_path: Path) -> None:
    """In a process of its own, which forks a child per case: a child of a process with threads might wait forever."""
    words = ("--cases", "40", "--jobs", "1", "--families", "llava,smolvlm,clip")
    with Forked(tmp_path, FUZZ, *words) as process:
        assert process.wait() == 0, process.stdout.read_text() + process.stderr.read_text()
    assert process.stdout.read_text().splitlines()[-1].endswith("0 tracebacks, 0 hangs, 0 changed inputs")
