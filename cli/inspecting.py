"""``nasdeploy verify`` and ``nasdeploy report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nasdeploy.cli.options import json_option, verbosity_options
from nasdeploy.cli.output import kept_clean, plain, put_json
from nasdeploy.cli.progress import observing
from nasdeploy.cli.services import pipeline_of
from nasdeploy.errors import GateError

if TYPE_CHECKING:
    from nasdeploy.data import Split
    from nasdeploy.exporters.verification import Verification


@click.command()
@click.argument("target", metavar="MODEL.onnx|RUN", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--data", metavar="NAME|PATH", help="Measure the accuracy of a lone file on the test images of this."
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Side of those; left out: the model's input.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    help="Of dividing --data; left out: the model's own, or 0.",
)
@json_option
@verbosity_options
@click.pass_context
def verify(
    context: click.Context,
    /,
    *,
    target: Path,
    data: str | None,
    image_size: int | None,
    seed: int | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Test the models of a run against their networks, or a lone ONNX file.

    A lone file is tested for structure, for running in ONNX Runtime, and with --data for accuracy.
    """
    if target.is_dir():
        if data is not None or image_size is not None or seed is not None:
            raise click.UsageError(
                "--data, --image-size and --seed are for a lone ONNX file; a run has its own data"
            )
        with observing(verbose=verbose, quiet=quiet) as observer:
            found = dict(pipeline_of(context).verify_run(target, observer))
        if as_json:
            profiles = {name: one.to_json() for name, one in found.items()}
            put_json("nasdeploy/run-verification/1", {"run_dir": str(target), "profiles": profiles})
    else:
        with kept_clean():
            found = {str(target): _verify_file(target, data=data, image_size=image_size, seed=seed)}
        if as_json:
            put_json("nasdeploy/verify/1", found[str(target)].to_json())
    _conclude(found, as_text=not as_json)


def _conclude(found: dict[str, Verification], *, as_text: bool) -> None:
    """Print the checks. Raises GateError, which names the first check of each file that failed."""
    from nasdeploy.cli.texts import verification_text

    if as_text:
        click.echo("\n\n".join(verification_text(one, title=name) for name, one in found.items()))
    failed = [f"{name}: {one.failures[0].describe()}" for name, one in found.items() if not one.passed]
    if failed:
        raise GateError("; ".join(failed))


def _verify_file(path: Path, *, data: str | None, image_size: int | None, seed: int | None) -> Verification:
    from nasdeploy.exporters.verification import verify_file

    if data is None:
        if image_size is not None or seed is not None:
            raise click.UsageError("--image-size and --seed need --data")
        return verify_file(path)
    test = _test_split(path, data, image_size=image_size, seed=seed)
    return verify_file(path, test.images, labels=test.labels)


def _test_split(path: Path, data: str, *, image_size: int | None, seed: int | None) -> Split:
    """Return the test images as the model takes them.

    Divided by the seed that the file was built with: with another, its training images could be among them.
    """
    from nasdeploy.data import load_dataset
    from nasdeploy.exporters.metadata import read_metadata

    side = image_size if image_size is not None else _input_side(path)
    stored = int(read_metadata(path).get("seed", 0))
    return load_dataset(data, image_size=side, seed=stored if seed is None else seed).test


def _input_side(path: Path) -> int | None:
    """Return the height of the model's images (B, C, H, W), or None where the file leaves it open."""
    from nasdeploy.exporters.verification import inspect_model

    shapes = [value.shape for value in inspect_model(path).inputs]
    side = shapes[0][2] if len(shapes) == 1 and len(shapes[0]) == 4 else None
    return side if isinstance(side, int) else None


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
@click.pass_context
def report(context: click.Context, /, *, run: Path, as_json: bool) -> None:
    """Write the report of a run again, from its folder, and print where it is."""
    with kept_clean():
        path = pipeline_of(context).report(run)
    if as_json:
        put_json("nasdeploy/report-result/1", {"report": plain(path)})
    else:
        click.echo(str(path))
