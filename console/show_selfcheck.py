"""What `slimvlm selfcheck` found, check by check as it comes, then one line for a bug report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimvlm.console.printing import print_json, print_line

if TYPE_CHECKING:
    from slimvlm.selfcheck.outcome import Outcome, Report


def show_outcome(outcome: Outcome) -> None:
    """One line."""
    print_line(f"{outcome.verdict}  {outcome.name:<16}{outcome.seconds:>7.1f} s  {outcome.detail}")


def show_selfcheck(report: Report, *, as_json: bool) -> None:
    """The end of it, or one document."""
    if as_json:
        print_json(report.to_dict())
    else:
        print_line()
        print_line(report.summary())
