"""The report of a run: report.json, and the same for people as HTML, Markdown and CSV; model cards; checksums."""

from __future__ import annotations

from nasdeploy.reporting.checksums import write_checksums
from nasdeploy.reporting.collect import collect_report
from nasdeploy.reporting.writing import write_model_card, write_report

__all__ = ["collect_report", "write_checksums", "write_model_card", "write_report"]
