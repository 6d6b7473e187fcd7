"""The report as one HTML file that asks nobody for anything."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from slimvlm.serve.report.document import Chart, Report, line, visible

TEMPLATE = "page.html.j2"


def page(report: Report) -> str:
    """The text of report.html. Whatever comes from data is escaped; only the charts are put in as they are."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"line": line, "visible": visible, "drawing": Markup}
    environment.tests["drawn"] = lambda part: isinstance(part, Chart)
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(report=report) + "\n"
