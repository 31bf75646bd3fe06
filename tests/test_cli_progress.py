"""Progress on a terminal and in a log."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from nasdeploy.cli.display import LiveDisplay
from nasdeploy.cli.output import duration, percent, plain, quantity, text_table
from nasdeploy.cli.progress import Lines, StepLines, observing, shown_values
from nasdeploy.progress import Several, Silent

STEP = {
    "step": 7,
    "phase": "search",
    "seconds": 3.5,
    "loss": 1.23456,
    "ess.v1.2": 3.14159,
    "latency.v1.2": 0.42,
    "flops.v1.2": 2_000_000.0,
    "entropy.v1.2": 12.0,
    "stepped.v1.2": "",
}


class Clock:
    """A clock that tests turn by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


def advance_each_second(observer: StepLines, clock: Clock, steps: range) -> None:
    for step in steps:
        clock.now += 1.0
        observer.advance("search", step, STEP)


def test_a_log_gets_a_line_at_the_borders_of_a_phase(log: list[str], clock: Clock):
    lines = Lines(log.append, clock=clock)
    lines.start("search", 40)
    clock.now = 65.0
    lines.finish("search", {"loss": 0.5, "validation accuracy": 0.8712})
    lines.start("certify")
    lines.note("noisy")
    assert log == [
        "search: started, 40 steps",
        "search: done in 1 min 05 s, loss 0.5, validation accuracy 87.12 %",
        "certify: started",
        "noisy",
    ]


def test_a_log_gets_at_most_one_line_in_ten_seconds(log: list[str], clock: Clock):
    lines = Lines(log.append, clock=clock)
    lines.start("search", 40)
    advance_each_second(lines, clock, range(1, 26))
    assert log[1:] == [
        f"search: {step}/40, {40 - step} s left, loss 1.235, v1.2: ess 3.142 latency 420us flops 2M"
        for step in (10, 20)
    ]


def test_verbose_log_gets_every_value_once_a_second(log: list[str], clock: Clock):
    lines = Lines(log.append, verbose=True, clock=clock)
    lines.start("search", 40)
    clock.now = 0.5
    lines.advance("search", 1, STEP)
    advance_each_second(lines, clock, range(2, 4))
    assert len(log) == 3
    assert log[1].endswith("entropy 12")


def test_time_left_of_a_resumed_phase_counts_from_where_it_resumed(log: list[str], clock: Clock):
    lines = Lines(log.append, clock=clock)
    lines.start("search", 240)
    advance_each_second(lines, clock, range(201, 211))
    assert log[1].startswith("search: 210/240, 30 s left")


def test_phase_of_unknown_length_shows_no_time_left(log: list[str], clock: Clock):
    lines = Lines(log.append, clock=clock)
    lines.start("certify")
    advance_each_second(lines, clock, range(1, 11))
    assert log[1].startswith("search: 10, loss")


def test_step_lines_are_silent_at_the_borders(log: list[str], clock: Clock):
    lines = StepLines(log.append, clock=clock)
    lines.start("search", 2)
    lines.note("read by somebody else")
    lines.finish("search", {})
    assert log == []


def test_values_by_profile_stand_together():
    assert shown_values(STEP, everything=False) == ["loss 1.235", "v1.2: ess 3.142 latency 420us flops 2M"]


def display_text(play: Callable[[LiveDisplay], None]) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with LiveDisplay(console) as display:
        play(display)
    return stream.getvalue()


def test_live_display_shows_phase_bar_and_values():
    def play(display: LiveDisplay) -> None:
        display.start("search [bold]", 40)
        display.advance("search [bold]", 12, STEP)
        display._progress.refresh()

    text = display_text(play)
    assert "search [bold]" in text  # as it is, not as markup
    assert "12/40" in text
    assert "loss 1.235" in text
    assert "420us" in text
    assert "entropy" not in text


def test_live_display_keeps_a_line_of_each_finished_phase_and_note():
    def play(display: LiveDisplay) -> None:
        display.advance("unknown", 1, {})
        display.start("search", 40)
        display.note("a [note]")
        display.finish("search", {"loss": 0.5})

    text = display_text(play)
    assert "a [note]" in text
    assert "search: done, loss 0.5" in text


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("verbose", "quiet", "terminal", "kind"),
    [
        (False, False, True, LiveDisplay),
        (True, False, True, Several),
        (False, True, True, Silent),
        (False, False, False, Lines),
        (True, False, False, Lines),
        (False, True, False, Silent),
    ],
)
def test_observer_fits_options_and_stderr(
    verbose: bool, quiet: bool, terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch
):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    before = sys.stdout
    with observing(verbose=verbose, quiet=quiet) as observer:
        assert type(observer) is kind
        print("a library that prints")
        observer.start("search", 3)
        observer.note("a note")
    assert sys.stdout is before
    assert sys.stderr is stream
    assert "a library that prints" in stream.getvalue()
    assert stream.getvalue().count("a note") == (0 if quiet else 1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


def test_figures_that_do_not_exist_are_dashes():
    assert (percent(None), quantity(None, "params"), quantity(float("nan"), "latency")) == ("-", "-", "-")


def test_plain_data_holds_no_nan():
    assert plain({"a": (1.0, float("inf")), "b": None}) == {"a": [1.0, None], "b": None}


def test_columns_are_as_wide_as_their_widest_cell():
    assert text_table(("a", "b"), [("long", "x")]) == "a     b\nlong  x"
