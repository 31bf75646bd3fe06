"""Search for a whole front: NSGA-II over integer choices, with a memory of everything that was evaluated.

Source: Deb, Pratap, Agarwal, Meyarivan, *A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II*, IEEE TEC 2002,
as pymoo implements it; this is its only import, inside functions, since it takes a while. Crossover is uniform,
mutation puts another allowed candidate in place of one, nothing is evaluated twice.

Notation: N evaluated architectures, D decisions, C candidates, M objectives, all to be minimised; P the population.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nasdeploy.costs.table import Cost, FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.objective import Objective

MAX_TILT = 4.0
MAX_TRIES = 100
"""How many draws, or rounds of mating, are made before what is new counts as rare."""

Affordable = Callable[[IntArray], BoolArray]
"""Says which of choices (n, D) are worth an evaluation: (n,)."""


class MultiObjectiveSearch:
    """NSGA-II, a generation at a time; it can be stored at any time, and continues bit by bit.

    mask: (D, C), what may be chosen. num_evaluations: distinct architectures in all. population_size: P, and how many
    are evaluated a generation. seed: of everything drawn. first: (m, D) of the first generation beside those drawn
    from small to large. affordable: what it refuses is not evaluated unless it is in ``first``; None: all is worth it.
    Raises ValueError for smaller sizes, and for ``first`` outside the mask.
    """

    def __init__(
        self,
        *,
        mask: BoolArray,
        num_evaluations: int,
        population_size: int,
        seed: int,
        first: IntArray | None = None,
        affordable: Affordable | None = None,
    ) -> None:
        if num_evaluations < 1 or population_size < 2:
            raise ValueError(
                f"num_evaluations = {num_evaluations}, population_size = {population_size}; expected at least 1 and 2"
            )
        self._mask, self._affordable = mask, affordable
        self._num_evaluations, self._population_size = num_evaluations, population_size
        self._rng = np.random.default_rng(seed)
        self._first = np.empty((0, len(mask)), dtype=np.int64) if first is None else first
        if not categorical.within(mask, self._first).all():
            raise ValueError("first: holds an architecture outside the mask")
        self.choices: IntArray = np.empty((0, len(mask)), dtype=np.int64)
        self.values: FloatArray = np.empty((0, 0))
        self._places: dict[bytes, int] = {}  # architecture: its place among all that was evaluated
        self._population = _Survivors()
        self._asked: IntArray | None = None
        self._exhausted = False

    @property
    def done(self) -> bool:
        """Whether all evaluations are made, or nothing new was found to evaluate."""
        return self._exhausted or len(self.choices) >= self._num_evaluations

    def ask(self) -> IntArray:
        """Return the next generation (n, D), all new; the same until it is told. Empty where nothing is left."""
        if self._asked is None:
            self._asked = self._next_generation()
            self._exhausted = len(self._asked) == 0
        return self._asked.copy()

    def tell(self, values: FloatArray) -> None:
        """Take the values (n, M) of what was asked for, and let the best of it and of the population survive.

        Raises ValueError for values of another shape, or that are not finite, and where nothing was asked for.
        """
        values, asked = np.asarray(values, dtype=np.float64), self._asked
        if asked is None or not len(asked):
            raise ValueError("tell: nothing was asked for; expected an ask before")
        if values.ndim != 2 or len(values) != len(asked) or not np.isfinite(values).all():
            raise ValueError(f"values of shape {values.shape}; expected {len(asked)} rows of finite numbers")
        self._asked = None
        self._places |= {row.tobytes(): len(self.choices) + i for i, row in enumerate(asked)}
        self.values = np.concatenate([self.values.reshape(-1, values.shape[1]), values])
        self.choices = np.concatenate([self.choices, asked])
        self._select(len(asked))

    def _next_generation(self) -> IntArray:
        size = min(self._population_size, self._num_evaluations - len(self.choices))
        if size == 0:
            return self._first[:0]
        born = self._offspring(size) if len(self.choices) else self._initial(size)
        return np.concatenate([born, self._drawn(size - len(born), born)])

    def _offspring(self, size: int) -> IntArray:
        """Return at most ``size`` new children of the population (n, D)."""
        algorithm, problem = self._operators()
        parents = self._individuals(self._population.places)
        parents.set("rank", self._population.ranks, "crowding", self._population.crowding)
        born = np.empty((0, len(self._mask)), dtype=np.int64)
        for _ in range(MAX_TRIES):
            children = algorithm.mating.do(
                problem, parents, size, algorithm=algorithm, random_state=self._rng
            )
            born = self._with_new(born, np.array(children.get("X"), dtype=np.int64), size)
            if len(born) == size:
                break
        return born

    def _select(self, num_born: int) -> None:
        """Let the best P of the population and the last ``num_born`` survive."""
        algorithm, problem = self._operators()
        born = range(len(self.choices) - num_born, len(self.choices))
        survivors = algorithm.survival.do(
            problem,
            self._individuals([*self._population.places, *born]),
            n_survive=self._population_size,
            random_state=self._rng,
        )
        self._population = _Survivors(
            places=tuple(int(place) for place in survivors.get("place")),
            ranks=tuple(int(rank) for rank in survivors.get("rank")),
            crowding=tuple(float(distance) for distance in survivors.get("crowding")),
        )

    def _operators(self) -> tuple[Any, Any]:
        return _operators(
            self._mask,
            num_objectives=self.values.shape[1],
            size=self._population_size,
            rng=self._rng,
        )

    def _individuals(self, places: Sequence[int]) -> Any:
        """Return what was evaluated at ``places`` as individuals of pymoo."""
        from pymoo.core.population import Population

        rows = list(places)
        return Population.new("X", self.choices[rows], "F", self.values[rows], "place", rows)

    def _initial(self, size: int) -> IntArray:
        """Return the first generation (n, D): what was asked for, the ends, and architectures from small to large."""
        last = categorical.last_allowed(self._mask)
        ends = np.stack([self._mask.argmax(axis=1), last])
        born = self._with_new(self._first[:0], self._first, size, whatever_it_costs=True)
        born = self._with_new(born, ends, size)
        for tilt in np.linspace(-MAX_TILT, MAX_TILT, size - len(born)):
            born = self._with_new(born, self._tilted(float(tilt)), len(born) + 1)
        return born

    def _drawn(self, count: int, born: IntArray) -> IntArray:
        """Return at most ``count`` random architectures that are new beside ``born``: (n, D)."""
        found = born
        for tilt in self._rng.uniform(-2.0 * MAX_TILT, MAX_TILT, size=count):  # what is small can be afforded
            found = self._with_new(found, self._tilted(float(tilt)), len(found) + 1)
        return found[len(born) :]

    def _tilted(self, tilt: float) -> IntArray:
        """Return random architectures (n, D): allowed candidate c of C with a probability as exp(t · c / (C - 1)).

        Uniform choices would nearly all be of middle size [nasdeploy.costs.table_models].
        """
        order = self._mask.cumsum(axis=1) - 1
        weights = np.where(self._mask, np.exp(tilt * order / np.maximum(order[:, -1:], 1)), 0.0)
        theta = weights / weights.sum(axis=1, keepdims=True)
        drawn: IntArray = categorical.sample_each(theta[None], MAX_TRIES, self._rng)[0]
        return drawn

    def _with_new(
        self, born: IntArray, drawn: IntArray, size: int, *, whatever_it_costs: bool = False
    ) -> IntArray:
        """Return ``born`` (n, D) and behind it those of ``drawn`` that are new and affordable: at most ``size``."""
        if self._affordable is not None and not whatever_it_costs:
            drawn = drawn[self._affordable(drawn)]
        seen = {row.tobytes() for row in born}
        rows = list(born)
        for row in drawn:
            key = row.tobytes()
            if len(rows) < size and key not in seen and key not in self._places:
                seen.add(key)
                rows.append(row)
        return self._rows(rows)

    def _rows(self, rows: Sequence[Any]) -> IntArray:
        return np.array(rows, dtype=np.int64).reshape(-1, len(self._mask))

    def state_dict(self) -> dict[str, Any]:
        """Return all that the generations to come depend on, as plain data."""
        return {
            "choices": self.choices.tolist(),
            "values": self.values.tolist(),
            "population": self._population.to_plain(),
            "asked": None if self._asked is None else self._asked.tolist(),
            "rng": self._rng.bit_generator.state,
            "exhausted": self._exhausted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken: the generations that follow are the same, bit by bit.

        Raises ValueError for architectures outside the mask.
        """
        choices = self._rows(state["choices"])
        if not categorical.within(self._mask, choices).all():
            raise ValueError("state: holds an architecture outside the mask")
        self.choices = choices
        self.values = np.array(state["values"], dtype=np.float64).reshape(
            len(choices), -1 if len(choices) else 0
        )
        self._places = {row.tobytes(): i for i, row in enumerate(choices)}
        self._population = _Survivors.of_plain(state["population"])
        self._asked = None if state["asked"] is None else self._rows(state["asked"])
        self._rng.bit_generator.state = state["rng"]
        self._exhausted = bool(state["exhausted"])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survivors:
    """The population: places among all that was evaluated, with the rank and the crowding distance of each."""

    places: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    crowding: tuple[float, ...] = ()

    def to_plain(self) -> list[list[float | None]]:
        """Return a row for each; None is an infinite distance, which JSON has not."""
        rows = zip(self.places, self.ranks, self.crowding, strict=True)
        return [[place, rank, distance if np.isfinite(distance) else None] for place, rank, distance in rows]

    @classmethod
    def of_plain(cls, rows: Sequence[Sequence[float | None]]) -> _Survivors:
        """Return what :meth:`to_plain` gave."""
        return cls(
            places=tuple(int(row[0] or 0) for row in rows),
            ranks=tuple(int(row[1] or 0) for row in rows),
            crowding=tuple(np.inf if row[2] is None else row[2] for row in rows),
        )


