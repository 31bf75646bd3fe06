"""The last rung: ψ from the graph of an architecture, by a pretrained encoder and an ensemble of small heads.

The encoder learns the space without any loss, once; a fit embeds the samples and trains the heads alone, which takes
about as long as one of a Gaussian process. Satisfies :class:`nasdeploy.optim.predictor.Predictor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasdeploy.costs.table import FloatArray, IntArray
from nasdeploy.optim import categorical
from nasdeploy.optim.cross_validation import variance_within
from nasdeploy.optim.gaussian_process import MAX_SAMPLES, Posterior
from nasdeploy.optim.ladder import COSTLY_GROWTH, Rung
from nasdeploy.optim.operation_importance import OperationImportance, comparable, spread_of
from nasdeploy.optim.predictor import NUM_GRADIENTS, half_of
from nasdeploy.predictors.encoder import AutoencoderSize, GraphAutoencoder, GraphBatch
from nasdeploy.predictors.heads import Heads, HeadSettings
from nasdeploy.predictors.pretraining import PretrainingSettings, pretrain
from nasdeploy.spaces.base import SearchSpace
from nasdeploy.spaces.graph_view import GraphView, graph_view

MAX_BATCH = 1024
"""So many graphs are embedded at once."""
MAX_RUNGS = 4
"""So many spaces keep their encoder, of about a megabyte each."""
SHARED = 0.5
"""Of what is uncertain of an architecture: the part that the disagreement of the heads tells, from one to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """How losses and steps became targets and times, and what remained unexplained.

    mean, spread: of the losses, whose targets have mean 0 and variance 1. clock: mean and spread of log(1 + step).
    latest: the time of the latest step. variance: of held-out losses around their predictions. disagreement: variance
    between heads at the samples, as targets.
    """

    mean: float
    spread: float
    clock: tuple[float, float]
    latest: float
    variance: float
    disagreement: float


