"""What can be chosen, as plain data. Built-in spaces are the dict literal below; others come by entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import (
    Architecture,
    CandidateMask,
    Decision,
    LayerSlot,
    LayerSpec,
    SearchSpace,
    make_slot,
)
from nasdeploy.spaces.mobile import MobileConfig, Stage, mobile_space

__all__ = [
    "Architecture",
    "CandidateMask",
    "Decision",
    "LayerSlot",
    "LayerSpec",
    "MobileConfig",
    "SearchSpace",
    "SpaceFactory",
    "Stage",
    "make_slot",
    "make_space",
    "mobile_space",
    "space_names",
]

SpaceFactory = Callable[[tuple[int, int, int], int], SearchSpace]
"""Makes the space for images of shape (channels, height, width) and a number of classes."""

BUILTIN_SPACES: dict[str, SpaceFactory] = {
    "mobile": mobile_space,
}

ENTRY_POINT_GROUP = "nasdeploy.spaces"


def space_names() -> list[str]:
    """Return the names that :func:`make_space` knows. Raises ConfigError where a plug-in takes a built-in's name."""
    names = list(BUILTIN_SPACES)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in names:
            raise ConfigError(
                f"space '{point.name}' is defined twice: built in, or by a plug-in, and by {point.value}"
            )
        names.append(point.name)
    return names


def make_space(name: str, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
    """Return the space called ``name``. Raises ConfigError for an unknown name or unsuitable images."""
    names = space_names()
    if name not in names:
        raise ConfigError(f"space: '{name}' is not known; expected one of {', '.join(names)}")
    if name in BUILTIN_SPACES:
        return BUILTIN_SPACES[name](image_shape, num_classes)
    (point,) = entry_points(group=ENTRY_POINT_GROUP, name=name)
    factory: SpaceFactory = point.load()
    return factory(image_shape, num_classes)
