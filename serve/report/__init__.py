"""`report.html` and `report.md` of a run folder: what a compression did, in charts, tables and words. No torch."""

from __future__ import annotations

from pathlib import Path

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.locks import locked_file
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.runs import AGAIN, CUTS, FRONTIER
from slimvlm.serve.frontier.frontier import Frontier
from slimvlm.serve.report.document import Chart, Report, Section
from slimvlm.serve.report.files import read_run
from slimvlm.serve.report.markdown import markdown
from slimvlm.serve.report.page import page, picture
from slimvlm.serve.report.sections.answers import answers_section
from slimvlm.serve.report.sections.cards import cards_of
from slimvlm.serve.report.sections.checks import parity_section, repeat_section
from slimvlm.serve.report.sections.frontier import frontier_said, frontier_section
from slimvlm.serve.report.sections.quality import quality_section
from slimvlm.serve.report.sections.removed import removed_section, scores_section
from slimvlm.serve.report.sections.running import running_section
from slimvlm.serve.report.sections.study import study_said
from slimvlm.serve.report.sections.training import recovery_section
from slimvlm.serve.study.choosing import CHOSEN_BY
from slimvlm.serve.study.study import RESULTS, read_rows

SECTIONS = (  # key, title, what says it
    ("frontier", "Prune or quantise", frontier_section),
    ("quality", "Quality", quality_section),
    ("answers", "Answers side by side", answers_section),
    ("removed", "What was removed", removed_section),
    ("scores", "Scores", scores_section),
    ("recovery", "Recovery", recovery_section),
    ("running", "Latency and memory", running_section),
    ("parity", "Parity", parity_section),
    ("repeat", "To repeat it", repeat_section),
)
PAGE, TEXT = "report.html", "report.md"


def write_report(run: Path) -> Path:
    """Write both files into the folder `run` of a compression, and give the page.

    They hold no date: the same run gives the same bytes. Stages that are not finished are named as missing. Of many
    cuts (`slimvlm frontier`, `slimvlm study`) they are the frontier's, or the study's.

    Raises:
        OutputError: `run` holds no run, a file of it is damaged, or the folder cannot be written.
    """
    if (run / RESULTS).is_file():
        return write_study_report(run)
    if (run / CUTS).is_dir():
        return write_frontier_report(run)
    with locked_file(run / PAGE):
        files = read_run(run)
        sections = (Section.of(key, title, said(files)) for key, title, said in SECTIONS)
        title = f"Compression of {files.record['options']['model']}"
        return _write(run, Report(title, tuple(filter(None, sections)), cards_of(files)))


def write_frontier_report(folder: Path) -> Path:
    """The same of a frontier without a run: both files beside `frontier.json`, and its charts as `frontier-*.svg`.

    Raises:
        OutputError: it is not there or damaged, or the folder cannot be written.
    """
    with locked_file(folder / PAGE):
        frontier = read(folder / FRONTIER, Frontier, OutputError, AGAIN)
        section = Section.of("frontier", "Prune or quantise", frontier_said(frontier))
        _write_charts(folder, section)
        return _write(folder, Report(f"What {frontier.source} can do, over what it costs", (section,)))


def write_study_report(folder: Path, chosen_by: str = CHOSEN_BY[0]) -> Path:
    """The same of a study: both files beside `results.jsonl`, and its charts as `study-*.svg`.

    Raises:
        OutputError: it is damaged, or the folder cannot be written.
    """
    with locked_file(folder / PAGE):
        rows = read_rows(folder)
        section = Section.of("study", "Methods side by side", study_said(rows, chosen_by))
        _write_charts(folder, section)
        return _write(folder, Report("What each way of compressing costs in quality", (section,)))


def _write_charts(folder: Path, section: Section) -> None:
    for chart in (part for part in section.parts if isinstance(part, Chart)):
        write_text(folder / f"{chart.name}.svg", picture(chart))


def _write(folder: Path, report: Report) -> Path:
    write_text(folder / TEXT, markdown(report))
    write_text(folder / PAGE, page(report))
    return folder / PAGE