class GraphPredictor:
    """A :class:`nasdeploy.optim.predictor.Predictor` on graphs.

    encoder: returns the pretrained autoencoder of ``view``, which is not changed; asked for at the first fit.
    seed: of the heads. device: where a state that is loaded goes to. Losses are fitted as they are: a ladder compresses
    them before, for all of its rungs. The latest 2048 samples are fitted.
    """

    def __init__(
        self,
        view: GraphView,
        *,
        encoder: Callable[[], GraphAutoencoder],
        seed: int = 0,
        heads: HeadSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._view, self._make_encoder, self._seed, self._device = view, encoder, seed, device
        self._encoder: GraphAutoencoder | None = None
        self._heads = Heads(heads)
        self._fit: _Fit | None = None
        self._latest: IntArray = np.empty((0, len(view.num_candidates)), dtype=np.int64)
        self._importance: OperationImportance | None = None

    def fit(self, choices: IntArray, losses: FloatArray, steps: IntArray) -> None:
        """Learn from choices (N, D), losses (N,) and steps (N,) alone. Raises ValueError without a sample."""
        if len(losses) == 0:
            raise ValueError("predictor: no samples to fit; expected at least 1")
        order = np.argsort(steps, kind="stable")[-MAX_SAMPLES:]
        choices, losses, steps = choices[order], losses[order], steps[order]
        if self._encoder is None:
            self._encoder = self._make_encoder()
        logs = np.log1p(steps.astype(np.float64))
        clock = (float(logs.mean()), float(logs.std()) if np.ptp(logs) > 0.0 else 1.0)
        times = (logs - clock[0]) / clock[1]
        mean, spread = float(losses.mean()), spread_of(losses)
        embeddings = self._embed(choices)
        unseen = self._heads.fit(
            embeddings, _like(embeddings, times), _like(embeddings, (losses - mean) / spread), seed=self._seed
        )
        held_out = mean + spread * _array(unseen)
        self._fit = _Fit(
            mean=mean,
            spread=spread,
            clock=clock,
            latest=float(times[-1]),
            variance=variance_within(losses - held_out, steps),
            disagreement=float(
                np.mean(_array(self._heads(embeddings, _like(embeddings, times))).var(axis=0))
            ),
        )
        self._latest, self._importance = choices[-NUM_GRADIENTS:], None

    def predict(self, choices: IntArray) -> FloatArray:
        """Return ψ (n,) of ``choices`` (n, D), as of the latest step fitted. Raises ValueError before a fit."""
        fit = self._fitted()
        predicted: FloatArray = fit.mean + fit.spread * self._targets(choices).mean(axis=0)
        return predicted

    def posterior(self, choices: IntArray) -> Posterior:
        """Return mean (n,) and covariance (n, n) of the losses of ``choices`` (n, D).

        At the samples that were fitted, variances and noise are in the mean together that of held-out losses. One half
        of a variance is the same for all and independent, the other one is how the heads differ.
        """
        fit, targets = self._fitted(), self._targets(choices)
        apart = targets - targets.mean(axis=0)
        between = apart.T @ apart / (len(targets) * fit.disagreement) if fit.disagreement > 0.0 else 0.0
        own, half = np.eye(len(choices)), half_of(fit.variance)
        return Posterior(
            mean=fit.mean + fit.spread * targets.mean(axis=0),
            covariance=half * (SHARED * between + (1.0 - SHARED) * own),
            noise=half,
        )

    def gradient(self, theta: FloatArray) -> FloatArray:
        """Return ∂ψ/∂θ (..., D, C) at ``theta`` (..., D, C), by the graphs that are expected under θ."""
        fit, encoder = self._fitted(), self._embedder()
        rows = theta.reshape(-1, *theta.shape[-2:])
        gradient = np.empty_like(rows)
        for part in _parts(len(rows)):
            batch = encoder.relaxed_batch(self._view.relaxed(rows[part]))
            operations, adjacency = batch.operations.requires_grad_(), batch.adjacency.requires_grad_()
            value = self._head_means(encoder.embed(batch), fit).sum()
            value.backward()  # type: ignore[no-untyped-call]  # of torch
            assert operations.grad is not None
            assert adjacency.grad is not None
            gradient[part] = self._view.pull_back(_array(operations.grad), _array(adjacency.grad))
        return fit.spread * gradient.reshape(theta.shape)

    def importance(self) -> FloatArray:
        """Return the OIW (D, C) from the gradients at some of the latest samples fitted; 0 before a fit."""
        if self._importance is None:
            num_candidates = self._view.num_candidates
            self._importance = OperationImportance(len(num_candidates), max(num_candidates))
            if len(self._latest) > 0:
                one_hots = categorical.one_hot(self._latest, max(num_candidates))
                mask = categorical.mask_array(num_candidates)
                self._importance.update(
                    comparable(self.gradient(one_hots), mask, spread=self._fitted().spread)
                )
        return self._importance.values

    def state_dict(self) -> dict[str, Any]:
        """Return all that predictions depend on, the encoder included, as plain lists, numbers and text."""
        state: dict[str, Any] = {"vocabulary": list(self._view.vocabulary), "fit": None}
        if self._fit is not None:
            state |= {
                "fit": asdict(self._fit),
                "encoder": self._embedder().plain(),
                "heads": self._heads.plain(),
                "latest": self._latest.tolist(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, bit by bit, to the device of this predictor.

        Raises ValueError when it is that of another space.
        """
        if state["vocabulary"] != list(self._view.vocabulary):
            raise ValueError(
                f"state is of graphs with the operations {', '.join(state['vocabulary'])}; "
                f"expected {', '.join(self._view.vocabulary)}"
            )
        self._fit, self._importance = None, None
        self._latest = self._latest[:0]
        if state["fit"] is None:
            return
        self._encoder = GraphAutoencoder.from_plain(state["encoder"]).to(self._device)
        self._heads.load_plain(state["heads"], self._encoder.edge_offset)
        fit = state["fit"]
        mean, spread = fit["clock"]
        self._fit = _Fit(**{**fit, "clock": (float(mean), float(spread))})
        self._latest = np.array(state["latest"], dtype=np.int64)

    def _fitted(self) -> _Fit:
        if self._fit is None:
            raise ValueError("predictor: predict before fit")
        return self._fit

    def _embedder(self) -> GraphAutoencoder:
        if self._encoder is None:
            raise ValueError("predictor: predict before fit")
        return self._encoder

    @torch.no_grad()
    def _embed(self, choices: IntArray) -> Tensor:
        """Return the embeddings (n, P) of ``choices`` (n, D)."""
        encoder = self._embedder()
        parts = [encoder.embed(self._batch(choices[part])) for part in _parts(len(choices))]
        return torch.cat(parts) if parts else encoder.edge_offset.new_empty((0, encoder.embedding_size))

    def _batch(self, choices: IntArray) -> GraphBatch:
        return self._embedder().batch(self._view.of(choices))

    @torch.no_grad()
    def _targets(self, choices: IntArray) -> FloatArray:
        """Return what each head expects of ``choices`` (n, D) at the latest step, in units of targets: (M, n)."""
        embeddings = self._embed(choices)
        times = embeddings.new_full((len(choices),), self._fitted().latest)
        return _array(self._heads(embeddings, times))

    def _head_means(self, embeddings: Tensor, fit: _Fit) -> Tensor:
        return self._heads(embeddings, embeddings.new_full((len(embeddings),), fit.latest)).mean(dim=0)


class GraphPredictors:
    """Makes graph predictors that share one encoder, which is pretrained when the first of them is fitted.

    A :data:`nasdeploy.optim.predictor.PredictorFactory`: cross-validation asks for many. dtype: float64 makes gradients
    exact to more digits.
    """

    def __init__(
        self,
        view: GraphView,
        *,
        seed: int = 0,
        size: AutoencoderSize | None = None,
        pretraining: PretrainingSettings | None = None,
        heads: HeadSettings | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._view, self._seed = view, seed
        self._size, self._pretraining, self._heads = size, pretraining, heads
        self._device, self._dtype = device, dtype
        self._encoder: GraphAutoencoder | None = None

    def encoder(self) -> GraphAutoencoder:
        """Return the pretrained autoencoder; the first call takes seconds."""
        if self._encoder is None:
            self._encoder = pretrain(
                self._view,
                seed=self._seed,
                size=self._size,
                settings=self._pretraining,
                device=self._device,
            ).to(self._dtype)
        return self._encoder

    def __call__(self) -> GraphPredictor:
        """Return a predictor that has seen no loss."""
        return GraphPredictor(
            self._view, encoder=self.encoder, seed=self._seed, heads=self._heads, device=self._device
        )


def graph_rung(space: SearchSpace, *, seed: int = 0, device: torch.device | str = "cpu") -> Rung:
    """Return the rung "graph" of a ladder over ``space``; nothing is pretrained before it is fitted.

    The same arguments give the same rung, so that all ladders of a job share one encoder. It depends on them alone:
    whether it was pretrained for another ladder before changes nothing but the time.
    """
    key = (space.fingerprint(), seed, str(device))
    if key not in _RUNGS:
        while len(_RUNGS) >= MAX_RUNGS:
            _RUNGS.pop(next(iter(_RUNGS)))
        predictors = GraphPredictors(graph_view(space), seed=seed, device=device)
        _RUNGS[key] = Rung(name="graph", make=predictors, growth=COSTLY_GROWTH)
    return _RUNGS[key]


_RUNGS: dict[tuple[str, int, str], Rung] = {}


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + MAX_BATCH) for start in range(0, count, MAX_BATCH))


def _like(tensor: Tensor, values: FloatArray) -> Tensor:
    return torch.from_numpy(values).to(tensor)


def _array(tensor: Tensor) -> FloatArray:
    return tensor.detach().double().cpu().numpy()
