"""Local search over architectures: single changes and double ones until neither improves. Pure NumPy.

Notation: n architectures, D decisions, C_d candidates of decision d, S single changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nasdeploy.spaces.base import FloatArray, IntArray

Values = Callable[[IntArray], FloatArray]
"""Values (n,) of architectures (n, D)."""

MAX_PAIRS = 4096
"""Changes of two decisions that are tried at once; a larger space has more, of which so many are drawn."""

NUM_STARTS = 4
NUM_RANDOM = 256


class Moves:
    """All changes of one decision and of two, among allowed candidates. allowed: D arrays of candidates."""

    def __init__(self, allowed: Sequence[IntArray]) -> None:
        self._decisions = np.repeat(np.arange(len(allowed)), [len(row) for row in allowed])  # (S,)
        self._candidates = np.concatenate([np.empty(0, dtype=np.int64), *allowed]).astype(np.int64)  # (S,)
        self._rng = np.random.default_rng(0)

    def single(self, choices: IntArray) -> IntArray:
        """Return ``choices`` (D,) with one decision changed: (S, D), itself among them."""
        changes = np.arange(len(self._decisions))
        return self._changed(choices, changes[:, None])

    def double(self, choices: IntArray) -> IntArray:
        """Return ``choices`` (D,) with two decisions changed: all of them, or MAX_PAIRS drawn ones."""
        count = len(self._decisions)
        if count * (count - 1) // 2 <= MAX_PAIRS:
            pairs = np.stack(np.triu_indices(count, k=1), axis=1)
        else:
            pairs = self._rng.integers(count, size=(MAX_PAIRS, 2))
        return self._changed(choices, pairs)

    def _changed(self, choices: IntArray, changes: IntArray) -> IntArray:
        """Return ``choices`` after each row of ``changes`` (n, moves), its moves one after the other."""
        changed = np.tile(choices, (len(changes), 1))
        rows = np.arange(len(changes))
        for column in changes.T:
            changed[rows, self._decisions[column]] = self._candidates[column]
        return changed


def descend(
    values: Values, start: IntArray, moves: Moves, *, target: float = -np.inf
) -> tuple[IntArray, float]:
    """Return what no single change and none of the double ones tried improves, from ``start`` (D,), and its value.

    Stops at a value of ``target`` or less.
    """
    best, least = start, float(values(start[None])[0])
    while least > target:
        for changed in (moves.single, moves.double):
            found = changed(best)
            value = values(found)
            if len(found) and value.min() < least:
                best, least = found[value.argmin()], float(value.min())
                break
        else:
            break
    return best, least


def starts(values: Values, allowed: Sequence[IntArray]) -> IntArray:
    """Return where local searches begin: the first, the last and the best of random architectures, (n, D)."""
    rng = np.random.default_rng(0)
    ends = np.array([[row[end] for row in allowed] for end in (0, -1)])
    drawn = np.stack([rng.choice(row, size=NUM_RANDOM) for row in allowed], axis=1)
    best = np.argsort(values(drawn), kind="stable")[:NUM_STARTS]
    return np.concatenate([ends, drawn[best]])
