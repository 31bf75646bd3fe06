"""An evolutionary search on the modelled loss: mutation descends ψ, and explores what ψ says nothing about.

Li, Dong, Wang, Xu, *NAS via Proxy Validation*, TPAMI 2023. One stream of evaluations serves K profiles, since costs are
exact and ψ is shared: every architecture that was evaluated, for whichever profile, may be a parent of each whose caps
it keeps, by f_k = ψ + weighted costs. A mutation changes one decision. Of a parent c with gradient g at its one-hot,

    f_k(c with j in decision d)  ≈  ψ(c) + g[d, j] - g[d, c_d] + weighted costs of k, exactly

sorts the changes of all parents, ψ itself the best of them. After a few such generations on ψ alone that of the least
f_k - optimism · sd is proposed. Where several are about as good, it is one that was not evaluated, whose sd is larger.
But losses are noisy: of a population the least ψ is too low as a rule, and only a second look at a leader tells. With
leaders never looked at again, the regret on NAS-Bench-Macro was half as large again (tests/benchmarks/tabular.py).

A share of the proposals explores instead: candidate j of decision d is drawn in proportion to 1 - OIW[d, j], see
:mod:`nasdeploy.optim.operation_importance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.acquisition import OUTSIDE, SAMPLES_PER_PARAMETER
from nasdeploy.optim.objective import Judge, Objective
from nasdeploy.optim.streaming import StreamingPredictor
from nasdeploy.spaces.base import CandidateMask

NUM_LEADING = 16
"""Of what was evaluated and of what was not, so many are compared with their uncertainty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolutionConfig:
    """How proposals are bred.

    num_parents: of all profiles together, per generation; at least half of a profile's were evaluated. num_children: of
    a profile, so many changes per generation are looked at by ψ itself. num_generations: on ψ, before a proposal.
    optimism: by so many standard deviations of its loss an architecture may be better than expected. explore_share: of
    the proposals, on average, those that explore.
    """

    num_parents: int = 24
    num_children: int = 16
    num_generations: int = 3
    optimism: float = 0.5
    explore_share: float = 0.25


@dataclass(slots=True, kw_only=True, eq=False)
class _Population:
    """m architectures, each once. keys (K, m): the least leads; values (K, m): f_k, infinite where k cannot have it."""

    choices: IntArray
    keys: FloatArray
    values: FloatArray
    evaluated: categorical.BoolArray  # (m,)

    def joined(self, other: _Population) -> _Population:
        return _Population(
            choices=np.concatenate([self.choices, other.choices]),
            keys=np.concatenate([self.keys, other.keys], axis=1),
            values=np.concatenate([self.values, other.values], axis=1),
            evaluated=np.concatenate([self.evaluated, other.evaluated]),
        )

    def ranked(self, k: int) -> IntArray:
        """Return the indices (m,) of what profile ``k`` can have, the least f_k first."""
        order = np.argsort(self.values[k], kind="stable")
        ranked: IntArray = order[np.isfinite(self.values[k, order])]
        return ranked

    def leading(self, k: int, taken: set[bytes]) -> IntArray:
        """Return the first of them that are not ``taken``: at most 16 evaluated ones, and as many others."""
        ranked = self.ranked(k)
        found = []
        for kind in (ranked[self.evaluated[ranked]], ranked[~self.evaluated[ranked]]):
            first = kind[: NUM_LEADING + len(taken)]
            found += [i for i in first if self.choices[i].tobytes() not in taken][:NUM_LEADING]
        return np.array(found, dtype=np.int64)


