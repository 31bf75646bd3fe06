"""Ctrl-C and SIGTERM that wait for the end of a step, so that its state can be stored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

GRACE_SECONDS = 3.0
"""How long a step may take to its end; then the state of the last checkpoint has to do."""


@dataclass
class StopRequest:
    """Whether the process was asked to stop."""

    requested: bool = False
    timers: list[threading.Timer] = field(default_factory=list)

    def answer(self) -> None:
        """The step has ended, and its state is being stored: nothing interrupts that but a second signal."""
        for timer in self.timers:
            timer.cancel()


@contextmanager
def stopping_between_steps() -> Iterator[StopRequest]:
    """Within this context the signals that would raise KeyboardInterrupt only set ``requested``.

    A loop asks it after every step, stores its state and raises KeyboardInterrupt. A second signal, or 3 seconds
    without an answer, raise it at once. Signals that Python does not handle stay as they are, and outside the main
    thread, where no handler can be set, all of them do.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    main = threading.get_ident()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        # a real signal again: it also ends a system call that waits
        timer = threading.Timer(GRACE_SECONDS, signal.pthread_kill, [main, number])
        timer.daemon = True
        stop.timers.append(timer)
        timer.start()

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        stop.answer()
        for number, handler in previous.items():
            signal.signal(number, handler)
