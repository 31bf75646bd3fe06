"""report.md and MODEL_CARD.md. Every value is escaped unless it is a code block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nasdeploy.reporting import random_weight, text, views
from nasdeploy.reporting.views import Report

__all__ = ["render_markdown", "render_model_card"]


def render_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    template = _environment().get_template("report.md.j2")
    return template.render(report=report, views=views, random_weight=random_weight, text=text)


def render_model_card(identity: Mapping[str, Any], profile: Mapping[str, Any]) -> str:
    """Return the card of one model. identity: run.json. profile: the section of the report."""
    template = _environment().get_template("model_card.md.j2")
    return template.render(run=identity, profile=profile, views=views, text=text)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nasdeploy.reporting", ""),
        autoescape=False,  # HTML's escapes are not Markdown's: `finalize` sees every value instead
        finalize=text.escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(text.FILTERS)
    environment.filters["code"] = text.indent_code
    environment.filters["literal"] = text.literal
    return environment
