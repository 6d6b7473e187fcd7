"""What is written is whole or absent, replaces regular files only, and takes the place of nobody else's files."""

import os
import stat

import pytest
import torch

from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.files.folders import refuse_inside, written_folder
from slimvlm.compress.files.locks import LOCK
from slimvlm.compress.files.writing import PARTIAL, load_tensors, save_tensors, write_text, written_file


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK
    }


def link(path):
    path.with_name("behind").write_text("somebody's")
    path.symlink_to("behind")


def device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 7))  # /dev/full
    except PermissionError:
        pytest.skip("only root makes devices")


SPECIAL = {"link": link, "dangling link": lambda path: path.symlink_to("gone"), "device": device, "pipe": os.mkfifo}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_replaced(tmp_path, kind):
    path = tmp_path / "out.json"
    SPECIAL[kind](path)
    before = path.lstat()
    for write in (write_text, lambda path, text: save_tensors(path, {"a": torch.zeros(1)}, {})):
        with pytest.raises(OutputError, match=r"out\.json is .* never replaced by a file; choose another name"):
            write(path, "mine")
    with pytest.raises(OutputError, match="never replaced by a folder"), written_folder(path):
        pass
    after = path.lstat()
    assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert sorted(tree(tmp_path)) == (["behind", "out.json"] if kind == "link" else [])


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first é")
    with pytest.raises(ZeroDivisionError), written_file(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt"), written_file(path) as beside:
        raise OSError(28, "No space left on device", str(beside))
    assert tree(tmp_path) == {"a.txt": "first é"}


def test_a_name_beside_is_not_written_through_a_link_that_waits_there(tmp_path):
    (tmp_path / "victim").write_text("somebody's")
    (tmp_path / f".a.txt{PARTIAL}").symlink_to("victim")
    write_text(tmp_path / "a.txt", "mine")
    assert tree(tmp_path) == {"a.txt": "mine", "victim": "somebody's"}


def test_tensors_and_facts_come_back_and_others_may_read_the_file(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"x": torch.arange(6.0).reshape(2, 3).T, "y": torch.ones(1)}
    save_tensors(path, tensors, {"facts": {"step": 1}})
    write_text(tmp_path / "plain", "")
    read, facts = load_tensors(path)
    assert facts == {"facts": {"step": 1}} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert load_tensors(path, ["y", "z"])[0].keys() == {"y"}
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError):
        load_tensors(path)


@pytest.mark.parametrize("there", (False, True), ids=("absent", "empty"))
def test_a_folder_is_whole_or_absent(tmp_path, there):
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)
        (out / PARTIAL).mkdir()  # of a killed process
        (out / PARTIAL / "half").write_text("half")
    with pytest.raises(ZeroDivisionError), written_folder(out) as beside:
        (beside / "half").write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == {}
    with written_folder(out) as beside:
        (beside / "part").mkdir()
        (beside / "part" / "a").write_text("a")
        assert tree(out) == ({f"{PARTIAL}/new/part/a": "a"} if there else {})
    assert tree(tmp_path) == {"deep/out/part/a": "a"}
    with pytest.raises(OutputError, match="not an empty folder"), written_folder(out):
        pass


def test_the_current_folder_can_be_filled(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    with written_folder(Path()) as beside:
        (beside / "a").write_text("a")
    assert tree(tmp_path) == {"a": "a"} and os.listdir() == ["a"]  # noqa: PTH208 (the folder one stands in)


def test_only_what_was_ours_makes_place(tmp_path):
    for name in ("ours/a", "ours/b", "gone/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "ours" / "notes").write_text("somebody's")
    earlier = ("ours/a", "ours/b", "gone/c", "never/was")
    with (
        pytest.raises(OutputError, match=r"ours/notes is there and not ours"),
        written_folder(tmp_path, earlier) as new,
    ):
        (new / "ours").mkdir()
        for name in ("a", "notes"):
            (new / "ours" / name).write_text("new")
    assert tree(tmp_path) == {"ours/a": "old", "ours/b": "old", "gone/c": "old", "ours/notes": "somebody's"}
    with written_folder(tmp_path, earlier) as new:
        (new / "ours").mkdir()
        (new / "ours" / "a").write_text("new")
    assert tree(tmp_path) == {"ours/a": "new", "ours/notes": "somebody's"}
    assert sorted(os.listdir(tmp_path)) == ["ours"]  # noqa: PTH208 (names are enough)


def test_a_loop_of_links_leads_nowhere_and_raises_nothing(tmp_path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refuse_inside(tmp_path / "out", {"model": loop})
    with pytest.raises(UnsuitableOptionError, match="lies in"):
        refuse_inside(loop, {"model": loop / "model"})
