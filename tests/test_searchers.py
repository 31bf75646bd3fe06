"""The one-shot loop and the selection of finalists, on a small space and bars for images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasdeploy.checkpoints import load_checkpoint, save_checkpoint
from nasdeploy.costs.table import CostTable, tabulate
from nasdeploy.data import Split, TrainingBatches, make_augmentation, training_batches
from nasdeploy.networks import Normalise, Supernet
from nasdeploy.optim.acquisition import KnowledgeGradient
from nasdeploy.optim.draws import GUIDED
from nasdeploy.optim.gaussian_process import GaussianProcess
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.searchers.oneshot import OneShotSearch, SearchStep
from nasdeploy.searchers.selecting import (
    Finalist,
    FinalistJudge,
    candidates,
    fit_surrogate,
    rank_finalists,
)
from nasdeploy.settings import SearchSettings
from nasdeploy.spaces import Architecture, MobileConfig, Stage, mobile_space
from nasdeploy.spaces.base import to_architectures
from nasdeploy.training.evaluation import loss_and_accuracy
from nasdeploy.training.recalibration import recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, NUM_CLASSES = (1, 28, 28), 4
SPACE = mobile_space(
    SHAPE,
    NUM_CLASSES,
    MobileConfig(
        stem_widths=(4, 8),
        stem_stride=2,
        stages=(
            Stage(widths=(4, 8), num_blocks=2, stride=2),
            Stage(widths=(8, 16), num_blocks=2, stride=2),
        ),
        head_widths=(8, 16),
        operations=((3, 1), (3, 2), (5, 2)),
    ),
)
SETTINGS = SearchSettings(
    num_steps=12,
    batch_size=16,
    learning_rate=0.1,
    warm_up_share=0.25,
    num_loss_samples=8,
    loss_interval=2,
    loss_batch_size=24,
)


def bars(count: int, seed: int) -> Split:
    """Return images of bars in four directions, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:28, 0:28]
    directions = np.stack([rows, columns, rows + columns, rows - columns])  # (4, 28, 28)
    labels = np.arange(count) % NUM_CLASSES
    clean = np.where((directions[labels] + rng.integers(0, 6, size=(count, 1, 1))) % 6 < 3, 200, 50)
    images = np.clip(clean + rng.normal(0, 20, size=clean.shape), 0, 255).astype(np.uint8)
    return Split(torch.from_numpy(images[:, None]), torch.from_numpy(labels))


def work() -> CostTable:
    """Return a cost that grows with every choice."""
    return tabulate(SPACE, lambda spec: spec.hidden_channels * (spec.in_channels + spec.out_channels))


def cost_of(architecture: Architecture) -> float:
    """Return the same cost, layer by layer."""
    return sum(s.hidden_channels * (s.in_channels + s.out_channels) for s in SPACE.decode(architecture))


def make_objectives() -> list[Objective]:
    """Return a profile with a hard cap at 30 % of the range, and one with a soft weight."""
    low, high = cost_of(SPACE.smallest()), cost_of(SPACE.largest())
    tables = {"params": work()}
    return [
        Objective(tables=tables, caps={"params": low + 0.3 * (high - low)}),
        Objective(tables=tables, coefficients={"params": 0.2}, references={"params": high}),
    ]


def batches(split: Split, batch_size: int, seed: int) -> TrainingBatches:
    """Return endless batches without augmentation."""
    return training_batches(
        split,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        augment=make_augmentation("none", SHAPE),
    )


@dataclass(kw_only=True)
class Search:
    """A search that is carried out step by step."""

    supernet: Supernet
    optimizer: PooledOptimizer
    loop: OneShotSearch
    steps: Iterator[SearchStep]


def steps_of(loop: OneShotSearch) -> Iterator[SearchStep]:
    """Yield the steps that are left."""
    while loop.num_done < loop.num_steps:
        yield loop.step()


