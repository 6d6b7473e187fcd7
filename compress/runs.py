"""The run folder: which stage is done, with what, and which of its files are ours.

`run.json` holds the command, options, versions, digests and the status of every stage.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slimvlm.compress.errors import CheckFailedError, OutputError
from slimvlm.compress.files.decoding import dump, parse
from slimvlm.compress.files.folders import (
    EARLIER,
    holds_others,
    listed_files,
    other_files,
    put_aside,
    put_back,
    remove_files,
)
from slimvlm.compress.files.writing import PARTIAL, installed_versions, reported_as_output_errors, write_text
from slimvlm.compress.options import STAGES
from slimvlm.compress.run_record import RECORD, SCHEMA, read_record, record_text

PLAN, SCORES = "plan.json", "scores.safetensors"
ORDER, ROUNDS = "order.safetensors", "order.partial.safetensors"  # of all rounds, of those that are done
JOURNAL, FIT, QUALITY, PROFILE = "recovery.jsonl", "fit.json", "quality.json", "profile.json"
FRONTIER, CUTS = "frontier.json", "cuts"  # of many cuts, each a run in a folder of its own
MODEL, CUT, RECOVERED, EXPORT = "model", "cut", ".recovered", "export"  # each has a manifest
FILES = (RECORD, PLAN, ORDER, ROUNDS, SCORES, FIT, JOURNAL, QUALITY, PROFILE, FRONTIER, "report.html", "report.md")
TRAINING, TEACHER = "recovery", "teacher"  # a training that is not finished; the teacher's outputs
AGAIN = "run the command that wrote it again"  # after a file of a run that cannot be read
# Any below: the values of JSON, which `read_record` has checked.
TRAINED = ("state.json", "state-*/*.safetensors", "best-*/*.safetensors", "block-*.safetensors", JOURNAL)


def run_files(folder: Path) -> list[str]:
    """The files in a run folder that are a run's: of known names, or named by a manifest of ours."""
    found = [folder / name for name in FILES]
    for name in (MODEL, CUT, RECOVERED, EXPORT):
        found += [folder / name / file for file in listed_files(folder / name)]
    found += folder.glob("frontier-*.svg")
    for pattern in TRAINED:
        found += (folder / TRAINING).glob(pattern)
    found += (folder / TEACHER).glob("*/*.safetensors")
    for place in (folder, folder / TRAINING, *(folder / TEACHER).glob("*")):
        found += [path for path in place.glob(f".*{PARTIAL}") if path.is_file()]
    for place in folder.glob(f".*{PARTIAL}"):  # of a checkpoint or an export that was not finished
        found += [path for path in place.rglob("*") if path.is_file()]
    for cut in (folder / CUTS).glob("*"):
        found += [*(cut / name for name in run_files(cut)), *cut.glob("quality-*.json")]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file() and not path.is_symlink()]


class RunFolder:
    """One run's folder and its record. Nothing is written or moved before `begun`.

    Args:
        path: the folder; created when absent.
        options: what identifies the run; a resumed run must have the same.
        resume: continue after the last finished stage of an earlier run in the same folder.
        overwrite: put this run in the place of an earlier one of ours; other files in the folder stay.
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
        options = parse(dump(options))
        with reported_as_output_errors(path):
            earlier = self._read_earlier(resume, overwrite)
            self._replaced = _replaceable(path) if overwrite and earlier is not None else []
        if earlier is not None and not overwrite:
            _check_same_options(earlier["options"], options, path)
            self.record = earlier
        else:
            command = [Path(sys.argv[0]).name, *sys.argv[1:]]
            self.record = {"schema": SCHEMA, "command": command, "options": options, "stages": {}}
        self.record["versions"] = installed_versions()

    def _read_earlier(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The record of the run that is there."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; choose a folder")
        if not self.path.exists() or not holds_others(self.path):
            return None
        if not (self.path / RECORD).is_file():
            raise OutputError(f"{self.path} is not empty and holds no run of slimvlm; choose an empty folder")
        record = read_record(self.path)
        if resume or overwrite:
            return record
        if not holds_others(self.path, (RECORD,)):  # refused before anything was made: nothing to lose
            return None
        raise OutputError(
            f"{self.path} holds an earlier run; continue it with --resume, or replace it with --overwrite"
        )

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The run is under way until the block ends. What it replaces is put aside, and removed once the block is done.

        A run that fails before it has anything that could be continued leaves everything as it was; else the earlier
        run stays aside, in `.earlier`, until this one is finished or replaced.
        """
        if not self.writer:
            yield
            return
        with reported_as_output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            aside = put_aside(self.path, self._replaced)
        made = False
        try:
            self.save()
            yield
            made = True
        except CheckFailedError as error:
            made = error.result is not None
            raise
        finally:
            if made:
                for earlier in self.path.glob(f"{EARLIER}*"):
                    shutil.rmtree(earlier, ignore_errors=True)
            elif (
                self._replaced
                and not (self.path / ROUNDS).exists()
                and not any(map(self.finished, self.record["stages"]))
            ):
                remove_files(run_files(self.path), self.path)
                put_back(self.path, self._replaced, aside)

    def save(self) -> None:
        """Write the record, if this process is the one that writes."""
        if self.writer:
            write_text(self.path / RECORD, record_text(self.record))

    def finished(self, stage: str) -> bool:
        """Whether `stage` was finished by this or an earlier process."""
        return bool(self.facts(stage).get("status") == "finished")

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
        facts: dict[str, Any] = self.record["stages"].get(stage, {})
        return facts

    def forget(self, first: str) -> None:
        """Take the stage `first`, and those that follow it, as never run."""
        for stage in STAGES[STAGES.index(first) :]:
            self.record["stages"].pop(stage, None)
        self.save()

    def remove(self, *parts: str) -> None:
        """Remove the run's files in these folders of it; others stay."""
        names = [name for name in run_files(self.path) if name.partition("/")[0] in parts]
        remove_files(names, self.path)


def _replaceable(path: Path) -> list[str]:
    """The files of the run in `path`, if another one can take its place."""
    for name in (MODEL, CUT, EXPORT):
        for other in other_files(path / name, listed_files(path / name)):
            raise OutputError(f"{other} is not of the run that is to be replaced; move it away first")
    return run_files(path)


def _check_same_options(earlier: Mapping[str, Any], options: Mapping[str, Any], path: Path) -> None:
    for key in sorted(set(earlier) | set(options)):
        if earlier.get(key) != options.get(key):
            raise OutputError(
                f"{path} holds a run with {key} = {earlier.get(key)!r}, not {options.get(key)!r}; "
                "resume with the same options, or start again with --overwrite"
            )
