"""Accuracy, balance of labels and weights of classes, in NumPy. Accuracy is in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nasdeploy.errors import DataError

UNBALANCED_RATIO = 1.5

ClassIndices = npt.NDArray[np.integer]
"""Labels or predicted labels, shape (n,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of correct predictions.

    top1: of all. per_class: of each class, None for a class without labels. macro: mean over the classes with
    labels.
    """

    top1: float
    macro: float
    per_class: tuple[float | None, ...]


def accuracy_metrics(predictions: ClassIndices, labels: ClassIndices, *, num_classes: int) -> Accuracy:
    """Return the accuracies of ``predictions`` (n,). Raises DataError for wrong shapes or labels."""
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise DataError(
            f"accuracy: predictions of shape {predictions.shape}, labels of shape {labels.shape}; "
            "expected both (n,) with n > 0"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"accuracy: labels from {labels.min()} to {labels.max()}; expected 0 to {num_classes - 1}"
        )
    correct = predictions == labels
    totals = np.bincount(labels, minlength=num_classes)
    hits = np.bincount(labels[correct], minlength=num_classes)
    per_class = tuple(float(h / t) if t else None for h, t in zip(hits, totals, strict=True))
    return Accuracy(
        top1=float(correct.mean()),
        macro=float(np.mean([share for share in per_class if share is not None])),
        per_class=per_class,
    )


def is_unbalanced(labels: ClassIndices) -> bool:
    """Whether the most frequent class has over 1.5 times the images of the rarest that occurs."""
    _, counts = np.unique(labels, return_counts=True)
    return bool(len(counts) and counts.max() > UNBALANCED_RATIO * counts.min())


def class_weights(labels: ClassIndices, num_classes: int) -> npt.NDArray[np.float32]:
    """Return a weight for each class (num_classes,) with which all classes count alike in a mean over ``labels`` (n,).

    n / (C * n_c) for a class of n_c labels, as scikit-learn's ``class_weight="balanced"``: C is the number of classes
    that occur, so that the weights of all labels have the mean 1. 0 for a class without labels.
    Raises DataError for wrong shapes or labels.
    """
    if labels.ndim != 1 or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"class weights: labels of shape {labels.shape}; expected (n,) with n > 0, all of 0 to {num_classes - 1}"
        )
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.zeros(num_classes, np.float32)
    occurring = counts > 0
    weights[occurring] = len(labels) / (occurring.sum() * counts[occurring])
    return weights
