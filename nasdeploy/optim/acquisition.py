"""Which architectures to evaluate next so that the answers of all profiles get better.

One evaluation serves every profile, since costs are known. What counts is by how much it can be expected to lower
Σ_k min_c f_k(c), with f_k = L + penalty by what is known then: the knowledge gradient for correlated beliefs (Frazier,
Powell, Dayanik 2009), summed over the profiles. With L ~ N(mean, covariance), an observation of c with noise σ² moves
the mean at every j by b_j(c) Z, Z ~ N(0, 1):

    b_j(c)  = covariance_jc / √(covariance_cc + σ²)
    gain(c) = Σ_k ( min_j f_kj - E_Z[min_j (f_kj + b_j(c) Z)] )

The expectation is taken by Gauss-Hermite quadrature, over c and the leading j of each profile. Architectures of one
batch are chosen one after the other, each as if those before it had been observed with the loss that is expected
(Ginsbourger, Le Riche, Carraro 2010, kriging believer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.features import CostFeatures
from nasdeploy.optim.gaussian_process import KNEE, MAX_SAMPLES, GaussianProcess, Posterior
from nasdeploy.optim.objective import Judge, Objective
from nasdeploy.optim.surrogate import StreamingSurrogate
from nasdeploy.spaces.base import CandidateMask

SAMPLES_PER_PARAMETER = 1
"""Before there are so many losses for each of the n_θ main effects, a model has nothing to propose by."""
OUTSIDE = 1e12
"""Added to violations: no f_k is as large."""
NUM_LEADING = 32
"""Of a profile, so many architectures are looked at that may become its best."""
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(11)
NODES = tuple(_NODES.tolist())
WEIGHTS = tuple((_WEIGHTS / _WEIGHTS.sum()).tolist())


class Proposer(Protocol):
    """Proposes architectures by a model of the loss; what it proposes is not a draw from any distribution."""

    def propose(self, count: int, rng: np.random.Generator) -> IntArray:
        """Return at most ``count`` architectures (m, D) to evaluate; fewer while too little is known."""
        ...

    def tell(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        """Learn the losses (n,) of ``choices`` (n, D), evaluated together at ``step``, proposed here or not."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next proposals depend on, as plain lists and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        ...


