"""K distributions learnt from one stream of evaluations. [search.md, One step; arXiv 2207.10334]

Every evaluation is used by all K distributions; how, is the matter of an estimator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.acquisition import Proposer
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.asng import Asng
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.doubly_robust import DoublyRobust
from nasdeploy.optim.draws import Draw, Mixture, draw_of
from nasdeploy.optim.estimators import Estimate, Evaluated, GradientEstimator, RankEstimator, evaluated
from nasdeploy.optim.objective import Judge, Objective
from nasdeploy.optim.prices import CapPrices
from nasdeploy.optim.surrogate import RidgeSurrogate, StreamingSurrogate
from nasdeploy.spaces.base import CandidateMask

Estimator = Literal["independent", "importance", "doubly_robust"]
ESTIMATORS: tuple[Estimator, ...] = ("independent", "importance", "doubly_robust")

SHARED_DELTA_0 = 0.3
"""Default δ_0 for K > 1: the distributions overlap for longer, which is when sharing pays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """What the last ``tell`` did, one entry per profile.

    ess: effective samples. stepped: whether θ moved. gated: whether it waits for more samples (neither: all
    pooled samples ranked equal). own_share: share of the weight on samples drawn from its own distribution.
    entropy: of p_k in nats, afterwards. r_squared: of the surrogate on earlier fresh samples, None without one.
    gate_openings: how often so far a distribution that had waited for samples moved on.
    """

    ess: tuple[float, ...]
    stepped: tuple[bool, ...]
    gated: tuple[bool, ...]
    own_share: tuple[float, ...]
    entropy: tuple[float, ...]
    r_squared: tuple[float | None, ...]
    gate_openings: tuple[int, ...]


