"""The cards at the head of a report: size, quality, times and memory, before and after."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from profiles import example_profile
from report_runs import Story, write_run
from report_texts import bad_news, table, text_of

from slimvlm.compress.runs import RunFolder

TITLES = ["Size", "Quality", "First token", "Per token", "Peak memory"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a profile, and its report."""
    where = write_run(tmp_path_factory.mktemp("cards"), Story(profile=example_profile()))
    text_of(where)
    return where


def cards_of_page(run: Path) -> dict[str, tuple[str, str]]:
    """Title -> (what it is coloured as, its text)."""
    page = (run / "report.html").read_text(encoding="utf-8")
    (cards,) = re.findall(r'<dl class="cards".*?</dl>', page, re.DOTALL)
    found = re.findall(r"<div(?: class=\"(\w+)\")?>\s*<dt>(.*?)</dt>(.*?)</div>", cards, re.DOTALL)
    return {title: (colour, " ".join(re.sub(r"<[^>]*>", " ", text).split())) for colour, title, text in found}


def test_a_report_opens_with_its_figures_before_and_after_and_then_what_got_worse(run: Path) -> None:
    text, page = ((run / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))
    before, after, change = table(text, "Before and after")
    assert text.index("Before and after") < text.index("**What got worse")
    assert page.index('class="cards"') < page.index("What got worse") < page.index("<main>")
    assert (before[1:], after[1:]) == (
        ["2M", "100.0 %", "30 ms", "4 ms", "134 MB"],
        ["1M", "50.0 %", "22 ms", "2 ms", "67.1 MB"],
    )
    assert change[1:] == [
        "-50.0 %, parameters",
        "-50.0 points, mean of tasks",
        "1.36 times as fast, torch, batch 1",
        "2.00 times as fast, torch, batch 1",
        "-50.0 %, torch, batch 1",
    ]
    cell = json.loads((run / "profile.json").read_text())["cells"][0]["ratios"]
    assert [1000 * cell[phase][model] for phase in ("ttft", "tpot") for model in ("dense", "slim")] == [30, 22, 4, 2]


def test_the_page_colours_what_is_certain(run: Path, tmp_path: Path) -> None:
    cards = cards_of_page(run)
    assert list(cards) == TITLES
    assert [colour for colour, _ in cards.values()] == ["good", "bad", "good", "good", "good"]
    assert cards["Quality"][1] == "50.0 % from 100.0 % -50.0 points, mean of tasks"
    certain = write_run(tmp_path, Story(tasks={"colour": (8, 7, 8), "count": (8, 8, 8)}))
    text_of(certain)
    assert cards_of_page(certain)["Quality"] == ("", "100.0 % from 100.0 % 0.0 points, mean of tasks, within chance")


def test_what_was_not_measured_is_said_on_its_card(tmp_path: Path) -> None:
    run = write_run(tmp_path, Story())
    assert "Latency and memory were not measured" in bad_news(text_of(run))
    cards = cards_of_page(run)
    assert [cards[title][1] for title in TITLES[2:]] == ["not measured no profile of both models"] * 3
    empty = RunFolder(tmp_path / "empty", json.loads((run / "run.json").read_text())["options"])
    with empty.begun():
        pass
    text_of(tmp_path / "empty")
    assert {text.split(" no ")[0].split(" the ")[0] for _, text in cards_of_page(tmp_path / "empty").values()} == {
        "not measured"
    }
