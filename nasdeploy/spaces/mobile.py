"""The space ``mobile``: a chain of inverted residual blocks (Sandler et al., MobileNetV2, 2018), 28 to 224 pixels.

Per block the operation (kernel 3 or 5, expansion, skip where the shapes allow it), per stage the width, and the
widths of stem and head. ReLU6 throughout, because it survives quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nasdeploy.errors import ConfigError
from nasdeploy.spaces.base import Decision, LayerSlot, LayerSpec, SearchSpace, make_slot

MIN_SIZE, MAX_SIZE = 28, 224
SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """``num_blocks`` blocks of one width; the first has ``stride``, the others may be skipped."""

    widths: tuple[int, ...]
    num_blocks: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MobileConfig:
    """What the ``mobile`` space is made of, candidates from the cheapest to the most expensive."""

    stem_widths: tuple[int, ...]
    stem_stride: int
    stages: tuple[Stage, ...]
    head_widths: tuple[int, ...]
    operations: tuple[tuple[int, int], ...]  # (kernel, expand)


def _small_config(first_stride: int) -> MobileConfig:
    return MobileConfig(
        stem_widths=(8, 16, 24),
        stem_stride=2,
        stages=(
            Stage(widths=(8, 16, 24), num_blocks=2, stride=first_stride),
            Stage(widths=(16, 32, 48), num_blocks=3, stride=2),
            Stage(widths=(32, 64, 96), num_blocks=3, stride=2),
        ),
        head_widths=(64, 128, 192),
        operations=((3, 2), (5, 2), (3, 4), (5, 4)),
    )


# MobileNetV2's strides without its stage at half the size of the image: that is where blocks are dearest.
LARGE_CONFIG = MobileConfig(
    stem_widths=(8, 16, 24),
    stem_stride=2,
    stages=(
        Stage(widths=(8, 16, 24), num_blocks=2, stride=2),
        Stage(widths=(16, 32, 40), num_blocks=3, stride=2),
        Stage(widths=(32, 48, 64), num_blocks=3, stride=2),
        Stage(widths=(48, 64, 96), num_blocks=3, stride=1),
        Stage(widths=(64, 128, 192), num_blocks=3, stride=2),
    ),
    head_widths=(256, 512, 1024),
    operations=((3, 2), (5, 2), (3, 4), (5, 4)),
)

CONFIGS: tuple[tuple[int, MobileConfig], ...] = (
    (40, _small_config(1)),
    (95, _small_config(2)),
    (MAX_SIZE, LARGE_CONFIG),
)
"""(largest size of images in pixels, configuration): 3 to 7 pixels are left at the end of each."""


def default_config(size: int) -> MobileConfig:
    """Return the default for images of ``size`` pixels, 28 to 224."""
    return next(config for largest, config in CONFIGS if size <= largest)


def mobile_space(
    image_shape: tuple[int, int, int], num_classes: int, config: MobileConfig | None = None
) -> SearchSpace:
    """Return the space for images of ``image_shape`` (channels, height, width).

    Raises ConfigError for images that are not square or not 28 to 224 pixels.
    """
    channels, height, width = image_shape
    if height != width or not MIN_SIZE <= height <= MAX_SIZE:
        raise ConfigError(
            f"space 'mobile': images are {height}x{width} pixels; expected square images of {MIN_SIZE} to {MAX_SIZE} "
            f"pixels; --image-size {min(max(height, MIN_SIZE), MAX_SIZE)} resizes them"
        )
    config = config or default_config(height)
    decisions = _decisions(config)
    slots = _slots(config, decisions, channels, height, num_classes)
    return SearchSpace(
        name="mobile", decisions=decisions, slots=slots, image_shape=image_shape, num_classes=num_classes
    )


def _decisions(config: MobileConfig) -> tuple[Decision, ...]:
    operations = tuple(_operation_name(kernel, expand) for kernel, expand in config.operations)
    decisions = [_width_decision("stem", config.stem_widths)]
    for s, stage in enumerate(config.stages, start=1):
        decisions.append(_width_decision(f"stage{s}", stage.widths))
        for b in range(1, stage.num_blocks + 1):
            candidates = operations if b == 1 else (SKIP, *operations)
            decisions.append(Decision(name=f"stage{s}.block{b}", candidates=candidates))
    decisions.append(_width_decision("head", config.head_widths))
    return tuple(decisions)


def _width_decision(name: str, widths: tuple[int, ...]) -> Decision:
    return Decision(name=f"{name}.width", candidates=tuple(map(str, widths)), channels=widths)


def _operation_name(kernel: int, expand: int) -> str:
    return f"k{kernel}e{expand}"


def _slots(
    config: MobileConfig, decisions: tuple[Decision, ...], channels: int, size: int, num_classes: int
) -> tuple[LayerSlot, ...]:
    def stem(width: str) -> LayerSpec:
        return LayerSpec(
            kind="stem",
            in_channels=channels,
            out_channels=int(width),
            size=size,
            kernel=3,
            stride=config.stem_stride,
        )

    slots = [make_slot("stem", decisions, ["stem.width"], stem)]
    size = -(-size // config.stem_stride)
    before = "stem.width"
    for s, stage in enumerate(config.stages, start=1):
        after = f"stage{s}.width"
        block = _block_layer(size=size, stride=stage.stride)
        slots.append(make_slot(f"stage{s}.block1", decisions, [before, after, f"stage{s}.block1"], block))
        size = -(-size // stage.stride)
        block = _block_layer(size=size, stride=1)
        for b in range(2, stage.num_blocks + 1):
            same_width = partial(_same_width, block)
            slots.append(
                make_slot(f"stage{s}.block{b}", decisions, [after, f"stage{s}.block{b}"], same_width)
            )
        before = after

    def head(in_width: str, width: str) -> LayerSpec:
        return LayerSpec(kind="head", in_channels=int(in_width), out_channels=int(width), size=size)

    def classifier(width: str) -> LayerSpec:
        return LayerSpec(kind="classifier", in_channels=int(width), out_channels=num_classes, size=size)

    slots.append(make_slot("head", decisions, [before, "head.width"], head))
    slots.append(make_slot("classifier", decisions, ["head.width"], classifier))
    return tuple(slots)


BlockLayer = Callable[[str, str, str], LayerSpec | None]


def _same_width(block: BlockLayer, width: str, operation: str) -> LayerSpec | None:
    return block(width, width, operation)


def _block_layer(*, size: int, stride: int) -> BlockLayer:
    def layer(in_width: str, width: str, operation: str) -> LayerSpec | None:
        if operation == SKIP:
            return None
        kernel, expand = map(int, operation.removeprefix("k").split("e"))
        return LayerSpec(
            kind="inverted_residual",
            in_channels=int(in_width),
            out_channels=int(width),
            size=size,
            kernel=kernel,
            stride=stride,
            expand=expand,
        )

    return layer
