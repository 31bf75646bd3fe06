"""What the layers of all kinds are built from: convolution with batch norm, plain and elastic, and the elastic layer.

Shapes: B images, i input and o output channels, k kernel, s size in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.spaces.base import LayerSpec


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm and, where ``activation``, ReLU6; 'same' padding."""

    def __init__(
        self,
        i: int,
        o: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        activation: bool = True,
    ) -> None:
        groups = o if depthwise else 1
        conv = nn.Conv2d(i, o, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(o), *([nn.ReLU6()] if activation else []))


class ElasticConvNorm(nn.Module):
    """:class:`ConvNorm` for any channel count up to ``i`` and ``o`` and any of ``kernels``.

    Every kernel size has filters and a batch norm of its own: a 3x3 filter is not the middle of a 5x5 one.
    """

    def __init__(
        self,
        i: int,
        o: int,
        *,
        kernels: Sequence[int] = (1,),
        depthwise: bool = False,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.activation = activation
        i = 1 if depthwise else i
        self.weights = nn.ParameterDict({str(k): nn.Parameter(torch.empty(o, i, k, k)) for k in kernels})
        self.gammas = nn.ParameterDict({str(k): nn.Parameter(torch.ones(o)) for k in kernels})
        self.betas = nn.ParameterDict({str(k): nn.Parameter(torch.zeros(o)) for k in kernels})

    def forward(self, x: Tensor, o: int, kernel: int = 1, stride: int = 1) -> Tensor:
        """Map (B, i, s, s) to (B, o, s/stride, s/stride) with batch statistics."""
        key = str(kernel)
        i = 1 if self.depthwise else x.shape[1]
        weight = self.weights[key][:o, :i]
        x = F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=o if self.depthwise else 1)
        x = F.batch_norm(x, None, None, self.gammas[key][:o], self.betas[key][:o], training=True)
        return F.relu6(x, inplace=True) if self.activation else x

    @torch.no_grad()
    def copy_to(self, plain: nn.Module) -> None:
        """Write the slice that ``plain`` (a :class:`ConvNorm`) needs into it."""
        assert isinstance(plain, ConvNorm)
        conv, norm = plain[0], plain[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        key = str(conv.kernel_size[0])
        o, i = conv.weight.shape[:2]
        conv.weight.copy_(self.weights[key][:o, :i])
        norm.weight.copy_(self.gammas[key][:o])
        norm.bias.copy_(self.betas[key][:o])


class ElasticLayer(nn.Module):
    """A layer with shared weights; subclasses compute any of the layers that they were made from.

    specs: those layers. num_sources: how many slots they may read, of which each of them reads some: a layer that
    joins several values has weights for every source.
    """

    def __init__(self, specs: Sequence[LayerSpec], num_sources: int = 1) -> None:
        super().__init__()
        self.specs = tuple(specs)
        self.num_sources = num_sources

    def forward(self, *values: Tensor, spec: LayerSpec, taken: Sequence[int] = (0,)) -> Tensor:
        """Compute the layer ``spec`` on values (B, i, s, s); ``taken`` says which source each of them is."""
        raise NotImplementedError

    def copy_to(self, plain: nn.Module, taken: Sequence[int] = (0,)) -> None:
        """Write the weights that the plain layer needs into it."""
        raise NotImplementedError


def widest(specs: Sequence[LayerSpec]) -> tuple[int, int]:
    """Return the most input and output channels of ``specs``."""
    return max(spec.in_channels for spec in specs), max(spec.out_channels for spec in specs)


def kernels_of(specs: Sequence[LayerSpec]) -> tuple[int, ...]:
    """Return the kernel sizes of ``specs``, in ascending order."""
    return tuple(sorted({spec.kernel for spec in specs}))
