"""A linear classifier on frozen features: ridge regression in closed form, or soft-max regression.

Notation: n images, d features, c classes. A = [F, 1] (n, d + 1): the features and a column of ones. All in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Literal["ridge", "softmax"]
HEADS: tuple[Head, ...] = ("ridge", "softmax")

CONSTANT = 1e-6
"""A column whose standard deviation is below this share of its root mean square is constant but for rounding."""

MAX_SOFTMAX_STEPS = 100
"""L-BFGS: the problem is convex; the top-1 error stands still long before."""


@torch.no_grad()
def standardised(train: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return both features, (n, d) and (m, d), with the mean and the standard deviation of ``train`` removed: float64.

    A constant column becomes 0. To a head with a penalty that is the same as dropping it, and no device has to be
    waited for, as it would be for the number of columns that are left.
    """
    train, valid = train.double(), valid.double()
    std, mean = torch.std_mean(train, dim=0, correction=0)  # (d,) each
    varies = std > CONSTANT * (std.square() + mean.square()).sqrt()
    scale = torch.where(varies, 1.0 / torch.where(varies, std, 1.0), 0.0)
    return (train - mean) * scale, (valid - mean) * scale


@torch.no_grad()
def ridge_weights(
    features: Tensor, targets: Tensor, *, ridge: float, image_weights: Tensor | None = None
) -> Tensor:
    """Return W (d + 1, c) = (AᵀA + λ diag(1, …, 1, 0))⁻¹ Aᵀ Y, the last row the bias, which is not penalised.

    features: (n, d) float64. targets: Y (n, c) float64. ridge: λ > 0. image_weights: v (n,) of the images, in
    AᵀVA and AᵀVY with V = diag(v); None: all 1. NaN where there is no solution: for features that are not finite.
    """
    augmented = _augmented(features)  # A (n, d + 1)
    weighted = augmented if image_weights is None else augmented * image_weights[:, None]
    gram = weighted.T @ augmented
    gram.diagonal()[:-1].add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(
        gram
    )  # unlike cholesky it does not wait for the device to raise
    return torch.where(failed == 0, torch.cholesky_solve(weighted.T @ targets, factor), torch.nan)


def softmax_weights(
    features: Tensor, labels: Tensor, *, num_classes: int, ridge: float, image_weights: Tensor | None = None
) -> Tensor:
    """Return W (d + 1, c) of least Σ v_i · cross entropy_i + λ/2 ‖W without its last row‖², found by L-BFGS from 0.

    features: (n, d) float64. labels: (n,) int64. ridge: λ > 0. image_weights: v (n,), None: all 1.
    """
    augmented = _augmented(features.detach())
    weights = features.new_zeros(augmented.shape[1], num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=MAX_SOFTMAX_STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        losses = F.cross_entropy(augmented @ weights, labels, reduction="none")
        total = losses.sum() if image_weights is None else losses @ image_weights
        # the mean over the images, so that tolerances do not depend on their number
        loss: Tensor = (total + 0.5 * ridge * weights[:-1].square().sum()) / len(labels)
        (weights.grad,) = torch.autograd.grad(loss, [weights])  # of nothing but the head
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


@torch.no_grad()
def predicted(features: Tensor, weights: Tensor) -> Tensor:
    """Return the classes (m,) that W (d + 1, c) gives ``features`` (m, d); -1, none, where a value is not finite."""
    logits = _augmented(features) @ weights
    return torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), -1)


def _augmented(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)
