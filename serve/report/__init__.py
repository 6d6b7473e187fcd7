"""`report.html` and `report.md` of a run folder: what a compression did, in charts, tables and words. No torch."""

from __future__ import annotations

from pathlib import Path

from slimvlm.compress.files.locks import locked_file
from slimvlm.compress.files.writing import write_text
from slimvlm.serve.report.document import Report, Section
from slimvlm.serve.report.files import read_run
from slimvlm.serve.report.markdown import markdown
from slimvlm.serve.report.page import page
from slimvlm.serve.report.sections.answers import answers_section
from slimvlm.serve.report.sections.checks import parity_section, repeat_section
from slimvlm.serve.report.sections.quality import quality_section
from slimvlm.serve.report.sections.removed import removed_section, scores_section
from slimvlm.serve.report.sections.running import running_section
from slimvlm.serve.report.sections.training import recovery_section

SECTIONS = (  # key, title, what says it
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

    They hold no date: the same run gives the same bytes. Stages that are not finished are named as missing.

    Raises:
        OutputError: `run` holds no run, a file of it is damaged, or the folder cannot be written.
    """
    with locked_file(run / PAGE):
        files = read_run(run)
        sections = tuple(Section.of(key, title, said(files)) for key, title, said in SECTIONS)
        report = Report(f"Compression of {files.record['options']['model']}", sections)
        write_text(run / TEXT, markdown(report))
        write_text(run / PAGE, page(report))
        return run / PAGE