class UncertainModel(StreamingSurrogate, Protocol):
    """What proposals rest on: a model of the losses that learns step by step and knows how sure it is."""

    max_samples: int

    @property
    def num_samples(self) -> int:
        """How many samples are remembered."""
        ...

    @property
    def choices(self) -> IntArray:
        """(N, D) of what is remembered."""
        ...

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean (n,) and covariance (n, n) of the losses of ``choices`` (n, D)."""
        ...


class KnowledgeGradient:
    """A :class:`Proposer`: the architectures of the largest gain, by a Gaussian process of all losses.

    objectives, masks: of the K profiles, as for the optimiser. model: another one than :func:`loss_model`. owns_model:
    whether what is told is passed on to the model, and stored with its state; not where the optimiser's estimator does
    both already. num_elites: from how many architectures, for all profiles together, neighbours are looked at in a
    round. pool_size: how many architectures the gain is computed for. num_random: of them, how many are uniform ones.
    """

    def __init__(
        self,
        *,
        num_candidates: Sequence[int],
        objectives: Sequence[Objective],
        masks: Sequence[CandidateMask] | None = None,
        model: UncertainModel | None = None,
        owns_model: bool = True,
        num_elites: int = 24,
        num_rounds: int = 3,
        pool_size: int = 384,
        num_random: int = 128,
    ) -> None:
        self.model: UncertainModel = model or loss_model(num_candidates, objectives)
        self._owns_model = owns_model
        self._judge = Judge(objectives)
        self._masks = np.stack(
            [
                categorical.mask_array(num_candidates, masks[k] if masks else None)
                for k in range(len(objectives))
            ]
        )  # (K, D, C)
        self._union = np.logical_or.reduce(self._masks, axis=0)  # (D, C)
        needed = SAMPLES_PER_PARAMETER * (int(self._union.sum()) - len(self._union))
        # not more than a model still has that has just forgotten its oldest half
        self._num_needed = max(min(needed, self.model.max_samples // 4), 2)
        self._num_elites, self._num_rounds = num_elites, num_rounds
        self._pool_size, self._num_random = pool_size, num_random

    def tell(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        """Learn the losses (n,) of ``choices`` (n, D), evaluated together at ``step``."""
        if self._owns_model:
            self.model.observe(choices, losses, step)

    def propose(self, count: int, rng: np.random.Generator) -> IntArray:
        """Return ``count`` different architectures (count, D), in the order of choice; none before n_θ losses."""
        if self.model.num_samples < self._num_needed:
            return np.empty((0, self._union.shape[0]), dtype=np.int64)
        pool = self._pool(rng)
        if len(pool) == 0:  # nothing within the caps was met
            return pool
        posterior = self.model.posterior(pool)
        values = self._values(posterior.mean, pool)
        chosen: list[int] = []
        for _ in range(min(count, len(pool))):
            gain = _gain(values, posterior)
            # where nothing can get better any more, what is known least
            wanted = gain if gain.max() > 0.0 else posterior.variance
            wanted[chosen] = -np.inf  # a step evaluates on one batch of images: twice would show the same
            i = int(wanted.argmax())
            chosen.append(i)
            posterior.condition(i)
        return pool[chosen]

    def answers(self, rng: np.random.Generator, *, size: int = 1) -> list[IntArray]:
        """Return, for each profile, at most ``size`` feasible architectures (m, D) by their expected f_k, best first.

        They need not have been evaluated. An array is empty where no feasible one was met.
        """
        known, values = self._climb(rng)
        order = np.argsort(values, axis=1, kind="stable")[:, :size]
        return [known[row[np.isfinite(values[k, row])]] for k, row in enumerate(order)]

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next proposals depend on, as plain lists and numbers."""
        return {"model": self.model.state_dict() if self._owns_model else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        if self._owns_model:
            self.model.load_state_dict(state["model"])

    def _values(self, losses: FloatArray, choices: IntArray) -> FloatArray:
        """Return f_k (K, n) of ``choices`` (n, D) with ``losses`` (n,), infinite where k cannot have them."""
        judged = self._judge.judge(choices)
        allowed = np.equal(judged.violation, 0.0) & categorical.within(self._masks, choices)
        return np.where(allowed, losses + judged.penalty, np.inf)

    def _pool(self, rng: np.random.Generator) -> IntArray:
        """Return the architectures to choose from (m, D): the nearest to being the best of a profile, and others."""
        known, values = self._climb(rng)
        best = values.min(axis=1, keepdims=True)  # infinite where a profile has nothing feasible
        behind = np.where(np.isfinite(values), values - np.where(np.isfinite(best), best, 0.0), np.inf).min(
            axis=0
        )
        near = np.argsort(behind, kind="stable")[: self._pool_size - self._num_random]
        return np.unique(np.concatenate([known[near[np.isfinite(behind[near])]], self._random(rng)]), axis=0)

    def _random(self, rng: np.random.Generator) -> IntArray:
        """Return uniform architectures (m, D) that some profile can have, from at most eight times as many draws."""
        uniform = categorical.uniform(self._union)
        drawn = categorical.sample(np.broadcast_to(uniform, (8 * self._num_random, *uniform.shape)), rng)
        possible = np.isfinite(self._values(np.zeros(len(drawn)), drawn)).any(axis=0)
        return drawn[possible][: self._num_random]

    def _climb(self, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Return what was evaluated and, round by round, the neighbours of what is expected to be best.

        Architectures (m, D), each once, and their expected f_k (K, m), infinite where k cannot have them.
        """
        beam = max(1, self._num_elites // len(self._masks))
        known = np.unique(np.concatenate([self.model.choices, self._random(rng)]), axis=0)
        seen = {choices.tobytes() for choices in known}
        keys, values = self._keys(known)
        expanded: set[bytes] = set()
        for _ in range(self._num_rounds):
            leaders = np.unique(np.argsort(keys, axis=1, kind="stable")[:, :beam])
            fresh = [choices for choices in known[leaders] if choices.tobytes() not in expanded]
            if not fresh:
                break
            expanded.update(choices.tobytes() for choices in fresh)
            around = np.unique(
                np.concatenate([categorical.neighbours(choices, self._union) for choices in fresh]), axis=0
            )
            around = around[[choices.tobytes() not in seen for choices in around]]
            seen.update(choices.tobytes() for choices in around)
            more_keys, more_values = self._keys(around)
            known = np.concatenate([known, around])
            keys = np.concatenate([keys, more_keys], axis=1)
            values = np.concatenate([values, more_values], axis=1)
        return known, values

    def _keys(self, choices: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return what leads (K, n) of ``choices`` (n, D), and their expected f_k (K, n).

        Feasible ones lead by f_k, then the others by violation, so that a climb from outside the caps ends inside.
        """
        values = self._values(self.model.predict(choices), choices)
        violation = np.where(
            categorical.within(self._masks, choices), self._judge.judge(choices).violation, np.inf
        )
        return np.where(np.isfinite(values), values, OUTSIDE + violation), values


def loss_model(
    num_candidates: Sequence[int], objectives: Sequence[Objective], *, max_samples: int = MAX_SAMPLES
) -> GaussianProcess:
    """Return a model of the loss that knows what architectures cost, as ``objectives`` count it."""
    return GaussianProcess(
        num_candidates,
        features=CostFeatures(num_candidates, objectives),
        knee=knee_of(objectives),
        max_samples=max_samples,
    )


def knee_of(objectives: Sequence[Objective]) -> float:
    """Return from where on a model may compress losses, in standard deviations above the median.

    Under caps alone only the least losses matter. With prices, a cheap architecture may be best for a profile
    although its loss is high.
    """
    priced = any(weight > 0.0 for objective in objectives for weight in objective.coefficients.values())
    return KNEE if priced else 0.0


def _gain(values: FloatArray, posterior: Posterior) -> FloatArray:
    """Return the gain (m,) of one more observation of each architecture, from f_k ``values`` (K, m)."""
    moves = posterior.moves()  # b_j(c): (m of c, m of j)
    own = moves.diagonal()
    total = np.zeros(len(own))
    for row in values:
        leading = np.argsort(row, kind="stable")[:NUM_LEADING]
        leading = leading[np.isfinite(row[leading])]
        if len(leading) == 0:
            continue
        best = row[leading[0]]
        across = moves[:, leading]  # (m, J)
        for z, weight in zip(NODES, WEIGHTS, strict=True):
            found = np.minimum((row[leading] + z * across).min(axis=1), row + z * own)
            total += weight * (best - found)
    return total
