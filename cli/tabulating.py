"""``nasdeploy measure``: the latency tables that a search rests on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click
from click.core import ParameterSource

from nasdeploy.cli.measuring import check_target
from nasdeploy.cli.options import json_option, pack_option, refuse_beside, verbosity_options
from nasdeploy.cli.output import plain, put_json, put_pack
from nasdeploy.cli.progress import observing
from nasdeploy.cli.services import pipeline_of
from nasdeploy.errors import NoisyMeasurementError

if TYPE_CHECKING:
    from nasdeploy.pipeline import MeasureResult


KEPT_SCHEMA = "nasdeploy/kept-result/1"


class _Space(TypedDict):
    """What a search space follows from, and the seed of its table."""

    data: str | None
    space: str
    image_shape: tuple[int, int, int] | None
    num_classes: int | None
    image_sizes: tuple[int, ...]
    seed: int


def read_image_shape(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int, int] | None:
    """Return (channels, height, width) of a text such as "3x224x224"."""
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"'{text}': expected channels, height and width, such as 3x224x224")
    channels, height, width = map(int, parts)
    return channels, height, width


@click.command()
@click.option(
    "-p",
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME|TOML",
    help="Hardware profile; repeatable. Left out: those of a build.",
)
@click.option(
    "--data", metavar="NAME|PATH", help="Image set: its images and classes fix the size of the space."
)
@click.option(
    "--image-shape",
    metavar="CxHxW",
    callback=read_image_shape,
    help="Channels, height and width, in place of --data; left out: 1x28x28.",
)
@click.option(
    "--classes",
    "num_classes",
    type=click.IntRange(min=2),
    metavar="N",
    help="Number of classes, in place of --data; left out: 10.",
)
@click.option(
    "--space", default="mobile", show_default=True, metavar="NAME", help="Search space, or FILE.py:FUNCTION."
)
@click.option(
    "--image-size",
    "image_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="PIXELS",
    help="Side of the images; repeated: the search may choose among them.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the networks that a table is fitted to and tested on.",
)
@pack_option
@click.option(
    "--import",
    "imported",
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="Take what a pack of `measure` or `build` wrote on its device, so that builds find it; a space in a Python "
    "file is named again by --space.",
)
@click.option("--fresh", is_flag=True, help="Measure everything, whatever was measured before.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the result to this file, as --json prints it.",
)
@json_option
@verbosity_options
@click.pass_context
def measure(
    context: click.Context,
    /,
    *,
    profiles: tuple[str, ...],
    data: str | None,
    image_shape: tuple[int, int, int] | None,
    num_classes: int | None,
    space: str,
    image_sizes: tuple[int, ...],
    seed: int,
    pack: Path | None,
    imported: Path | None,
    fresh: bool,
    output: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Measure the latency table of a search space under the runtime of each profile.

    A build with the same space, runtime and machine finds the tables again. Where two measurements of the same
    networks differ by more than 5 %, the machine is too noisy: the result is printed, not kept, and the exit code is 5.
    """
    from nasdeploy.profiles import DEFAULT_PROFILES

    if data is not None and (image_shape is not None or num_classes is not None):
        raise click.UsageError(
            "--data has its own image shape and classes; leave out --image-shape and --classes"
        )
    if output is not None:
        check_target(output)
    if imported is not None:
        others = [*(_Space.__annotations__.keys() - {"space"}), "pack", "fresh"]
        refuse_beside(context, "--import", others)
        _check_one(profiles or [""], "--import")
        _import(context, imported, profiles, output=output, as_json=as_json, verbose=verbose, quiet=quiet)
        return
    where: _Space = {
        "data": data,
        "space": space,
        "image_shape": image_shape,
        "num_classes": num_classes,
        "image_sizes": image_sizes,
        "seed": seed,
    }
    if pack is not None:
        refuse_beside(context, "--pack", ["fresh", "output"])
        _check_one(profiles, "--pack")
        put_pack(pipeline_of(context).pack_table(profiles[0], pack, **where), as_json=as_json)
        return
    with observing(verbose=verbose, quiet=quiet) as observer:
        result = pipeline_of(context).measure(
            profiles or DEFAULT_PROFILES, fresh=fresh, observer=observer, **where
        )
    _put(result, output=output, as_json=as_json)


def _check_one(profiles: Sequence[str], option: str) -> None:
    if len(profiles) != 1:
        raise click.UsageError(f"{option} is for one device; expected one --profile")


def _import(
    context: click.Context,
    path: Path,
    profiles: Sequence[str],
    *,
    output: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    from nasdeploy.files import write_json
    from nasdeploy.pipeline.packing import KeptResult

    is_named = context.get_parameter_source("space") is ParameterSource.COMMANDLINE
    space = context.params["space"] if is_named else None
    with observing(verbose=verbose, quiet=quiet) as observer:
        found = pipeline_of(context).import_result(
            path, profile=profiles[0] if profiles else None, space=space, observer=observer
        )
    if not isinstance(found, KeptResult):
        _put(found, output=output, as_json=as_json)
        return
    if output is not None:
        write_json(output, {"schema": KEPT_SCHEMA, **plain(found)})
    if as_json:
        put_json(KEPT_SCHEMA, plain(found))
    else:
        click.echo(f"{found.profile}: kept in {found.path}; the same build command certifies with it")


def _put(result: MeasureResult, *, output: Path | None, as_json: bool) -> None:
    data_out = result.to_json()
    if output is not None:
        from nasdeploy.files import write_json

        write_json(output, data_out)
    if as_json:
        put_json(data_out["schema"], data_out)
    else:
        from nasdeploy.cli.table_texts import measure_text

        click.echo(measure_text(result))
    if result.noise:
        raise NoisyMeasurementError(result.noise)
