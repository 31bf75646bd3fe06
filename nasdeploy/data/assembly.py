"""From labelled images to a dataset: the checks and the stratified, seeded division into splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from nasdeploy.data.contents import LabelledImages, Labels
from nasdeploy.data.types import Dataset, Preprocessing, Split
from nasdeploy.errors import ConfigError, DataError

TEST_FRACTION = 0.15
"""Share of each class that becomes the test split where the data brings none."""

# Streams of the seed: that valid/ exists must not change which images become the test split, nor the reverse.
TEST_STREAM, VALID_STREAM = 0, 1


def assemble_dataset(
    *,
    name: str,
    source: str,
    class_names: Sequence[str],
    train: LabelledImages | Split,
    valid: LabelledImages | Split | None = None,
    test: LabelledImages | Split | None = None,
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
    splits = {
        part: _checked_split(images, where=f"{source}: {part}", num_classes=len(class_names))
        for part, images in given.items()
        if images is not None
    }
    _check_same_size(splits, source)
    _check_class_sizes(splits["train"], class_names, source=source, num_parts=4 - len(splits))
    missing = {
        part: (fraction, np.random.default_rng([seed, stream]))
        for part, fraction, stream in (
            ("test", TEST_FRACTION, TEST_STREAM),
            ("valid", valid_fraction, VALID_STREAM),
        )
        if part not in splits
    }
    if missing:
        splits |= _divide(splits["train"], missing)
    channels, size = splits["train"].images.shape[1:3]
    return Dataset(
        name=name,
        **splits,
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


def _divide(whole: Split, missing: dict[str, tuple[float, np.random.Generator]]) -> dict[str, Split]:
    """Return the parts, each a fraction of what those before it left, and "train", the rest.

    Images are copied once, at the end: in memory there is room for two copies and not for three.
    """
    labels = whole.labels.numpy()
    rest = np.arange(len(labels))
    rows = {}
    for part, (fraction, rng) in missing.items():
        stays, taken = stratified_division(labels[rest], fraction, rng)
        rows[part], rest = rest[taken], rest[stays]
    return {part: whole.part(chosen) for part, chosen in {**rows, "train": rest}.items()}


def _checked_split(given: LabelledImages | Split, *, where: str, num_classes: int) -> Split:
    split = given if isinstance(given, Split) else _as_split(given, where)
    count, channels, height, width = split.images.shape
    if not count or height != width or channels not in (1, 3):
        raise DataError(
            f"{where}: images of shape {(count, height, width, channels)}; expected (N, size, size, 1 or 3), N > 0"
        )
    wrong = torch.nonzero((split.labels < 0) | (split.labels >= num_classes))
    if len(wrong):
        index = int(wrong[0])
        raise DataError(
            f"{where}: label {int(split.labels[index])} of image {index} is out of range; "
            f"expected 0 to {num_classes - 1}"
        )
    return split


def _as_split(labelled: LabelledImages, where: str) -> Split:
    shape, labels = labelled.images.shape, labelled.labels
    if len(shape) != 4:
        raise DataError(f"{where}: images of shape {shape}; expected (N, size, size, 1 or 3)")
    if labels.shape != shape[:1]:
        raise DataError(f"{where}: {len(labels)} labels for {shape[0]} images; expected one each")
    images = labelled.images.transpose(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    return Split(_as_tensor(images), _as_tensor(labels))


def _as_tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    # Writable: torch has no other tensors, and warns of an array that is not.
    return torch.from_numpy(np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"]))


def _check_same_size(splits: dict[str, Split], source: str) -> None:
    shapes = {part: (*split.images.shape[2:], split.images.shape[1]) for part, split in splits.items()}
    for part, shape in shapes.items():
        if shape != shapes["train"]:
            raise DataError(f"{source}: {part}: images of {shape}; expected {shapes['train']} as in train")


def _check_classes(source: str, class_names: Sequence[str]) -> None:
    if len(class_names) < 2:
        raise DataError(f"{source}: {len(class_names)} class ({', '.join(class_names)}); expected at least 2")
    if len(set(class_names)) < len(class_names):
        twice = next(name for name in class_names if list(class_names).count(name) > 1)
        raise DataError(f"{source}: class name '{twice}' occurs more than once; expected distinct names")


def _check_class_sizes(train: Split, class_names: Sequence[str], *, source: str, num_parts: int) -> None:
    for label, count in enumerate(torch.bincount(train.labels, minlength=len(class_names)).tolist()):
        if count < num_parts:
            raise DataError(
                f"{source}: class '{class_names[label]}' has {count} training images; "
                f"expected at least {num_parts}: one for each split that is made of them"
            )
