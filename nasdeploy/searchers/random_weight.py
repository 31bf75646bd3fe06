"""Random-weight evaluation: the error of a linear head on the features of a network that nobody has trained.

Sources: Hu, Cheng, He, Lu et al., *Accelerating Multi-Objective NAS by Random-Weight Evaluation*, 2021, arXiv
2110.05242, and *Multi-objective NAS with Almost No Training*, EMO 2021, arXiv 2011.13591. What they leave open is
fixed here. It says how well an architecture's random features separate the classes, not how well it can be trained:
:data:`LIMITS`.

Notation: n training and m validation images, d features, c classes, S seeds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.data import Images, Split, StoredImages
from nasdeploy.data.stored import take
from nasdeploy.errors import ConfigError, DataError
from nasdeploy.networks import Normalise, build_network
from nasdeploy.searchers.evaluator import Scores
from nasdeploy.spaces.base import Architecture, SearchSpace
from nasdeploy.training.evaluation import predict
from nasdeploy.training.linear_head import Head, predicted, ridge_weights, softmax_weights, standardised
from nasdeploy.training.recalibration import MIN_IMAGES, recalibrate

LIMITS = (
    "It partly follows the number of parameters: compare networks of about the same size.",
    "Features of deep random networks collapse where no skip connection leads past a layer.",
    "Operations without weights are rated too high.",
    "It is a warm start and a check of plausibility: trained networks may rank otherwise.",
)
"""What a table of such errors has to say of itself."""

MIN_SEEDS = 2
MIN_TRAINING_IMAGES = 50
IMAGES_PER_FEATURE = 5
"""With fewer training images for each feature the head fits the noise of the images."""

CPU_BATCH_SIZE = 64
"""Images at once on a CPU: with more, what wide layers give out leaves its caches; up to 2.5 times slower."""

Splits = Callable[[Architecture], tuple[Split, Split]]
"""Gives the training and the validation images at the size that an architecture takes."""


class RandomWeightEvaluator:
    """Scores architectures of ``space`` by the top-1 error of a linear head; each is evaluated once a seed.

    The loss is the mean error on validation images over ``num_seeds`` draws of the weights, the standard error that
    of this mean over the draws. All architectures have common random numbers: in draw s the weights of a layer come
    from a generator that depends on s and on the layer's name alone, and the images are the same.

    images: the splits at the size of an architecture; ``num_images`` of each are drawn, the same at every size.
    ridge: λ of the head. class_weights: (num_classes,) of its fit and of the error, None: all 1. Runs on the device
    of the images. Raises ConfigError for fewer than two seeds.
    """

    def __init__(
        self,
        space: SearchSpace,
        normalise: Normalise,
        *,
        images: Splits,
        num_images: int = 5000,
        num_seeds: int = 4,
        ridge: float = 1.0,
        head: Head = "ridge",
        class_weights: Tensor | None = None,
    ) -> None:
        if num_seeds < MIN_SEEDS:
            raise ConfigError(
                f"search.random_weight.num_seeds = {num_seeds}; expected at least {MIN_SEEDS}, so that an error has "
                "a standard error"
            )
        self._space, self._normalise = space, normalise
        self._images, self._num_images = images, num_images
        self._num_seeds, self._ridge, self._head = num_seeds, ridge, head
        self._class_weights = class_weights
        self._drawn: dict[tuple[int, int], Sample] = {}
        self._known: dict[tuple[int, Architecture], tuple[float, float]] = {}

    def score(self, architectures: Sequence[Architecture], *, seed: int) -> Scores:
        """Return the scores of ``architectures`` (n). Raises ConfigError for a network without a linear layer."""
        for architecture in architectures:
            if (seed, architecture) not in self._known:
                errors = self._errors(architecture, seed)
                standard_error = float(errors.std(ddof=1) / np.sqrt(len(errors)))
                self._known[seed, architecture] = (float(errors.mean()), standard_error)
        rows = np.array([self._known[seed, a] for a in architectures]).reshape(-1, 2)
        return Scores(losses=rows[:, 0], errors=rows[:, 1])

    def _errors(self, architecture: Architecture, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the top-1 errors (S,); they cross from the device in one transfer."""
        drawn = self.sample(architecture, seed=seed)
        network = build_network(self._space, architecture, self._normalise)
        network = network.to(drawn.train_labels.device).to(memory_format=torch.channels_last)
        network.requires_grad_(requires_grad=False)
        found = []
        for s in range(self._num_seeds):
            draw_weights(network, seed=seed, draw=s)
            recalibrate(network, drawn.recalibration)
            found.append(
                head_error(
                    network,
                    drawn,
                    num_classes=self._space.num_classes,
                    ridge=self._ridge,
                    head=self._head,
                    class_weights=self._class_weights,
                )
            )
        return torch.stack(found).cpu().numpy()

    def sample(self, architecture: Architecture, *, seed: int) -> Sample:
        """Return the images that all architectures of one size are evaluated on: drawn once.

        Raises DataError for fewer than 50 training images.
        """
        key = seed, self._space.input_shape(architecture)[1]
        if key not in self._drawn:
            train, valid = self._images(architecture)
            if len(train) < MIN_TRAINING_IMAGES:
                raise DataError(
                    f"random-weight evaluation: {len(train)} training images; expected {MIN_TRAINING_IMAGES} or more"
                )
            generator = _generator(seed, "images")
            (train_images, train_labels), (valid_images, valid_labels) = (
                _part(split, self._num_images, generator) for split in (train, valid)
            )
            self._drawn[key] = Sample(
                train=train_images,
                train_labels=train_labels,
                valid=valid_images,
                valid_labels=valid_labels,
                recalibration=train_images[:MIN_IMAGES],
            )
        return self._drawn[key]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """The images of an evaluation, in random order, and their labels: n of ``train``, m of ``valid``.

    recalibration: the first of ``train``, from which the statistics of batch norms are recomputed.
    """

    train: Images
    train_labels: Tensor
    valid: Images
    valid_labels: Tensor
    recalibration: Tensor


