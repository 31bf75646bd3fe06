"""How long work tells what it is doing: the caller passes an observer; the mathematics never prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Value = str | int | float


class Observer(Protocol):
    """Told of every phase; implementations show progress or write it down."""

    def start(self, phase: str, total: int | None = None) -> None:
        """``phase`` begins; it has ``total`` steps where that is known."""

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        """``step`` steps of ``phase`` are done; ``values`` describe the last one."""

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        """``phase`` is done and its result is stored."""

    def note(self, message: str) -> None:
        """Something a person should read."""


class Silent:
    """An observer that ignores everything."""

    def start(self, phase: str, total: int | None = None) -> None:
        """Ignore it."""

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        """Ignore it."""

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        """Ignore it."""

    def note(self, message: str) -> None:
        """Ignore it."""


class Several:
    """Passes everything on to several observers."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def start(self, phase: str, total: int | None = None) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.start(phase, total)

    def advance(self, phase: str, step: int, values: Mapping[str, Value]) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.advance(phase, step, values)

    def finish(self, phase: str, values: Mapping[str, Value]) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.finish(phase, values)

    def note(self, message: str) -> None:
        """Pass it on."""
        for observer in self._observers:
            observer.note(message)