def non_dominated(values: FloatArray) -> IntArray:
    """Return the places of the rows of ``values`` (n, M) that no other row dominates, in order; equals all stay.

    A row dominates another if it is nowhere higher and somewhere lower.
    """
    from pymoo.util.nds.non_dominated_sorting import find_non_dominated

    if len(values) == 0:
        return np.empty(0, dtype=np.int64)
    return np.asarray(find_non_dominated(values), dtype=np.int64)


def front_of(
    *, choices: IntArray, losses: FloatArray, objective: Objective, mask: BoolArray, metrics: Sequence[str]
) -> IntArray:
    """Return the places of what one profile may choose from: feasible, and non-dominated in loss and ``metrics``.

    choices: (N, D) of all that was evaluated, for whichever profile. losses: (N,). mask: (D, C) of the profile.
    metrics: some of ``objective.tables``. By loss; equals by the cost of the first metric, the cheapest first.
    """
    allowed = np.flatnonzero(categorical.within(mask, choices))
    found = allowed[objective.feasible(choices[allowed])]
    costs = [objective.tables[metric].of(choices[found]) for metric in metrics]
    values = np.stack([*costs, losses[found]], axis=1)  # (n, M + 1)
    front = non_dominated(values)
    return found[front[np.lexsort((values[front, 0], values[front, -1]))]]


