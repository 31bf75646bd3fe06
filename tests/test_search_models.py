"""Which models of the loss a search rests on, by its settings."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from nasdeploy.costs.counting import counting_tables
from nasdeploy.costs.table import CostTable, Factor
from nasdeploy.optim.acquisition import KnowledgeGradient
from nasdeploy.optim.evolution import EvolutionaryProposer
from nasdeploy.optim.gaussian_predictor import GaussianPredictor
from nasdeploy.optim.gaussian_process import GaussianProcess
from nasdeploy.optim.ladder import Ladder
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.streaming import StreamingLadder
from nasdeploy.pipeline.context import Job
from nasdeploy.pipeline.loss_models import make_guide, make_predictor, make_proposer, make_surrogate
from nasdeploy.settings import BuildSettings
from nasdeploy.spaces import make_space

SPACE = make_space("mobile", (1, 28, 28), 3)


def job_of(**search: Any) -> Job:
    """Return what the factories look at of a job."""
    settings = BuildSettings(search={"estimator": "doubly_robust", **search})
    job = SimpleNamespace(settings=settings, space=SPACE, device=torch.device("cpu"), seed=lambda purpose: 1)
    return cast(Job, job)


@pytest.fixture(scope="module")
def objectives() -> list[Objective]:
    """One profile with a cap."""
    return [Objective(tables=dict(counting_tables(SPACE)), caps={"params": 50_000.0})]


@pytest.mark.parametrize(
    ("predictor", "selecting", "in_the_gradient"),
    [("gaussian-process", GaussianProcess, type(None)), ("proxy", Ladder, StreamingLadder)],
)
def test_selection_and_gradient_rest_on_the_predictor(
    objectives: list[Objective], predictor: str, selecting: type, in_the_gradient: type
) -> None:
    job = job_of(predictor=predictor)
    assert type(make_predictor(job, objectives)) is selecting
    assert type(make_surrogate(job, objectives)) is in_the_gradient


@pytest.mark.parametrize(
    ("predictor", "proposer", "kind", "model"),
    [
        ("gaussian-process", "knowledge-gradient", KnowledgeGradient, GaussianProcess),
        ("gaussian-process", "evolution", EvolutionaryProposer, GaussianPredictor),
        ("proxy", "knowledge-gradient", KnowledgeGradient, StreamingLadder),
        ("proxy", "evolution", EvolutionaryProposer, StreamingLadder),
    ],
)
def test_the_proposer_rests_on_the_predictor(
    objectives: list[Objective], predictor: str, proposer: str, kind: type, model: type
) -> None:
    job = job_of(predictor=predictor, proposer=proposer)
    surrogate = make_surrogate(job, objectives)
    mask = tuple((True,) * count for count in SPACE.num_candidates())
    made = cast(Any, make_proposer(job, objectives, [mask], surrogate=surrogate))
    assert type(made) is kind
    assert type(made.model) is model
    made.tell(np.array([SPACE.smallest().choices]), np.array([1.0]), 0)
    shared = predictor == "proxy"
    assert (made.model is surrogate) == shared
    assert made.model.num_samples == (0 if shared else 1)  # a shared one is told by the gradient


@pytest.mark.parametrize("proposer", ["knowledge-gradient", "evolution"])
def test_a_search_whose_proposer_shares_the_model_continues_bit_by_bit(proposer: str) -> None:
    sizes = (3, 3, 3, 3)
    table = CostTable(tuple(Factor((d,), np.arange(1.0, 4.0)) for d in range(4)))
    space = SimpleNamespace(num_candidates=lambda: sizes, decisions=sizes)
    search = {"predictor": "proxy", "proposer": proposer, "proxy": {"rungs": ("ridge", "pairs")}}
    settings = BuildSettings(search={"estimator": "doubly_robust", **search})
    job = cast(Job, SimpleNamespace(settings=settings, space=space))
    goals = [Objective(tables={"params": table}, caps={"params": 9.0})]

    def optimizer() -> PooledOptimizer:
        surrogate = make_surrogate(job, goals)
        mask = tuple((True,) * count for count in sizes)
        return PooledOptimizer(
            num_candidates=sizes,
            objectives=goals,
            estimator="doubly_robust",
            surrogate=surrogate,
            proposer=make_proposer(job, goals, [mask], surrogate=surrogate),
            guided_share=0.5,
        )

    def advance(made: PooledOptimizer, steps: range) -> None:
        for step in steps:
            choices = made.ask(4, np.random.default_rng(step))
            made.tell(choices, np.random.default_rng(step).normal(size=4) - 0.3 * choices.sum(axis=1))

    one, other = optimizer(), optimizer()
    advance(one, range(8))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for made in (one, other):
        advance(made, range(8, 14))
    assert one.state_dict() == other.state_dict()
    assert one.latest is not None
    assert not one.latest.draw.drawn.all()  # some are proposals


@pytest.mark.parametrize(
    ("search", "proposer", "model"),
    [
        ({}, KnowledgeGradient, GaussianProcess),
        ({"proposer": "evolution"}, EvolutionaryProposer, GaussianPredictor),
        ({"predictor": "proxy", "proposer": "evolution"}, EvolutionaryProposer, StreamingLadder),
    ],
)
def test_an_added_profile_is_led_by_the_settings_of_the_search(
    objectives: list[Objective], search: dict[str, Any], proposer: type, model: type
) -> None:
    mask = tuple((True,) * count for count in SPACE.num_candidates())
    guide = make_guide(job_of(proxy={"rungs": ("ridge",)}, **search), objectives[0], mask)
    assert type(guide.proposer) is proposer
    assert type(guide.model) is model
    choices = np.array([SPACE.smallest().choices, SPACE.largest().choices])
    guide.model.fit(choices, np.array([2.0, 1.0]), np.array([0, 0]))
    guide.proposer.tell(choices, np.array([2.0, 1.0]), 1)
    assert guide.model.num_samples == 4  # the proposer tells this very model
    assert np.isfinite(guide.model.predict(choices)).all()


@pytest.mark.parametrize("rungs", [("ridge",), ("pairs", "ridge"), ("ridge", "pairs", "graph")])
def test_the_ladder_has_the_rungs_of_the_settings_the_simplest_first(
    objectives: list[Objective], rungs: tuple[str, ...]
) -> None:
    made = make_predictor(job_of(predictor="proxy", proxy={"rungs": rungs}), objectives)
    assert isinstance(made, Ladder)
    assert made.choice.rung == ("ridge" if "ridge" in rungs else rungs[0])
