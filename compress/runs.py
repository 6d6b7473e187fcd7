"""The run folder: which stage is done, with what, and files that are either whole or absent.

`run.json` holds the command, options, versions, digests and the status of every stage.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files import installed_versions, reported_as_output_errors, write_text

SCHEMA = 1
RECORD = "run.json"


class RunFolder:
    """One run's folder and its record.

    Args:
        path: the folder; created when absent.
        options: what identifies the run; a resumed run must have the same.
        resume: continue after the last finished stage of an earlier run in the same folder.
        overwrite: delete what an earlier run of ours left; never deletes a folder without a run record.
        writer: of several processes in one run only one writes; the others open the folder after it, with `resume`.

    Raises:
        OutputError: the folder is not empty (and neither flag fits), not writable, or holds another run.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        writer: bool = True,
    ) -> None:
        self.path, self.writer = path, writer
        options = json.loads(json.dumps(options, sort_keys=True))
        with reported_as_output_errors(path):
            earlier = self._read_earlier(resume, overwrite)
            path.mkdir(parents=True, exist_ok=True)
        if earlier is not None:
            _check_same_options(earlier["options"], options, path)
            self.record = earlier
        else:
            self.record = {
                "schema": SCHEMA,
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "options": options,
                "stages": {},
            }
        self.record["versions"] = installed_versions()
        self.save()

    def _read_earlier(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; choose a folder")
        record = self.path / RECORD
        if not record.is_file():
            raise OutputError(f"{self.path} is not empty and holds no run of slimvlm; choose an empty folder")
        if overwrite:
            shutil.rmtree(self.path)
            return None
        if not resume and list(self.path.iterdir()) == [record]:  # refused before anything was made: nothing to lose
            return None
        if not resume:
            raise OutputError(
                f"{self.path} holds an earlier run; continue it with --resume, or replace it with --overwrite"
            )
        return _parse(record)

    def save(self) -> None:
        """Write the record, if this process is the one that writes."""
        if self.writer:
            write_text(self.path / RECORD, json.dumps(self.record, indent=2, sort_keys=True) + "\n")

    def finished(self, stage: str) -> bool:
        """Whether `stage` was finished by this or an earlier process."""
        return self.record["stages"].get(stage, {}).get("status") == "finished"

    @contextmanager
    def stage(self, name: str, **known: Any) -> Iterator[dict[str, Any]]:
        """Record `name` as running, then as finished with its seconds; `known` facts, and those put into the yielded
        dict, are kept.
        """
        facts: dict[str, Any] = dict(known)
        self.record["stages"][name] = {**known, "status": "running"}
        self.save()
        start = time.perf_counter()
        with reported_as_output_errors(self.path):
            yield facts
        self.record["stages"][name] = {**facts, "status": "finished", "seconds": round(time.perf_counter() - start, 3)}
        self.save()

    def facts(self, stage: str) -> dict[str, Any]:
        """What a stage recorded; nothing where it never began."""
        return self.record["stages"].get(stage, {})

    def forget(self, *stages: str) -> None:
        """Take `stages` as never run."""
        for stage in stages:
            self.record["stages"].pop(stage, None)
        self.save()


def read_record(path: Path) -> dict[str, Any]:
    """The record of the run in the folder `path`.

    Raises:
        OutputError: there is no run.
    """
    if not (path / RECORD).is_file():
        raise OutputError(f"{path} holds no run of slimvlm; give the folder that `slimvlm compress` wrote")
    return _parse(path / RECORD)


def _parse(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise OutputError(f"{path} is not a run record of this version; start again with --overwrite")
    return record


def _check_same_options(earlier: Mapping[str, Any], options: Mapping[str, Any], path: Path) -> None:
    for key in sorted(set(earlier) | set(options)):
        if earlier.get(key) != options.get(key):
            raise OutputError(
                f"{path} holds a run with {key} = {earlier.get(key)!r}, not {options.get(key)!r}; "
                "resume with the same options, or start again with --overwrite"
            )
