"""The models that a latency table is measured from: layers alone, and networks of all sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from nasdeploy.costs.graphs import (
    INPUT_NAME,
    IR_VERSION,
    OUTPUT_NAME,
    chain_graph,
    graph_layers,
    network_graph,
    random_weights,
    serialise,
)
from nasdeploy.errors import ConfigError
from nasdeploy.profiles import Runtime
from nasdeploy.spaces.base import Architecture, LayerSpec, SearchSpace

__all__ = ["Convert", "ModelWriter", "split", "stratified_architectures"]

MIN_ARCHITECTURES = 9
MAX_TILT = 4.0

Convert = Callable[[onnx.ModelProto], onnx.ModelProto]
"""Makes the model of the profile's precision from the one in float32."""


def stratified_architectures(space: SearchSpace, count: int, rng: np.random.Generator) -> list[Architecture]:
    """Return ``count`` distinct random architectures, small ones first, large ones last.

    Uniform choices would nearly all be of middle size. Candidate c of C is drawn with a probability that
    grows as exp(t · c / (C - 1)); the tilt t runs evenly from -4 to 4 over the list.
    """
    found: dict[Architecture, None] = {}
    for tilt in np.linspace(-MAX_TILT, MAX_TILT, count):
        for _ in range(100):  # a small space may not hold ``count`` distinct ones
            architecture = _tilted(space, float(tilt), rng)
            if architecture not in found:
                break
        found[architecture] = None
    return list(found)


def split(
    space: SearchSpace, drawn: Sequence[Architecture], share: float
) -> tuple[list[Architecture], list[Architecture]]:
    """Divide into (calibration, held out) at even distances, so that both parts hold all sizes."""
    if len(drawn) < MIN_ARCHITECTURES:
        raise ConfigError(
            f"space '{space.name}': only {len(drawn)} architectures found to measure; "
            f"expected {MIN_ARCHITECTURES} or more for a latency table"
        )
    num = max(3, round(share * len(drawn)))
    chosen = {int((i + 0.5) * len(drawn) / num) for i in range(num)}
    parts = [[a for i, a in enumerate(drawn) if (i in chosen) == held] for held in (False, True)]
    return parts[0], parts[1]


def _tilted(space: SearchSpace, tilt: float, rng: np.random.Generator) -> Architecture:
    choices = []
    for num in space.num_candidates():
        weights = np.exp(tilt * np.arange(num) / max(num - 1, 1))
        choices.append(int(rng.choice(num, p=weights / weights.sum())))
    return Architecture(tuple(choices))


class ModelWriter:
    """Writes the models that a table is measured from."""

    def __init__(
        self, folder: Path, space: SearchSpace, runtime: Runtime, *, seed: int, convert: Convert | None
    ) -> None:
        self.folder = folder
        self.space = space
        self.runtime = runtime
        self.convert = convert
        self.rng = np.random.default_rng(seed)

    def write_all(
        self,
        calibration: Sequence[Architecture],
        held_out: Sequence[Architecture],
        *,
        without: Collection[LayerSpec] = (),
    ) -> dict[str, Path]:
        """Return {name: path} of all models; held-out networks twice, for the ceiling of any prediction.

        without: layers of which no model is needed.
        """
        mask = self.space.candidate_mask(self.runtime.channel_multiple)
        paths = {
            f"layer{i}": self._layer(spec)
            for i, spec in enumerate(self.space.distinct_layers())
            if spec not in without
        }
        paths |= {f"calibration{i}": self.network(a) for i, a in enumerate(calibration)}
        paths |= {f"held-out{i}": self.network(a) for i, a in enumerate(held_out)}
        paths |= {f"again{i}": paths[f"held-out{i}"] for i in range(len(held_out))}
        paths["smallest"] = self.network(self.space.smallest(mask))
        paths["largest"] = self.network(self.space.largest(mask))
        paths["call"] = self._write(_call_graph(self.runtime.opset))
        return paths

    def _layer(self, spec: LayerSpec) -> Path:
        layers = [(spec.kind, spec, random_weights(spec, self.rng))]
        return self._write(chain_graph(layers, batch_size=self.runtime.batch_size, opset=self.runtime.opset))

    def network(self, architecture: Architecture) -> Path:
        """Write the file of ``architecture`` with random weights."""
        image_shape = self.space.input_shape(architecture)
        layers = graph_layers(self.space.placed(architecture), lambda spec: random_weights(spec, self.rng))
        return self._write(
            network_graph(
                layers,
                image_shape=image_shape,
                mean=[127.5] * image_shape[0],
                scale=[1 / 127.5] * image_shape[0],
                batch_size=self.runtime.batch_size,
                opset=self.runtime.opset,
            )
        )

    def _write(self, model: onnx.ModelProto) -> Path:
        path = self.folder / f"{sum(1 for _ in self.folder.iterdir())}.onnx"
        path.write_bytes(serialise(self.convert(model) if self.convert else model))
        return path


def _call_graph(opset: int) -> onnx.ModelProto:
    """Return the least work that a session can do: what a layer alone pays on top of its own time."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (INPUT_NAME, OUTPUT_NAME)
    ]
    node = helper.make_node("Neg", [INPUT_NAME], [OUTPUT_NAME])
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "call", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSION,
    )
    return model
