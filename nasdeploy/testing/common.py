"""What several contracts work with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import getstate

import numpy as np
import torch
from torch import Tensor

from nasdeploy.exporters import ExportedModel, Exporter
from nasdeploy.exporters.opsets import DEFAULT_OPSET
from nasdeploy.networks import Network, Normalise, build_network
from nasdeploy.spaces import Architecture, SearchSpace
from nasdeploy.training.recalibration import recalibrate


def check_global_generators(action: Callable[[], object]) -> None:
    """Raise AssertionError if ``action`` draws from a generator that the whole process shares."""
    before = _global_states()
    action()
    used = [name for name, state in _global_states().items() if state != before[name]]
    assert not used, f"the global generator of {', '.join(used)} was used; expected one made from the seed"


def _global_states() -> dict[str, object]:
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  # looked at, not drawn from
    return {
        "random": getstate(),
        "NumPy": (numpy["key"].tobytes(), numpy["pos"]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def plain_normalise(space: SearchSpace) -> Normalise:
    """Return a normalisation of pixels that are about 50 to 190."""
    channels = space.image_shape[0]
    return Normalise((120.0,) * channels, (70.0,) * channels)


def plain_network(space: SearchSpace, architecture: Architecture, images: Tensor | None = None) -> Network:
    """Return a network in evaluation mode, its batch norms with the statistics of ``images`` (N, C, H, W)."""
    network = build_network(space, architecture, plain_normalise(space))
    if images is not None:
        recalibrate(network, images)
    return network.eval()


def export(
    exporter: Exporter,
    network: Network,
    path: Path,
    *,
    image_shape: tuple[int, int, int] = (1, 28, 28),
    opset: int = DEFAULT_OPSET,
    batch_size: int | None = None,
) -> ExportedModel:
    """Export ``network`` to ``path``, with two entries of metadata."""
    metadata = {"nasdeploy.seed": "3", "nasdeploy.labels": '["höhe", "b"]'}
    return exporter.export(
        network, image_shape=image_shape, path=path, opset=opset, batch_size=batch_size, metadata=metadata
    )
