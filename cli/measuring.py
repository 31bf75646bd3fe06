"""``nasdeploy bench``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from nasdeploy.cli.options import json_option, pack_option, refuse_beside, verbosity_options
from nasdeploy.cli.output import put_json, put_pack
from nasdeploy.cli.progress import observing
from nasdeploy.cli.services import pipeline_of
from nasdeploy.errors import UsageError

if TYPE_CHECKING:
    from nasdeploy.costs.comparison import BenchProtocol
    from nasdeploy.pipeline.bench_results import BenchResult

# A test compares them with the formats that can be drawn.
CHART_SUFFIXES = (".png", ".svg")


class _Work(TypedDict):
    """What is measured, and how."""

    profile: str | None
    threads: int | None
    batch_size: int | None
    shapes: dict[str, tuple[int, ...]]
    protocol: BenchProtocol
    check_cap: bool
    operators: bool
    seed: int


def read_shapes(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return {input: sizes} of texts such as "images=1x3x48x192"."""
    shapes = {}
    for text in texts:
        name, _equals, sizes = text.rpartition("=")  # names of inputs may hold an "="
        parts = sizes.split("x")
        if not name or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
            raise click.BadParameter(f"'{text}': expected an input and its sizes, such as images=1x3x48x192")
        shapes[name] = tuple(map(int, parts))
    return shapes


@click.command()
@click.argument("models", nargs=-1, metavar="MODEL.onnx...", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--profile",
    metavar="NAME|TOML",
    help="Measure under its runtime; left out: one CPU thread, batches of one.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads, in place of the profile's."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", help="Images a run, in place of the profile's."
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=SIZES",
    callback=read_shapes,
    help="Sizes of an input that its file leaves open, such as images=1x3x48x192; repeatable.",
)
@click.option("--quick", is_flag=True, help="100 runs and 1 s a model instead of 1000 runs and 10 s.")
@click.option(
    "--interval",
    metavar="TIME",
    help="Start a run every so often and sleep between, such as 33ms: what a camera's pipeline sees.",
)
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure N times at most, with twice the runs each time, while the machine leaves doubts. "
    "[default: 3; 1 with --quick]",
)
@click.option(
    "--check-cap",
    is_flag=True,
    help="Exit with 3 where a file breaks the profile's latency cap, with 5 where that stays undecided.",
)
@click.option(
    "--operators", is_flag=True, help="Also profile each file, in runs of their own: where its time goes."
)
@click.option(
    "--chart",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw the medians with their range to a .png or .svg file.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the order and of the inputs.",
)
@pack_option
@click.option(
    "--import",
    "imported",
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="Print what such a pack wrote on its device; models and options are those of the pack.",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="JSON", help="Also write the JSON to a file."
)
@json_option
@verbosity_options
@click.pass_context
def bench(
    context: click.Context,
    /,
    *,
    models: tuple[Path, ...],
    profile: str | None,
    threads: int | None,
    batch_size: int | None,
    shapes: dict[str, tuple[int, ...]],
    quick: bool,
    interval: str | None,
    attempts: int | None,
    check_cap: bool,
    operators: bool,
    chart: Path | None,
    seed: int,
    pack: Path | None,
    imported: Path | None,
    output: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Measure the latency of any ONNX files together, and compare them with the first.

    Fresh processes, models in turns, the first one twice: what lies within the noise is "no difference". On a machine
    that does not hold still the result is printed and the exit code is 5.
    """
    work: _Work = {
        "profile": profile,
        "threads": threads,
        "batch_size": batch_size,
        "shapes": shapes,
        "protocol": read_protocol(quick=quick, interval=interval, attempts=attempts),
        "check_cap": check_cap,
        "operators": operators,
        "seed": seed,
    }
    _check_targets(output, chart)
    if imported is not None:
        refuse_beside(context, "--import", [*work, "models", "quick", "interval", "attempts", "pack"])
    elif not models:
        raise click.UsageError("Missing argument 'MODEL.onnx...'.")
    if pack is not None:
        refuse_beside(context, "--pack", ["attempts", "chart", "output"])
        put_pack(pipeline_of(context).pack_bench(models, pack, **work), as_json=as_json)
        return
    with observing(verbose=verbose, quiet=quiet) as observer:
        if imported is not None:
            result = pipeline_of(context).import_bench(imported, observer=observer)
        else:
            result = pipeline_of(context).bench(models, observer=observer, **work)
    _put(result, output=output, chart=chart, as_json=as_json)
    context.exit(result.exit_code)


def _put(result: BenchResult, *, output: Path | None, chart: Path | None, as_json: bool) -> None:
    data = result.to_json()
    _write_files(result, output, chart)
    if as_json:
        put_json(data["schema"], data)
    else:
        from nasdeploy.cli.bench_texts import bench_text

        click.echo(bench_text(result))
    for failure in result.failures:
        click.echo(f"error: {failure}", err=True)


def read_protocol(*, quick: bool, interval: str | None, attempts: int | None) -> BenchProtocol:
    """Return the protocol that the options ask for. Raises ConfigError for an interval that cannot be read."""
    from nasdeploy.costs.comparison import FULL, QUICK
    from nasdeploy.profiles import parse_quantity

    protocol = QUICK if quick else FULL
    if interval is not None:
        interval_ms = parse_quantity(interval, metric="latency", key="--interval")
        protocol = replace(protocol, interval_ms=interval_ms)
    return protocol if attempts is None else replace(protocol, attempts=attempts)


def _check_targets(output: Path | None, chart: Path | None) -> None:
    """Raise UsageError for a file that could not be written, and for a chart of another format."""
    if output is not None:
        check_target(output)
    if chart is not None:
        if chart.suffix.lower() not in CHART_SUFFIXES:
            raise UsageError(f"--chart {chart}: expected a name that ends in {' or '.join(CHART_SUFFIXES)}")
        check_target(chart, option="--chart", example="bench.svg")


def _write_files(result: BenchResult, output: Path | None, chart: Path | None) -> None:
    if output is not None:
        from nasdeploy.files import write_json

        write_json(output, result.to_json())
    if chart is not None:
        from nasdeploy.pipeline.bench_results import write_chart

        write_chart(result, chart)


def check_target(path: Path, *, option: str = "--output", example: str = "bench.json") -> None:
    """Raise UsageError for a file that could not be written: before a minute of measuring, not after."""
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; expected a file name, such as {path / example}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{option} {path}: its folder cannot be made ({error.strerror}); expected a place that can be written"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: its folder cannot be written to; expected one that can")