def make_search(seed: int = 0, *, guided: bool = False, **changes: Any) -> Search:
    """Return a search with everything drawn from ``seed``. guided: a model proposes half of what is evaluated."""
    settings = SETTINGS.model_copy(update=changes)
    supernet = Supernet(SPACE, Normalise((125.0,), (78.0,)), torch.Generator().manual_seed(seed))
    counts, objectives = SPACE.num_candidates(), make_objectives()
    optimizer = PooledOptimizer(
        num_candidates=counts,
        objectives=objectives,
        estimator="doubly_robust" if guided else "importance",
        proposer=KnowledgeGradient(num_candidates=counts, objectives=objectives) if guided else None,
        guided_share=0.5 if guided else 0.0,
    )
    loop = OneShotSearch(
        supernet,
        optimizer,
        train=batches(bars(64, seed=1), settings.batch_size, seed),
        valid=batches(bars(48, seed=2), settings.loss_batch_size, seed + 1),
        settings=settings,
        rng=np.random.default_rng(seed),
    )
    return Search(supernet=supernet, optimizer=optimizer, loop=loop, steps=steps_of(loop))


@pytest.fixture(scope="module")
def finished() -> Search:
    """A search after its last step."""
    search = make_search()
    list(search.steps)
    return search


def test_distributions_rest_while_the_weights_warm_up() -> None:
    search = make_search()
    start = search.optimizer.theta
    weights = {name: value.clone() for name, value in search.supernet.state_dict().items()}
    for _ in range(3):  # a quarter of 12 steps
        assert next(search.steps).diagnostics is None
    assert np.array_equal(search.optimizer.theta, start)
    assert search.optimizer.num_steps == 0
    stem = "elastic_layers.0.conv.weights.3"
    assert not torch.equal(search.supernet.state_dict()[stem], weights[stem])


def test_distributions_move_after_the_warm_up() -> None:
    search = make_search()
    start = search.optimizer.theta
    told = [search.optimizer.num_steps for _ in search.steps]
    assert told == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]  # every second step
    assert all(np.abs(search.optimizer.theta - start).max(axis=(1, 2)) > 0.01)  # both profiles
    assert len(search.optimizer.archive.losses) == 5 * SETTINGS.num_loss_samples


@pytest.mark.parametrize(("num_steps", "warm_up_share"), [(1, 0.2), (3, 1.0), (7, 0.0)])
def test_a_search_has_as_many_steps_as_it_was_told_and_moves_at_least_once(
    num_steps: int, warm_up_share: float
) -> None:
    search = make_search(num_steps=num_steps, warm_up_share=warm_up_share)
    assert [step.step for step in search.steps] == list(range(1, num_steps + 1))
    assert search.optimizer.num_steps >= 1


@pytest.mark.parametrize("num_steps", range(1, 13))
def test_a_search_may_have_any_number_of_steps(num_steps: int) -> None:
    search = make_search(num_steps=num_steps, num_loss_samples=2, batch_size=4, loss_batch_size=4)
    assert len(list(search.steps)) == num_steps


def test_the_same_seed_gives_the_same_bits() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - nothing may draw from here
    first, again, other = make_search(3), make_search(3), make_search(4)
    losses = [[float(step.loss) for step in search.steps] for search in (first, again, other)]
    assert losses[0] == losses[1] != losses[2]
    assert np.array_equal(first.optimizer.theta, again.optimizer.theta)
    assert not np.array_equal(first.optimizer.theta, other.optimizer.theta)
    left, right = first.supernet.state_dict(), again.supernet.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("stop", "guided"), [(1, False), (3, False), (4, False), (11, False), (14, True)])
def test_a_search_that_was_stored_continues_bit_by_bit(stop: int, guided: bool, tmp_path: Path) -> None:
    num_steps = 20 if guided else 12
    whole, first, second = (make_search(guided=guided, num_steps=num_steps) for _ in range(3))
    steps = [(float(step.loss), step.diagnostics) for step in whole.steps]
    for _ in range(stop):
        next(first.steps)
    save_checkpoint(tmp_path / "state", first.loop.state_dict(), schema="test/1")
    second.loop.load_state_dict(load_checkpoint(tmp_path / "state", schema="test/1"))
    assert [(float(step.loss), step.diagnostics) for step in second.steps] == steps[stop:]
    left, right = whole.loop.state_dict(), second.loop.state_dict()
    assert left["optimizer"] == right["optimizer"]
    assert all(torch.equal(left["supernet"][name], value) for name, value in right["supernet"].items())
    latest = whole.optimizer.latest
    assert latest is not None
    assert np.equal(latest.draw.owners, GUIDED).any() == guided  # or nothing was tested


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    list(make_search(num_steps=2).steps)
    assert torch.equal(torch.get_rng_state(), before)


