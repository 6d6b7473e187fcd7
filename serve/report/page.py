"""The report as one HTML file that asks nobody for anything."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from slimvlm.serve.report.document import Chart, Report, line, visible

TEMPLATE, PALETTE = "page.html.j2", "palette.css"
ALONE = "svg { background: var(--page); font-family: system-ui, sans-serif; }\n"


def page(report: Report) -> str:
    """The text of report.html. Whatever comes from data is escaped; only the charts are put in as they are."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"line": line, "visible": visible, "drawing": Markup}
    environment.tests["drawn"] = lambda part: isinstance(part, Chart)
    template = environment.from_string(_packaged(TEMPLATE))
    return template.render(report=report, palette=Markup(_packaged(PALETTE))) + "\n"


def picture(chart: Chart) -> str:
    """The chart as an SVG file of its own, in the page's colours, by day and by night."""
    return chart.svg.replace(">", f"><style>{_packaged(PALETTE)}{ALONE}</style>", 1) + "\n"


def _packaged(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
