"""From labelled arrays to a dataset: the checks and the stratified, seeded division into splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nasdeploy.data.types import Dataset, Preprocessing, Split
from nasdeploy.errors import ConfigError, DataError

TEST_FRACTION = 0.15
"""Share of each class that becomes the test split where the data brings none."""

# Streams of the seed: that valid/ exists must not change which images become the test split, nor the reverse.
TEST_STREAM, VALID_STREAM = 0, 1

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledImages:
    """Images uint8 (N, H, W, C) with labels int64 (N,), in a fixed order."""

    images: npt.NDArray[np.uint8]
    labels: Labels

    def part(self, indices: npt.NDArray[np.intp]) -> LabelledImages:
        """Return the images at ``indices``."""
        return LabelledImages(images=self.images[indices], labels=self.labels[indices])


def assemble_dataset(
    *,
    name: str,
    source: str,
    class_names: Sequence[str],
    train: LabelledImages,
    valid: LabelledImages | None = None,
    test: LabelledImages | None = None,
    seed: int,
    valid_fraction: float,
) -> Dataset:
    """Return the dataset, ``test`` and ``valid`` taken from ``train`` where they are None.

    Test is taken first (:data:`TEST_FRACTION`), then ``valid_fraction`` of the rest, both class by class.
    Raises DataError for unusable labels or images, ConfigError for a wrong fraction.
    """
    if not 0.0 < valid_fraction < 1.0:
        raise ConfigError(
            f"valid_fraction = {valid_fraction}; expected a number between 0 and 1, such as 0.15"
        )
    _check_classes(source, class_names)
    given = {"train": train, "valid": valid, "test": test}
    for part, labelled in given.items():
        if labelled is not None:
            _check_part(labelled, reference=train, where=f"{source}: {part}", num_classes=len(class_names))
    _check_class_sizes(
        train.labels, class_names, source=source, num_parts=1 + (valid is None) + (test is None)
    )
    if test is None:
        train, test = _divide(train, TEST_FRACTION, np.random.default_rng([seed, TEST_STREAM]))
    if valid is None:
        train, valid = _divide(train, valid_fraction, np.random.default_rng([seed, VALID_STREAM]))
    size, channels = train.images.shape[2:]
    return Dataset(
        name=name,
        train=_split(train),
        valid=_split(valid),
        test=_split(test),
        class_names=tuple(class_names),
        source=source,
        preprocessing=Preprocessing(
            image_size=size, channels=channels, colour="grey" if channels == 1 else "rgb"
        ),
    )


def stratified_division(
    labels: Labels, fraction: float, rng: np.random.Generator
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return (indices that stay, indices taken), both ascending, for labels (N,).

    Of every class the rounded ``fraction`` is taken, but at least one image, and at least one stays; a
    class of one image cannot be divided.
    """
    taken = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken.append(rng.permutation(members)[:count])
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.concatenate(taken)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _divide(
    whole: LabelledImages, fraction: float, rng: np.random.Generator
) -> tuple[LabelledImages, LabelledImages]:
    stays, taken = stratified_division(whole.labels, fraction, rng)
    return whole.part(stays), whole.part(taken)


def _split(labelled: LabelledImages) -> Split:
    images = np.ascontiguousarray(labelled.images.transpose(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)
    return Split(torch.from_numpy(images), torch.from_numpy(np.ascontiguousarray(labelled.labels)))


def _check_classes(source: str, class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise DataError(f"{source}: {len(class_names)} class ({', '.join(class_names)}); expected at least 2")
    if len(set(class_names)) < len(class_names):
        twice = next(name for name in class_names if list(class_names).count(name) > 1)
        raise DataError(f"{source}: class name '{twice}' occurs more than once; expected distinct names")


def _check_part(part: LabelledImages, *, reference: LabelledImages, where: str, num_classes: int) -> None:
    shape, labels = part.images.shape, part.labels
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3):
        raise DataError(f"{where}: images of shape {shape}; expected (N, size, size, 1 or 3)")
    if shape[1:] != reference.images.shape[1:]:
        raise DataError(f"{where}: images of {shape[1:]}; expected {reference.images.shape[1:]} as in train")
    if labels.shape != shape[:1] or not len(labels):
        raise DataError(
            f"{where}: {len(labels)} labels for {shape[0]} images; expected one each, at least one"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is out of range; "
            f"expected 0 to {num_classes - 1}"
        )


def _check_class_sizes(labels: Labels, class_names: Sequence[str], *, source: str, num_parts: int) -> None:
    for label, count in enumerate(np.bincount(labels, minlength=len(class_names))):
        if count < num_parts:
            raise DataError(
                f"{source}: class '{class_names[label]}' has {count} training images; "
                f"expected at least {num_parts}: one for each split that is made of them"
            )
