"""What is counted as a process's own memory, and what as mapped."""

from __future__ import annotations

import mmap

from slimvlm.serve.measuring import memory
from slimvlm.serve.measuring.memory import held_bytes

SIZE, SLACK = 2**26, 2**22


def test_mapped_files_are_not_a_process_s_own_memory(tmp_path):
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(bytes(SIZE))
    before = held_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # touches every page
        after = held_bytes()
        assert after.own - before.own < SLACK
        assert after.mapped - before.mapped > SIZE - SLACK
        assert after.resident == after.own + after.mapped


def test_what_a_process_allocates_and_writes_is_its_own():
    before = held_bytes()
    kept = bytearray(b"x") * SIZE
    after = held_bytes()
    assert after.own - before.own > SIZE - SLACK
    assert after.mapped - before.mapped < SLACK
    del kept


def test_where_the_system_has_no_status_files_what_is_freed_at_the_end_counts_as_own(tmp_path, monkeypatch):
    usual = held_bytes()
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    found = held_bytes()
    assert 0 < found.own <= found.resident
    assert abs(found.resident - usual.resident) < SIZE
    assert memory.peak_bytes() is None
