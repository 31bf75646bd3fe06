"""From distributions to what ships: finalists on the whole validation split. [search.md, Hard caps]"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nasdeploy.costs.joint_caps import JointCaps
from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.data import Split
from nasdeploy.networks import Supernet
from nasdeploy.optim.acquisition import loss_model
from nasdeploy.optim.gaussian_process import Posterior
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.selection import paired_errors, propose, settled
from nasdeploy.optim.strategy import Strategy
from nasdeploy.optim.surrogate import Surrogate
from nasdeploy.searchers.seats import Ranked
from nasdeploy.spaces.base import Architecture, to_architectures
from nasdeploy.training.evaluation import losses_and_accuracy
from nasdeploy.training.recalibration import recalibrate


class LossModel(Surrogate, Protocol):
    """The seat of the model that a selection rests on: it knows how sure it is."""

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean (m,) and covariance (m, m) of the losses of ``choices`` (m, D)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Distribution ``k`` of ``strategy``, with all losses that it knows."""

    strategy: Strategy
    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """An architecture with its recalibrated loss and accuracy on the whole validation split.

    losses: (B,) of the images, whose mean is the loss.
    """

    architecture: Architecture
    loss: float
    accuracy: float
    losses: FloatArray


class FinalistJudge:
    """Evaluates stand-alone copies of supernet architectures, each once for all profiles.

    images: gives the images that an architecture is recalibrated with and the validation split, at its size.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        images: Callable[[Architecture], tuple[Tensor, Split]],
        class_weights: Tensor | None = None,
    ) -> None:
        self._supernet = supernet
        self._images = images
        self._class_weights = class_weights
        self._known: dict[Architecture, Finalist] = {}

    def judge(self, architecture: Architecture) -> Finalist:
        """Return the finalist of ``architecture``."""
        if architecture not in self._known:
            network, valid = self.network(architecture), self._images(architecture)[1]
            losses, accuracy = losses_and_accuracy(
                network, valid.images, valid.labels, class_weights=self._class_weights
            )
            self._known[architecture] = Finalist(
                architecture=architecture,
                loss=float(losses.mean()),
                accuracy=accuracy,
                losses=losses.numpy().astype(np.float64),
            )
        return self._known[architecture]

    def network(self, architecture: Architecture) -> nn.Module:
        """Return a recalibrated copy of ``architecture`` with the shared weights, on their device."""
        network = self._supernet.extract(architecture).to(memory_format=torch.channels_last)
        recalibrate(network, self._images(architecture)[0])
        return network


class SupernetOutcome:
    """A :class:`nasdeploy.searchers.seats.SearchOutcome`: shared weights and K distributions.

    sources: by profile. make_model: returns a model of the losses, which knows nothing yet, for some objectives; one
    is fitted for each strategy. seed: of the draws of candidates. scaled: the decision that is solved for
    (:func:`nasdeploy.optim.selection.widened`), None where there is none.
    """

    def __init__(
        self,
        *,
        judge: FinalistJudge,
        sources: Mapping[str, Source],
        make_model: Callable[[Sequence[Objective]], LossModel],
        seed: int,
        scaled: int | None = None,
    ) -> None:
        self._judge, self._sources = judge, sources
        self._make_model, self._seed, self._scaled = make_model, seed, scaled
        self._models: dict[int, LossModel] = {}

    def candidates(self, profile: str, *, objective: Objective) -> IntArray:
        """Return feasible architectures (m, D), the most promising first."""
        source = self._sources[profile]
        return candidates(
            source.strategy,
            source.k,
            objective=objective,
            surrogate=self.model(source.strategy),
            seed=self._seed,
            scaled=self._scaled,
        )

    def ranked(self, profile: str, found: IntArray, *, objective: Objective, size: int) -> list[Ranked]:
        """Return at most ``size`` of ``found`` (m, D), evaluated with the shared weights, the best first."""
        strategy = self._sources[profile].strategy
        finalists = rank_finalists(
            found,
            judge=self._judge,
            objective=objective,
            surrogate=self.model(strategy),
            evaluated=strategy.archive.choices,
            size=size,
        )
        return [Ranked(architecture=f.architecture, loss=f.loss, accuracy=f.accuracy) for f in finalists]

    def trained(self, architecture: Architecture) -> nn.Module:
        """Return a recalibrated copy of ``architecture`` with the shared weights, on their device."""
        return self._judge.network(architecture)

    def model(self, strategy: Strategy) -> LossModel:
        """Return the model of the losses that ``strategy`` knows: fitted once."""
        if id(strategy) not in self._models:
            self._models[id(strategy)] = fit_surrogate(strategy, self._make_model(strategy.objectives))
        return self._models[id(strategy)]


def fit_surrogate(strategy: Strategy, model: LossModel | None = None) -> LossModel:
    """Return a model of the losses seen during the search, ``model`` or the default one: architecture to loss."""
    surrogate = model or loss_model(strategy.num_candidates, strategy.objectives)
    archive = strategy.archive
    if len(archive.losses):
        surrogate.fit(archive.choices, archive.losses, archive.steps)
    return surrogate


def candidates(
    optimizer: Strategy,
    k: int,
    *,
    objective: Objective,
    surrogate: Surrogate,
    seed: int,
    scaled: int | None = None,
) -> IntArray:
    """Return the feasible candidates of profile ``k`` (m, D), the most promising first.

    objective: that of the search, or one with tighter caps after a measurement broke one. scaled: the decision that is
    solved for. What comes nearest to
    these is among the starts, so that caps which hardly any architecture keeps have a candidate all the same.
    """
    seen = optimizer.archive.choices
    if objective.caps:
        rows = zip(optimizer.mask[k], optimizer.num_candidates, strict=True)
        mask = tuple(tuple(row[:count].tolist()) for row, count in rows)
        nearest = JointCaps(objective.tables, objective.caps, mask).nearest()
        seen = np.concatenate([seen, np.array([nearest.choices])])
    return propose(
        theta=optimizer.theta[k],
        mask=optimizer.mask[k],
        objective=objective,
        seen=seen,
        surrogate=surrogate,
        rng=np.random.default_rng([seed, k]),
        scaled=scaled,
    )


def rank_finalists(
    found: IntArray,
    *,
    judge: FinalistJudge,
    objective: Objective,
    surrogate: LossModel,
    evaluated: IntArray,
    size: int,
) -> list[Finalist]:
    """Evaluate the first ``size`` of the candidates (m, D); return them by f_k = L + weighted costs, best first.

    L is what the validation images say of a finalist and what the search says, each by its precision. The best of those
    ``evaluated`` (N, D) in the search is always one: the model alone may be wrong about all that it has not seen.
    """
    chosen = found[:size].copy()
    known = {choices.tobytes() for choices in evaluated}
    best_known = next((choices for choices in found if choices.tobytes() in known), None)
    if best_known is not None and not (chosen == best_known).all(axis=1).any():
        chosen[-1] = best_known
    finalists = [judge.judge(architecture) for architecture in to_architectures(chosen)]
    posterior = surrogate.posterior(chosen)
    losses = settled(
        expected=posterior.mean,
        covariance=posterior.covariance,
        measured=np.array([finalist.loss for finalist in finalists]),
        errors=paired_errors(np.stack([finalist.losses for finalist in finalists])),
    )
    order = np.argsort(losses + objective.penalty(chosen), kind="stable")
    return [finalists[i] for i in order]
