"""What a network's memory follows from: a linear law in a few sizes, fitted to measured networks.

M = constant + Σ over terms of coefficient · size. The constant is what the runtime needs for any file. Weights always
count; each further term only where it predicts networks left out of the fit better than without it. All but one of the
sizes are sums over layers. The exception is the working set, of which a network needs its largest: a table over the
decisions of the layers that can have it. (In a graph, values that wait for a later reader are left to the other terms.)

Absolute errors are minimised: a cap is a number of bytes, the constant is most of a small network's memory, and the
noise (pages, the allocator) does not grow with what a file needs. (The relative fit is no better on unseen networks.)

Notation: n networks, F terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt

from nasdeploy.costs.calibration import rank_correlation
from nasdeploy.costs.derived import Extension
from nasdeploy.costs.graphs import weight_shapes
from nasdeploy.costs.table import CostTable, Factor, tabulate
from nasdeploy.spaces.base import CLASSIFIERS, LayerSlot, LayerSpec, SearchSpace

__all__ = ["MemoryAccuracy", "MemoryLaw", "assess_left_out", "fit_law", "left_out_predictions", "term_tables"]

FloatArray = npt.NDArray[np.float64]

VALUE_BYTES = 4  # of float32; in another precision the coefficients take up the difference
# A term must lower the error on left-out networks by this share: with some twenty networks chance makes 5 %.
WORTHWHILE_GAIN = 0.1
NO_ERROR = 1.0  # byte
MAX_ENTRIES = 20_000
"""Of the table of working sets: no more slots are looked at once it would be larger."""

REQUIRED_TERM = "weights"


def weight_bytes(spec: LayerSpec) -> float:
    """Return the size of a layer's weights."""
    return float(VALUE_BYTES * sum(map(prod, weight_shapes(spec).values())))


def activation_bytes(spec: LayerSpec) -> float:
    """Return the size of what a layer takes and gives for one image, values inside the layer included."""
    return float(VALUE_BYTES * sum(_values(spec)))


def working_set_bytes(spec: LayerSpec) -> float:
    """Return the most that a layer holds at one time for one image.

    An operator needs its input and its output; within an inverted residual block the input of the block waits for
    the addition.
    """
    values = _values(spec)
    waiting = values[0] if spec.kind == "inverted_residual" and spec.has_residual else 0
    first, *later = (before + after for before, after in pairwise(values))
    return float(VALUE_BYTES * max([first, *(held + waiting for held in later)]))


def _values(spec: LayerSpec) -> list[int]:
    """Return how many values stand before, inside and behind a layer."""
    taken = spec.value_channels * spec.num_inputs * spec.size**2
    given = spec.out_channels * (1 if spec.kind in CLASSIFIERS else spec.out_size**2)
    inner: dict[str, list[int]] = {
        "inverted_residual": [spec.hidden_channels * spec.size**2, spec.hidden_channels * spec.out_size**2],
        "join": [taken],
        "join_classifier": [taken],
        "separable": [taken, spec.in_channels * spec.out_size**2],
    }
    return [taken, *inner.get(spec.kind, []), given]


SUMS: dict[str, Callable[[LayerSpec], float]] = {
    REQUIRED_TERM: weight_bytes,
    "layers": lambda spec: 1.0,
    "activations": activation_bytes,
}
"""What a layer contributes to each term that is a sum."""


def term_tables(space: SearchSpace) -> dict[str, CostTable]:
    """Return every term as a table, by its name."""
    sums = {term: tabulate(space, size_of) for term, size_of in SUMS.items()}
    return {**sums, "working_set": _largest_working_set(space)}


def _largest_working_set(space: SearchSpace) -> CostTable:
    """Return the largest working set of a network: one table over the slots that can hold it.

    Slots join in the order of what they can need at most, as long as the table keeps to MAX_ENTRIES; those left out
    are those that the largest one is rarely found in. So are those that no factor can hold together with the others,
    since one depends on a derived value and the other on a decision behind it.
    """
    num_candidates = space.num_values()
    behind = [{d} for d in range(len(space.decisions))] + [set(one.decisions) for one in space.derived]
    decisions: tuple[int, ...] = ()
    chosen: list[LayerSlot] = []
    for slot in sorted(space.slots, key=lambda slot: -_slot_values(slot, num_candidates).max()):
        joined = tuple(sorted({*decisions, *slot.decisions}))
        scopes = [behind[d] for d in joined]
        if sum(map(len, scopes)) != len(set().union(*scopes)):
            continue
        if chosen and prod(num_candidates[d] for d in joined) > MAX_ENTRIES:
            break
        chosen.append(slot)
        decisions = joined
    largest = np.zeros([num_candidates[d] for d in decisions])
    for slot in chosen:
        values = _slot_values(slot, num_candidates).transpose(np.argsort(slot.decisions))
        missing = tuple(axis for axis, d in enumerate(decisions) if d not in slot.decisions)
        largest = np.maximum(largest, np.expand_dims(values, missing))
    return CostTable((Factor(decisions, largest),), extension=Extension.of_space(space))


