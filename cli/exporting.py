"""``nasdeploy export``."""

from __future__ import annotations

from pathlib import Path

import click

from nasdeploy.cli.options import json_option, verbosity_options
from nasdeploy.cli.output import put_json
from nasdeploy.cli.progress import observing
from nasdeploy.cli.services import pipeline_of

# A test compares them with the pipeline's.
PRECISIONS = ("fp32", "fp16", "int8")


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-p",
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME",
    help="Profile of the run; repeatable; left out: all that are trained.",
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Number format."
)
@click.option("--opset", type=int, metavar="N", help="Operator set; left out: the profile's.")
@click.option("--exporter", metavar="NAME", help="What writes the ONNX file; left out: the run's.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), metavar="N", help="Fixed batch; left out: as in the run."
)
@click.option("--dynamic-batch", is_flag=True, help="A file that takes any batch size.")
@click.option(
    "--max-accuracy-drop",
    type=click.FloatRange(0.0, 100.0),
    metavar="POINTS",
    help="Percentage points of validation accuracy that int8 (1 by default) or fp16 (0.5) may cost.",
)
@click.option(
    "-o", "--output-dir", type=click.Path(path_type=Path), metavar="DIR", help="Left out: RUN/exports."
)
@json_option
@verbosity_options
@click.pass_context
def export(
    context: click.Context,
    /,
    *,
    run: Path,
    profiles: tuple[str, ...],
    precision: str,
    opset: int | None,
    exporter: str | None,
    batch_size: int | None,
    dynamic_batch: bool,
    max_accuracy_drop: float | None,
    output_dir: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Export the networks of a finished run again, without searching or training.

    Each file PROFILE.PRECISION.onnx has a JSON file beside it. A file that fails its checks is not written, and the
    exit code is 4. The run's own models stay as they are.
    """
    if batch_size is not None and dynamic_batch:
        raise click.UsageError("--batch-size and --dynamic-batch exclude each other; give one of them")
    if max_accuracy_drop is not None and precision == "fp32":
        raise click.UsageError(
            "--max-accuracy-drop is for --precision int8 and fp16; an fp32 file must compute what its network computes"
        )
    with observing(verbose=verbose, quiet=quiet) as observer:
        result = pipeline_of(context).export_run(
            run,
            profiles=profiles or None,
            precision=precision,
            opset=opset,
            exporter=exporter,
            batch_size=batch_size,
            dynamic_batch=dynamic_batch,
            max_accuracy_drop=None if max_accuracy_drop is None else max_accuracy_drop / 100.0,
            output_dir=output_dir,
            observer=observer,
        )
    if as_json:
        data = result.to_json()
        put_json(data["schema"], data)
    else:
        from nasdeploy.cli.texts import export_text

        click.echo(export_text(result))
    for one in result.exports:
        if one.message:
            word = "error" if one.exit_code else "note"
            click.echo(f"{word}: {one.profile}: {one.message}", err=True)
    context.exit(result.exit_code)
