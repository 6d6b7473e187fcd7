"""The report as Markdown: the same findings and tables, without the charts and images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from slimvlm.serve.report.document import Card, Example, Report, Section, Table, line, visible

SPECIAL = re.compile(r"([\\`*_\[\]<>#!|~$&])")


def markdown(report: Report) -> str:
    """The text of report.md."""
    return "\n".join(_lines(report))


def escaped(value: str) -> str:
    """Text that stands for itself in any Markdown, in a cell as well; an empty one is said to be."""
    return SPECIAL.sub(r"\\\1", line(value))


def paragraph(value: str) -> str:
    """Such text at the start of a line, where a sign or a number with a dot would begin a list."""
    return re.sub(r"^(\d*)([-+.)])(?=\s|$)", r"\1\\\2", escaped(value))


def _lines(report: Report) -> Iterator[str]:
    yield f"# {escaped(report.title)}"
    if report.cards:
        yield from _table(_card_table(report.cards))
    yield ""
    for title, findings in report.findings:
        yield from (f"**{escaped(title)}**", "")
        yield from (f"- {paragraph(finding.text)} ({escaped(finding.source)})" for finding in findings)
        yield ""
    for section in report.sections:
        yield from _section(section)


def _card_table(cards: Sequence[Card]) -> Table:
    rows = [(word, *(getattr(card, word) or "none" for card in cards)) for word in ("before", "after")]
    rows.append(("change", *(card.note for card in cards)))
    sources = "; ".join(dict.fromkeys(card.source for card in cards))
    return Table("Before and after", ("", *(card.title for card in cards)), rows, sources)


def _section(section: Section) -> Iterator[str]:
    yield f"## {escaped(section.title)}"
    for note in section.notes:
        yield from ("", paragraph(note))
    for part in section.parts:
        if isinstance(part, Table):
            yield from _table(part)
    if section.examples:
        yield from _table(_example_table(section.examples))
    for label, text in section.code:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield from ("", escaped(label), "", fence, visible(text), fence)
    yield ""


def _table(table: Table) -> Iterator[str]:
    yield from ("", f"### {escaped(table.title)}", "")
    yield _row(map(escaped, table.columns))
    yield _row("---" if place < table.texts else "---:" for place in range(len(table.columns)))
    for row in table.rows:
        yield _row(map(escaped, row))
    yield from ("", f"From {escaped(table.source)}.")


def _example_table(examples: Iterable[Example]) -> Table:
    examples = tuple(examples)
    labels = tuple(examples[0].said)
    rows = [
        (
            *(example.name, example.task, example.question, example.wanted),
            *(f"{answer} ({'right' if is_right else 'wrong'})" for answer, is_right in example.said.values()),
        )
        for example in examples
    ]
    columns = ("sample", "task", "question", "wanted", *labels)
    return Table("Answers side by side", columns, rows, "quality.json: rows, and the samples", texts=len(columns))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
