"""What the commands call. A test, or a program that embeds the command line, passes its own by ``obj=``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import click

if TYPE_CHECKING:
    from nasdeploy.costs.budgets import Feasibility
    from nasdeploy.exporters.verification import Verification
    from nasdeploy.pipeline import BuildResult, Plan, SearchResult
    from nasdeploy.profiles import HardwareProfile
    from nasdeploy.progress import Observer
    from nasdeploy.settings import BuildSettings


class Pipeline(Protocol):
    """The part of :mod:`nasdeploy.pipeline` that the command line needs."""

    def build(
        self,
        settings: BuildSettings | None = None,
        *,
        output_dir: str | Path | None = None,
        observer: Observer | None = None,
        resume: bool = True,
    ) -> BuildResult:
        """Run everything, or what is missing of it."""

    def search(
        self,
        settings: BuildSettings | None = None,
        *,
        output_dir: str | Path | None = None,
        observer: Observer | None = None,
        resume: bool = True,
    ) -> SearchResult:
        """Run the search alone."""

    def plan(self, settings: BuildSettings, *, output_dir: str | Path | None = None) -> Plan:
        """Say what a build would do, and whether its budgets can be met."""

    def check_profile(
        self,
        profile: HardwareProfile,
        *,
        space: str = "mobile",
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
    ) -> Feasibility:
        """Measure what the space costs on a profile. image_shape: (channels, height, width)."""

    def verify_run(self, run_dir: Path, observer: Observer | None = None) -> Mapping[str, Verification]:
        """Check the models of a run again, by profile."""

    def report(self, run_dir: Path) -> Path:
        """Write the report of a run again and return its first page."""


def pipeline_of(context: click.Context) -> Pipeline:
    """Return the pipeline that the caller passed as ``obj``, or nasdeploy's own."""
    if context.obj is not None:
        return cast(Pipeline, context.obj)
    from nasdeploy import pipeline

    return pipeline