class EvolutionaryProposer:
    """A :class:`nasdeploy.optim.acquisition.Proposer`.

    objectives, masks: of the K profiles, as for the optimiser. model: of the losses. owns_model: whether what is told
    is passed on to the model, and stored with its state; not where the optimiser's estimator does both already.
    """

    def __init__(
        self,
        *,
        num_candidates: Sequence[int],
        objectives: Sequence[Objective],
        model: StreamingPredictor,
        masks: Sequence[CandidateMask] | None = None,
        owns_model: bool = True,
        config: EvolutionConfig | None = None,
    ) -> None:
        self.model = model
        self._owns_model = owns_model
        self._config = config or EvolutionConfig()
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
        self._turn = 0  # whose profile is next

    def tell(self, choices: IntArray, losses: FloatArray, step: int) -> None:
        """Learn the losses (n,) of ``choices`` (n, D), evaluated together at ``step``."""
        if self._owns_model:
            self.model.observe(choices, losses, step)

    def propose(self, count: int, rng: np.random.Generator) -> IntArray:
        """Return ``count`` different architectures (count, D), for one profile after the other; none before n_θ losses.

        Each is feasible for the profile that it was bred for. It was evaluated before only where it is expected to be
        better than all others by more than what is not known of them.
        """
        num_decisions = len(self._union)
        if self.model.num_samples < self._num_needed:
            return np.empty((0, num_decisions), dtype=np.int64)
        population = self._bred(rng)
        chosen: list[IntArray] = []
        taken: set[bytes] = set()
        known = {choices.tobytes() for choices in population.choices[population.evaluated]}
        for _ in range(count):
            child = self._child(population, known, taken, rng)
            self._turn = (self._turn + 1) % len(self._masks)
            if child is not None:
                taken.add(child.tobytes())
                chosen.append(child)
        return np.stack(chosen) if chosen else np.empty((0, num_decisions), dtype=np.int64)

    def answers(self, rng: np.random.Generator, *, size: int = 1) -> list[IntArray]:
        """Return, for each profile, at most ``size`` feasible architectures (m, D) by their expected f_k, best first.

        They need not have been evaluated. An array is empty where no feasible one was met.
        """
        population = self._bred(rng)
        return [population.choices[population.ranked(k)[:size]] for k in range(len(self._masks))]

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next proposals depend on, as plain lists and numbers."""
        return {"model": self.model.state_dict() if self._owns_model else None, "turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        if self._owns_model:
            self.model.load_state_dict(state["model"])
        self._turn = int(state["turn"])

    def _child(
        self, population: _Population, known: set[bytes], taken: set[bytes], rng: np.random.Generator
    ) -> IntArray | None:
        """Return the next proposal (D,) of the profile whose turn it is, or None where it has nothing feasible."""
        k = self._turn
        leading = population.leading(k, taken)
        if rng.random() < self._config.explore_share or len(leading) == 0:
            explored = self._explored(population, k, known | taken, rng)
            if explored is not None or len(leading) == 0:
                return explored
        deviation = np.sqrt(self.model.posterior(population.choices[leading]).variance)
        wanted = population.values[k, leading] - self._config.optimism * deviation
        found: IntArray = population.choices[leading[wanted.argmin()]]
        return found

    def _explored(
        self, population: _Population, k: int, known: set[bytes], rng: np.random.Generator
    ) -> IntArray | None:
        """Return a feasible new architecture (D,) one change from a parent of ``k``, or None where there is none."""
        for i in rng.permutation(self._parents(population, k)):
            parent = population.choices[i]
            around = categorical.neighbours(parent, self._masks[k])
            around = around[[choices.tobytes() not in known for choices in around]]
            around = around[np.isfinite(self._keys(np.zeros(len(around)), around)[1][k])]
            if len(around) == 0:
                continue
            d = (around != parent).argmax(axis=1)
            weights = 1.0 - self.model.importance()[d, around[np.arange(len(around)), d]]
            total = weights.sum()
            found: IntArray = around[rng.choice(len(around), p=weights / total if total > 0.0 else None)]
            return found
        return None

    def _bred(self, rng: np.random.Generator) -> _Population:
        """Return what was evaluated and, generation by generation, the best changes of its best by ψ."""
        evaluated = np.unique(self.model.choices, axis=0)
        population = self._population(evaluated, evaluated=True)
        drawn = self._drawn(population, rng)
        if len(drawn):
            population = population.joined(self._population(drawn, evaluated=False))
        seen = {choices.tobytes() for choices in population.choices}
        bred: set[bytes] = set()
        for _ in range(self._config.num_generations):
            parents = np.unique(
                np.concatenate([self._parents(population, k) for k in range(len(self._masks))])
            )
            fresh = population.choices[parents]
            fresh = fresh[[choices.tobytes() not in bred for choices in fresh]]
            if len(fresh) == 0:
                break
            bred.update(choices.tobytes() for choices in fresh)
            children = self._children(fresh, seen)
            seen.update(choices.tobytes() for choices in children)
            population = population.joined(self._population(children, evaluated=False))
        return population

    def _drawn(self, population: _Population, rng: np.random.Generator) -> IntArray:
        """Return uniform architectures (m, D) for profiles whose masks hold nothing that was evaluated."""
        size = self._config.num_parents
        drawn = [np.empty((0, len(self._union)), dtype=np.int64)]
        for mask, keys in zip(self._masks, population.keys, strict=True):
            if not np.isfinite(keys).any():
                uniform = categorical.uniform(mask)
                drawn.append(categorical.sample(np.broadcast_to(uniform, (size, *uniform.shape)), rng))
        distinct: IntArray = np.unique(np.concatenate(drawn), axis=0)
        known = {choices.tobytes() for choices in population.choices}
        return distinct[[choices.tobytes() not in known for choices in distinct]]

    def _parents(self, population: _Population, k: int) -> IntArray:
        """Return the indices of the best for profile ``k``: half of them evaluated, if so many were."""
        size = max(2, self._config.num_parents // len(self._masks))
        order = np.argsort(population.keys[k], kind="stable")
        order = order[np.isfinite(population.keys[k, order])]
        real = order[population.evaluated[order]][: (size + 1) // 2]
        others = order[~np.isin(order, real)][: size - len(real)]
        return np.concatenate([real, others])

    def _children(self, parents: IntArray, seen: set[bytes]) -> IntArray:
        """Return the new changes (m, D) of ``parents`` (P, D) that come first for a profile, by gradient and costs."""
        gradient = self.model.gradient(categorical.one_hot(parents, self._union.shape[1]))  # (P, D, C)
        expected = self.model.predict(parents)  # (P,)
        own = np.take_along_axis(gradient, parents[..., None], axis=2)  # (P, D, 1)
        change = expected[:, None, None] + gradient - own  # (P, D, C)
        around = np.concatenate([categorical.neighbours(choices, self._union) for choices in parents])
        owner = np.repeat(np.arange(len(parents)), len(around) // len(parents))
        first_met = {choices.tobytes(): i for i, choices in reversed(list(enumerate(around)))}
        new = np.array([i for key, i in first_met.items() if key not in seen], dtype=np.int64)
        around, owner = around[new], owner[new]
        d = (around != parents[owner]).argmax(axis=1)
        estimated = change[owner, d, around[np.arange(len(around)), d]]  # (P n_θ,)
        keys, _ = self._keys(estimated, around)
        first = np.argsort(keys, axis=1, kind="stable")[:, : self._config.num_children]
        return np.unique(around[np.unique(first)], axis=0)

    def _population(self, choices: IntArray, *, evaluated: bool) -> _Population:
        losses = self.model.predict(choices) if len(choices) else np.empty(0)
        keys, values = self._keys(losses, choices)
        return _Population(
            choices=choices, keys=keys, values=values, evaluated=np.full(len(choices), evaluated)
        )

    def _keys(self, losses: FloatArray, choices: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return what leads (K, n) of ``choices`` (n, D) with ``losses`` (n,), and f_k (K, n).

        Feasible ones lead by f_k, then the others by violation; infinite outside a mask.
        """
        judged = self._judge.judge(choices)
        allowed = categorical.within(self._masks, choices)
        values = np.where(allowed & np.equal(judged.violation, 0.0), losses + judged.penalty, np.inf)
        keys = np.where(np.isfinite(values), values, np.where(allowed, OUTSIDE + judged.violation, np.inf))
        return keys, values