def head_error(
    network: nn.Module,
    sample: Sample,
    *,
    num_classes: int,
    ridge: float,
    head: Head = "ridge",
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the top-1 error of a head on the features of ``network``, a float64 scalar still on the device.

    The network itself is not changed. ridge: λ of the head. class_weights: (c,) of its fit and of the error, None: all
    1. With more than n/5 features, so many of them are taken. An image with features that are not finite counts as
    wrong; where those of a training image are not, all do. Raises ConfigError for a network without a linear layer.
    """
    limit = len(sample.train_labels) // IMAGES_PER_FEATURE
    train, valid = standardised(
        *(spread(pooled_features(network, part), limit) for part in (sample.train, sample.valid))
    )
    labels = sample.train_labels
    by_image = None if class_weights is None else class_weights[labels].double()
    if head == "softmax":
        weights = softmax_weights(train, labels, num_classes=num_classes, ridge=ridge, image_weights=by_image)
    else:
        targets = F.one_hot(labels, num_classes).double()
        weights = ridge_weights(train, targets, ridge=ridge, image_weights=by_image)
    wrong = (predicted(valid, weights) != sample.valid_labels).double()
    if class_weights is None:
        return wrong.mean()
    by_image = class_weights[sample.valid_labels].double()
    return (wrong * by_image).sum() / by_image.sum()


@torch.no_grad()
def draw_weights(network: nn.Module, *, seed: int, draw: int) -> None:
    """Draw all weights of ``network``: normal, of variance 2 / fan_in (He et al. 2015); biases 0, γ 1, β 0.

    Statistics of batch norms are reset. The weights of a layer depend on ``seed``, ``draw``, the layer's name and its
    shape alone: layers that two architectures share are equal. Drawn on the CPU, so that every device has the same.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.zero_()
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            std = (2.0 / parameter[0].numel()) ** 0.5
            drawn = torch.empty(parameter.shape)
            drawn.normal_(0.0, std, generator=_generator(seed, f"{draw}/{name}"))
            parameter.copy_(drawn)


@torch.no_grad()
def pooled_features(network: nn.Module, images: Images) -> Tensor:
    """Return what the last linear layer of ``network`` takes in evaluation mode: (N, d), float32.

    images: (N, C, s, s), uint8 or float, 0..255. Raises ConfigError for a network without a linear layer.
    """
    linear = next(
        (module for module in reversed([*network.modules()]) if isinstance(module, nn.Linear)), None
    )
    if linear is None:
        raise ConfigError(
            "random-weight evaluation: the networks of this space have no linear layer (torch.nn.Linear); "
            "expected one that classifies, last"
        )
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].flatten(1).float())

    handle = linear.register_forward_pre_hook(keep)
    try:
        if linear.weight.device.type == "cpu":
            predict(network, images, batch_size=CPU_BATCH_SIZE)
        else:
            predict(network, images)
    finally:
        handle.remove()
    return torch.cat(found)


def spread(features: Tensor, limit: int) -> Tensor:
    """Return at most ``limit`` columns of ``features`` (n, d), evenly spread: they may come from several branches."""
    num = features.shape[1]
    if num <= limit:
        return features
    return features[:, np.linspace(0, num - 1, limit).round().astype(np.int64)]


def _part(split: Split, size: int, generator: torch.Generator) -> tuple[Images, Tensor]:
    """Return ``size`` random images, or all there are, and their labels; those in a file are not read for it."""
    order = torch.randperm(len(split), generator=generator)[:size]
    labels = split.labels[order.to(split.labels.device)]
    if isinstance(split.images, StoredImages):
        return split.images.select(order.numpy()), labels
    return take(split.images, order.to(split.images.device)), labels


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Return a fresh CPU generator for one purpose: no two draw from one stream."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))
