"""Which models of the loss a search rests on: in its gradient, for its proposals, and for the selection."""

from __future__ import annotations

from collections.abc import Sequence

from nasdeploy.optim import gaussian_process
from nasdeploy.optim.acquisition import KnowledgeGradient, Proposer, knee_of, loss_model
from nasdeploy.optim.added import Guide
from nasdeploy.optim.evolution import EvolutionaryProposer
from nasdeploy.optim.features import CostFeatures
from nasdeploy.optim.gaussian_predictor import GaussianPredictor
from nasdeploy.optim.gaussian_process import GaussianProcess
from nasdeploy.optim.ladder import Ladder, proxy_ladder, ridge_rungs
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.streaming import StreamingLadder
from nasdeploy.pipeline.context import Job
from nasdeploy.predictors.graph import graph_rung
from nasdeploy.searchers.selecting import LossModel
from nasdeploy.spaces.base import CandidateMask

MAX_SAMPLES = 768
"""Losses that a search is guided by: those of the latest weights, and few enough that a step costs little."""


def make_predictor(job: Job, objectives: Sequence[Objective]) -> LossModel:
    """Return the model of the losses that a selection for profiles with ``objectives`` rests on, without samples."""
    if job.settings.search.predictor == "proxy":
        return _ladder(job, objectives)
    return loss_model(job.space.num_candidates(), objectives)


def make_surrogate(job: Job, objectives: Sequence[Objective]) -> StreamingLadder | None:
    """Return the model of the losses inside the doubly robust gradient, None: its own ridge regression."""
    if job.settings.search.predictor != "proxy":
        return None
    return _streaming(job, objectives, max_samples=MAX_SAMPLES)


def make_proposer(
    job: Job,
    objectives: Sequence[Objective],
    masks: Sequence[CandidateMask],
    *,
    surrogate: StreamingLadder | None,
) -> Proposer:
    """Return who proposes the guided share for the profiles with ``objectives`` and ``masks``.

    surrogate: the model inside the gradient, which learns every loss already; proposals rest on the same one.
    """
    model = surrogate if surrogate is not None else _model(job, objectives, max_samples=MAX_SAMPLES)
    return _proposer(job, objectives, masks, model=model, owns_model=surrogate is None)


def make_guide(job: Job, objective: Objective, mask: CandidateMask) -> Guide:
    """Return what leads a profile that is added after the search, by the settings of the search."""
    model = _model(job, [objective], max_samples=gaussian_process.MAX_SAMPLES)
    return Guide(model=model, proposer=_proposer(job, [objective], [mask], model=model, owns_model=True))


def _proposer(
    job: Job,
    objectives: Sequence[Objective],
    masks: Sequence[CandidateMask],
    *,
    model: StreamingLadder | GaussianPredictor | GaussianProcess,
    owns_model: bool,
) -> Proposer:
    num_candidates = job.space.num_candidates()
    if isinstance(model, StreamingLadder | GaussianPredictor) and _evolves(job):
        return EvolutionaryProposer(
            num_candidates=num_candidates,
            objectives=objectives,
            masks=masks,
            model=model,
            owns_model=owns_model,
        )
    return KnowledgeGradient(
        num_candidates=num_candidates,
        objectives=objectives,
        masks=masks,
        model=model,
        owns_model=owns_model,
    )


def _model(
    job: Job, objectives: Sequence[Objective], *, max_samples: int
) -> StreamingLadder | GaussianPredictor | GaussianProcess:
    """Return the model that proposals rest on: one with gradients where an evolution asks for them."""
    if job.settings.search.predictor == "proxy":
        return _streaming(job, objectives, max_samples=max_samples)
    num_candidates = job.space.num_candidates()
    if not _evolves(job):
        return loss_model(num_candidates, objectives, max_samples=max_samples)
    return GaussianPredictor(
        num_candidates,
        features=CostFeatures(num_candidates, objectives),
        knee=knee_of(objectives),
        max_samples=max_samples,
    )


def _evolves(job: Job) -> bool:
    return job.settings.search.proposer == "evolution"


def _streaming(job: Job, objectives: Sequence[Objective], *, max_samples: int) -> StreamingLadder:
    num_decisions = len(job.space.decisions)
    return StreamingLadder(_ladder(job, objectives), num_decisions=num_decisions, max_samples=max_samples)


def _ladder(job: Job, objectives: Sequence[Objective]) -> Ladder:
    """Return the model of proxy validation with the rungs of the settings, the simplest first, without samples.

    All ladders of a job share one graph rung, hence one encoder.
    """
    settings, num_candidates = job.settings.search.proxy, job.space.num_candidates()
    known = {rung.name: rung for rung in ridge_rungs(num_candidates)}
    if "graph" in settings.rungs:
        known["graph"] = graph_rung(job.space, seed=job.seed("graph rung"), device=job.device)
    return proxy_ladder(
        num_candidates,
        objectives,
        rungs=[rung for name, rung in known.items() if name in settings.rungs],
        num_folds=settings.num_folds,
        num_repeats=settings.num_repeats,
    )
