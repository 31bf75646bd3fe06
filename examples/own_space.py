"""Search among networks of one's own: a search space in one function, and its tests for nothing.

Run it with ``python examples/own_space.py [FOLDER]``, and its tests with ``python -m pytest examples/own_space.py``.
On the command line the space is ``--space examples/own_space.py:space``.
"""

# CI: run

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nasdeploy
from nasdeploy.spaces import Decision, LayerSpec, SearchSpace, make_slot
from nasdeploy.testing import SpaceContract


def space(image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
    """Return a chain of five layers: a convolution, three blocks of one width, a classifier."""
    channels, size, _ = image_shape
    # What can be chosen. Candidates go from the cheapest to the dearest; `channels` is for widths only, so that a
    # profile's channel_multiple can forbid some of them.
    decisions = (
        Decision(name="width", candidates=("8", "16", "24"), channels=(8, 16, 24)),
        Decision(name="block1", candidates=("k3e1", "k3e2", "k5e2")),
        Decision(name="block2", candidates=("skip", "k3e1", "k3e2", "k5e2")),
        Decision(name="block3", candidates=("skip", "k3e1", "k3e2", "k5e2")),
    )

    # What stands in a slot, given the candidates of the decisions that it depends on. "stem" is a convolution,
    # "inverted_residual" a block of MobileNetV2; nasdeploy.networks.LAYER_KINDS lists all kinds.
    def stem(width: str) -> LayerSpec:
        return LayerSpec(
            kind="stem", in_channels=channels, out_channels=int(width), size=size, kernel=3, stride=2
        )

    def block(width: str, operation: str, *, size: int, stride: int = 1) -> LayerSpec | None:
        if operation == "skip":
            return None
        return LayerSpec(
            kind="inverted_residual",
            in_channels=int(width),
            out_channels=int(width),
            size=size,
            kernel=int(operation[1]),
            stride=stride,
            expand=int(operation[3]),
        )

    def classifier(width: str) -> LayerSpec:
        return LayerSpec(kind="classifier", in_channels=int(width), out_channels=num_classes, size=quarter)

    half, quarter = -(-size // 2), -(-size // 4)  # padded strides of 2 round up
    slots = (
        make_slot("stem", decisions, ["width"], stem),
        make_slot("block1", decisions, ["width", "block1"], lambda w, op: block(w, op, size=half, stride=2)),
        make_slot("block2", decisions, ["width", "block2"], lambda w, op: block(w, op, size=quarter)),
        make_slot("block3", decisions, ["width", "block3"], lambda w, op: block(w, op, size=quarter)),
        make_slot("classifier", decisions, ["width"], classifier),
    )
    return SearchSpace(
        name="five-layers", decisions=decisions, slots=slots, image_shape=image_shape, num_classes=num_classes
    )


class TestSpace(SpaceContract):
    """The layers fit together, costs are exact, and PyTorch, ONNX and the supernet compute the same."""

    def factory(self, image_shape: tuple[int, int, int], num_classes: int) -> SearchSpace:
        return space(image_shape, num_classes)


def main(folder: Path) -> int:
    """Build into ``folder``; return the exit code that the command line would give."""
    result = nasdeploy.build(
        space=f"{__file__}:space",
        profiles=("cpu-middle",),
        output_dir=folder / "run",
        search={"num_steps": 30, "num_finalists": 2},
        retrain={"num_steps": 30},
        measure={"min_seconds": 0.1},
    )
    (one,) = result.profiles
    print(f"{one.profile}: {one.status}, {one.params} parameters, {one.model}")
    return result.exit_code


if __name__ == "__main__":
    if len(sys.argv) > 1:
        chosen = Path(sys.argv[1])
        chosen.mkdir(parents=True, exist_ok=True)
        sys.exit(main(chosen))
    with tempfile.TemporaryDirectory() as name:
        sys.exit(main(Path(name)))