def relative_cost(tables: Sequence[Cost], mask: BoolArray) -> Callable[[IntArray], FloatArray]:
    """Return the function that gives the mean (n,) of several costs, each relative to that of a random network.

    The second objective for several devices at once: they agree too well for an objective each, with which nearly
    everything would be non-dominated. It takes choices (n, D). mask: (D, C), what random networks are drawn from.
    """
    distinct = list({id(table): table for table in tables}.values())
    scales = [table.expected(categorical.uniform(mask)) for table in distinct]

    def cost(choices: IntArray) -> FloatArray:
        shares = [table.of(choices) / scale for table, scale in zip(distinct, scales, strict=True)]
        mean: FloatArray = np.mean(shares, axis=0)
        return mean

    return cost


def _operators(
    mask: BoolArray, *, num_objectives: int, size: int, rng: np.random.Generator
) -> tuple[Any, Any]:
    """Return pymoo's NSGA-II, for its mating and its survival, and the problem that they ask for its sizes.

    Both draw from ``rng`` alone; the caller keeps population and budget, so that its state is plain data.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ux import UniformCrossover

    class OtherCandidate(Mutation):  # type: ignore[misc]  # pymoo ships no type information
        """Replaces each choice, with probability 1/D_valid, by another allowed candidate of its decision."""

        def _do(self, problem: Any, X: Any, *_: Any, random_state: Any, **__: Any) -> IntArray:
            return mutated(np.asarray(X, dtype=np.int64), mask, random_state)

    problem = Problem(n_var=len(mask), n_obj=num_objectives, xl=0, xu=mask.shape[1] - 1, vtype=int)
    algorithm = NSGA2(
        pop_size=size, crossover=UniformCrossover(), mutation=OtherCandidate(), eliminate_duplicates=False
    )
    algorithm.random_state = rng
    return algorithm, problem


def mutated(choices: IntArray, mask: BoolArray, rng: np.random.Generator) -> IntArray:
    """Return ``choices`` (n, D), each replaced with probability 1/D_valid by another candidate that ``mask`` allows."""
    counts = mask.sum(axis=1)  # (D,)
    places = (mask.cumsum(axis=1) - 1)[np.arange(len(mask)), choices]  # among the allowed ones (n, D)
    other = (places + rng.integers(1, np.maximum(counts, 2), size=choices.shape)) % counts
    order = np.argsort(~mask, axis=1, kind="stable")  # the allowed candidates first (D, C)
    changed = rng.random(choices.shape) < 1.0 / max((counts > 1).sum(), 1)
    return np.where(changed, order[np.arange(len(mask)), other], choices)
