"""Progress on standard error: a live display on a terminal, lines now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import click

from nasdeploy.cli.output import duration, kept_clean, percent, quantity
from nasdeploy.progress import Observer, Several, Silent, Value

LINE_INTERVAL_S = 10.0
VERBOSE_INTERVAL_S = 1.0

QUANTITIES = ("latency", "flops", "params", "file_size", "peak_memory")
SHOWN_BY_PROFILE = ("ess", *QUANTITIES)
"""Of what a step tells about each profile; the rest is shown with -v only."""

REPEATED = ("phase", "step", "seconds")
"""What a line says already."""


@contextmanager
def observing(*, verbose: bool, quiet: bool) -> Iterator[Observer]:
    """Yield the observer for -v, -q and the kind of stderr; standard output is kept for the result."""
    if verbose and quiet:
        raise click.UsageError("-v and -q exclude each other; give one of them")
    with kept_clean():
        if quiet:
            yield Silent()
        elif not sys.stderr.isatty():
            yield Lines(write_line, verbose=verbose)
        else:
            from nasdeploy.cli.display import LiveDisplay

            with LiveDisplay() as display:
                # The live display keeps lines that are written to stderr above itself.
                yield Several(display, StepLines(write_line, verbose=True)) if verbose else display


def write_line(line: str) -> None:
    """Write a line to stderr."""
    click.echo(line, err=True)


class StepLines:
    """At most one line per interval, about the last step; nothing at the borders of a phase.

    verbose: all values and a short interval. clock: seconds.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._verbose = verbose
        self._interval_s = VERBOSE_INTERVAL_S if verbose else LINE_INTERVAL_S
        self._clock = clock
        self._total: int | None = None
        self._started = self._last_line = clock()
        self._first_step: int | None = None

    def start(self, phase: str, total: int | None = None) -> None:
        """Begin to count."""
        self._total = total
        self._first_step = None
        self._started = self._last_line = self._clock()

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        """Write a line if the last one is old enough."""
        now = self._clock()
        if self._first_step is None:
            self._first_step = step - 1  # a resumed phase does not start at 0
        if now - self._last_line < self._interval_s:
            return
        self._last_line = now
        count = f"{step}/{self._total}" if self._total else str(step)
        parts = [
            f"{phase}: {count}",
            *self._time_left(step, now),
            *shown_values(values, everything=self._verbose),
        ]
        self._write(", ".join(parts))

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        """Write nothing."""

    def note(self, message: str) -> None:
        """Write nothing."""

    def seconds(self) -> float:
        """Return how long the phase has taken."""
        return self._clock() - self._started

    def _time_left(self, step: int, now: float) -> list[str]:
        done = step - (self._first_step or 0)
        if not self._total or done <= 0:
            return []
        return [f"{duration((now - self._started) / done * (self._total - step))} left"]


class Lines(StepLines):
    """For a log: a line when a phase starts and when it ends, and now and then one between."""

    def start(self, phase: str, total: int | None = None) -> None:
        """Write that the phase begins."""
        super().start(phase, total)
        self._write(f"{phase}: started" + (f", {total} steps" if total else ""))

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        """Write that the phase is done, how long it took, and its values."""
        self._write(
            ", ".join(
                [f"{phase}: done in {duration(self.seconds())}", *shown_values(values, everything=True)]
            )
        )

    def note(self, message: str) -> None:
        """Write the message."""
        self._write(message)


def shown_values(values: Mapping[str, Value], *, everything: bool) -> list[str]:
    """Return "loss 1.234" for each plain value and "cpu-tight: ess 3.1, latency 0.4ms" for each profile.

    everything: also the values by profile that only a close look needs.
    """
    common, by_profile = by_owner(values, everything=everything)
    parts = [f"{name} {text}" for name, text in common.items()]
    for profile, row in by_profile.items():
        parts.append(f"{profile}: " + " ".join(f"{name} {text}" for name, text in row.items()))
    return parts


def by_owner(
    values: Mapping[str, Value], *, everything: bool
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return {name: text} of the whole step, and {profile: {name: text}} of keys "<name>.<profile>"."""
    common: dict[str, str] = {}
    by_profile: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        if value == "":  # a column that this step leaves open
            continue
        name, dot, profile = key.partition(".")
        if not dot and name not in REPEATED:
            common[name] = value_text(name, value)
        elif dot and (everything or name in SHOWN_BY_PROFILE):
            by_profile.setdefault(profile, {})[name] = value_text(name, value)
    return common, by_profile


def value_text(name: str, value: Value) -> str:
    """Return a value with its unit where its name tells it."""
    if isinstance(value, str):
        return value
    if name in QUANTITIES:
        return quantity(value, name)
    if name.endswith("accuracy"):
        return percent(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
