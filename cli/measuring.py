"""``nasdeploy bench``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from nasdeploy.cli.options import json_option, verbosity_options
from nasdeploy.cli.output import put_json
from nasdeploy.cli.progress import observing
from nasdeploy.cli.services import pipeline_of
from nasdeploy.errors import NoisyMeasurementError, UsageError


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
@click.argument("models", nargs=-1, required=True, metavar="MODEL.onnx...", type=click.Path(path_type=Path))
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
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the order and of the inputs.",
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
    seed: int,
    output: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Measure the latency of any ONNX files together, and compare them with the first.

    Fresh processes, models in turns, the first one twice: what lies within the noise is "no difference". On a machine
    that does not hold still the result is printed and the exit code is 5.
    """
    from nasdeploy.costs.comparison import FULL, QUICK

    if output is not None:
        _check_target(output)
    with observing(verbose=verbose, quiet=quiet) as observer:
        result = pipeline_of(context).bench(
            models,
            profile=profile,
            threads=threads,
            batch_size=batch_size,
            shapes=shapes,
            protocol=QUICK if quick else FULL,
            seed=seed,
            observer=observer,
        )
    data = result.to_json()
    if output is not None:
        from nasdeploy.files import write_json

        write_json(output, data)
    if as_json:
        put_json(data["schema"], data)
    else:
        from nasdeploy.cli.texts import bench_text

        click.echo(bench_text(result))
    if not result.comparison.stable:
        raise NoisyMeasurementError(result.comparison.instability)


def _check_target(path: Path) -> None:
    """Raise UsageError for a file that could not be written: before a minute of measuring, not after."""
    if path.is_dir():
        raise UsageError(f"--output {path}: is a folder; expected a file name, such as {path / 'bench.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output {path}: its folder cannot be made ({error.strerror}); expected a place that can be written"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--output {path}: its folder cannot be written to; expected one that can")
