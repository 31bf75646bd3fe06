"""``nasdeploy profiles``: what is known of devices, and whether a search space can meet their budgets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nasdeploy.cli.options import json_option
from nasdeploy.cli.output import kept_clean, plain, put_json
from nasdeploy.cli.services import pipeline_of
from nasdeploy.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from nasdeploy.costs.budgets import Feasibility

DEFAULT_IMAGE_SHAPE, DEFAULT_NUM_CLASSES = (1, 28, 28), 10


@click.group()
def profiles() -> None:
    """List, show, check and create hardware profiles."""


@profiles.command("list")
@json_option
def list_profiles(*, as_json: bool) -> None:
    """List the profiles that are known by name, those of plug-ins too."""
    from nasdeploy.cli.texts import profiles_text
    from nasdeploy.profiles import load_profile, profile_names

    known = [load_profile(name) for name in profile_names()]
    if as_json:
        put_json("nasdeploy/profile-list/1", {"profiles": [profile.to_dict() for profile in known]})
    else:
        click.echo(profiles_text(known))


@profiles.command()
@click.argument("name", metavar="NAME|TOML")
@json_option
def show(*, name: str, as_json: bool) -> None:
    """Print a profile as TOML, its defaults filled in."""
    import tomli_w

    from nasdeploy.profiles import load_profile

    profile = load_profile(name).to_dict()
    if as_json:
        put_json("nasdeploy/profile/1", profile)
    else:
        click.echo(tomli_w.dumps(profile), nl=False)


@profiles.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME|TOML...")
@click.option("--space", default="mobile", show_default=True, metavar="NAME", help="Search space.")
@click.option(
    "--data", metavar="NAME|PATH", help="Image set: its images and classes fix the size of the space."
)
@click.option(
    "--image-size",
    "image_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="PIXELS",
    help="Side of the images; repeated: the search may choose among them.",
)
@json_option
@click.pass_context
def check(
    context: click.Context,
    /,
    *,
    names: tuple[str, ...],
    space: str,
    data: str | None,
    image_sizes: tuple[int, ...],
    as_json: bool,
) -> None:
    """Say in seconds which caps a search space can meet, and the nearest cap that it can.

    Without --data: grey images of 28x28 pixels and ten classes.
    """
    from nasdeploy.profiles import load_profile

    known = [load_profile(name) for name in names]
    with kept_clean():
        sizes = tuple(sorted(set(image_sizes)))
        image_shape, num_classes = _border_of(data, sizes[-1] if sizes else None)
        pipeline = pipeline_of(context)
        found = [
            pipeline.check_profile(
                profile,
                space=space,
                image_shape=image_shape,
                num_classes=num_classes,
                image_sizes=sizes if len(sizes) > 1 else (),
            )
            for profile in known
        ]
    _print_check(found, as_json)


def _border_of(data: str | None, image_size: int | None) -> tuple[tuple[int, int, int], int]:
    """Return (channels, height, width) of the images and the number of classes."""
    if data is None:
        channels, height, width = DEFAULT_IMAGE_SHAPE
        return (channels, image_size or height, image_size or width), DEFAULT_NUM_CLASSES
    from nasdeploy.data import load_dataset

    dataset = load_dataset(data, image_size=image_size, seed=0)
    return dataset.image_shape, dataset.num_classes


def _print_check(found: list[Feasibility], as_json: bool) -> None:
    if as_json:
        put_json("nasdeploy/profile-check/1", {"profiles": plain(found)})
    else:
        from nasdeploy.cli.texts import feasibility_text

        click.echo("\n\n".join(map(feasibility_text, found)))
    broken = [one.message for one in found if not one.feasible]
    if broken:
        raise InfeasibleError("; ".join(broken))


@profiles.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the profile; left out: that of the file.")
@json_option
def new(*, file: Path, name: str | None, as_json: bool) -> None:
    """Write a commented profile to start from. An existing file is never overwritten."""
    from nasdeploy.profiles import profile_template

    if file.suffix != ".toml":
        raise UsageError(f'FILE = "{file}": expected a file name that ends in .toml, such as "{file}.toml"')
    text = profile_template(name or file.stem)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{file}: exists already; choose another file name") from None
    except OSError as error:
        raise UsageError(
            f"{file}: cannot be written ({error.strerror}); expected a name in an existing folder"
        ) from None
    if as_json:
        put_json("nasdeploy/new-profile/1", {"file": str(file)})
    else:
        click.echo(str(file))


@profiles.command()
@click.option(
    "--of", "kind", type=click.Choice(("profile", "settings")), default="profile", show_default=True
)
def schema(*, kind: str) -> None:
    """Print the JSON Schema of a profile's TOML file, or of the settings of a build."""
    import json

    from nasdeploy.profiles import profile_json_schema
    from nasdeploy.settings import settings_json_schema

    made = profile_json_schema() if kind == "profile" else settings_json_schema()
    click.echo(json.dumps(made, indent=1))
