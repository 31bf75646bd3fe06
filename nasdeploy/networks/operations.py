"""The layers that a network is built from: each kind once as a plain module and once *elastic*, with shared weights.

An elastic layer holds the weights of the widest layer that its slot can hold and computes any of them by slicing; the
layer is an argument of ``forward``, never a mode of the module. Its batch norm always uses batch statistics, because
running averages would mix all architectures; :meth:`copy_to` writes the slice into a plain layer, whose batch norm is
then recalibrated (``nasdeploy.training.recalibration``).

Shapes: B images, i input and o output channels, h hidden channels, k kernel, s size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.errors import ConfigError
from nasdeploy.networks.blocks import ConvNorm, ElasticConvNorm, ElasticLayer, kernels_of, widest
from nasdeploy.networks.cells import (
    ElasticJoin,
    ElasticJoinClassifier,
    ElasticPool,
    ElasticSeparable,
    ElasticSum,
    Join,
    JoinClassifier,
    Pool,
    Separable,
    Sum,
)
from nasdeploy.spaces.base import LayerSpec

__all__ = [
    "LAYER_KINDS",
    "Classifier",
    "ConvNorm",
    "ElasticClassifier",
    "ElasticConv",
    "ElasticConvNorm",
    "ElasticInvertedResidual",
    "ElasticLayer",
    "InvertedResidual",
    "build_elastic_layer",
    "build_layer",
    "initialise",
]


class InvertedResidual(nn.Module):
    """1x1 expansion, k x k depthwise, 1x1 projection; the input is added where the shapes allow it."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        h = spec.hidden_channels
        self.has_residual = spec.has_residual
        self.expansion = ConvNorm(spec.in_channels, h)
        self.depthwise = ConvNorm(h, h, kernel=spec.kernel, stride=spec.stride, depthwise=True)
        self.projection = ConvNorm(h, spec.out_channels, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, i, s, s) to (B, o, s/stride, s/stride)."""
        y: Tensor = self.projection(self.depthwise(self.expansion(x)))
        return x + y if self.has_residual else y


class Classifier(nn.Module):
    """Global average pooling and a linear layer: (B, i, s, s) to (B, o)."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.in_channels, spec.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, i, s, s) to logits (B, o)."""
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stem(spec: LayerSpec) -> nn.Module:
    return ConvNorm(spec.in_channels, spec.out_channels, kernel=spec.kernel, stride=spec.stride)


def _head(spec: LayerSpec) -> nn.Module:
    return ConvNorm(spec.in_channels, spec.out_channels)


class ElasticConv(ElasticLayer):
    """Stem and head: one convolution."""

    def __init__(self, specs: Sequence[LayerSpec], num_sources: int = 1) -> None:
        super().__init__(specs, num_sources)
        i, o = widest(specs)
        self.conv = ElasticConvNorm(i, o, kernels=kernels_of(specs))

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Compute the layer ``spec`` on x (B, i, s, s)."""
        (x,) = values
        out: Tensor = self.conv(x, spec.out_channels, spec.kernel, spec.stride)
        return out

    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write the weights that the plain layer needs into it."""
        self.conv.copy_to(plain)


class ElasticInvertedResidual(ElasticLayer):
    """:class:`InvertedResidual` for any width, expansion and kernel of its slot."""

    def __init__(self, specs: Sequence[LayerSpec], num_sources: int = 1) -> None:
        super().__init__(specs, num_sources)
        i, o = widest(specs)
        h = max(spec.hidden_channels for spec in specs)
        self.expansion = ElasticConvNorm(i, h)
        self.depthwise = ElasticConvNorm(h, h, kernels=kernels_of(specs), depthwise=True)
        self.projection = ElasticConvNorm(h, o, activation=False)

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Compute the block ``spec`` on x (B, i, s, s)."""
        (x,) = values
        h = spec.hidden_channels
        y: Tensor = self.depthwise(self.expansion(x, h), h, spec.kernel, spec.stride)
        y = self.projection(y, spec.out_channels)
        return x + y if spec.has_residual else y

    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write the weights that the plain block needs into it."""
        assert isinstance(plain, InvertedResidual)
        self.expansion.copy_to(plain.expansion)
        self.depthwise.copy_to(plain.depthwise)
        self.projection.copy_to(plain.projection)


class ElasticClassifier(ElasticLayer):
    """:class:`Classifier` for any input width."""

    def __init__(self, specs: Sequence[LayerSpec], num_sources: int = 1) -> None:
        super().__init__(specs, num_sources)
        i, o = widest(specs)
        self.weight = nn.Parameter(torch.empty(o, i))
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Map (B, i, s, s) to logits (B, o)."""
        (x,) = values
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.weight[:, : spec.in_channels], self.bias)

    @torch.no_grad()
    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write the weights that the plain layer needs into it."""
        assert isinstance(plain, Classifier)
        plain.linear.weight.copy_(self.weight[:, : plain.linear.in_features])
        plain.linear.bias.copy_(self.bias)


LAYER_KINDS: dict[str, tuple[Callable[[LayerSpec], nn.Module], type[ElasticLayer]]] = {
    "stem": (_stem, ElasticConv),
    "inverted_residual": (InvertedResidual, ElasticInvertedResidual),
    "head": (_head, ElasticConv),
    "classifier": (Classifier, ElasticClassifier),
    "separable": (Separable, ElasticSeparable),
    "max_pool": (Pool, ElasticPool),
    "avg_pool": (Pool, ElasticPool),
    "sum": (Sum, ElasticSum),
    "join": (Join, ElasticJoin),
    "join_classifier": (JoinClassifier, ElasticJoinClassifier),
}


def build_layer(spec: LayerSpec) -> nn.Module:
    """Return the plain layer ``spec``. Raises ConfigError for an unknown kind."""
    return _kind(spec)[0](spec)


def build_elastic_layer(specs: Sequence[LayerSpec], num_sources: int = 1) -> ElasticLayer:
    """Return one layer with shared weights that computes any of ``specs`` (all of one kind).

    num_sources: how many slots it may read.
    """
    kinds = {spec.kind for spec in specs}
    if len(kinds) != 1:
        raise ConfigError(
            f"a slot mixes layers of the kinds {', '.join(sorted(kinds))}; expected one kind a slot"
        )
    return _kind(specs[0])[1](specs, num_sources)


def _kind(spec: LayerSpec) -> tuple[Callable[[LayerSpec], nn.Module], type[ElasticLayer]]:
    if spec.kind not in LAYER_KINDS:
        raise ConfigError(f"layer kind '{spec.kind}' is not known; expected one of {', '.join(LAYER_KINDS)}")
    return LAYER_KINDS[spec.kind]


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw all weight matrices of ``module`` uniformly from ±1/√fan_in, as torch does; linear biases become 0.

    He normal by fan-out, five times as large, cost 2 points of accuracy after 5 epochs: before a batch norm the scale
    of a weight is the inverse of its learning rate.
    """
    for parameter in module.parameters():
        if parameter.dim() > 1:
            bound = parameter[0].numel() ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.bias.zero_()
