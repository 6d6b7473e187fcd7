"""Folders that are whole or absent, and of which nothing is ever taken away but what a manifest of ours names."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TypedDict

from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.files.decoding import content_of, decode, parse
from slimvlm.compress.files.locks import LOCK, locked_folder
from slimvlm.compress.files.writing import PARTIAL, file_digest, real, reported_as_output_errors, require_kind, sync

EARLIER = ".earlier"  # begins the names of folders that hold what is being replaced, until that is done
MANIFEST = "manifest.json"  # of a checkpoint or an export


class FileEntry(TypedDict):
    """Size and digest of a file."""

    bytes: int
    sha256: str


class Listing(TypedDict):
    """What every manifest has: the files of its folder by name."""

    files: dict[str, FileEntry]


def list_files(folder: Path) -> dict[str, FileEntry]:
    """What a manifest of `folder` lists: every file but the manifest, `/` in names."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }


def listed_files(folder: Path) -> tuple[str, ...]:
    """The files in `folder` that its manifest names, and the manifest; nothing where there is none that can be read."""
    try:
        names = decode(parse(content_of(folder / MANIFEST)), Listing)["files"]
    except (OSError, ValueError):
        return ()
    inside = [name for name in names if not (Path(name).is_absolute() or ".." in Path(name).parts)]
    return (*inside, MANIFEST)


def other_files(folder: Path, ours: Collection[str] = ()) -> Iterator[Path]:
    """What is in `folder` besides `ours` and what a killed process left."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if (path.is_symlink() or not path.is_dir()) and name.as_posix() not in ours and not _is_passing(name):
            yield path


def holds_others(folder: Path, ours: Collection[str] = ()) -> bool:
    """Whether there is anything else in `folder`; see `other_files`."""
    return any(other_files(folder, ours))


def require_free(folder: Path) -> None:
    """Refuse to write a folder where there is anything already.

    Raises:
        OutputError: there is.
    """
    require_kind(folder, stat.S_ISDIR, "a folder")
    with reported_as_output_errors(folder):
        if folder.exists() and holds_others(folder):
            raise OutputError(f"{folder} is not an empty folder; choose another name or remove it first")


def require_room(folder: Path, wanted: int, advice: str = "choose a folder on another disk") -> None:
    """Refuse to begin what cannot be written to the end.

    Args:
        wanted: bytes that will be written into `folder`.
        advice: what to do besides making room.

    Raises:
        OutputError: fewer are free there.
    """
    above = real(folder.expanduser())
    while not above.is_dir():
        above = above.parent
    with reported_as_output_errors(folder):
        free = shutil.disk_usage(above).free
    if wanted > free:
        raise OutputError(
            f"{folder} would take about {wanted / 1e6:,.1f} MB, and only {free / 1e6:,.1f} MB of space are free there; "
            f"make room, or {advice}"
        )


def refuse_inside(out: Path, read: Mapping[str, str | Path | None]) -> None:
    """Refuse to write into a folder that what is `read`, by the names of options, lies in.

    Raises:
        UnsuitableOptionError: it does.
    """
    for name, given in read.items():
        if given is not None and real(Path(given).expanduser()).is_relative_to(real(out.expanduser())):
            raise UnsuitableOptionError(
                f"{name.replace('_', '-')} {given} lies in {out}, where the result would go; choose another folder"
            )


def _is_passing(path: Path) -> bool:
    return path.parts[0].startswith(EARLIER) or any(part == LOCK or part.endswith(PARTIAL) for part in path.parts)


@contextmanager
def written_folder(folder: Path, earlier: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder to write what shall become `folder` when the block ends; after an error nothing is left of it.

    Args:
        earlier: files in `folder` that the new ones replace, `/` in names; whatever else is there stays.

    Raises:
        OutputError: `folder` is there and no folder, or not empty and nothing is `earlier`; a new file has the name of
            one that stays; another process writes it; it cannot be written, or the disk is full.
    """
    with reported_as_output_errors(folder), reserved(folder) as beside:
        folder = Path(os.path.abspath(folder))  # noqa: PTH100 (a name for `.`, but no links followed)
        there = folder.exists()
        if not earlier:
            require_free(folder)
        new = beside / "new"
        try:
            _clear(beside)  # of what a killed process left
            new.mkdir()
            yield new
            for path in (*new.rglob("*"), new):
                sync(path)
            if there:
                _fill(folder, new, earlier)
            else:
                new.replace(folder)
            sync(folder.parent)
        finally:
            _clear(beside)


@contextmanager
def reserved(folder: Path) -> Iterator[Path]:
    """Hold the place of a folder that will be written; where its files are made.

    Raises:
        OutputError: another process holds it (named), or nothing can be written there.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (as written_folder)
    require_kind(folder, stat.S_ISDIR, "a folder")
    there = folder.exists()  # perhaps a mount point or somebody's current folder: filled, not replaced
    beside = folder / PARTIAL if there else folder.with_name(f".{folder.name}{PARTIAL}")
    with locked_folder(beside, folder):
        yield beside
    _drop_empty(beside, beside.parent)  # of a killed process


def _clear(folder: Path) -> None:
    """Remove what is in a folder of our own, but its lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def _fill(folder: Path, new: Path, earlier: Collection[str]) -> None:
    """Move the files of `new` into `folder`, in the place of the `earlier` ones; after an error all is as before."""
    names = [path.relative_to(new).as_posix() for path in new.rglob("*") if not path.is_dir()]
    with set_aside(folder, earlier):
        moved: list[str] = []
        try:
            for name in sorted(names, key=lambda name: (name == MANIFEST, name)):  # which says that all is there
                move_files([name], new, folder)
                moved.append(name)
        except BaseException:
            move_files(moved, folder, new)
            raise


@contextmanager
def set_aside(folder: Path, names: Collection[str]) -> Iterator[None]:
    """Move files of `folder` out of the way while the block makes new ones: back after an error, else removed."""
    aside = put_aside(folder, names)
    try:
        yield
    except BaseException:
        put_back(folder, names, aside)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def put_aside(folder: Path, names: Collection[str]) -> Path:
    """Move files of `folder` into a new folder in it; where they are now."""
    aside = next(path for number in count() if not (path := folder / f"{EARLIER}{number or ''}").exists())
    move_files(names, folder, aside)
    return aside


def put_back(folder: Path, names: Collection[str], aside: Path) -> None:
    """Undo `put_aside`."""
    move_files(names, aside, folder)
    _drop_empty(aside, folder)


def move_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Move the files of these names that are in `source` to `target`; folders left empty leave `source`.

    Raises:
        OutputError: `target` has something of that name, which is never replaced.
        OSError: it cannot be moved.
    """
    for name in names:
        if os.path.lexists(source / name):
            if os.path.lexists(target / name):
                raise OutputError(f"{target / name} is there and not ours; move it away, or choose another folder")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(target / name)
            _drop_empty((source / name).parent, source)


def move_folder(source: Path, target: Path) -> None:
    """Rename the folder of a checkpoint; where others have files in `target`, move only its own."""
    if target.exists():
        move_files(listed_files(source), source, target)
    else:
        source.rename(target)


def remove_files(names: Iterable[str], folder: Path) -> None:
    """Remove the files of these names from `folder`, and folders left empty, `folder` too."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        _drop_empty((folder / name).parent, folder.parent)


def _drop_empty(folder: Path, outer: Path) -> None:
    """Remove `folder` and those around it, up to `outer`, as long as they are empty."""
    with suppress(OSError):
        while folder != outer:
            folder.rmdir()
            folder = folder.parent
