"""Reading report.md: its tables, and what it puts under which heading."""

from __future__ import annotations

from pathlib import Path

from slimvlm.serve.report import write_report


def text_of(run: Path) -> str:
    write_report(run)
    return (run / "report.md").read_text()


def table(text: str, title: str) -> list[list[str]]:
    """The rows of a table of report.md, without its head."""
    lines = text.split(f"### {title}\n", 1)[1].split("\n\nFrom ", 1)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def bad_news(text: str) -> str:
    head = text.split("\n## ", 1)[0]
    return head.split("**What was done**", 1)[0]


def good_news(text: str) -> str:
    return text.split("\n## ", 1)[0].split("**What was done**", 1)[1]
