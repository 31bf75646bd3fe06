"""K distributions learnt from one stream of evaluations. [search.md, One step; arXiv 2207.10334]

Every evaluation is used by all K distributions, each with its importance weight p_k / q.

Why a distribution with too few effective samples does not step: ASNG rescales any gradient to full length.
With one effective sample the utilities nearly vanish, and the crumbs of foreign samples would become a full
step: a random walk. Such a distribution keeps the samples of up to 12 steps and acts once enough have
accumulated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.asng import Asng, natural_gradient
from nasdeploy.optim.categorical import BoolArray
from nasdeploy.optim.importance import MIN_ESS, effective_sample_size, importance_weights, log_mixture
from nasdeploy.optim.objective import Judge, Objective, rank
from nasdeploy.optim.utility import rank_utility, truncation_share
from nasdeploy.spaces.base import CandidateMask

Estimator = Literal["independent", "importance"]
ESTIMATORS: tuple[Estimator, ...] = ("independent", "importance")

MAX_POOLED_STEPS = 12
MAX_REDRAWS = 16
SHARED_DELTA_0 = 0.3
"""Default δ_0 for K > 1: the distributions overlap for longer, which is when sharing pays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """What the last ``tell`` did, one entry per profile.

    ess: effective samples. stepped: whether θ moved. gated: whether it waits for more samples (neither: all
    pooled samples ranked equal). own_share: share of the weight on samples drawn from its own distribution.
    entropy: of p_k in nats, afterwards.
    """

    ess: tuple[float, ...]
    stepped: tuple[bool, ...]
    gated: tuple[bool, ...]
    own_share: tuple[float, ...]
    entropy: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Draw:
    """Architectures and where they come from: choices (n, D), owners (n,), log q of this very draw (n,)."""

    choices: IntArray
    owners: IntArray
    log_q: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Step:
    """An evaluated draw: losses (n,) minus the step's mean; penalty and violation (K, n)."""

    draw: _Draw
    losses: FloatArray
    penalty: FloatArray
    violation: FloatArray


