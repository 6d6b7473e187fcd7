"""A study, made: what cells share, what becomes of it when it is interrupted, and of a cell that fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_folders import write_tiny
from tiny_models import FACTORIES

from slimvlm import pipeline
from slimvlm.cli import main
from slimvlm.compress.errors import OutputError, SampleError, UnsuitableOptionError
from slimvlm.compress.files.locks import holder_of, locked_folder
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.progress import silent
from slimvlm.compress.stages.evaluate import evaluate_model
from slimvlm.compress.stages.sparsify import sparsify_model
from slimvlm.console.commands.study_file import read_cells
from slimvlm.serve.study.job import run_study
from slimvlm.serve.study.making import CALIBRATIONS, PLANS, Makings
from slimvlm.serve.study.options import StudyOptions
from slimvlm.serve.study.study import FAILED, MEASURED, MISSED, RESULTS, TEST, VAL, missing, read_rows
from slimvlm.serve.study.worker import CELLS

UNWRITTEN = {"internvl", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # without torchvision
STUDY = """
[bed.tiny]
model = "my-vlm"
data = "samples.jsonl"
val = "val/samples.jsonl"
test = "test/samples.jsonl"
device = "cpu"

[all]
ratio = [0.1, 0.2]
samples = 8
rounds = 1
recover = "none"

[[row]]
name = "{criterion}"
criterion = ["gate", "magnitude"]

[[row]]
name = "gate, balanced"
allocator = "balanced"
compensation = "none"

[[row]]
name = "one plan"
rounds = 2
one-plan = true

