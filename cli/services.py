"""What the commands call. A test, or a program that embeds the command line, passes its own by ``obj=``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import click

if TYPE_CHECKING:
    from nasdeploy.costs.budgets import Feasibility
    from nasdeploy.costs.comparison import BenchProtocol
    from nasdeploy.exporters.verification import Verification
    from nasdeploy.pipeline import (
        BenchResult,
        BuildResult,
        ExportResult,
        KeptResult,
        MeasureResult,
        Plan,
        SearchResult,
        WrittenPack,
    )
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

    def plan(
        self, settings: BuildSettings, *, output_dir: str | Path | None = None, resume: bool = True
    ) -> Plan:
        """Say what a build would do, and whether its budgets can be met."""

    def check_profile(
        self,
        profile: HardwareProfile,
        *,
        space: str = "mobile",
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        image_sizes: Sequence[int] = (),
    ) -> Feasibility:
        """Measure what the space costs on a profile. image_shape: (channels, height, width).

        image_sizes: several to choose from; none: that of ``image_shape``.
        """

    def verify_run(self, run_dir: Path, observer: Observer | None = None) -> Mapping[str, Verification]:
        """Check the models of a run again, by profile."""

    def bench(
        self,
        models: Sequence[str | Path],
        *,
        profile: str | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        protocol: BenchProtocol = ...,
        check_cap: bool = False,
        operators: bool = False,
        seed: int = 0,
        observer: Observer | None = None,
    ) -> BenchResult:
        """Measure ONNX files together. shapes: {input: sizes} that a file leaves open.

        check_cap: let the profile's latency cap decide on the exit code. operators: profile each file, too.
        """

    def pack_bench(
        self,
        models: Sequence[str | Path],
        path: Path,
        *,
        profile: str | None = None,
        threads: int | None = None,
        batch_size: int | None = None,
        shapes: Mapping[str, Sequence[int]] | None = None,
        protocol: BenchProtocol = ...,
        check_cap: bool = False,
        operators: bool = False,
        seed: int = 0,
    ) -> WrittenPack:
        """Write what measures ONNX files on a device."""

    def import_bench(self, path: Path, *, observer: Observer | None = None) -> BenchResult:
        """Return what such a pack measured there."""

    def measure(
        self,
        profiles: Sequence[HardwareProfile | str | Path] = ...,
        *,
        data: str | None = None,
        space: str = "mobile",
        image_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        image_sizes: Sequence[int] = (),
        seed: int = 0,
        fresh: bool = False,
        observer: Observer | None = None,
    ) -> MeasureResult:
        """Measure the latency tables of a space, or find them again."""

    def pack_table(
        self,
        profile: HardwareProfile | str | Path,
        path: Path,
        *,
        data: str | None = None,
        space: str = "mobile",
        image_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        image_sizes: Sequence[int] = (),
        seed: int = 0,
    ) -> WrittenPack:
        """Write what measures the latency table of a space on a device."""

    def import_result(
        self,
        path: Path,
        *,
        profile: HardwareProfile | str | Path | None = None,
        space: str | None = None,
        observer: Observer | None = None,
    ) -> MeasureResult | KeptResult:
        """Take what a pack wrote on its device."""

    def export_run(
        self,
        run_dir: Path,
        *,
        profiles: Sequence[str] | None = None,
        precision: str = "fp32",
        opset: int | None = None,
        exporter: str | None = None,
        batch_size: int | None = None,
        dynamic_batch: bool = False,
        max_accuracy_drop: float | None = None,
        output_dir: str | Path | None = None,
        observer: Observer | None = None,
    ) -> ExportResult:
        """Export the trained networks of a run again. max_accuracy_drop: in [0, 1]."""

    def report(self, run_dir: Path) -> Path:
        """Write the report of a run again and return its first page."""


def pipeline_of(context: click.Context) -> Pipeline:
    """Return the pipeline that the caller passed as ``obj``, or nasdeploy's own."""
    if context.obj is not None:
        return cast(Pipeline, context.obj)
    from nasdeploy import pipeline

    return pipeline
