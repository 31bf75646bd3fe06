"""The live display: a bar for the phase, and a table of what its last step said of each profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from nasdeploy.cli.output import NOTHING
from nasdeploy.cli.progress import by_owner, shown_values
from nasdeploy.progress import Value

# Twice a second: the display must not take time from what is being measured.
REFRESH_PER_SECOND = 2.0


class _PhaseProgress(Progress):
    """A progress bar with a table below it."""

    values: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, then the table."""
        yield self.make_tasks_table(self.tasks)
        if self.values is not None:
            yield self.values


class LiveDisplay:
    """An observer for a terminal, to be used in a ``with`` statement. console: standard error by default."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = _PhaseProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=console or Console(stderr=True),
            refresh_per_second=REFRESH_PER_SECOND,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()
        self._progress.stop()

    def start(self, phase: str, total: int | None = None) -> None:
        """Show a new bar in the place of the last one."""
        self._clear()
        self._task = self._progress.add_task(phase, total=total, values="")

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        """Move the bar and show the values."""
        if self._task is None:
            return
        common, by_profile = by_owner(values, everything=False)
        text = ", ".join(f"{name} {value}" for name, value in common.items())
        self._progress.update(self._task, completed=step, values=text)
        self._progress.values = _profile_table(by_profile) if by_profile else None

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        """Replace the bar by a line that stays."""
        self._clear()
        self._print(", ".join([f"{phase}: done", *shown_values(values, everything=True)]))

    def note(self, message: str) -> None:
        """Print the message above the bar."""
        self._print(message)

    def _print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def _clear(self) -> None:
        self._progress.values = None
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None


def _profile_table(by_profile: Mapping[str, Mapping[str, str]]) -> Table:
    names = list(dict.fromkeys(name for row in by_profile.values() for name in row))
    table = Table("profile", *names, box=None, pad_edge=False)
    for profile, row in by_profile.items():
        table.add_row(profile, *(row.get(name, NOTHING) for name in names))
    return table
