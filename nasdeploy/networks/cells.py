"""The layers of cells: separable convolutions, pooling, sums and joins, each plain and elastic.

A join puts the values that it reads side by side and mixes them by a 1x1 convolution. The weights for one value stay
its own whichever others stand beside it, as in ENAS (Pham et al., 2018).

Shapes: B images, c channels of one value, i input channels of all values together, o output channels, k kernel, s size
in pixels, S sources that a slot may read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.networks.blocks import ConvNorm, ElasticConvNorm, ElasticLayer, kernels_of, widest
from nasdeploy.spaces.base import LayerSpec


class Separable(nn.Module):
    """ReLU, k x k depthwise and 1x1 convolution, batch norm: (B, c, s, s) to (B, c, s/stride, s/stride)."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        c, k = spec.in_channels, spec.kernel
        self.depthwise = nn.Conv2d(c, c, k, stride=spec.stride, padding=k // 2, groups=c, bias=False)
        self.pointwise = ConvNorm(c, spec.out_channels, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c, s, s) to (B, c, s/stride, s/stride). Others read x too, so it is left as it is."""
        y: Tensor = self.pointwise(self.depthwise(F.relu(x)))
        return y


class Pool(nn.Module):
    """The largest or the mean value of k x k pixels, those outside of the image left out."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c, s, s) to (B, c, s/stride, s/stride)."""
        return _pool(x, self.spec)


class Sum(nn.Module):
    """The sum of values (B, c, s, s), which may be the same one twice."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()

    def forward(self, *values: Tensor) -> Tensor:
        """Map values (B, c, s, s) to (B, c, s, s)."""
        return _sum(values)


class Join(nn.Module):
    """Concatenation, ReLU, 1x1 convolution, batch norm."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.conv = ConvNorm(spec.in_channels, spec.out_channels, stride=spec.stride, activation=False)

    def forward(self, *values: Tensor) -> Tensor:
        """Map values (B, c, s, s) to (B, o, s/stride, s/stride)."""
        y: Tensor = self.conv(F.relu(_side_by_side(values)))
        return y


class JoinClassifier(nn.Module):
    """Concatenation, ReLU, global average pooling and a linear layer."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.in_channels, spec.out_channels)

    def forward(self, *values: Tensor) -> Tensor:
        """Map values (B, c, s, s) to logits (B, o)."""
        logits: Tensor = self.linear(_pooled(values))
        return logits


class ElasticSeparable(ElasticLayer):
    """:class:`Separable` for any width and kernel of its slot; every kernel size has all weights of its own."""

    def __init__(self, specs: Sequence[LayerSpec], num_sources: int = 1) -> None:
        super().__init__(specs, num_sources)
        i, o = widest(specs)
        sizes = kernels_of(specs)
        self.depthwise = nn.ParameterDict({str(k): nn.Parameter(torch.empty(i, 1, k, k)) for k in sizes})
        self.pointwise = nn.ModuleDict({str(k): ElasticConvNorm(i, o, activation=False) for k in sizes})

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Compute the layer ``spec`` on x (B, c, s, s)."""
        (x,) = values
        c, k = spec.in_channels, spec.kernel
        weight = self.depthwise[str(k)][:c]
        x = F.conv2d(F.relu(x), weight, stride=spec.stride, padding=k // 2, groups=c)
        y: Tensor = self.pointwise[str(k)](x, spec.out_channels)
        return y

    @torch.no_grad()
    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write the weights that the plain layer needs into it."""
        assert isinstance(plain, Separable)
        key = str(plain.depthwise.kernel_size[0])
        pointwise = self.pointwise[key]
        assert isinstance(pointwise, ElasticConvNorm)
        plain.depthwise.weight.copy_(self.depthwise[key][: plain.depthwise.out_channels])
        pointwise.copy_to(plain.pointwise)


class ElasticPool(ElasticLayer):
    """:class:`Pool`: there is nothing to share."""

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Compute the layer ``spec`` on x (B, c, s, s)."""
        (x,) = values
        return _pool(x, spec)

    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write nothing: the layer has no weights."""


class ElasticSum(ElasticLayer):
    """:class:`Sum`: there is nothing to share."""

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Compute the layer ``spec`` on values (B, c, s, s)."""
        return _sum(values)

    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write nothing: the layer has no weights."""


class ElasticJoin(ElasticLayer):
    """:class:`Join` for any width and any of the sources of its slot."""

    def __init__(self, specs: Sequence[LayerSpec], num_sources: int = 1) -> None:
        super().__init__(specs, num_sources)
        c = max(spec.value_channels for spec in specs)
        _, o = widest(specs)
        self.weight = nn.Parameter(torch.empty(o, num_sources, c))
        self.gamma = nn.Parameter(torch.ones(o))
        self.beta = nn.Parameter(torch.zeros(o))

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Map values (B, c, s, s), each of another source, to (B, o, s/stride, s/stride) with batch statistics."""
        o = spec.out_channels
        weight = _of_sources(self.weight[:o], taken, spec.value_channels)[:, :, None, None]  # (o, i, 1, 1)
        x = F.conv2d(F.relu(_side_by_side(values)), weight, stride=spec.stride)
        return F.batch_norm(x, None, None, self.gamma[:o], self.beta[:o], training=True)

    @torch.no_grad()
    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write the weights of the sources that the plain layer reads into it."""
        assert isinstance(plain, Join)
        conv, norm = plain.conv[0], plain.conv[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        o = conv.out_channels
        weight = _of_sources(self.weight[:o], taken, conv.in_channels // len(taken))
        conv.weight.copy_(weight[:, :, None, None])
        norm.weight.copy_(self.gamma[:o])
        norm.bias.copy_(self.beta[:o])


class ElasticJoinClassifier(ElasticLayer):
    """:class:`JoinClassifier` for any width and any of the sources of its slot."""

    def __init__(self, specs: Sequence[LayerSpec], num_sources: int = 1) -> None:
        super().__init__(specs, num_sources)
        c = max(spec.value_channels for spec in specs)
        _, o = widest(specs)
        self.weight = nn.Parameter(torch.empty(o, num_sources, c))
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Map values (B, c, s, s), each of another source, to logits (B, o)."""
        return F.linear(_pooled(values), _of_sources(self.weight, taken, spec.value_channels), self.bias)

    @torch.no_grad()
    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write the weights of the sources that the plain layer reads into it."""
        assert isinstance(plain, JoinClassifier)
        c = plain.linear.in_features // len(taken)
        plain.linear.weight.copy_(_of_sources(self.weight, taken, c))
        plain.linear.bias.copy_(self.bias)


def _of_sources(weight: Tensor, taken: Sequence[int], c: int) -> Tensor:
    """Return the weights (o, i) of the first c channels of the sources taken, out of (o, S, c_max)."""
    return torch.cat([weight[:, source, :c] for source in taken], dim=1)


def _side_by_side(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(list(values), dim=1)


def _pooled(values: Sequence[Tensor]) -> Tensor:
    return F.adaptive_avg_pool2d(F.relu(_side_by_side(values)), 1).flatten(1)


def _pool(x: Tensor, spec: LayerSpec) -> Tensor:
    if spec.kind == "max_pool":
        return F.max_pool2d(x, spec.kernel, stride=spec.stride, padding=spec.kernel // 2)
    return F.avg_pool2d(x, spec.kernel, stride=spec.stride, padding=spec.kernel // 2, count_include_pad=False)


def _sum(values: Sequence[Tensor]) -> Tensor:
    first, *others = values
    for value in others:
        first = first + value
    return first
