"""The page in a real browser: silent, alone, legible in light and dark, on a telephone and on paper."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from profiles import hostile_profile
from report_runs import Story, write_run

from slimvlm.serve.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 240_000  # milliseconds, for machines that do other things as well
SEEN = """() => {
  const number = text => text.match(/[\\d.]+/g).map(Number);
  const light = rgb => { const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const page = light(number(getComputedStyle(document.body).backgroundColor));
  const contrast = colour => { const own = light(number(colour)); return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05); };
  const letters = [...document.querySelectorAll('svg text')], words = [...document.querySelectorAll('p, td, th, dd, dt, .source, a, h1, h2, h3')];
  return {
    page: page,
    charts: [...document.querySelectorAll('svg')].map(one => [one.getBoundingClientRect().width, one.getBoundingClientRect().height]),
    drawn: [...document.querySelectorAll('svg')].map(one => one.getBBox().width),
    contrasts: [...letters.map(one => contrast(getComputedStyle(one).fill)), ...words.map(one => contrast(getComputedStyle(one).color))],
    letters: letters.map(one => parseFloat(getComputedStyle(one).fontSize) * Math.hypot(one.getScreenCTM().a, one.getScreenCTM().b)),
    images: [...document.querySelectorAll('img')].map(one => one.naturalWidth),
    excess: document.documentElement.scrollWidth - innerWidth,
    hidden: [...document.querySelectorAll('.rows')].map(one => one.scrollHeight - one.clientHeight),
    dialogs: window.hit === undefined,
  };
}"""  # noqa: E501
VIEWS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of the browsers {', '.join(BROWSERS)} is installed: apt-get install chromium")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found, timeout=PATIENCE)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "\"><script>window.hit = 1; console.error('hit')</script><img src=http://localhost:9/x.png onerror=hit=1>"
    return write_report(
        write_run(
            tmp_path_factory.mktemp("page"),
            Story(model=text, wrong=text, profile=hostile_profile(text), stages=(text, "task")),
        )
    )


def visit(browser: Any, page_file: Path, media: str | None = None, **view: Any) -> tuple[dict[str, Any], list[str]]:
    """(what there is to see, what should not have happened)."""
    context = browser.new_context(**view)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    allowed = (page_file.as_uri(), "data:image/webp;base64,")
    page.on("request", lambda asked: asked.url.startswith(allowed) or wrong.append(f"request: {asked.url}"))
    page.emulate_media(media=media, color_scheme=view.get("color_scheme"))
    page.goto(page_file.as_uri())
    seen = page.evaluate(SEEN)
    context.close()
    return seen, wrong


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_silent_alone_and_legible(browser: Any, page_file: Path, view: str) -> None:
    seen, wrong = visit(browser, page_file, **VIEWS[view])
    assert wrong == []
    assert seen["dialogs"]
    assert len(seen["charts"]) == 8 + 3  # times, speed-ups and memory
    assert all(width >= 200 and height >= 80 for width, height in seen["charts"])
    assert all(width > 100 for width in seen["drawn"])
    assert min(seen["contrasts"]) >= 4.5
    assert min(seen["letters"]) >= 8.5
    assert seen["images"] == [40] * 5
    assert seen["excess"] <= 0
    assert (seen["page"] < 0.05) == (view == "dark")


def test_paper_is_white_and_shows_every_row(browser: Any, page_file: Path) -> None:
    seen, wrong = visit(browser, page_file, media="print", **VIEWS["dark"])
    assert wrong == []
    assert seen["page"] == pytest.approx(1)
    assert min(seen["contrasts"]) >= 4.5
    assert max(seen["hidden"]) <= 0
