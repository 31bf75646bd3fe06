"""The verbs by name, and what becomes of errors: one line on stderr and an exit code."""

from __future__ import annotations

import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TextIO

import click

from nasdeploy.errors import InterruptedRunError, NasdeployError

# verb -> (module that defines the command of that name, its help in one line)
VERBS: Mapping[str, tuple[str, str]] = {
    "build": (
        "nasdeploy.cli.building",
        "Search, retrain, export, verify, measure and report, for every profile.",
    ),
    "search": ("nasdeploy.cli.building", "The search alone."),
    "profiles": ("nasdeploy.cli.profiles", "List, show, check and create hardware profiles."),
    "measure": (
        "nasdeploy.cli.tabulating",
        "Measure the latency table of a search space under each profile.",
    ),
    "bench": ("nasdeploy.cli.measuring", "Measure and compare the latency of any ONNX files."),
    "verify": (
        "nasdeploy.cli.inspecting",
        "Test an exported model against its network, or a lone ONNX file.",
    ),
    "export": ("nasdeploy.cli.exporting", "Export the networks of a run again, in other formats."),
    "report": ("nasdeploy.cli.inspecting", "Write the report of a run again."),
}

EPILOG = """\b
Exit codes:
  0  done
  1  unexpected error
  2  wrong usage, configuration or data
  3  a budget cannot be met, or the exported file breaks it
  4  the exported file does not match its network, or lost too much accuracy
  5  the machine is too noisy to certify a cap
  6  interrupted; the same command continues
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they run: its own help imports none of them."""

    def __init__(self, *, verbs: Mapping[str, tuple[str, str]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None for an unknown verb."""
        if cmd_name not in self._verbs:
            return None
        command: click.Command = getattr(import_module(self._verbs[cmd_name][0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of the verbs from their literal help."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in self._verbs.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error becomes one line on stderr, and a traceback only where it is a bug."""
        try:
            with _termination_as_interrupt():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own: usage errors, --help, and the codes of commands that ended
        except NasdeployError as error:
            _fail(ctx, error, str(error))
        except KeyboardInterrupt:
            _fail(ctx, InterruptedRunError(), "interrupted")
        except BrokenPipeError:
            if _reader_is_gone(sys.stdout) or _reader_is_gone(sys.stderr):
                raise  # `nasdeploy … | head`: click ends it quietly
            _report_bug(ctx)
        except Exception:
            _report_bug(ctx)


def _fail(ctx: click.Context, error: NasdeployError, message: str) -> None:
    click.echo(f"error: {message}", err=True)
    ctx.exit(error.exit_code)


def _report_bug(ctx: click.Context) -> None:
    click.echo(
        "error: this is a bug in nasdeploy; please report it with the command and the lines below", err=True
    )
    click.echo(traceback.format_exc(), err=True, nl=False)
    ctx.exit(NasdeployError.exit_code)


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether ``stream`` is a pipe that nobody reads any more."""
    try:
        descriptor = stream.fileno()
    except OSError:  # no file: a test's or an embedding program's own stream
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM (a scheduler, a container) as Ctrl-C, so that both end a run in the same way."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from nasdeploy import __version__

    click.echo(f"nasdeploy {__version__}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    name="nasdeploy",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """One architecture search, one certified ONNX file per device.

    Results go to standard output, progress to standard error; --json prints a result for programs.
    """
