"""Which decisions matter, and which of their candidates lose least: main effects of a model of the loss.

The mean effect of a candidate is what the modelled loss changes by where an architecture takes it, other decisions as
they are, averaged over architectures (the main effect of an analysis of variance; a partial dependence in Friedman,
*Greedy Function Approximation*, Annals of Statistics 29, 2001, section 8.2). Operation importance weights
(:mod:`nasdeploy.optim.operation_importance`) are normalised within each decision; effects are in units of the loss, so
that decisions can be compared.

Notation: M architectures, D decisions, C = the largest number of candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.gaussian_process import Posterior

NUM_ARCHITECTURES = 32
"""Effects are means over so many architectures, and over all where there are fewer."""


class LossModel(Protocol):
    """What effects are computed from: any fitted model of the loss."""

    def predict(self, choices: IntArray) -> FloatArray:
        """Return the modelled losses (n,) of ``choices`` (n, D)."""
        ...

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean and covariance of the losses of ``choices`` (n, D)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MainEffects:
    """Effects (D, C) in units of the loss, NaN where there is no candidate; the allowed ones of a decision sum to 0.

    errors: (D,) standard error of the range of a decision by the model, NaN where the model does not tell how the
    errors of two architectures depend on each other. num_architectures: M, which were averaged over.
    """

    effects: FloatArray
    errors: FloatArray
    num_architectures: int

    @property
    def ranges(self) -> FloatArray:
        """(D,) how much the loss depends on each decision: largest less smallest effect."""
        ranges: FloatArray = np.nanmax(self.effects, axis=1) - np.nanmin(self.effects, axis=1)
        return ranges


def main_effects(model: LossModel, evaluated: IntArray, mask: BoolArray) -> MainEffects:
    """Return the effects of all candidates that ``mask`` (D, C) allows, averaged over some of ``evaluated`` (N, D).

    Networks that were evaluated are where the model knows most. Raises ValueError without one.
    """
    if len(evaluated) == 0:
        raise ValueError("main effects: no architectures to average over; expected at least 1")
    bases = evaluated[_spread(len(evaluated))]  # (M, D)
    effects = np.full(mask.shape, np.nan)
    errors = np.full(len(mask), np.nan)
    tells_errors = True
    for d, allowed in enumerate(mask):
        candidates = np.flatnonzero(allowed)
        variants = _variants(bases, d, candidates)  # (C_d, M, D)
        losses = model.predict(variants.reshape(-1, len(mask))).reshape(len(candidates), -1).mean(axis=1)
        effects[d, candidates] = losses - losses.mean()
        order = np.argsort(losses, kind="stable")
        if len(candidates) == 1:
            errors[d] = 0.0
        elif tells_errors:
            errors[d] = _range_error(model, variants[order[[0, -1]]])
            tells_errors = not np.isnan(errors[d])
    return MainEffects(effects=effects, errors=errors, num_architectures=len(bases))


def _spread(count: int) -> IntArray:
    """Return at most NUM_ARCHITECTURES places below ``count``, from the first to the last at even distances."""
    num = min(count, NUM_ARCHITECTURES)
    return np.round(np.linspace(0, count - 1, num)).astype(np.int64)


def _variants(bases: IntArray, d: int, candidates: IntArray) -> IntArray:
    """Return ``bases`` (M, D) with each of ``candidates`` (C_d,) in decision ``d``: (C_d, M, D)."""
    variants = np.repeat(bases[None], len(candidates), axis=0)
    variants[:, :, d] = candidates[:, None]
    return variants


def _range_error(model: LossModel, ends: IntArray) -> float:
    """Return the standard error of the difference between the means of two times M architectures (2, M, D)."""
    covariance = model.posterior(ends.reshape(-1, ends.shape[2])).covariance
    if np.count_nonzero(covariance) <= len(covariance):
        return float("nan")  # diagonal: how errors depend on each other is not known
    weights = np.repeat([1.0, -1.0], ends.shape[1]) / ends.shape[1]
    return float(np.sqrt(max(weights @ covariance @ weights, 0.0)))
