"""What can be chosen, as plain data. Built-in spaces are the dict literal below; others come by file or entry point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint

from nasdeploy.errors import ConfigError
from nasdeploy.plugins import call_plugin, entry_points_of, find_plugin
from nasdeploy.spaces.base import (
    CLASSIFIERS,
    IMAGES,
    RESOLUTION,
    Architecture,
    CandidateMask,
    Decision,
    Derived,
    LayerSlot,
    LayerSpec,
    PlacedLayer,
    SearchSpace,
    make_slot,
)
from nasdeploy.spaces.cell import CellConfig, cell_space
from nasdeploy.spaces.mobile import MobileConfig, Stage, mobile_space
from nasdeploy.spaces.resolutions import check_sizes, with_resolutions

__all__ = [
    "CLASSIFIERS",
    "IMAGES",
    "RESOLUTION",
    "Architecture",
    "CandidateMask",
    "CellConfig",
    "Decision",
    "Derived",
    "LayerSlot",
    "LayerSpec",
    "MobileConfig",
    "PlacedLayer",
    "SearchSpace",
    "SpaceFactory",
    "Stage",
    "cell_space",
    "make_slot",
    "make_space",
    "mobile_space",
    "space_names",
    "with_resolutions",
]

SpaceFactory = Callable[[tuple[int, int, int], int], SearchSpace]
"""Makes the space for images of shape (channels, height, width) and a number of classes."""

BUILTIN_SPACES: dict[str, SpaceFactory] = {
    "mobile": mobile_space,
    "cell": cell_space,
}

ENTRY_POINT_GROUP = "nasdeploy.spaces"


def space_names() -> list[str]:
    """Return the names that :func:`make_space` knows. Raises ConfigError where two spaces share a name."""
    return [*BUILTIN_SPACES, *_plugins()]


def _plugins() -> dict[str, EntryPoint]:
    return entry_points_of(ENTRY_POINT_GROUP, builtin_names=BUILTIN_SPACES, what="space")


def make_space(
    name: str, image_shape: tuple[int, int, int], num_classes: int, image_sizes: Sequence[int] = ()
) -> SearchSpace:
    """Return the space called ``name``: built in, a plug-in's, or a function in a file ("my_space.py:space").

    image_sizes: several sizes in pixels make the resolution a decision; the largest is that of ``image_shape``.
    Raises ConfigError for an unknown name, a factory that does not give such a space, and unsuitable images.
    """
    if image_sizes:
        check_sizes(image_sizes, image_shape)
        return with_resolutions([make_space(name, (image_shape[0], s, s), num_classes) for s in image_sizes])
    plugins = _plugins()
    if name in BUILTIN_SPACES:
        return BUILTIN_SPACES[name](image_shape, num_classes)
    factory = find_plugin(name, plugins, builtin_names=BUILTIN_SPACES, what="space")
    space = call_plugin(factory, image_shape, num_classes, what="space", source=name)
    return _checked(space, name, image_shape, num_classes)


def _checked(space: object, name: str, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
    """Return what a factory made. Raises ConfigError unless it is a space for these images and classes."""
    if not isinstance(space, SearchSpace):
        raise ConfigError(
            f"space: {name} gives a {type(space).__name__}; expected a nasdeploy.spaces.SearchSpace"
        )
    if (tuple(space.image_shape), space.num_classes) != (tuple(image_shape), num_classes):
        raise ConfigError(
            f"space: {name} gives a space for images of {tuple(space.image_shape)} and {space.num_classes} classes; "
            f"expected what it was asked for: {tuple(image_shape)} and {num_classes}"
        )
    return space
