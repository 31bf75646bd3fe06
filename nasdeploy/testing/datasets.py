"""The contract of a data set.

Shapes: N images, C channels, H = W pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from nasdeploy.data import Dataset, Split
from nasdeploy.data.stored import image_chunks
from nasdeploy.testing.common import check_global_generators


class DatasetContract:
    """A loader of images: implement :meth:`load`. All tests load with ``image_size``, some with :attr:`other_sizes`.

    brings_test_split: whether the data itself says what its test images are. max_shared_images: how many images of
    one split may be equal, pixel by pixel, to one of another; data with duplicates of its own needs more than 0.
    """

    image_size: int | None = None
    other_size: int = 32
    brings_test_split: bool = True
    max_shared_images: int = 0

    def load(self, *, image_size: int | None, seed: int, valid_fraction: float) -> Dataset:
        """Return the dataset, as :class:`nasdeploy.data.DatasetLoader` does."""
        raise NotImplementedError

    @property
    def other_sizes(self) -> tuple[int, int]:
        """Sizes in pixels to ask for: two, because one could be the size that the images have anyway."""
        return self.other_size, self.other_size + 4

    def _load_at(self, size: int | None) -> Dataset:
        return self.load(image_size=size, seed=0, valid_fraction=0.15)

    def _load(self, *, seed: int = 0) -> Dataset:
        return self.load(image_size=self.image_size, seed=seed, valid_fraction=0.15)

    def test_images_are_square_and_uint8(self) -> None:
        for name, split in _splits(self._load()):
            _check_images(name, split, size=None)

    def test_splits_have_images_of_one_shape(self) -> None:
        shapes = {name: tuple(split.images.shape) for name, split in _splits(self._load())}
        assert min(shape[0] for shape in shapes.values()) > 0, f"a split is empty: {shapes}"
        assert len({shape[1:] for shape in shapes.values()}) == 1, f"splits of different shapes: {shapes}"

    def test_labels_are_those_of_the_classes(self) -> None:
        dataset = self._load()
        names = dataset.class_names
        assert len(names) >= 2, f"class names {names}: expected at least 2"
        assert len(set(names)) == len(names), f"class names {names}: expected distinct ones"
        for name, split in _splits(dataset):
            low, high = int(split.labels.min()), int(split.labels.max())
            assert 0 <= low <= high < len(names), f"{name}: labels {low} to {high} for {len(names)} classes"

    def test_every_class_has_training_images(self) -> None:
        dataset = self._load()
        counts = torch.bincount(dataset.train.labels, minlength=dataset.num_classes).tolist()
        empty = [name for name, count in zip(dataset.class_names, counts, strict=False) if count == 0]
        assert not empty, f"train: no images of {', '.join(empty)}"

    def test_splits_share_no_images(self) -> None:
        counts: Counter[bytes] = Counter()
        for _, split in _splits(self._load()):
            counts.update(set(_digests(split)))
        shared = sum(count > 1 for count in counts.values())
        assert shared <= self.max_shared_images, f"{shared} images are in more than one split"

    def test_one_seed_gives_one_dataset(self) -> None:
        first, second = self._load(seed=3), self._load(seed=3)
        assert first.fingerprint() == second.fingerprint(), "seed 3 gave two different datasets"

    def test_another_seed_leaves_the_test_split_as_it_was(self) -> None:
        if self.brings_test_split:
            first, second = self._load(seed=0).test, self._load(seed=1).test
            same = torch.equal(first.labels, second.labels) and list(_digests(first)) == list(
                _digests(second)
            )
            assert same, (
                "the test split depends on the seed; brings_test_split = False where the data has none"
            )

    def test_images_have_the_size_that_was_asked_for(self) -> None:
        for size in self.other_sizes:
            dataset = self._load_at(size)
            for name, split in _splits(dataset):
                _check_images(name, split, size=size)
            stated = dataset.preprocessing.image_size
            assert stated == size, f"preprocessing.image_size = {stated}; expected {size}"

    def test_the_division_does_not_depend_on_the_size(self) -> None:
        """A run over several sizes loads the images at each, and has to find the same ones in every split."""
        first = _labels(self._load_at(self.image_size))
        for size in self.other_sizes:
            for name, labels in _labels(self._load_at(size)).items():
                assert torch.equal(labels, first[name]), (
                    f"{name}: other labels with image_size = {size} than with {self.image_size}; expected the same "
                    "images, in the same order, at every size"
                )

    def test_loading_draws_from_no_global_generator(self) -> None:
        check_global_generators(self._load)


def _splits(dataset: Dataset) -> list[tuple[str, Split]]:
    return [("train", dataset.train), ("valid", dataset.valid), ("test", dataset.test)]


def _labels(dataset: Dataset) -> dict[str, Tensor]:
    return {name: split.labels for name, split in _splits(dataset)}


def _digests(split: Split) -> Iterator[bytes]:
    """Yield a hash of each image; they may lie in a file that does not fit into memory."""
    for chunk in image_chunks(split.images):
        for image in chunk.cpu().numpy():
            yield hashlib.sha256(image.tobytes()).digest()


def _check_images(name: str, split: Split, *, size: int | None) -> None:
    shape, dtype = tuple(split.images.shape), split.images.dtype
    right = len(shape) == 4 and shape[1] in (1, 3) and shape[2] == shape[3] == (size or shape[2])
    wanted = "(N, 1 or 3, size, size)" if size is None else f"(N, 1 or 3, {size}, {size})"
    assert dtype == torch.uint8, f"{name}: {dtype}; expected torch.uint8"
    assert right, f"{name}: images of shape {shape}; expected {wanted}"
