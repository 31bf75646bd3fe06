"""The default exporter: batch norm folded in double precision, the graph written node by node.

Milliseconds instead of the seconds of torch's exporter, and exactly the graph whose layers the latency table
measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasdeploy.costs.graphs import GraphLayer, LayerWeights, network_graph
from nasdeploy.errors import ConfigError
from nasdeploy.exporters.base import ExportedModel
from nasdeploy.exporters.files import save_model
from nasdeploy.exporters.opsets import check_opset
from nasdeploy.networks.cells import Join, JoinClassifier, Pool, Separable, Sum
from nasdeploy.networks.network import Network
from nasdeploy.networks.operations import Classifier, ConvNorm, InvertedResidual


class GraphExporter:
    """Writes networks of :mod:`nasdeploy.networks`, by :func:`nasdeploy.costs.graphs.network_graph`."""

    @property
    def name(self) -> str:
        """See :class:`~nasdeploy.exporters.base.Exporter`."""
        return "graph"

    def export(
        self,
        network: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        path: Path,
        opset: int,
        batch_size: int | None,
        metadata: Mapping[str, str],
    ) -> ExportedModel:
        """See :class:`~nasdeploy.exporters.base.Exporter`."""
        check_opset(opset)
        if not isinstance(network, Network):
            raise ConfigError(
                f"exporter 'graph' cannot write a {type(network).__name__}; expected a network of nasdeploy; "
                "exporter 'torch' takes others"
            )
        model = network_graph(
            [
                GraphLayer(one.name, one.spec, folded_weights(one.name, network.layer(one.name)), one.inputs)
                for one in network.placed
            ],
            image_shape=image_shape,
            mean=_values(network.normalise.get_buffer("mean")),
            scale=_values(network.normalise.get_buffer("scale")),
            batch_size=batch_size,
            opset=opset,
        )
        return save_model(model, path=path, opset=opset, exporter=self.name, metadata=metadata)


def folded_weights(slot: str, layer: nn.Module) -> LayerWeights:
    """Return the weights of ``layer`` with its batch norm folded into the convolutions.

    Raises ConfigError for a layer that the exporter does not know.
    """
    if type(layer) not in FOLDERS:
        raise ConfigError(
            f"{slot}: exporter 'graph' cannot write a {type(layer).__name__}; expected one of "
            f"{', '.join(kind.__name__ for kind in FOLDERS)}; exporter 'torch' takes others"
        )
    return FOLDERS[type(layer)](layer)


def _fold_conv_norm(layer: nn.Module) -> LayerWeights:
    """Batch norm with running statistics is affine: w' = w·γ/√(σ²+ε), b' = β − μ·γ/√(σ²+ε)."""
    conv, norm = layer.get_submodule("0"), layer.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    variance, mean = _double(norm.running_var), _double(norm.running_mean)
    gain = _double(norm.weight) / np.sqrt(variance + norm.eps)  # (o,)
    weight = _double(conv.get_parameter("weight")) * gain[:, None, None, None]  # (o, i, k, k)
    bias = _double(norm.bias) - mean * gain
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


def _fold_inverted_residual(layer: nn.Module) -> LayerWeights:
    parts = ("expansion", "depthwise", "projection")
    return {
        f"{part}.{name}": values
        for part in parts
        for name, values in _fold_conv_norm(layer.get_submodule(part)).items()
    }


def _classifier_weights(layer: nn.Module) -> LayerWeights:
    names = ("weight", "bias")
    return {name: _double(layer.get_parameter(f"linear.{name}")).astype(np.float32) for name in names}


def _fold_separable(layer: nn.Module) -> LayerWeights:
    """Nothing stands between the two convolutions: the depthwise one has no batch norm, hence no bias."""
    depthwise = _double(layer.get_parameter("depthwise.weight")).astype(np.float32)
    pointwise = _fold_conv_norm(layer.get_submodule("pointwise"))
    return {
        "depthwise.weight": depthwise,
        **{f"pointwise.{name}": values for name, values in pointwise.items()},
    }


def _no_weights(layer: nn.Module) -> LayerWeights:
    return {}


FOLDERS: dict[type[nn.Module], Callable[[nn.Module], LayerWeights]] = {
    ConvNorm: _fold_conv_norm,
    InvertedResidual: _fold_inverted_residual,
    Classifier: _classifier_weights,
    Separable: _fold_separable,
    Pool: _no_weights,
    Sum: _no_weights,
    Join: lambda layer: _fold_conv_norm(layer.get_submodule("conv")),
    JoinClassifier: _classifier_weights,
}


def _double(tensor: Tensor | None) -> NDArray[np.float64]:
    assert tensor is not None
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())


def _values(tensor: Tensor) -> list[float]:
    """Return a per-channel buffer (1, C, 1, 1) as C numbers."""
    return [float(value) for value in tensor.flatten().tolist()]
