"""An ensemble of small networks from embeddings to losses, all trained at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nasdeploy.predictors.arrays import from_plain, to_plain

LEAST_SPREAD = 1e-4
"""A number of the embeddings that varies less than so much of the most variable one tells nothing."""
CHECK_EVERY = 10
"""Held-out errors are looked at once in so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """num_heads: each holds out another part of the samples. hidden: width of its one hidden layer.

    weight_decay: decoupled [Loshchilov and Hutter, ICLR 2019], in units of the learning rate.
    """

    num_heads: int = 5
    hidden: int = 64
    num_steps: int = 200
    learning_rate: float = 1e-2
    weight_decay: float = 1.0


class Heads:
    """M networks [embedding, time] -> SiLU -> target. They take embeddings (n, P) and times (n,).

    Head m never sees the m-th part of the samples; it stops where that part is predicted best.
    """

    def __init__(self, settings: HeadSettings | None = None) -> None:
        self._settings = settings or HeadSettings()
        self._tensors: dict[str, Tensor] = {}

    def fit(self, embeddings: Tensor, times: Tensor, targets: Tensor, *, seed: int) -> Tensor:
        """Learn from n samples, and return their targets (n,) as predicted by the head that did not see them."""
        settings, count = self._settings, len(targets)
        generator = torch.Generator().manual_seed(seed)
        part = torch.randperm(count, generator=generator) % settings.num_heads
        held = (part == torch.arange(settings.num_heads)[:, None]).to(targets)  # (M, n)
        self._tensors = _standardise(embeddings)
        x = self._inputs(embeddings, times)  # (n, P + 1)
        weights = _draw(settings, x, generator)
        train_share = (1.0 - held) / (1.0 - held).sum(dim=1, keepdim=True).clamp(min=1.0)
        # where nothing is held out, what it learns from tells when to stop
        some_held = held.sum(dim=1, keepdim=True) > 0.0
        held_share = torch.where(some_held, held / held.sum(dim=1, keepdim=True).clamp(min=1.0), train_share)
        best = [weight.detach().clone() for weight in weights]
        least = torch.full((settings.num_heads,), torch.inf).to(targets)
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        for step in range(settings.num_steps):
            errors = (_forward(weights, x) - targets) ** 2  # (M, n)
            if step % CHECK_EVERY == 0 or step == settings.num_steps - 1:
                error = (errors.detach() * held_share).sum(dim=1)
                better = error < least
                least = torch.where(better, error, least)
                best = [
                    torch.where(better[:, None, None], weight.detach(), kept)
                    for weight, kept in zip(weights, best, strict=True)
                ]
            optimizer.zero_grad(set_to_none=True)
            (errors * train_share).sum().backward()  # type: ignore[no-untyped-call]  # of torch
            optimizer.step()
        self._tensors |= {f"weight{i}": weight for i, weight in enumerate(best)}
        with torch.no_grad():
            return (_forward(best, x) * held).sum(dim=0)

    def __call__(self, embeddings: Tensor, times: Tensor) -> Tensor:
        """Return the targets (M, n) that each head expects; their mean is the prediction."""
        weights = [self._tensors[f"weight{i}"] for i in range(4)]
        return _forward(weights, self._inputs(embeddings, times))

    def plain(self) -> dict[str, Any]:
        """Return all numbers as plain lists and text."""
        return to_plain(self._tensors)

    def load_plain(self, state: dict[str, Any], like: Tensor) -> None:
        """Take over what :meth:`plain` returned, to the device and type of ``like``."""
        self._tensors = {name: tensor.to(like) for name, tensor in from_plain(state).items()}

    def _inputs(self, embeddings: Tensor, times: Tensor) -> Tensor:
        standard = (embeddings - self._tensors["mean"]) * self._tensors["factor"]
        return torch.cat([standard, times[:, None]], dim=1)


def _standardise(embeddings: Tensor) -> dict[str, Tensor]:
    """Return mean and factor (P,) that give embeddings the mean 0 and, all numbers together, the variance 1/2.

    The variance of a sum does not grow with P then; what hardly varies is left out.
    """
    spread = embeddings.std(dim=0, correction=0)
    useful = spread > LEAST_SPREAD * spread.max()
    factor = torch.where(useful, 1.0 / spread.clamp(min=torch.finfo(spread.dtype).tiny), 0.0)
    return {"mean": embeddings.mean(dim=0), "factor": factor / (2.0 * useful.sum().clamp(min=1)).sqrt()}


def _draw(settings: HeadSettings, x: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return first weights (M, P + 1, H), (M, 1, H), (M, H, 1), (M, 1, 1) like ``x`` (n, P + 1)."""
    heads, hidden = settings.num_heads, settings.hidden
    first = torch.randn(heads, x.shape[1], hidden, generator=generator, dtype=x.dtype)
    second = torch.randn(heads, hidden, 1, generator=generator, dtype=x.dtype) / hidden**0.5
    drawn = [first, torch.zeros(heads, 1, hidden), second, torch.zeros(heads, 1, 1)]
    return [weight.to(x).requires_grad_() for weight in drawn]


def _forward(weights: list[Tensor], x: Tensor) -> Tensor:
    """Return (M, n) of x (n, P + 1)."""
    hidden = F.silu(x @ weights[0] + weights[1])  # (M, n, H)
    return (hidden @ weights[2] + weights[3])[..., 0]
