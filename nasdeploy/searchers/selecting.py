"""From distributions to what ships: finalists on the whole validation split. [search.md, Hard caps]"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nasdeploy.costs.table import IntArray
from nasdeploy.data import Split
from nasdeploy.networks import Supernet
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.selection import propose
from nasdeploy.optim.surrogate import RidgeSurrogate
from nasdeploy.searchers.oneshot import to_architectures
from nasdeploy.spaces.base import Architecture
from nasdeploy.training.evaluation import loss_and_accuracy
from nasdeploy.training.recalibration import recalibrate


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """An architecture with its recalibrated loss and accuracy on the whole validation split."""

    architecture: Architecture
    loss: float
    accuracy: float


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
            loss, accuracy = loss_and_accuracy(
                network, valid.images, valid.labels, class_weights=self._class_weights
            )
            self._known[architecture] = Finalist(architecture=architecture, loss=loss, accuracy=accuracy)
        return self._known[architecture]


def fit_surrogate(optimizer: PooledOptimizer) -> RidgeSurrogate:
    """Return a model of the losses seen during the search: architecture to loss."""
    surrogate = RidgeSurrogate(optimizer.num_candidates)
    archive = optimizer.archive
    if len(archive.losses):
        surrogate.fit(archive.choices, archive.losses, archive.steps)
    return surrogate


def candidates(
    optimizer: PooledOptimizer, k: int, *, objective: Objective, surrogate: RidgeSurrogate, seed: int
) -> IntArray:
    """Return the feasible candidates of profile ``k`` (m, D), the most promising first.

    objective: that of the search, or one with tighter caps after a measurement broke one.
    """
    return propose(
        theta=optimizer.theta[k],
        mask=optimizer.mask[k],
        objective=objective,
        seen=optimizer.archive.choices,
        surrogate=surrogate,
        rng=np.random.default_rng([seed, k]),
    )


def rank_finalists(
    found: IntArray, *, judge: FinalistJudge, objective: Objective, size: int
) -> list[Finalist]:
    """Evaluate the first ``size`` of the candidates (m, D); return them by f_k = L + weighted costs, best first."""
    finalists = [judge.judge(architecture) for architecture in to_architectures(found[:size])]
    penalties = objective.penalty(found[:size])
    order = np.argsort(np.array([f.loss for f in finalists]) + penalties, kind="stable")
    return [finalists[i] for i in order]
