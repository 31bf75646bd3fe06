"""Writing of reports and model cards, every file whole."""

from __future__ import annotations

from pathlib import Path

from nasdeploy.errors import ConfigError
from nasdeploy.files import write_json, write_whole
from nasdeploy.reporting.collect import collect_profile, collect_report, read_identity
from nasdeploy.reporting.html import render_html
from nasdeploy.reporting.markdown import render_markdown, render_model_card
from nasdeploy.reporting.pareto import render_pareto
from nasdeploy.runs import RunFolder

__all__ = ["write_model_card", "write_report"]


def write_report(run: RunFolder) -> Path:
    """Write report.json, report.md, index.html and pareto.csv; return the path of index.html.

    An unfinished run gets a report of what there is. Raises RunFolderError when run.json is missing or a file
    is damaged.
    """
    report = collect_report(run)
    pages = {
        run.report_markdown: render_markdown(report),
        run.pareto: render_pareto(report),
        run.report_html: render_html(report),
    }
    write_json(run.report_json, report)
    for path, content in pages.items():
        write_whole(path, content.encode())
    return run.report_html


def write_model_card(run: RunFolder, profile: str) -> Path:
    """Write MODEL_CARD.md of ``profile`` from the other files of its folder; return its path.

    Raises ConfigError for a profile that the run does not have, RunFolderError when a file is damaged.
    """
    identity = read_identity(run)
    if profile not in identity["profiles"]:
        raise ConfigError(
            f"profile '{profile}' is not in {run.path}; expected one of {', '.join(identity['profiles'])}"
        )
    card = render_model_card(identity, collect_profile(run, identity, profile))
    path = run.model(profile).card
    write_whole(path, card.encode())
    return path
