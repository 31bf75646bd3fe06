"""Batches from splits that lie in memory or in a file, without worker processes.

A batch is (images, labels) on the split's device: float32 (B, C, H, W), 0 to 255, channels_last; int64 (B,).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from nasdeploy.data.augment import Augmentation
from nasdeploy.data.stored import StoredImages, take
from nasdeploy.data.types import Split
from nasdeploy.errors import ConfigError, RunFolderError

Batch = tuple[Tensor, Tensor]


class TrainingBatches(Iterator[Batch]):
    """Endless batches, in a new order every epoch; what does not fill a batch at its end is dropped.

    The state is tensors only, and covers ``generator``: after :meth:`load_state_dict` the same batches
    follow, with the same augmentation, wherever the order was interrupted.
    """

    def __init__(self, split: Split, *, batch_size: int, generator: Generator, augment: Augmentation) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}; expected at least 1")
        if not len(split):
            raise ConfigError("training batches: the split has no images; expected at least one")
        self._split = split
        self._batch_size = min(batch_size, len(split))
        self._generator = generator
        self._augment = augment
        self._set_order(torch.empty(0, dtype=torch.int64))
        self._position = 0

    def __next__(self) -> Batch:
        if self._position + self._batch_size > len(self._order):
            self._set_order(torch.randperm(len(self._split), generator=self._generator))
            self._position = 0
        batch = slice(self._position, self._position + self._batch_size)
        self._position += self._batch_size
        images = self._augment(take(self._split.images, self._image_order[batch]), self._generator)
        return as_input(images), self._split.labels[self._label_order[batch]]

    def _set_order(self, order: Tensor) -> None:
        """Take ``order`` (N,), on the CPU, to where it is used: once an epoch, so that no batch waits for a device."""
        self._order = order
        self._label_order = order.to(self._split.labels.device)
        self._image_order = order if isinstance(self._split.images, StoredImages) else self._label_order

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's state, the order of the epoch and the position in it."""
        return {
            "generator": self._generator.get_state(),
            "order": self._order.clone(),
            "position": torch.tensor(self._position),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where ``state`` was taken. Raises RunFolderError if it is of a split of another size."""
        order = state["order"]
        if len(order) not in (0, len(self._split)):
            raise RunFolderError(
                f"stored batches: their order is of {len(order)} images; expected {len(self._split)}, as in "
                "the training split; use the data and seed of the interrupted run"
            )
        self._generator.set_state(state["generator"])
        self._set_order(order.cpu())
        self._position = int(state["position"])


def training_batches(
    split: Split, *, batch_size: int, generator: Generator, augment: Augmentation
) -> TrainingBatches:
    """Return endless shuffled batches of ``batch_size`` images, or of the whole split if that is smaller.

    ``generator`` (on the CPU) decides order and augmentation. Raises ConfigError for a batch size below 1.
    """
    return TrainingBatches(split, batch_size=batch_size, generator=generator, augment=augment)


def as_input(images: Tensor) -> Tensor:
    """Return (B, C, H, W) as the networks take it: float32, channels_last, values unchanged."""
    return images.to(dtype=torch.float32, memory_format=torch.channels_last)
