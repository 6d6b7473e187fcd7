"""Nothing that comes from data becomes markup: a hostile run gives a page and a text of the same structure."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from profiles import hostile_profile
from report_runs import Story, write_run

from slimvlm.serve.report import write_report
from slimvlm.serve.report.document import line, shown
from slimvlm.serve.report.markdown import escaped, paragraph

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style></svg></textarea>--><!-- ]]> &amp; &#x3c;b&#x3e;",
    "{{ 7 * 7 }}{% raw %}${7*7}",
    r"$\frac{1}{0}$ \alpha ^_~",
    "a | b |\n| --- |\r\n# title\n\n- list ![x](http://example.org/x.png) `code`",
    "\x00\x07\x1b[31m\u202egnp.exe\u2028\ufeff",
    "javascript:alert(1)//http://example.org/?q=%3Cb%3E",
    "图像 🙂 עברית",
)


class Structure(HTMLParser):
    """Which elements with which attributes a page has, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: Counter[tuple[str, ...]] = Counter()
        self.values: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[(tag, *(name for name, _ in attrs))] += 1
        self.values.extend(value or "" for name, value in attrs if name in ("src", "href", "xlink:href"))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.elements["a comment",] += 1


def hostile_story(text: str) -> Story:
    """Every text of a run is, or holds, `text`; names of tensors can be encoded."""
    name = text.encode("utf-8", "ignore").decode()
    return replace(
        Story(),
        model=text,
        tasks={f"a{text}": (8, 2, 7), f"b{text}": (8, 0, 1)},
        vendors=(f"a{text}", f"b{text}"),
        answer=f"a{text}",
        question=text,
        wrong=f"b{text}",
        towers=(f"a{name}", f"b{name}"),
        stages=(f"a{text}", f"b{text}"),
        bad_samples=(text,),
        version=text,
        profile=hostile_profile(name),
    )


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return written(tmp_path_factory.mktemp("harmless"), "name")


def written(folder: Path, text: str) -> tuple[str, str]:
    page = write_report(write_run(folder, hostile_story(text)))
    return page.read_text(encoding="utf-8"), page.with_name("report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_changes_no_structure(harmless: tuple[str, str], tmp_path: Path, text: str) -> None:
    (calm_page, calm_text), (page, markdown) = harmless, written(tmp_path, text)
    calm, found = Structure(calm_page), Structure(page)
    assert found.elements == calm.elements
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in found.values)
    assert line(text) in "".join(found.text)  # it is shown, as text
    assert len(markdown.splitlines()) == len(calm_text.splitlines())
    assert not re.search(r"(?<!\\)[<>\[]", re.sub(r"(?s)```+\n.*?\n```+", "", markdown))
    rows = [len(re.findall(r"(?<!\\)\|", row)) for row in markdown.splitlines() if row.startswith("|")]
    assert rows == [len(re.findall(r"(?<!\\)\|", row)) for row in calm_text.splitlines() if row.startswith("|")]


def test_what_cannot_be_seen_is_written_as_an_escape() -> None:
    assert line("a\x00b\u202ec\ud800\u200b\n d") == r"a\u0000b\u202ec\ud800\u200b d"
    assert line("图像 🙂 é") == "图像 🙂 é"


def test_long_answers_are_cut_off_visibly() -> None:
    assert shown("x" * 1000) == "x" * 400 + "…"


def test_markdown_takes_text_as_text() -> None:
    assert escaped("a|b*c_d`e<f>[g](h)#!") == r"a\|b\*c\_d\`e\<f\>\[g\](h)\#\!"
    assert paragraph("- x") == r"\- x"
    assert paragraph("12. x") == r"12\. x"
    assert escaped("-16.2") == paragraph("-16.2") == "-16.2"
    assert paragraph("50.0 % are gone") == "50.0 % are gone"
