"""Files that are whole or absent: written beside their name, flushed, renamed; only regular files are ever replaced.

A killed process leaves nothing half-written under a final name. What cannot be written is an OutputError. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any  # JSON

from safetensors import SafetensorError, safe_open

from slimvlm.compress.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"  # ends the names of what is not yet whole
VERSIONED = ("slimvlm", "torch", "transformers", "safetensors", "numpy", "pillow")
KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISREG, "a file"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """Where to write what shall become `path` when the block ends; after an error nothing is left of it.

    Raises:
        OutputError: `path` is there and no regular file; it cannot be written, or the disk is full.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 (a name for `.`, but no links followed)
    require_kind(path, stat.S_ISREG, "a file")
    with reported_as_output_errors(path):
        beside = path.with_name(f".{path.name}{PARTIAL}")
        try:
            beside.unlink(missing_ok=True)
            with beside.open("xb") as file:  # never through a link that somebody put there
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield beside
            beside.chmod(mode)  # safetensors writes for the owner alone
            sync(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Find out before a long measurement that its result could not be written.

    Raises:
        OutputError: as `written_file`.
    """
    with suppress(_DryRunError), written_file(path):
        raise _DryRunError


class _DryRunError(Exception):
    """Leaves nothing of a file that was begun."""


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` (UTF-8) whole or not at all.

    Raises:
        OutputError: as `written_file`.
    """
    with written_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write tensors, and JSON `facts` in the header, as one safetensors file, whole or not at all.

    Raises:
        OutputError: as `written_file`.
    """
    from safetensors.torch import save_file

    header = {name: json.dumps(fact, sort_keys=True) for name, fact in facts.items()}
    with written_file(path) as beside:
        save_file({name: value.contiguous() for name, value in tensors.items()}, beside, metadata=header)


def load_tensors(path: Path, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (all, or those of `names` that are there) and the facts that `save_tensors` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            wanted = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118 (no mapping)
            return {name: file.get_tensor(name) for name in wanted}, facts
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(str(error)) from None


def real(path: Path) -> Path:
    """Where `path` leads, links followed; a loop of links leads nowhere (`Path.resolve` would raise RuntimeError)."""
    return Path(os.path.realpath(path))


def require_kind(path: Path, is_kind: Callable[[int], bool], words: str) -> None:
    """Refuse to write to `path` if it is there and something else: a link, a device, a pipe.

    Raises:
        OutputError: it is.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _output_error(path, error) from None
    if not is_kind(mode):
        found = next((kind for matches, kind in KINDS if matches(mode)), "something special")
        raise OutputError(f"{path} is {found}, and never replaced by {words}; choose another name")


@contextmanager
def reported_as_output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of a write (disk full, no permission) inside the block into an OutputError naming the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _output_error(path, error) from error


def _output_error(path: Path, error: Exception) -> OutputError:
    named = getattr(error, "filename", None)
    where = path if named is None or PARTIAL in str(named) else named
    why = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), type(error).__name__)
    return OutputError(f"cannot write {where}: {why}; check free space and permissions, or choose another folder")


def file_digest(path: Path) -> str:
    """Sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def installed_versions(packages: Collection[str] = VERSIONED) -> dict[str, str]:
    """Versions of Python and of those of the packages that are there."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
