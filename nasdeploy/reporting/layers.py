"""An architecture as the chain of layers that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nasdeploy.errors import ConfigError
from nasdeploy.spaces import LayerSpec, SearchSpace, make_space

__all__ = ["chain_of", "space_of"]


def space_of(identity: Mapping[str, Any]) -> SearchSpace | None:
    """Return the search space of a run, None where it comes from a plug-in that is missing or has changed."""
    dataset, stored = identity["dataset"], identity["space"]
    channels, height, width = dataset["image_shape"]
    sizes = identity["settings"].get("image_size")
    try:
        space = make_space(
            stored["name"],
            (channels, height, width),
            dataset["num_classes"],
            image_sizes=tuple(sizes) if isinstance(sizes, list) else (),
        )
    except ConfigError:  # only the drawing of the chain is lost: the names of the candidates are still shown
        return None
    return space if space.fingerprint() == stored["fingerprint"] else None


def chain_of(space: SearchSpace | None, names: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """Return the slots of an architecture, input first, each with its layer; None without a space.

    Raises ConfigError for names that the space does not have.
    """
    if space is None:
        return None
    architecture = space.from_names(names)
    return [_row(slot.name, slot.layer(architecture)) for slot in space.slots]


def _row(slot: str, spec: LayerSpec | None) -> dict[str, Any]:
    if spec is None:
        return {"slot": slot, "kind": "skip"}
    return {
        "slot": slot,
        "kind": spec.kind,
        "kernel": spec.kernel,
        "stride": spec.stride,
        "expand": spec.expand,
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "size": spec.size,
        "out_size": spec.out_size,
        "residual": spec.kind == "inverted_residual" and spec.has_residual,
    }