class PooledOptimizer:
    """Ask for architectures, tell their losses: K distributions move, each towards its own objective.

    num_candidates: (C_1, …, C_D).
    objectives: K of them. masks: what each profile allows; None allows everything.
    estimator: "importance" pools all samples; "doubly_robust" learns a model of the loss besides; "independent", a
    baseline, gives each distribution its own samples.
    alpha: mixture shares (K,), default 1/K. delta_0: default 1 for one distribution, 0.3 for several.
    archive_size: how many of the latest samples are remembered at least.
    initial_theta: (K, D, C) to start from, brought inside the masks and to the margin; default uniform.
    surrogate: the model of "doubly_robust", default a ridge regression.
    proposer: proposes a share ``guided_share`` of what is asked for; every loss is told to it.

    Raises ValueError for arguments that do not fit each other.
    """

    def __init__(
        self,
        *,
        num_candidates: Sequence[int],
        objectives: Sequence[Objective],
        masks: Sequence[CandidateMask] | None = None,
        estimator: Estimator = "importance",
        alpha: Sequence[float] | None = None,
        delta_0: float | None = None,
        archive_size: int = 8192,
        initial_theta: FloatArray | None = None,
        surrogate: StreamingSurrogate | None = None,
        proposer: Proposer | None = None,
        guided_share: float = 0.0,
    ) -> None:
        num_profiles = len(objectives)
        if num_profiles == 0 or (masks is not None and len(masks) != num_profiles):
            raise ValueError(
                f"{num_profiles} objectives, masks: {masks and len(masks)}; expected one of each a profile"
            )
        if not 0.0 <= guided_share <= 1.0 or (guided_share > 0.0 and proposer is None):
            raise ValueError(
                f"guided_share = {guided_share}; expected a number from 0 to 1, and a proposer unless it is 0"
            )
        self.objectives = tuple(objectives)
        self.num_candidates = tuple(num_candidates)
        self.estimator = estimator
        self.alpha = _mixture_shares(alpha, num_profiles)
        self.mask = np.stack(
            [
                categorical.mask_array(num_candidates, masks[k] if masks is not None else None)
                for k in range(num_profiles)
            ]
        )  # (K, D, C)
        if delta_0 is None:
            delta_0 = 1.0 if num_profiles == 1 else SHARED_DELTA_0
        judge = Judge(self.objectives)
        self._judge = judge
        self._asng = Asng(_initial_theta(initial_theta, self.mask), self.mask, delta_0=delta_0)
        self._estimator = _make_estimator(
            estimator,
            judge=judge,
            num_candidates=num_candidates,
            num_profiles=num_profiles,
            surrogate=surrogate,
        )
        self._mixture = Mixture(
            alpha=self.alpha, mask=self.mask, judge=judge, own_only=self._estimator.own_draws_only
        )
        self._prices = CapPrices(num_profiles)
        self._proposer, self._guided_share = proposer, guided_share
        self.archive = Archive(len(self.num_candidates), archive_size)
        self.diagnostics: Diagnostics | None = None
        self.latest: Evaluated | None = None  # what the last ``tell`` of this process took
        self.num_steps = 0
        self._asked: Draw | None = None

    @property
    def theta(self) -> FloatArray:
        """θ (K, D, C), with margin."""
        return self._asng.theta.copy()

    @property
    def sharp_theta(self) -> FloatArray:
        """θ (K, D, C) without the margin: what the distributions would be once the search ends."""
        return categorical.without_margin(self._asng.theta, self.mask)

    def modes(self) -> IntArray:
        """Return the likeliest architecture of each distribution: (K, D). It may break a cap."""
        return categorical.mode(self.sharp_theta)

    def expected_cost(self, k: int, metric: str) -> float:
        """Return E[R_m] under distribution ``k`` without its margin, in the metric's unit."""
        sharp = categorical.without_margin(self._asng.theta[k], self.mask[k])
        return self.objectives[k].tables[metric].expected(sharp)

    def ask(self, n: int, rng: np.random.Generator) -> IntArray:
        """Return ``n`` architectures (n, D) to be evaluated and told: from the mixture q, then those proposed.

        n does not grow with K: distribution k gives floor or ceil of n α_k, less what the proposer gives. What no
        profile can afford is drawn again (for "independent": what its own profile cannot), at most 16 times; then
        it is returned as it is. Raises ValueError for n < 1, and for proposals that are no architectures.
        """
        if n < 1:
            raise ValueError(f"ask: n = {n}; expected at least 1 architecture")
        num_guided = round(n * self._guided_share)
        if self._estimator.draws_freely:  # its model is to see more than its own proposals
            num_guided = min(num_guided, n - 1)
        proposals = self._proposals(num_guided, rng)
        draw = self._mixture.draw(self._asng.theta, n - len(proposals), rng)
        if self._estimator.draws_freely:
            draw = replace(draw, seed=int(rng.integers(2**63)))
        self._asked = draw.with_guided(proposals) if len(proposals) else draw
        return self._asked.choices.copy()

    def ask_for_weights(self, n: int, rng: np.random.Generator, *, uniform_share: float) -> IntArray:
        """Return ``n`` architectures (n, D) to train the shared weights on; they are not to be told.

        A share is drawn uniformly from all that some profile allows, caps aside; the rest comes from the
        mixture.
        """
        if not 0.0 <= uniform_share <= 1.0:
            raise ValueError(f"uniform_share = {uniform_share}; expected a number from 0 to 1")
        shares = np.array([uniform_share, 1.0 - uniform_share])
        num_uniform = int((categorical.systematic_owners(shares, n, rng) == 0).sum())
        union = categorical.uniform(np.logical_or.reduce(self.mask, axis=0))  # (D, C)
        uniform = categorical.sample(np.broadcast_to(union, (num_uniform, *union.shape)), rng)
        drawn = self._mixture.draw(self._asng.theta, n - num_uniform, rng)
        return np.concatenate([uniform, drawn.choices])

    def tell(self, choices: IntArray, losses: FloatArray) -> None:
        """Take the losses (n,) of the ``choices`` (n, D) that the last ``ask`` returned, and move every θ.

        Raises ValueError for other choices, and for a loss that is not finite.
        """
        draw = self._asked
        losses = np.array(losses, dtype=np.float64)
        if draw is None or not np.array_equal(draw.choices, choices) or losses.shape != (len(draw.choices),):
            raise ValueError(
                "tell: expected the choices of the last ask, in their order, with one loss each, once"
            )
        if not np.isfinite(losses).all():
            raise ValueError(
                f"tell: {(~np.isfinite(losses)).sum()} of {len(losses)} losses are not finite numbers"
            )
        self._asked = None
        self.archive.add(self.num_steps, draw.choices, losses)
        self.latest = told = evaluated(draw, losses, self._judge)
        self._prices.begin(losses)
        estimate = self._estimator.estimate(
            told, self._asng.theta, prices=self._prices.values, step=self.num_steps
        )
        gradient = estimate.gradient / estimate.unit[:, None, None]
        stepped = self._asng.step(gradient, ready=estimate.ready)
        if self._judge.has_caps:
            self._prices.follow(self._judge.expected_excess(self.sharp_theta))
        if self._proposer is not None:
            self._proposer.tell(draw.choices, losses, self.num_steps)
        self.num_steps += 1
        self.diagnostics = self._describe(estimate, stepped)

    def continue_archive(self, other: PooledOptimizer) -> None:
        """Take over what ``other`` has evaluated; what is told from now on counts as later than that."""
        self.archive.load_state_dict(other.archive.state_dict())
        self.num_steps = other.num_steps

    def _proposals(self, count: int, rng: np.random.Generator) -> IntArray:
        """Return at most ``count`` architectures of the proposer (m, D)."""
        num_decisions = len(self.num_candidates)
        if self._proposer is None or count == 0:
            return np.empty((0, num_decisions), dtype=np.int64)
        found = self._proposer.propose(count, rng)
        union = np.logical_or.reduce(self.mask, axis=0)  # (D, C)
        if (
            found.ndim != 2
            or found.shape[1] != num_decisions
            or len(found) > count
            or (found < 0).any()
            or (found >= union.shape[1]).any()
            or not categorical.within(union, found).all()
        ):
            raise ValueError(
                f"proposer: {len(found)} proposals of shape {found.shape}; expected at most {count} architectures of "
                f"{num_decisions} decisions, inside the masks"
            )
        return found.astype(np.int64)

    def _describe(self, estimate: Estimate, stepped: BoolArray) -> Diagnostics:
        num_profiles = len(self.objectives)
        known = estimate.r_squared
        return Diagnostics(
            ess=tuple(estimate.ess.tolist()),
            stepped=tuple(stepped.tolist()),
            gated=tuple(self._estimator.waiting.tolist()),
            own_share=tuple(estimate.own_share.tolist()),
            entropy=tuple(categorical.entropy(self._asng.theta).tolist()),
            r_squared=tuple(known.tolist()) if known is not None else (None,) * num_profiles,
            gate_openings=tuple(self._estimator.gate_openings.tolist()),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to continue bit by bit, as plain lists, numbers and text."""
        return {
            "estimator": self.estimator,
            "num_steps": self.num_steps,
            "distributions": self._asng.state_dict(),
            "prices": self._prices.state_dict(),
            **self._estimator.state_dict(),
            "proposer": self._proposer.state_dict() if self._proposer is not None else None,
            "asked": self._asked.state_dict() if self._asked is not None else None,
            "archive": self.archive.state_dict(),
            "diagnostics": asdict(self.diagnostics) if self.diagnostics is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Raises ValueError when it belongs to another problem."""
        stored = state.get("estimator", self.estimator)  # version 0.1 did not say
        if stored != self.estimator:
            raise ValueError(f"state is of estimator {stored!r}; expected {self.estimator!r}")
        self._asng.load_state_dict(state["distributions"])
        if "prices" in state:  # not in version 0.1
            self._prices.load_state_dict(state["prices"])
        self._estimator.load_state_dict(state)
        self.num_steps = int(state["num_steps"])
        if self._proposer is not None and state.get("proposer") is not None:
            self._proposer.load_state_dict(state["proposer"])
        self._asked = draw_of(state["asked"]) if state["asked"] is not None else None
        self.archive.load_state_dict(state["archive"])
        self.latest = None
        self.diagnostics = _diagnostics_of(state["diagnostics"])


def _make_estimator(
    name: str,
    *,
    judge: Judge,
    num_candidates: Sequence[int],
    num_profiles: int,
    surrogate: StreamingSurrogate | None,
) -> GradientEstimator:
    if name not in ESTIMATORS:
        raise ValueError(f"estimator = {name!r}; expected one of {', '.join(ESTIMATORS)}")
    if name == "doubly_robust":
        model = surrogate if surrogate is not None else RidgeSurrogate(num_candidates)
        return DoublyRobust(num_profiles=num_profiles, judge=judge, surrogate=model)
    if surrogate is not None:
        raise ValueError(f'a surrogate was given; expected estimator = "doubly_robust", got "{name}"')
    return RankEstimator(num_profiles=num_profiles, judge=judge, own_draws_only=name == "independent")


def _diagnostics_of(state: dict[str, Any] | None) -> Diagnostics | None:
    if state is None:
        return None
    num_profiles = len(state["ess"])
    added = {"r_squared": (None,) * num_profiles, "gate_openings": (0,) * num_profiles}  # not in version 0.1
    return Diagnostics(**{key: tuple(values) for key, values in {**added, **state}.items()})


def _mixture_shares(alpha: Sequence[float] | None, num_profiles: int) -> FloatArray:
    shares = np.full(num_profiles, 1.0 / num_profiles) if alpha is None else np.array(alpha, dtype=np.float64)
    if shares.shape != (num_profiles,) or not (shares > 0.0).all() or abs(shares.sum() - 1.0) > 1e-9:
        raise ValueError(f"alpha = {alpha}; expected {num_profiles} positive shares that sum to 1")
    return shares


def _initial_theta(theta: FloatArray | None, mask: BoolArray) -> FloatArray:
    """Return where the distributions start (K, D, C): uniform, or ``theta`` cut to ``mask``, normalised."""
    if theta is None:
        return categorical.uniform(mask)
    if theta.shape != mask.shape or not np.isfinite(theta).all() or (theta < 0.0).any():
        raise ValueError(
            f"initial_theta has shape {theta.shape}; expected probabilities of shape {mask.shape}"
        )
    inside = np.where(mask, theta, 0.0)
    total = inside.sum(axis=-1, keepdims=True)
    # a decision whose whole weight lies on forbidden candidates starts uniform
    return np.where(total > 0.0, inside / np.where(total > 0.0, total, 1.0), categorical.uniform(mask))
