"""The report shows every measured artefact, which ones are worth having, and which to take."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from frontiers import example_frontier, example_point
from profiles import example_cell
from report_runs import Story, write_run
from report_texts import bad_news, good_news, table, text_of

from slimvlm.compress.runs import FRONTIER
from slimvlm.serve.report import write_frontier_report, write_report
from slimvlm.serve.report.sections.frontier import frontier_said

POINTS = (
    example_point(0, "fp32", 11_200_000, 0.0, 4.0),
    example_point(0, "int8", 3_600_000, 0.2, 1.6),
    example_point(0.5, "fp32", 6_000_000, 15.0, 2.2),
    example_point(0.5, "int8", 2_300_000, 0.8, 1.1),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("frontier") / "run", Story())
    frontier = example_frontier(*POINTS, targets=("size=3MB",), skipped={"50 % removed, q4": "no such kernel"})
    (folder / FRONTIER).write_text(frontier.to_json())
    return folder


def test_dense_and_slim_stand_in_one_table_in_every_variant_with_what_they_cost_and_lose(run):
    rows = table(text_of(run), "Dense and slim, in every precision")
    assert [row[0] for row in rows] == ["dense fp32\\*", "dense int8\\*", "50 % removed, fp32", "50 % removed, int8\\*"]
    assert [row[2] for row in rows] == ["11.20", "3.60", "6.00", "2.30"]
    assert rows[3][4] == "0.8 (0.3 to 1.3)" and rows[3][6] == "1.1"


def test_what_to_take_is_said_and_what_could_not_be_measured_stands_with_the_bad_news(run):
    text = text_of(run)
    assert "Smallest with at most 1 point lost: 50 % removed, int8, 2.3 MB" in good_news(text)
    assert "Best under size 3 MB: 50 % removed, int8" in good_news(text)
    assert "no such kernel" in bad_news(text)


def test_the_page_draws_quality_over_size_and_over_time(run):
    write_report(run)
    page = (run / "report.html").read_text()
    assert page.count('aria-label="Quality over ') == 2 and "MB on disk" in page and "ms per later token" in page


def test_beside_what_an_artefact_was_timed_is_said_as_it_was(run):
    assert "beside the other model in the same precision" in text_of(run)  # its points are of the run's profile
    ratio = example_cell().ratios["tpot"]
    paired = [replace(one, cell=replace(one.cell, ratios={"tpot": ratio})) for one in POINTS]
    said = next(iter(frontier_said(example_frontier(*paired))))
    assert "beside the dense model in full precision" in said


def test_a_run_without_a_frontier_has_no_such_section(tmp_path):
    assert "Prune or quantise" not in text_of(write_run(tmp_path / "run", Story()))


def test_the_charts_of_a_frontier_stand_alone_in_files_with_colours_of_their_own(tmp_path):
    (tmp_path / FRONTIER).write_text(example_frontier(*POINTS).to_json())
    write_frontier_report(tmp_path)
    for name in ("frontier-size.svg", "frontier-tpot.svg"):
        root = ElementTree.parse(tmp_path / name).getroot()
        used = set(re.findall(r"var\((--\w+)\)", (tmp_path / name).read_text()))
        assert root.tag.endswith("svg") and used and all(f"{variable}: #" in root[0].text for variable in used)