[[row]]
name = "too much"
ratio = 0.99
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_tiny(folder, samples=12)
    for number, name in enumerate(("val", "test"), start=1):
        (folder / name).mkdir()
        _, data = write_tiny(folder / name, samples=6, first=100 * number)
        shutil.rmtree(data.with_name("my-vlm"))
    (folder / "study.toml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def asked(folder) -> StudyOptions:
    return StudyOptions(out=folder / "out", cells=read_cells(folder / "study.toml"))


@pytest.fixture(scope="module")
def interrupted(asked):
    """Ended by Ctrl-C after some cells; the lines on disk then."""

    def stop(_stage: str, done: int, _total: int, _note: str = "", /) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(asked, stop)
    return (asked.out / RESULTS).read_text().splitlines()


@pytest.fixture(scope="module")
def rows(asked, interrupted):
    """The same, continued."""
    return run_study(asked)


def test_an_interrupted_study_keeps_its_rows_and_measures_the_others(asked, interrupted, rows):
    assert len(interrupted) == 2 + 3
    assert set(interrupted) < {row.to_line() for row in rows}
    assert len(rows) == 2 + len(asked.cells)
    assert [row.method for row in rows[:2]] == ["dense", "blind"]
    assert [(row.method, row.ratio) for row in rows[2:]] == [(cell.method, cell.options.ratio) for cell in asked.cells]


def test_a_cell_that_fails_says_why_and_the_others_are_measured(rows):
    (failed,) = [row for row in rows if row.status == FAILED]
    assert failed.method == "too much" and failed.score is None
    assert failed.reason.startswith("ratio 0.99 cannot be reached")


def test_a_cut_that_misses_its_ratio_is_not_evaluated(rows):
    cut = [row for row in rows[2:] if row.removed is not None]
    assert len(cut) == 8
    for row in cut:  # a tiny model has large units
        assert (row.status == MEASURED) == (abs(row.removed - row.ratio) <= 0.002) == (row.score is not None)
    assert {row.status for row in cut} == {MEASURED, MISSED}


def test_calibrations_are_shared_by_allocators_and_ratios_and_plans_where_that_is_asked_for(asked, rows):
    assert len(list((asked.out / CALIBRATIONS).iterdir())) == 1
    plans = {path: json.loads((path / "plan.json").read_text()) for path in (asked.out / PLANS).iterdir() if
             (path / "plan.json").is_file()}  # fmt: skip
    assert sorted(plan["rounds"] for plan in plans.values()) == [1] * 6 + [2]


def test_nothing_of_a_measured_cell_stays_but_its_row(asked, rows):
    assert list((asked.out / CELLS).iterdir()) == []


def test_a_cell_gives_what_compress_gives_with_the_same_options(asked, rows, tmp_path):
    cell = next(one for one in asked.cells if one.method == "one plan" and one.options.ratio == one.largest)
    (row,) = [row for row in rows if row.method == "one plan" and row.ratio == cell.options.ratio]
    given = {name: getattr(cell.options, name) for name in ("samples", "rounds", "equal_rounds", "seed", "ratio")}
    paths = {"model": cell.bed.model, "data": cell.bed.data, "eval_data": cell.bed.val, "out": tmp_path / "out"}
    options = CompressOptions(**paths, **given, recover="none", export=(), profile=False, device="cpu")
    result = pipeline.compress(options)
    assert row.removed == pytest.approx(result.plan.removed_fraction, abs=1e-6)
    if row.status == MEASURED:
        assert row.score == pytest.approx(result.slim.score, abs=1e-6)


def test_a_finished_study_is_shown_again_without_measuring(folder, asked, rows):
    shutil.copytree(asked.out, copy := folder / "copy")
    (shutil.rmtree(copy / name) for name in (PLANS, CALIBRATIONS))
    found = CliRunner().invoke(main, ["study", str(folder / "study.toml"), str(copy), "--json"])
    assert found.exit_code == 0, found.output
    assert "0 of 9 cells to measure" in found.stderr
    document = json.loads(found.stdout)
    assert len(document["rows"]) == len(rows) and document["best_by"] == "val"
    assert (copy / "report.html").is_file() and list(copy.glob("study-1-ratio.svg"))


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(folder, tmp_path):
    words = ["study", str(folder / "study.toml"), str(tmp_path / "none"), "--dry-run"]
    found = CliRunner().invoke(main, words)
    assert found.stdout == "9 of 9 cells to measure; how long is known after the first ones\n"
    assert not (tmp_path / "none").exists()


def test_what_failed_or_missed_its_ratio_is_measured_again_where_that_is_asked_for(folder, asked, rows):
    shutil.copytree(asked.out, copy := folder / "again")
    assert replace(asked, out=copy).left()[0] == 0
    again = replace(asked, out=copy, retry=True)
    assert again.left()[0] == sum(row.status != MEASURED for row in rows[2:])
    assert [row.status for row in run_study(again)] == [row.status for row in rows]


def test_the_test_questions_are_asked_of_chosen_rows_alone(folder, asked, rows):
    shutil.copytree(asked.out, copy := folder / "tested")
    assert not any(row.split == TEST for row in rows)
    found = run_study(replace(asked, out=copy, report_test=("magnitude",)))
    assert {row.method for row in found if row.split == TEST} == {"dense", "blind", "magnitude"}


def test_test_questions_about_images_that_models_are_cut_with_are_refused(folder, asked, rows):
    shutil.copytree(asked.out, copy := folder / "leaking")
    bed = replace(asked.beds[0], test=folder / "samples.jsonl")
    cells = [replace(cell, bed=bed) for cell in asked.cells]
    with pytest.raises(SampleError, match="12 of the test samples samples.jsonl show images of"):
        run_study(replace(asked, out=copy, cells=cells, report_test=("best",)))


def test_a_folder_with_something_else_or_with_another_model_is_refused(folder, asked, rows, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not empty and holds no study"):
        run_study(replace(asked, out=tmp_path))
    shutil.copytree(asked.out, copy := folder / "other")
    lines = (copy / RESULTS).read_text().replace(read_rows(copy)[0].options["model_digest"], "0" * 64)
    (copy / RESULTS).write_text(lines)
    with pytest.raises(OutputError, match="has the bed tiny with another model"):
        run_study(replace(asked, out=copy))


def test_contradicting_options_are_refused_before_anything_is_measured(asked, tmp_path):
    wrong = replace(asked.cells[0], options=replace(asked.cells[0].options, allocator="paper", rounds=2))
    with pytest.raises(UnsuitableOptionError, match="row 'gate': the allocator paper takes all in one round"):
        run_study(replace(asked, out=tmp_path / "out", cells=[*asked.cells, wrong]))


def test_a_cell_that_another_process_is_at_is_left_to_it(asked, rows, tmp_path):
    one, other = [cell for cell in asked.cells if cell.method == "magnitude"]
    options = replace(asked, out=tmp_path / "out", cells=[one, other])
    with locked_folder(options.out / CELLS / one.key):
        (options.out / RESULTS).touch()

        def stop_when_waiting(_stage: str, done: int, _total: int, _note: str = "", /) -> None:
            if done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_study(options, stop_when_waiting)
    assert [row.ratio for row in read_rows(options.out)] == [0, 0, other.options.ratio]


def test_of_several_processes_one_that_is_killed_loses_its_cell_alone(asked, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("slimvlm.serve.study.job.LOOK", 0.02)
    cells = [cell for cell in asked.cells if cell.method == "magnitude"]
    options, killed = replace(asked, out=tmp_path / "out", cells=cells, processes=2), []

    def kill_one(_stage: str, _done: int, _total: int, _note: str = "", /) -> None:
        for cell in cells if not killed else ():
            if (holder := holder_of(options.out / CELLS / cell.key)) is not None:
                os.kill(holder, signal.SIGSTOP)  # so that it cannot write the row while that is looked for
                if cell in missing(cells, VAL, read_rows(options.out)):
                    killed.append(holder)
                os.kill(holder, signal.SIGKILL if killed else signal.SIGCONT)
                return

    found = run_study(options, kill_one)
    assert len(found) == 2 + len(cells) and killed
    (lost,) = [row for row in found if row.status == FAILED]
    assert "was ended by SIGKILL" in lost.reason


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - {"llava"} - UNWRITTEN))
def test_a_study_is_made_of_every_family(name, tmp_path):
    model, data = write_tiny(tmp_path, name, samples=6)
    (tmp_path / "study.toml").write_text(
        f"""
        [bed.tiny]
        model = "{model.name}"
        data = "{data.name}"
        val = "{data.name}"
        device = "cpu"
        [[row]]
        criterion = "magnitude"
        compensation = "none"
        rounds = 1
        recover = "none"
        """
    )
    found = run_study(StudyOptions(out=tmp_path / "out", cells=read_cells(tmp_path / "study.toml")))
    assert [row.method for row in found][:1] == ["dense"] and "cannot" not in found[-1].reason


def test_a_row_of_single_zeros_is_what_sparsify_makes_with_the_same_options(folder, asked, rows, tmp_path):
    text = STUDY[: STUDY.index("[[row]]")] + '[[row]]\nname = "wanda"\nsparsity = "unstructured"\nratio = 0.2\n'
    (folder / "zeros.toml").write_text(text)
    (cell,) = read_cells(folder / "zeros.toml")
    (row,) = run_study(replace(asked, out=tmp_path / "study", cells=[cell]))[2:]
    done = sparsify_model(replace(cell.zeros, out=tmp_path / "sparse"))
    assert (row.method, row.status, row.options["rule"]) == ("wanda", MEASURED, "wanda")
    assert row.removed == pytest.approx(done.zeros, abs=1e-6) == pytest.approx(0.2, abs=0.002)
    quality = evaluate_model(cell.options, str(tmp_path / "sparse"), Makings(tmp_path).questions(cell.bed, VAL), silent)
    assert row.score == pytest.approx(quality.score, abs=1e-6) and row.token_loss == quality.scores["token_loss"]
