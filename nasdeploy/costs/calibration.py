"""From times of single layers to times of networks: a linear correction that is fitted on measured networks.

A layer alone converts its input to the runtime's layout, a layer in a network finds it there; so
T = constant + Σ over layers of (slope · table + further terms), each further term only where it predicts
networks left out of the fit better than without it. (That of the image always, where images differ in size.)

Notation: n networks, F terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nasdeploy.spaces.base import LayerSpec

__all__ = ["TERMS", "Accuracy", "Calibration", "assess", "fit", "line_through", "rank_correlation"]

FloatArray = npt.NDArray[np.float64]

TERMS: dict[str, Callable[[LayerSpec, float], float]] = {
    "table": lambda spec, ms: ms,
    "layers": lambda spec, ms: 1.0,
    "residuals": lambda spec, ms: float(spec.kind == "inverted_residual" and spec.has_residual),
    "pixels": lambda spec, ms: spec.in_channels * spec.size**2 / 1e4,
    # Alone they run in the layout of the images; and two that read the same value are computed once.
    "pools": lambda spec, ms: ms if spec.kind in ("max_pool", "avg_pool") else 0.0,
    # The normalisation in front of the first layer: part of the constant where all images have one size.
    "image": lambda spec, ms: spec.in_channels * spec.size**2 / 1e4 if spec.kind == "stem" else 0.0,
}
"""What a layer contributes to each term, from its specification and its time alone in ms."""

REQUIRED_TERMS = ("table", "image")
NO_ERROR = 1e-9
WORTHWHILE_GAIN = 0.05  # a term must lower the error on left-out networks by this share


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """``constant_ms`` and the coefficient of each term, in ms."""

    constant_ms: float
    coefficients: Mapping[str, float]

    def layer_ms(self, spec: LayerSpec, table_ms: float) -> float:
        """Return what a layer costs inside a network, from its time alone."""
        return sum(c * TERMS[term](spec, table_ms) for term, c in self.coefficients.items())

    def network_ms(self, layers: Sequence[LayerSpec], table_ms: Mapping[LayerSpec, float]) -> float:
        """Return the predicted time of a network."""
        return self.constant_ms + sum(self.layer_ms(spec, table_ms[spec]) for spec in layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How well the table predicts networks that it was not fitted on; errors relative to the measured time.

    mape: mean error. quantile90: 90 % of the networks have a smaller one: the margin for a selection.
    flops_mape, flops_spearman: of FLOPs as the predictor, by a line through the networks of the calibration.
    ceiling, ceiling_spearman: of a second measurement of the same networks; no table can do better.
    """

    mape: float
    quantile90: float
    max_error: float
    spearman: float
    flops_mape: float
    flops_spearman: float
    ceiling: float
    ceiling_spearman: float
    num_calibration: int
    num_held_out: int


def fit(
    networks: Sequence[Sequence[LayerSpec]], times_ms: FloatArray, table_ms: Mapping[LayerSpec, float]
) -> Calibration:
    """Return the calibration with the least relative squared error on ``networks`` and their times (n,)."""
    features = {term: _feature(term, networks, table_ms) for term in TERMS}
    varying = [
        term for term in TERMS if np.ptp(features[term]) > 0.0
    ]  # the others are the constant once more
    chosen = [term for term in REQUIRED_TERMS if term in varying]
    error = _left_out_error([features[t] for t in chosen], times_ms)
    while error > NO_ERROR and (rest := [term for term in varying if term not in chosen]):
        trials = {term: _left_out_error([features[t] for t in [*chosen, term]], times_ms) for term in rest}
        best = min(trials, key=trials.__getitem__)
        if trials[best] > (1.0 - WORTHWHILE_GAIN) * error:
            break
        chosen.append(best)
        error = trials[best]
    constant, *coefficients = _solve(_weighted([features[t] for t in chosen], times_ms))
    return Calibration(
        constant_ms=float(constant),
        coefficients={term: float(c) for term, c in zip(chosen, coefficients, strict=True)},
    )


def line_through(predictor: FloatArray, times_ms: FloatArray) -> tuple[float, float]:
    """Return (a, b) of the line a + b · predictor with the least relative squared error on times (n,)."""
    unit = float(np.abs(predictor).max()) or 1.0  # FLOPs are millions, times fractions: solved near 1
    constant, slope = _solve(_weighted([predictor / unit], times_ms))
    return float(constant), float(slope) / unit


def assess(
    predicted_ms: FloatArray,
    measured_ms: FloatArray,
    *,
    again_ms: FloatArray,
    by_flops_ms: FloatArray,
    num_calibration: int,
) -> Accuracy:
    """Compare predictions (n,) with measurements (n,); beside them a second measurement, and what FLOPs predict."""
    errors = _relative_errors(predicted_ms, measured_ms)
    return Accuracy(
        mape=float(errors.mean()),
        quantile90=float(np.quantile(errors, 0.9)),
        max_error=float(errors.max()),
        spearman=rank_correlation(predicted_ms, measured_ms),
        flops_mape=float(_relative_errors(by_flops_ms, measured_ms).mean()),
        flops_spearman=rank_correlation(by_flops_ms, measured_ms),
        ceiling=float(_relative_errors(again_ms, measured_ms).mean()),
        ceiling_spearman=rank_correlation(again_ms, measured_ms),
        num_calibration=num_calibration,
        num_held_out=len(errors),
    )


def _relative_errors(predicted: FloatArray, measured: FloatArray) -> FloatArray:
    errors: FloatArray = np.abs(predicted / measured - 1.0)
    return errors


def rank_correlation(a: FloatArray, b: FloatArray) -> float:
    """Return Spearman's rank correlation of two arrays (n,); ties get their mean rank.

    0 where one of them is constant: it orders nothing.
    """
    if np.ptp(a) == 0.0 or np.ptp(b) == 0.0:
        return 0.0
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2.0
    return np.asarray(mean_ranks[inverse], dtype=np.float64)


def _feature(
    term: str, networks: Sequence[Sequence[LayerSpec]], table_ms: Mapping[LayerSpec, float]
) -> FloatArray:
    return np.array([sum(TERMS[term](spec, table_ms[spec]) for spec in layers) for layers in networks])


def _weighted(features: Sequence[FloatArray], times_ms: FloatArray) -> FloatArray:
    """Return (n, 1 + F): rows divided by their time, so that a residual is a relative error."""
    weighted: FloatArray = np.stack([np.ones_like(times_ms), *features], axis=1) / times_ms[:, None]
    return weighted


def _solve(weighted: FloatArray) -> FloatArray:
    solution = np.linalg.lstsq(weighted, np.ones(len(weighted)), rcond=None)[0]
    return np.asarray(solution, dtype=np.float64)


def _left_out_error(features: Sequence[FloatArray], times_ms: FloatArray) -> float:
    """Return the root mean square of the relative error on each network when it is left out of the fit.

    residual / (1 - leverage): exact for least squares, without n fits.
    """
    weighted = _weighted(features, times_ms)
    q, _ = np.linalg.qr(weighted)
    residuals = weighted @ _solve(weighted) - 1.0
    leverage = np.minimum((q**2).sum(axis=1), 1.0 - 1e-9)
    return float(np.sqrt(np.mean((residuals / (1.0 - leverage)) ** 2)))
