"""The run folder: stages are remembered, foreign folders are left alone."""

import json
import os

import pytest

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.runs import RunFolder


def begin(folder, options, files=()):
    with RunFolder(folder, options).begun():
        for name in files:
            write_text(folder / name, files[name])


def test_finished_stages_are_remembered_and_interrupted_ones_are_not(tmp_path):
    run = RunFolder(tmp_path / "out", {"ratio": 0.5})
    with pytest.raises(KeyboardInterrupt), run.begun():
        with run.stage("plan") as facts:
            facts["samples"] = 3
        with run.stage("slice"):
            raise KeyboardInterrupt
    again = RunFolder(tmp_path / "out", {"ratio": 0.5}, resume=True)
    assert again.finished("plan")
    assert again.facts("plan")["samples"] == 3
    assert not again.finished("slice")


def test_a_resumed_run_with_other_options_is_refused_naming_the_option(tmp_path):
    begin(tmp_path, {"ratio": 0.5, "seed": 0})
    with pytest.raises(OutputError, match="ratio = 0.5, not 0.4"):
        RunFolder(tmp_path, {"ratio": 0.4, "seed": 0}, resume=True)


def test_a_run_made_when_there_was_one_compensation_and_one_schedule_is_resumed(tmp_path):
    begin(tmp_path, {"refit": False})
    RunFolder(tmp_path, {"compensation": "none", "equal_rounds": False}, resume=True)


def test_a_non_empty_folder_is_refused_and_a_foreign_one_is_never_deleted(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputError, match="not empty"):
            RunFolder(tmp_path, {}, **flags)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_overwrite_replaces_an_earlier_run_when_it_is_done(tmp_path):
    begin(tmp_path, {"ratio": 0.5}, {"plan.json": "{}"})
    with pytest.raises(OutputError, match="--resume"):
        RunFolder(tmp_path, {"ratio": 0.5})
    run = RunFolder(tmp_path, {"ratio": 0.3}, overwrite=True)
    assert (tmp_path / "plan.json").exists()  # nothing is touched before it begins
    with run.begun():
        assert (tmp_path / ".earlier" / "plan.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["run.json"]  # noqa: PTH208 (names are enough)
    assert json.loads((tmp_path / "run.json").read_text())["options"] == {"ratio": 0.3}


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write|is a file"), RunFolder(tmp_path / "file" / "out", {}).begun():
        pass


def test_a_run_that_was_refused_before_it_made_anything_is_no_obstacle(tmp_path):
    begin(tmp_path, {"ratio": 0.99})
    assert RunFolder(tmp_path, {"ratio": 0.5}).record["options"] == {"ratio": 0.5}
