"""An architecture as the layers that it stands for: a chain slot by slot, a graph layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nasdeploy.errors import ConfigError
from nasdeploy.reporting.text import TIMES
from nasdeploy.spaces import IMAGES, LayerSpec, SearchSpace, make_space

__all__ = ["chain_of", "layer_text", "space_of"]


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
    """Return the layers of an architecture, input first; None without a space.

    Of a chain also the slots that are skipped; of a graph what every layer reads. Raises ConfigError for names that
    the space does not have.
    """
    if space is None:
        return None
    architecture = space.from_names(names)
    placed = space.placed(architecture)
    if any(slot.inputs is not None for slot in space.slots):
        read = ([name for name in layer.inputs if name != IMAGES] for layer in placed)
        return [
            _row(layer.name, layer.spec) | {"inputs": names}
            for layer, names in zip(placed, read, strict=True)
        ]
    specs = {layer.name: layer.spec for layer in placed}
    return [_row(slot.name, specs.get(slot.name)) for slot in space.slots]


def layer_text(layer: Mapping[str, Any]) -> str:
    """Return in a few words what a layer of :func:`chain_of` does, and in a graph what it reads."""
    if "inputs" not in layer:
        return _kind_text(layer)
    stage, _, name = layer["slot"].partition(".")
    sources = ", ".join(source.removeprefix(f"{stage}.") for source in layer["inputs"])
    return f"{name}: {_kind_text(layer)}{f' of {sources}' if sources else ''}".removeprefix(": ")


def _kind_text(layer: Mapping[str, Any]) -> str:
    kind, kernel = layer["kind"], f"{layer.get('kernel')}{TIMES}{layer.get('kernel')}"
    stride = f", stride {layer['stride']}" if layer.get("stride", 1) > 1 else ""
    if kind == "inverted_residual":
        residual = ", residual" if layer["residual"] else ""
        return f"{kernel} {TIMES}{layer['expand']}{stride}{residual}"
    texts = {
        "stem": f"{kernel} conv{stride}",
        "head": f"1{TIMES}1 conv",
        "classifier": "pool + linear",
        "separable": f"{kernel} separable{stride}",
        "max_pool": f"{kernel} maximum{stride}",
        "avg_pool": f"{kernel} mean{stride}",
        "join": f"1{TIMES}1 conv{stride}",
        "join_classifier": "pool + linear",
    }
    return texts.get(kind, str(kind))


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
