"""A device that cannot be reached from here: packs are carried there, and results back.

What measures asks a :class:`~nasdeploy.costs.sessions.Device` as anywhere. Here it gets the answers that came back,
each to exactly its request; :func:`packed` finds out what it would ask, so that this can be written as a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nasdeploy.costs.packs import Pack, PackResult
from nasdeploy.costs.sessions import Answers, Device, Progress, Request
from nasdeploy.errors import ConfigError

__all__ = ["ByHandDevice", "NotMeasuredError", "packed"]


class NotMeasuredError(ConfigError):
    """The device has not been asked this yet. pack: what it should be asked."""

    def __init__(self, message: str, pack: Pack) -> None:
        super().__init__(message)
        self.pack = pack


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHandDevice:
    """A device that has answered what is in ``results``. remedy: what to do where that is not enough."""

    name: str
    remedy: str
    results: tuple[PackResult, ...] = ()

    def carry_out(self, requests: Sequence[Request], *, progress: Progress | None = None) -> Answers:
        """Return the stored answers to ``requests``. Raises NotMeasuredError where there are none."""
        for result in self.results:
            if (answers := result.answers_to(requests)) is not None:
                if progress:
                    progress(1.0)
                return answers
        pack = Pack()
        pack.add(requests)
        raise NotMeasuredError(f"{self.name}: cannot be measured from here; {self.remedy}", pack)


def packed(*measurements: Callable[[Device], object]) -> Pack:
    """Return the pack of all that ``measurements`` ask their device first, one after the other."""
    pack = Pack()
    for measure in measurements:
        try:
            measure(ByHandDevice(name="a pack", remedy=""))
        except NotMeasuredError as error:
            pack.join(error.pack)
    return pack
