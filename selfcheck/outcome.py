"""What a check gave, and the report of all: read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
SCHEMA = 1


class SkippedError(Exception):
    """This machine lacks what a check is about; the message says what."""


class WrongError(Exception):
    """A check found what should not be; the message says what was found and what is accepted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check.

    Attributes:
        detail: what was found, or why it failed or was skipped; one sentence.
        trace: of an exception nobody expected, for a bug report.
    """

    name: str
    verdict: str
    seconds: float
    detail: str
    trace: str | None = None


@dataclass(frozen=True)
class Report:
    """All checks on one device; `facts` say what the machine and its software are."""

    device: str
    outcomes: tuple[Outcome, ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    def named(self, verdict: str) -> list[str]:
        """The checks with this verdict."""
        return [outcome.name for outcome in self.outcomes if outcome.verdict == verdict]

    @property
    def seconds(self) -> float:
        """Of all checks."""
        return sum(outcome.seconds for outcome in self.outcomes)

    def summary(self) -> str:
        """One line to paste into a bug report."""
        counts = [f"{len(self.named(PASS))} {PASS}"]
        for verdict in (FAIL, SKIP):
            names = self.named(verdict)
            counts.append(f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if names else ""))
        facts = "; ".join(f"{name} {value}" for name, value in self.facts.items())
        return f"slimvlm selfcheck on {self.device}: {', '.join(counts)} in {self.seconds:.0f} s; {facts}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "schema": SCHEMA,
            "device": self.device,
            "facts": dict(self.facts),
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "seconds": self.seconds,
            "passed": not self.named(FAIL),
            "summary": self.summary(),
        }
