"""What a report is made of, before it is a page or a text: findings, sections, tables, charts, examples.

Everything here is plain text as it came from the files; only the two writers (page.py, markdown.py) escape.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

Kind = TypeVar("Kind")
HEADINGS = ("What got worse, failed or is missing", "What was done")
WIDE = (6, 66)  # columns, letters
LONGEST_TEXT = 400  # characters of an answer, a reason or a name that are shown


@dataclass(frozen=True, slots=True)
class Card:
    """One figure before and after, at the head of a report.

    Attributes:
        before: empty where there is none.
        note: the change in words.
        source: file and fields it comes from.
        good: whether the change is certainly for the better; None: that is not certain, or nothing changed.
    """

    title: str
    before: str
    after: str
    note: str
    source: str
    good: bool | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence on the result, and the fields it follows from; `bad`: something got worse or failed."""

    text: str
    source: str
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells, all of them text.

    Attributes:
        source: file and fields the figures come from.
        texts: so many first columns hold names; the others hold figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    source: str
    texts: int = 1

    @property
    def is_wide(self) -> bool:
        """Whether it needs the whole width of a page."""
        longest = (max((len(row[place]) for row in self.rows), default=0) for place in range(len(self.columns)))
        return len(self.columns) > WIDE[0] or sum(longest) > WIDE[1]


@dataclass(frozen=True, slots=True)
class Chart:
    """An SVG element of our own making; `name` is unique in a report, `title` says in words what it shows."""

    name: str
    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Example:
    """One evaluated question with what each model said.

    Attributes:
        image: a data URI.
        said: label of a model -> (its answer, whether it is right).
    """

    image: str
    name: str
    task: str
    question: str
    wanted: str
    said: dict[str, tuple[str, bool]]


class Code(NamedTuple):
    """Text to be copied as it stands."""

    label: str
    text: str


Said = str | Finding | Chart | Table | Example | Code  # what a section is made of; a str is a paragraph


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter; each list holds its kind in the order it was said, a chart before the table of its figures."""

    key: str
    title: str
    notes: list[str]
    findings: list[Finding]
    parts: list[Chart | Table]
    examples: list[Example]
    code: list[Code]

    @classmethod
    def of(cls, key: str, title: str, said: Iterable[Said]) -> Section:
        """What a section says, sorted by its kind."""
        everything = list(said)

        def only(*kinds: type[Kind]) -> list[Kind]:
            return [one for one in everything if isinstance(one, kinds)]

        return cls(key, title, only(str), only(Finding), only(Chart, Table), only(Example), only(Code))

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return any((self.notes, self.findings, self.parts, self.examples, self.code))


@dataclass(frozen=True, slots=True)
class Report:
    """The whole of it."""

    title: str
    sections: tuple[Section, ...]
    cards: tuple[Card, ...] = ()

    @property
    def findings(self) -> list[tuple[str, list[Finding]]]:
        """What the sections found, under two headings, the bad news first; a heading without findings is left out."""
        found = [finding for section in self.sections for finding in section.findings]
        lists = [[finding for finding in found if finding.bad is bad] for bad in (True, False)]
        return [(title, findings) for title, findings in zip(HEADINGS, lists, strict=True) if findings]


def shown(value: object) -> str:
    """A name or an answer as one line of visible text, of bounded length."""
    text = line(value)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def line(value: object) -> str:
    """Any value as one line of visible text: line breaks and runs of blanks become a blank."""
    return visible(" ".join(str(value).split()))


def visible(text: str) -> str:
    """The text with escapes for control characters, half surrogates and what reorders text (bidirectional overrides):
    nothing in a name or an answer can hide or forge anything, and it can always be encoded.
    """
    return "".join(character if _is_visible(character) else _escape(character) for character in text)


def _is_visible(character: str) -> bool:
    return character == " " or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def whole(number: float) -> str:
    """A count: 2,520,256."""
    return f"{number:,.0f}"


def percent(fraction: float) -> str:
    """A fraction in percent: 79.1 %."""
    return f"{100 * fraction:.1f} %"


def share(fraction: float) -> str:
    """A round fraction in percent: 95 %."""
    return f"{100 * fraction:g} %"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points: -16.2."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def figure(value: float | None) -> str:
    """Any figure to three digits: 0.05, 7.71e-07, none where there is none."""
    if value is None:
        return "none"
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def change(before: float, after: float) -> str:
    """Relative change in percent: -35.0 %."""
    return f"{100 * (after / before - 1):+.1f} %" if before else "none"
