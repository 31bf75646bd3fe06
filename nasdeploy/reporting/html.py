"""index.html: one file without scripts and outside resources. Everything from outside is escaped by the template."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nasdeploy.reporting import effects_plot, plots, random_weight, text, views
from nasdeploy.reporting.views import Report

__all__ = ["render_html"]


def render_html(report: Report) -> str:
    """Return the page: the same report gives the same bytes."""
    environment = Environment(
        loader=PackageLoader("nasdeploy.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text.FILTERS)
    pictures = {
        "tradeoff": plots.tradeoff_plot(report),
        "expected_latency": plots.history_plot(report, "latency"),
        "ess": plots.history_plot(report, "ess"),
        "table": plots.table_plot(report),
        "effects": effects_plot.effects_plot(report),
        "weights": effects_plot.weights_plot(report),
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        views=views,
        random_weight=random_weight,
        text=text,
        # matplotlib escapes the texts in its SVG.
        pictures={name: Markup(svg) if svg else None for name, svg in pictures.items()},
    )
