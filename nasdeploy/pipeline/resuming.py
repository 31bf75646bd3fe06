"""Loops that are stored every few seconds, and continue bit by bit after a kill at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nasdeploy.checkpoints import load_checkpoint, save_checkpoint
from nasdeploy.interruption import stopping_between_steps

CHECKPOINT_SECONDS = 5.0
"""What a kill costs at most, beside the start of the program."""

MAX_SAVING_SHARE = 0.02
"""Of the time; where storing the state takes long, it is stored more rarely."""

Step = TypeVar("Step", covariant=True)


class Loop(Protocol[Step]):
    """Training that can be stored between any two of its ``num_steps`` steps."""

    num_done: int
    num_steps: int

    def step(self) -> Step:
        """Do one step."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the steps to come depend on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""


class Checkpoint:
    """The stored state of one loop. owner: what the state belongs to; that of another owner is not taken."""

    def __init__(self, path: Path, *, schema: str, owner: str) -> None:
        self._path, self._schema, self._owner = path, schema, owner
        self._interval = CHECKPOINT_SECONDS
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time to store the state again."""
        return time.monotonic() - self._last >= self._interval

    def save(self, state: Mapping[str, Any]) -> None:
        """Store ``state``, whole or not at all."""
        started = time.monotonic()
        save_checkpoint(self._path, {"owner": self._owner, **state}, schema=self._schema)
        self._last = time.monotonic()
        self._interval = max(CHECKPOINT_SECONDS, (self._last - started) / MAX_SAVING_SHARE)

    def load(self) -> dict[str, Any] | None:
        """Return what was stored for this owner, or None. Raises RunFolderError for a damaged file."""
        if not self._path.exists():
            return None
        state = load_checkpoint(self._path, schema=self._schema)
        return state if state.pop("owner") == self._owner else None

    def discard(self) -> None:
        """Delete the state: what the loop led to is stored."""
        self._path.unlink(missing_ok=True)


def carry_out(
    loop: Loop[Step],
    checkpoint: Checkpoint,
    *,
    after_step: Callable[[Step], None],
    before_save: Callable[[], None] = lambda: None,
) -> float:
    """Carry ``loop`` out to its last step, from where the checkpoint stands; return the seconds of all its steps.

    before_save: stores what belongs to the steps so far elsewhere. Ctrl-C and SIGTERM store the state after the step
    and raise KeyboardInterrupt.
    """
    seconds = 0.0
    stored = checkpoint.load()
    if stored is not None:
        loop.load_state_dict(stored["loop"])
        seconds = float(stored["seconds"])
    started = time.perf_counter()

    def save() -> None:
        before_save()
        elapsed = seconds + time.perf_counter() - started
        checkpoint.save({"loop": loop.state_dict(), "seconds": elapsed})

    with stopping_between_steps() as stop:
        while loop.num_done < loop.num_steps:
            after_step(loop.step())
            if checkpoint.due and not stop.requested:
                save()
            if stop.requested:  # perhaps while the state was stored
                stop.answer()
                save()
                raise KeyboardInterrupt
    return seconds + time.perf_counter() - started