def trained_architectures(search: Search) -> list[list[Architecture]]:
    """Return, step by step, the architectures that the weights were trained on."""
    trained: list[list[Architecture]] = []

    def note(module: nn.Module, args: tuple[Tensor, Architecture]) -> None:
        if torch.is_grad_enabled():
            trained[-1].append(args[1])

    search.supernet.register_forward_pre_hook(note)
    while True:
        trained.append([])
        if next(search.steps, None) is None:
            return trained[:-1]


@pytest.mark.parametrize("interval", [1, 3, 20])
def test_both_ends_of_the_space_are_trained_every_so_many_steps(interval: int) -> None:
    trained = trained_architectures(
        make_search(sandwich_interval=interval, num_weight_samples=2, num_steps=7)
    )
    for step, architectures in enumerate(trained):
        ends = [SPACE.smallest(), SPACE.largest()] if step % interval == 0 else []
        assert len(architectures) == 2 + len(ends)
        assert architectures[2:] == ends


def test_warm_up_draws_uniformly() -> None:
    search = make_search(
        num_steps=40, warm_up_share=1.0, sandwich_interval=100, num_weight_samples=4, batch_size=4
    )
    trained = [a for step in trained_architectures(search) for a in step[:4]]
    counts = Counter(architecture.choices[-1] for architecture in trained)  # the head's width: 2 candidates
    assert abs(counts[0] - counts[1]) < 4 * len(trained) ** 0.5  # 4 standard deviations


def test_losses_that_are_told_are_those_of_the_supernet_on_one_batch() -> None:
    search = make_search(num_steps=1)
    next(search.steps)
    images, labels = next(batches(bars(48, seed=2), SETTINGS.loss_batch_size, 1))
    archive = search.optimizer.archive
    with torch.no_grad():
        expected = [
            float(nn.functional.cross_entropy(search.supernet(images, a), labels))
            for a in to_architectures(archive.choices)
        ]
    np.testing.assert_allclose(archive.losses, expected, rtol=1e-6)


def make_judge(search: Search) -> FinalistJudge:
    """Return a judge on a validation split."""
    return FinalistJudge(
        search.supernet, images=lambda architecture: (bars(64, seed=1).images, bars(48, seed=2))
    )


def test_a_finalist_is_judged_by_a_recalibrated_copy(finished: Search) -> None:
    before = {name: value.clone() for name, value in finished.supernet.state_dict().items()}
    found = make_judge(finished).judge(SPACE.largest())
    network, valid = finished.supernet.extract(SPACE.largest()), bars(48, seed=2)
    recalibrate(network, bars(64, seed=1).images)
    expected = loss_and_accuracy(network, valid.images, valid.labels)
    assert (found.loss, found.accuracy) == pytest.approx(expected, rel=1e-5)
    after = finished.supernet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_finalist_is_judged_once(finished: Search) -> None:
    judge = make_judge(finished)
    assert judge.judge(SPACE.smallest()) is judge.judge(Architecture(SPACE.smallest().choices))


class Listed:
    """A judge that knows losses beforehand, and remembers what it was asked."""

    def __init__(self, losses: dict[Architecture, float]) -> None:
        self.losses = losses
        self.asked: list[Architecture] = []

    def judge(self, architecture: Architecture) -> Finalist:
        self.asked.append(architecture)
        loss = self.losses[architecture]
        return Finalist(architecture=architecture, loss=loss, accuracy=0.5, losses=np.full(4, loss))


def ignorant() -> GaussianProcess:
    """Return a model that saw one architecture and takes all others for equal."""
    model = GaussianProcess(SPACE.num_candidates())
    choices = np.array([[1] * len(SPACE.decisions)])
    model.fit(choices, np.array([1.0]), np.array([0]))
    return model