def _slot_values(slot: LayerSlot, num_candidates: Sequence[int]) -> FloatArray:
    """Return the working sets of a slot, an axis for each of its decisions; 0 where it is skipped."""
    values = np.zeros([num_candidates[d] for d in slot.decisions])
    for choice, layer in slot.layers.items():
        values[choice] = 0.0 if layer is None else working_set_bytes(layer)
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLaw:
    """``constant_bytes`` and the coefficient of each term, in bytes for one unit of the term."""

    constant_bytes: float
    coefficients: Mapping[str, float]

    def of(self, features: Mapping[str, FloatArray]) -> FloatArray:
        """Return the bytes (n,) of networks with these ``features``, each (n,)."""
        total: FloatArray = self.constant_bytes + sum(
            (c * features[term] for term, c in self.coefficients.items()), np.zeros(1)
        )
        return total

    def table(self, tables: Mapping[str, CostTable]) -> CostTable:
        """Return the law as a table; ``tables``: those of the terms."""
        total = CostTable((), self.constant_bytes)
        for term, coefficient in self.coefficients.items():
            total = total.plus(tables[term].scaled(0.0, coefficient))
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccuracy:
    """How well the law predicts networks left out of its fit, terms and all; errors in bytes.

    quantile90_bytes: 90 % of the networks have a smaller one: the margin for a selection.
    """

    mean_bytes: float
    quantile90_bytes: float
    max_bytes: float
    spearman: float


def fit_law(features: Mapping[str, FloatArray], sizes: FloatArray) -> MemoryLaw:
    """Return the law with the least squared error on networks with ``features``, each (n,), and ``sizes`` (n,)."""
    # A term without variation is the constant once more; two coefficients and one row to spare need four networks.
    varying = [term for term in features if np.ptp(features[term]) > 0.0]
    chosen = [term for term in varying if term == REQUIRED_TERM]
    error = _left_out_error([features[term] for term in chosen], sizes)
    while error > NO_ERROR and len(chosen) + 3 <= len(sizes):
        trials = {
            term: _left_out_error([features[t] for t in [*chosen, term]], sizes)
            for term in varying
            if term not in chosen
        }
        best = min(trials, key=trials.__getitem__, default=None)
        if best is None or trials[best] > (1.0 - WORTHWHILE_GAIN) * error:
            break
        chosen.append(best)
        error = trials[best]
    constant, *coefficients = _solve(*_scaled([features[term] for term in chosen], len(sizes)), sizes)
    return MemoryLaw(
        constant_bytes=float(constant),
        coefficients={term: float(c) for term, c in zip(chosen, coefficients, strict=True)},
    )


def left_out_predictions(features: Mapping[str, FloatArray], sizes: FloatArray) -> FloatArray:
    """Return what each network (n,) is predicted from the others alone: terms chosen and fitted without it."""
    found = []
    for i in range(len(sizes)):
        law = fit_law({term: np.delete(values, i) for term, values in features.items()}, np.delete(sizes, i))
        found.append(law.of({term: values[i : i + 1] for term, values in features.items()})[0])
    return np.array(found)


def assess_left_out(predicted: FloatArray, measured: FloatArray) -> MemoryAccuracy:
    """Compare predictions (n,) of networks that were left out with their sizes (n,)."""
    errors = np.abs(predicted - measured)
    return MemoryAccuracy(
        mean_bytes=float(errors.mean()),
        quantile90_bytes=float(np.quantile(errors, 0.9)),
        max_bytes=float(errors.max()),
        spearman=rank_correlation(predicted, measured),
    )


def _scaled(features: Sequence[FloatArray], count: int) -> tuple[FloatArray, FloatArray]:
    """Return the matrix (n, 1 + F) with columns of like size, and the factors (1 + F,) that made them so."""
    columns = np.stack([np.ones(count), *features], axis=1)
    factors = 1.0 / np.abs(columns).max(axis=0)
    return columns * factors, factors


def _solve(matrix: FloatArray, factors: FloatArray, sizes: FloatArray) -> FloatArray:
    solution: FloatArray = factors * np.linalg.lstsq(matrix, sizes, rcond=None)[0]
    return solution


def _left_out_error(features: Sequence[FloatArray], sizes: FloatArray) -> float:
    """Return the root mean square error on each network when it is left out of the fit.

    residual / (1 - leverage): exact for least squares, without n fits.
    """
    matrix, factors = _scaled(features, len(sizes))
    q, _ = np.linalg.qr(matrix)
    residuals = (matrix / factors) @ _solve(matrix, factors, sizes) - sizes
    leverage = np.minimum((q**2).sum(axis=1), 1.0 - 1e-9)
    return float(np.sqrt(np.mean((residuals / (1.0 - leverage)) ** 2)))
