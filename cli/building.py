"""``nasdeploy build`` and ``nasdeploy search``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nasdeploy.cli.options import json_option, read_settings, settings_options, verbosity_options
from nasdeploy.cli.output import kept_clean, plain, put_json
from nasdeploy.cli.progress import observing
from nasdeploy.cli.services import pipeline_of
from nasdeploy.errors import InfeasibleError, InterruptedRunError

if TYPE_CHECKING:
    from nasdeploy.pipeline import BuildResult
    from nasdeploy.settings import BuildSettings


@click.command()
@settings_options
@click.option(
    "--dry-run", is_flag=True, help="Print the plan and whether the budgets can be met; train nothing."
)
@json_option
@verbosity_options
@click.pass_context
def build(
    context: click.Context,
    /,
    *,
    output_dir: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **_: Any,
) -> None:
    """Search, retrain, export, verify, measure and report, for every profile.

    The same command continues a build that was interrupted. Exits with the most serious code of its profiles;
    every good file stays.
    """
    settings = read_settings(context)
    if dry_run:
        _print_plan(context, settings, output_dir=output_dir, resume=resume, as_json=as_json)
        return
    with _resumable(resume), observing(verbose=verbose, quiet=quiet) as observer:
        result = pipeline_of(context).build(settings, output_dir=output_dir, observer=observer, resume=resume)
    _print_build(result, as_json)
    context.exit(result.exit_code)


@click.command()
@settings_options
@json_option
@verbosity_options
@click.pass_context
def search(
    context: click.Context,
    /,
    *,
    output_dir: Path | None,
    resume: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    **_: Any,
) -> None:
    """The search alone: one architecture per profile.

    `nasdeploy build` with the same options continues from it.
    """
    settings = read_settings(context)
    with _resumable(resume), observing(verbose=verbose, quiet=quiet) as observer:
        result = pipeline_of(context).search(
            settings, output_dir=output_dir, observer=observer, resume=resume
        )
    if as_json:
        put_json("nasdeploy/search-result/1", plain(result))
        return
    from nasdeploy.cli.texts import search_text

    click.echo(search_text(result))


@contextmanager
def _resumable(resume: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        command = "the same command" if resume else "the same command without --no-resume"
        raise InterruptedRunError(f"interrupted; what was finished is stored: {command} continues") from None


def _print_plan(
    context: click.Context, settings: BuildSettings, *, output_dir: Path | None, resume: bool, as_json: bool
) -> None:
    from nasdeploy.cli.texts import plan_text

    with kept_clean():
        plan = pipeline_of(context).plan(settings, output_dir=output_dir, resume=resume)
    if as_json:
        put_json("nasdeploy/plan/1", plain(plan))
    else:
        click.echo(plan_text(plan))
    broken = [one.message for one in plan.feasibility if not one.feasible]
    if broken:
        raise InfeasibleError("; ".join(broken))


def _print_build(result: BuildResult, as_json: bool) -> None:
    if as_json:
        put_json("nasdeploy/build-result/1", plain(result) | {"exit_code": result.exit_code})
    else:
        from nasdeploy.cli.texts import build_text

        click.echo(build_text(result))
    for profile in result.profiles:
        if profile.exit_code != 0:
            click.echo(f"error: {profile.profile}: {profile.message}", err=True)