class PooledOptimizer:
    """Ask for architectures, tell their losses: K distributions move, each towards its own objective.

    num_candidates: (C_1, …, C_D).
    objectives: K of them. masks: what each profile allows; None allows everything.
    estimator: "importance" pools all samples; "independent", a baseline, gives each distribution its own.
    alpha: mixture shares (K,), default 1/K. delta_0: default 1 for one distribution, 0.3 for several.
    archive_size: how many of the latest samples are remembered at least.
    initial_theta: (K, D, C) to start from, brought inside the masks and to the margin; default uniform.

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
    ) -> None:
        num_profiles = len(objectives)
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator = {estimator!r}; expected one of {', '.join(ESTIMATORS)}")
        if num_profiles == 0 or (masks is not None and len(masks) != num_profiles):
            raise ValueError(
                f"{num_profiles} objectives, masks: {masks and len(masks)}; expected one of each a profile"
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
        start = _initial_theta(initial_theta, self.mask)
        self._asng = [Asng(t, m, delta_0=delta_0) for t, m in zip(start, self.mask, strict=True)]
        self._judge = Judge(self.objectives)
        self.archive = Archive(len(self.num_candidates), archive_size)
        self.diagnostics: Diagnostics | None = None
        self.num_steps = 0
        self._recent: deque[_Step] = deque(maxlen=MAX_POOLED_STEPS)
        self._held = [0] * num_profiles  # per profile: how many steps before this one it has not used yet
        self._asked: _Draw | None = None

    @property
    def theta(self) -> FloatArray:
        """θ (K, D, C), with margin."""
        return np.stack([asng.theta for asng in self._asng])

    @property
    def sharp_theta(self) -> FloatArray:
        """θ (K, D, C) without the margin: what the distributions would be once the search ends."""
        return categorical.without_margin(self.theta, self.mask)

    def modes(self) -> IntArray:
        """Return the likeliest architecture of each distribution: (K, D). It may break a cap."""
        return categorical.mode(self.sharp_theta)

    def expected_cost(self, k: int, metric: str) -> float:
        """Return E[R_m] under distribution ``k`` without its margin, in the metric's unit."""
        return self.objectives[k].tables[metric].expected(self.sharp_theta[k])

    def ask(self, n: int, rng: np.random.Generator) -> IntArray:
        """Return ``n`` architectures (n, D) from the mixture q, to be evaluated and told.

        n does not grow with K: distribution k gives floor or ceil of n α_k. What no profile can afford is
        drawn again (for "independent": what its own profile cannot), at most 16 times; then it is returned as
        it is. Raises ValueError for n < 1.
        """
        if n < 1:
            raise ValueError(f"ask: n = {n}; expected at least 1 architecture")
        self._asked = self._draw(n, rng)
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
        return np.concatenate([uniform, self._draw(n - num_uniform, rng).choices])

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
        self._recent.append(self._evaluated(draw, losses - losses.mean()))  # L minus the step's mean
        outcomes = [self._update(k) for k in range(len(self._asng))]
        self.num_steps += 1
        while len(self._recent) > max(self._held):
            self._recent.popleft()
        ess, stepped, own_share = zip(*outcomes, strict=True)
        self.diagnostics = Diagnostics(
            ess=ess,
            stepped=stepped,
            gated=tuple(held > 0 for held in self._held),
            own_share=own_share,
            entropy=tuple(categorical.entropy(self.theta).tolist()),
        )

    def continue_archive(self, other: PooledOptimizer) -> None:
        """Take over what ``other`` has evaluated; what is told from now on counts as later than that."""
        self.archive.load_state_dict(other.archive.state_dict())
        self.num_steps = other.num_steps

    def _update(self, k: int) -> tuple[float, bool, float]:
        """Move θ_k by the pooled samples; return (ESS, whether it moved, weight share of own samples)."""
        pool = list(self._recent)[-1 - self._held[k] :]  # this step and those that k has not used yet
        choices = np.concatenate([step.draw.choices for step in pool])  # (N, D)
        owners = np.concatenate([step.draw.owners for step in pool])
        weights = self._weights(k, choices, owners, np.concatenate([step.draw.log_q for step in pool]))
        ess = effective_sample_size(weights)
        own_share = float(weights[owners == k].sum() / weights.sum()) if ess > 0.0 else 0.0
        if ess < MIN_ESS:
            self._held[k] = min(self._held[k] + 1, MAX_POOLED_STEPS - 1)
            return ess, False, own_share
        self._held[k] = 0
        ranks = rank(
            np.concatenate([step.losses + step.penalty[k] for step in pool]),
            np.concatenate([step.violation[k] for step in pool]),
        )
        utilities = rank_utility(ranks, weights, truncation_share(ess))
        asng = self._asng[k]
        return ess, asng.step(natural_gradient(utilities, choices, asng.theta)), own_share

    def _weights(self, k: int, choices: IntArray, owners: IntArray, log_q: FloatArray) -> FloatArray:
        """Return w_k = p_k / q (N,), up to a factor, which the utility and the ESS do not see.

        Redrawing cuts p_k and q to the affordable set A: w_k changes by p_k(A) and by q(A), the same for a
        whole step. Between held steps q(A) differs a little; that is left out, since only an estimate of it
        could be put in.
        """
        if self.estimator == "independent":
            return np.equal(owners, k).astype(np.float64)
        return importance_weights(categorical.log_probability(self._asng[k].theta, choices), log_q)

    def _evaluated(self, draw: _Draw, losses: FloatArray) -> _Step:
        judged = self._judge.judge(draw.choices)
        return _Step(draw=draw, losses=losses, penalty=judged.penalty, violation=judged.violation)

    def _draw(self, n: int, rng: np.random.Generator) -> _Draw:
        theta = self.theta
        owners = categorical.systematic_owners(self.alpha, n, rng)  # (n,)
        choices = categorical.sample(theta[owners], rng)  # (n, D, C) -> (n, D)
        wasted = np.flatnonzero(~self._affordable(choices, owners))
        for _ in range(MAX_REDRAWS):
            if wasted.size == 0:
                break
            if self.estimator == "importance":
                # from the whole mixture, not from the same p_k: so accepted draws follow q, cut to A
                owners[wasted] = rng.choice(len(self.alpha), size=wasted.size, p=self.alpha)
            choices[wasted] = categorical.sample(theta[owners[wasted]], rng)
            wasted = wasted[~self._affordable(choices[wasted], owners[wasted])]
        log_q = log_mixture(categorical.log_probability(theta, choices), self.alpha)
        return _Draw(choices=choices, owners=owners, log_q=log_q)

    def _affordable(self, choices: IntArray, owners: IntArray) -> BoolArray:
        """Return (n,): can some profile afford it, within its mask; for "independent", can its own?"""
        if not self._judge.has_caps:  # what p_k draws lies in its own mask
            return np.ones(len(choices), dtype=np.bool_)
        feasible = self._judge.judge(choices).violation == 0.0  # (K, n)
        by_profile = feasible & categorical.within(self.mask, choices)
        affordable: BoolArray = by_profile.any(axis=0)
        if self.estimator == "independent":
            affordable = by_profile[owners, np.arange(len(owners))]
        return affordable

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to continue bit by bit, as plain lists and numbers."""
        return {
            "num_steps": self.num_steps,
            "distributions": [asng.state_dict() for asng in self._asng],
            "held": list(self._held),
            "recent": [{**_draw_state(step.draw), "losses": step.losses.tolist()} for step in self._recent],
            "asked": _draw_state(self._asked) if self._asked is not None else None,
            "archive": self.archive.state_dict(),
            "diagnostics": asdict(self.diagnostics) if self.diagnostics is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`. Raises ValueError when it belongs to another problem."""
        if len(state["distributions"]) != len(self._asng):
            raise ValueError(
                f"state holds {len(state['distributions'])} distributions; expected {len(self._asng)}"
            )
        for asng, row in zip(self._asng, state["distributions"], strict=True):
            asng.load_state_dict(row)
        self.num_steps = int(state["num_steps"])
        self._held = [int(held) for held in state["held"]]
        self._recent.clear()
        for row in state["recent"]:
            self._recent.append(self._evaluated(_draw_of(row), np.array(row["losses"], dtype=np.float64)))
        self._asked = _draw_of(state["asked"]) if state["asked"] is not None else None
        self.archive.load_state_dict(state["archive"])
        found = state["diagnostics"]
        self.diagnostics = (
            Diagnostics(**{key: tuple(values) for key, values in found.items()})
            if found is not None
            else None
        )


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


def _draw_state(draw: _Draw) -> dict[str, Any]:
    return {"choices": draw.choices.tolist(), "owners": draw.owners.tolist(), "log_q": draw.log_q.tolist()}


def _draw_of(state: dict[str, Any]) -> _Draw:
    return _Draw(
        choices=np.array(state["choices"], dtype=np.int64),
        owners=np.array(state["owners"], dtype=np.int64),
        log_q=np.array(state["log_q"], dtype=np.float64),
    )
