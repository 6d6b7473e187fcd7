"""A file of lines that several processes add to."""

import multiprocessing

import pytest

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files.lines import add_line, change_lines, read_lines


def test_what_a_killed_process_left_without_an_end_is_no_line_and_is_written_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_lines(path) == []
    path.write_text("one\ntw")
    assert read_lines(path) == ["one"]
    add_line(path, "three")
    assert path.read_text() == "one\nthree\n"


def _add(path, name):
    for number in range(50):
        add_line(path, f"{name} {number} " + "x" * 5000)


def test_lines_of_several_processes_are_all_there_and_whole(tmp_path):
    path, context = tmp_path / "rows.jsonl", multiprocessing.get_context("fork")
    members = [context.Process(target=_add, args=(path, name)) for name in "abc"]
    for member in members:
        member.start()
    for _ in range(20):  # others change the file meanwhile, and lose nothing of it
        change_lines(path, sorted)
    for member in members:
        member.join()
    assert sorted(line.rstrip("x").strip() for line in read_lines(path)) == (
        sorted(f"{name} {number}" for name in "abc" for number in range(50))
    )


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(OutputError, match="rows.jsonl"):
        add_line(tmp_path / "rows.jsonl", "one")
