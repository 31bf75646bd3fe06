"""From distributions to what ships: finalists on the whole validation split. [search.md, Hard caps]"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nasdeploy.costs.joint_caps import JointCaps
from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.data import Split
from nasdeploy.networks import Supernet
from nasdeploy.optim.acquisition import loss_model
from nasdeploy.optim.gaussian_process import GaussianProcess
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.selection import paired_errors, propose, settled
from nasdeploy.optim.surrogate import Surrogate
from nasdeploy.searchers.oneshot import to_architectures
from nasdeploy.spaces.base import Architecture
from nasdeploy.training.evaluation import losses_and_accuracy
from nasdeploy.training.recalibration import recalibrate


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
            network = self._supernet.extract(architecture).to(memory_format=torch.channels_last)
            recalibration_images, valid = self._images(architecture)
            recalibrate(network, recalibration_images)
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


def fit_surrogate(optimizer: PooledOptimizer) -> GaussianProcess:
    """Return a model of the losses seen during the search: architecture to loss."""
    surrogate = loss_model(optimizer.num_candidates, optimizer.objectives)
    archive = optimizer.archive
    if len(archive.losses):
        surrogate.fit(archive.choices, archive.losses, archive.steps)
    return surrogate


def candidates(
    optimizer: PooledOptimizer, k: int, *, objective: Objective, surrogate: Surrogate, seed: int
) -> IntArray:
    """Return the feasible candidates of profile ``k`` (m, D), the most promising first.

    objective: that of the search, or one with tighter caps after a measurement broke one. What comes nearest to
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
    )


def rank_finalists(
    found: IntArray,
    *,
    judge: FinalistJudge,
    objective: Objective,
    surrogate: GaussianProcess,
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