def test_finalists_are_ranked_by_loss_plus_weighted_costs() -> None:
    high = cost_of(SPACE.largest())
    objective = Objective(
        tables={"params": work()}, coefficients={"params": 1.0}, references={"params": high}
    )
    small, large = SPACE.smallest(), SPACE.largest()
    middle = Architecture((0,) * 7 + (1,))
    found = np.array([large.choices, small.choices, middle.choices])
    share = {a: cost_of(a) / high for a in (small, middle, large)}
    judge = Listed({large: 0.1, small: 1.05 - share[small], middle: 1.0 - share[middle]})
    ranked = rank_finalists(
        found, judge=judge, objective=objective, surrogate=ignorant(), evaluated=found, size=3
    )
    # 1.0, 1.05 and 1.1 in all; by the loss alone the largest would lead
    assert [finalist.architecture for finalist in ranked] == [middle, small, large]


def test_only_the_first_candidates_are_judged() -> None:
    found = np.array([SPACE.largest().choices, SPACE.smallest().choices])
    judge = Listed({SPACE.largest(): 2.0})
    objective = make_objectives()[0]
    ranked = rank_finalists(
        found, judge=judge, objective=objective, surrogate=ignorant(), evaluated=found, size=1
    )
    assert [finalist.architecture for finalist in ranked] == judge.asked == [SPACE.largest()]


def test_the_best_that_the_search_has_evaluated_is_always_judged() -> None:
    large, small = SPACE.largest(), SPACE.smallest()
    found = np.array([large.choices, small.choices])
    judge, objective = Listed({small: 2.0}), make_objectives()[0]
    rank_finalists(found, judge=judge, objective=objective, surrogate=ignorant(), evaluated=found[1:], size=1)
    assert judge.asked == [small]


def propose(search: Search, k: int, seed: int = 0, **caps: float) -> list[Architecture]:
    """Return the candidates of profile ``k``, under other caps where they are given."""
    objective = search.optimizer.objectives[k]
    if caps:
        objective = Objective(tables=objective.tables, caps=caps)
    surrogate = fit_surrogate(search.optimizer)
    return to_architectures(
        candidates(search.optimizer, k, objective=objective, surrogate=surrogate, seed=seed)
    )


def test_candidates_are_feasible_and_distinct(finished: Search) -> None:
    cap = finished.optimizer.objectives[0].caps["params"]
    found = propose(finished, 0)
    assert len(found) > 20
    assert len(set(found)) == len(found)
    assert max(map(cost_of, found)) <= cap
    assert max(map(cost_of, propose(finished, 1))) > cap  # the other profile has none


def test_candidates_keep_to_tightened_caps(finished: Search) -> None:
    cap = 1.2 * cost_of(SPACE.smallest())
    found = propose(finished, 0, params=cap)
    assert found
    assert max(map(cost_of, found)) <= cap


def test_there_are_no_candidates_below_the_cheapest_network(finished: Search) -> None:
    assert propose(finished, 0, params=0.99 * cost_of(SPACE.smallest())) == []


def test_candidates_come_best_first_by_the_model_of_the_losses(finished: Search) -> None:
    found = np.array([a.choices for a in propose(finished, 1)])
    predicted = fit_surrogate(finished.optimizer).predict(found) + make_objectives()[1].penalty(found)
    assert np.all(np.diff(predicted) >= -1e-12)


def test_candidates_depend_on_the_seed_alone(finished: Search) -> None:
    assert propose(finished, 1, seed=5) == propose(finished, 1, seed=5)


def test_candidates_keep_to_the_mask_of_the_profile() -> None:
    mask = SPACE.candidate_mask(8)  # widths of 4 are forbidden
    optimizer = PooledOptimizer(
        num_candidates=SPACE.num_candidates(), objectives=make_objectives()[1:], masks=[mask]
    )
    choices = optimizer.ask(8, np.random.default_rng(0))
    optimizer.tell(choices, np.arange(8.0))
    found = candidates(
        optimizer, 0, objective=optimizer.objectives[0], surrogate=fit_surrogate(optimizer), seed=0
    )
    for architecture in to_architectures(found):
        assert all(spec.out_channels % 8 == 0 for spec in SPACE.decode(architecture)[:-1])
