"""A profile that comes after the search: answered from the recorded losses, and from a few evaluations of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasdeploy.costs.table import CostTable, Factor, FloatArray, IntArray, tabulate
from nasdeploy.data import Split, TrainingBatches, make_augmentation, training_batches
from nasdeploy.errors import ConfigError
from nasdeploy.networks import Normalise, Supernet
from nasdeploy.optim import draws
from nasdeploy.optim.added import NUM_KEPT, Addition, Guide, added_optimizer, relevant
from nasdeploy.optim.archive import Archive
from nasdeploy.optim.evolution import EvolutionaryProposer
from nasdeploy.optim.ladder import proxy_ladder, ridge_rungs
from nasdeploy.optim.objective import Objective
from nasdeploy.optim.pooled import PooledOptimizer
from nasdeploy.optim.streaming import StreamingLadder
from nasdeploy.searchers.adapting import Adapted, adapt, uncovered
from nasdeploy.spaces import MobileConfig, Stage, mobile_space

pytestmark = pytest.mark.usefixtures("one_thread")

# Eight decisions between small, middle and large: loss falls and cost rises with size.
SIZES = (3,) * 8
COST = CostTable(tuple(Factor((d,), np.array([0.0, 1.0, 3.0])) for d in range(8)))
WORTH = np.linspace(0.2, 1.6, 8)  # what size is worth in each decision
EVERYTHING: IntArray = np.array(list(itertools.product(range(3), repeat=8)))
ALL = tuple((True,) * 3 for _ in SIZES)


def loss_of(choices: IntArray) -> FloatArray:
    """Return losses (n,): less and less is gained by size."""
    gained: FloatArray = np.array([0.0, 1.2, 2.0])[choices] @ WORTH
    return 20.0 - gained


def priced(price: float) -> Objective:
    """Return loss + price · cost."""
    return Objective(tables={"cost": COST}, coefficients={"cost": price}, references={"cost": 1.0})


def capped(cap: float) -> Objective:
    """Return loss where the cost keeps ``cap``."""
    return Objective(tables={"cost": COST}, caps={"cost": cap})


def regret(objective: Objective, answer: IntArray) -> float:
    """Return how far the answer (D,) is from the best of all; infinite where it breaks a cap."""
    values = np.where(
        objective.feasible(EVERYTHING), loss_of(EVERYTHING) + objective.penalty(EVERYTHING), np.inf
    )
    found = answer[None]
    own = float(loss_of(found)[0] + objective.penalty(found)[0])
    return own - float(values.min()) if objective.feasible(found)[0] else np.inf


def search_for(objectives: list[Objective], *, num_steps: int, seed: int = 0) -> PooledOptimizer:
    """Return the distributions after a search with twelve evaluations a step."""
    optimizer, rng = PooledOptimizer(num_candidates=SIZES, objectives=objectives), np.random.default_rng(seed)
    for _ in range(num_steps):
        choices = optimizer.ask(12, rng)
        optimizer.tell(choices, loss_of(choices) + rng.normal(0.0, 0.1, size=12))
    return optimizer


@pytest.fixture(scope="module")
def ends() -> PooledOptimizer:
    """A search for a roomy and a tight budget."""
    return search_for([priced(0.05), priced(1.5)], num_steps=20)


def addition_to(searched: PooledOptimizer, objective: Objective, *, num_evaluations: int = 0) -> Addition:
    """Return the addition of a profile that allows everything."""
    return Addition(
        searched,
        objective=objective,
        mask=ALL,
        num_evaluations=num_evaluations,
        rng=np.random.default_rng(1),
    )


def evaluate(addition: Addition, *, num_steps: int) -> None:
    """Evaluate what the addition asks for, twelve a step."""
    rng = np.random.default_rng(2)
    for _ in range(num_steps):
        choices = addition.optimizer.ask(12, rng)
        addition.optimizer.tell(choices, loss_of(choices))


@pytest.mark.parametrize("objective", [priced(0.4), priced(0.7), capped(8.0), capped(15.0)])
def test_a_budget_between_the_others_is_answered_without_an_evaluation(
    ends: PooledOptimizer, objective: Objective
) -> None:
    found = addition_to(ends, objective).distribution(np.random.default_rng(0))
    guess = regret(objective, ends.modes()[1])  # the answer to the tight budget keeps the caps too
    assert regret(objective, found.modes()[0]) < min(0.25, 0.2 * guess)
    assert len(found.archive.losses) == len(ends.archive.losses)
    assert found.num_steps == ends.num_steps


def test_evaluations_correct_what_the_recorded_losses_do_not_tell() -> None:
    searched = search_for([capped(24.0)], num_steps=12)
    theta = searched.theta
    while categorical_mass(theta) < 0.8:  # until all that is evaluated is large
        searched = search_for([capped(24.0)], num_steps=2 * searched.num_steps)
        theta = searched.theta
    objective = capped(3.0)
    addition = addition_to(searched, objective, num_evaluations=60)
    evaluate(addition, num_steps=5)
    found = addition.distribution(np.random.default_rng(0))
    assert regret(objective, found.modes()[0]) < 0.3


def categorical_mass(theta: FloatArray) -> float:
    """Return the mean probability of the largest candidate."""
    return float(theta[..., 2].mean())


def test_all_evaluations_are_proposals_of_the_model_and_later_than_the_search(ends: PooledOptimizer) -> None:
    addition = addition_to(ends, priced(0.4), num_evaluations=24)
    evaluate(addition, num_steps=2)
    latest = addition.optimizer.latest
    assert latest is not None
    assert set(latest.draw.owners.tolist()) == {draws.GUIDED}
    found = addition.distribution(np.random.default_rng(0))
    assert found.archive.steps[-24:].tolist() == [20] * 12 + [21] * 12
    assert found.num_steps == 22


def test_another_guide_leads_where_it_is_given(ends: PooledOptimizer) -> None:
    objective = capped(8.0)
    ladder = proxy_ladder(SIZES, [objective], rungs=ridge_rungs(SIZES), num_repeats=1)
    model = StreamingLadder(ladder, num_decisions=len(SIZES))
    proposer = EvolutionaryProposer(num_candidates=SIZES, objectives=[objective], masks=[ALL], model=model)
    addition = Addition(
        ends,
        objective=objective,
        mask=ALL,
        num_evaluations=24,
        rng=np.random.default_rng(1),
        guide=Guide(model=model, proposer=proposer),
    )
    evaluate(addition, num_steps=2)
    found = addition.distribution(np.random.default_rng(0))
    assert model.num_samples == len(ends.archive.losses) + 24
    assert regret(objective, found.modes()[0]) < 0.25 * regret(objective, ends.modes()[1])


def test_proposals_keep_to_the_caps_and_the_mask(ends: PooledOptimizer) -> None:
    mask = ((True, True, False),) * 8
    objective = capped(5.0)
    addition = Addition(
        ends, objective=objective, mask=mask, num_evaluations=36, rng=np.random.default_rng(0)
    )
    evaluate(addition, num_steps=3)
    own = addition.optimizer.archive.choices[-36:]
    assert own.max() == 1
    assert objective.feasible(own).all()
    assert addition.distribution(np.random.default_rng(0)).theta[0, :, 2].max() == 0.0


def test_with_next_to_nothing_recorded_the_distribution_is_sampled_until_the_model_knows_enough() -> None:
    searched = search_for([priced(0.4)], num_steps=1)
    addition = addition_to(searched, priced(0.2), num_evaluations=60)
    owners = []
    for _ in range(5):
        evaluate(addition, num_steps=1)
        latest = addition.optimizer.latest
        assert latest is not None
        owners.append(set(latest.draw.owners.tolist()))
    assert owners[0] == {0}  # 12 losses say too little of 16 free parameters
    assert owners[-1] == {draws.GUIDED}


def test_an_addition_leaves_the_search_as_it_is_and_depends_on_nothing_else(ends: PooledOptimizer) -> None:
    before = ends.state_dict()
    states = []
    for objective in (priced(0.4), capped(8.0), priced(0.4)):
        addition = addition_to(ends, objective, num_evaluations=24)
        evaluate(addition, num_steps=2)
        states.append(addition.distribution(np.random.default_rng(0)).state_dict())
    assert ends.state_dict() == before
    assert states[0] == states[2] != states[1]


def test_a_stored_distribution_comes_back(ends: PooledOptimizer) -> None:
    objective = capped(8.0)
    addition = addition_to(ends, objective, num_evaluations=12)
    evaluate(addition, num_steps=1)
    found = addition.distribution(np.random.default_rng(0))
    stored = added_optimizer(SIZES, objective=objective, mask=ALL)
    stored.load_state_dict(json.loads(json.dumps(found.state_dict())))
    assert np.array_equal(stored.theta, found.theta)
    assert np.array_equal(stored.archive.choices, found.archive.choices)
    assert stored.state_dict() == found.state_dict()


def long_archive(count: int, *, noise: float = 0.0) -> Archive:
    """Return ``count`` samples, ten a step: small architectures first, then large ones alone."""
    rng, archive = np.random.default_rng(0), Archive(8, 10**6)
    for step in range(count // 10):
        choices = rng.integers(0, 2, size=(10, 8)) + (step >= count // 20)
        archive.add(step, choices, loss_of(choices) + rng.normal(0.0, noise, size=10))
    return archive


def kept_of(
    archive: Archive, size: int, objective: Objective, mask: tuple[tuple[bool, ...], ...]
) -> IntArray:
    """Return what is kept of the archive for a profile."""
    return relevant(archive, num_candidates=SIZES, objective=objective, mask=mask, size=size)


def test_a_short_archive_is_kept_whole() -> None:
    archive = long_archive(200)
    assert kept_of(archive, 200, capped(4.0), ALL).tolist() == list(range(200))


def test_of_a_long_archive_old_samples_that_suit_the_profile_are_kept_and_the_latest() -> None:
    archive, objective = long_archive(400, noise=0.1), capped(4.0)
    kept = kept_of(archive, 60, objective, ALL)
    assert len(kept) == 60
    assert np.all(np.diff(kept) > 0)
    assert set(range(370, 400)) <= set(kept.tolist())  # the latest 30, none of which keeps the cap
    old = kept[kept < 200]
    assert len(old) == 30
    assert objective.feasible(archive.choices[old]).all()
    others = np.setdiff1d(np.flatnonzero(objective.feasible(archive.choices)), old)
    assert loss_of(archive.choices[old]).mean() < loss_of(archive.choices[others]).mean() - 0.5


def test_samples_outside_the_mask_are_the_last_to_be_kept_as_suitable() -> None:
    archive, mask = long_archive(400), ((True, True, False),) * 8
    kept = kept_of(archive, 60, priced(0.0), mask)  # by loss alone, the large ones would be better
    assert (archive.choices[kept].max(axis=1) == 1).sum() == 30


def test_the_model_of_an_addition_forgets_nothing_that_was_kept() -> None:
    searched = search_for([priced(0.05), priced(1.5)], num_steps=1)
    rng = np.random.default_rng(0)
    for step in range(1, 120):
        choices = rng.integers(0, 3, size=(12, 8))
        searched.archive.add(step, choices, loss_of(choices))
    assert len(searched.archive.losses) > NUM_KEPT
    addition = addition_to(searched, capped(3.0), num_evaluations=24)
    assert len(addition.optimizer.archive.losses) == NUM_KEPT
    evaluate(addition, num_steps=2)
    archive = addition.distribution(np.random.default_rng(0)).archive
    assert len(archive.losses) == NUM_KEPT + 24
    feasible = capped(3.0).feasible(searched.archive.choices)
    assert 0 < feasible.sum() == capped(3.0).feasible(archive.choices[:-24]).sum()


# A small supernet, and bars for images.

SHAPE, NUM_CLASSES = (1, 28, 28), 4
SPACE = mobile_space(
    SHAPE,
    NUM_CLASSES,
    MobileConfig(
        stem_widths=(4, 8),
        stem_stride=2,
        stages=(Stage(widths=(4, 8), num_blocks=2, stride=2), Stage(widths=(8, 16), num_blocks=2, stride=2)),
        head_widths=(8, 16),
        operations=((3, 1), (3, 2), (5, 2)),
    ),
)
WORK = tabulate(SPACE, lambda spec: spec.hidden_channels * (spec.in_channels + spec.out_channels))


def batches(seed: int) -> TrainingBatches:
    """Return endless batches of 24 noisy images."""
    rng = np.random.default_rng(seed)
    labels = np.arange(48) % NUM_CLASSES
    images = rng.integers(0, 60, size=(48, 1, 28, 28)) + 40 * labels[:, None, None, None]
    return training_batches(
        Split(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels)),
        batch_size=24,
        generator=torch.Generator().manual_seed(seed),
        augment=make_augmentation("none", SHAPE),
    )


def half() -> Objective:
    """Return a cap at 30 % of the range of costs."""
    low, high = (float(WORK.of(np.array([one.choices]))[0]) for one in (SPACE.smallest(), SPACE.largest()))
    return Objective(tables={"params": WORK}, caps={"params": low + 0.3 * (high - low)})


def make_supernet() -> Supernet:
    """Return an untrained supernet."""
    return Supernet(SPACE, Normalise((125.0,), (78.0,)), torch.Generator().manual_seed(0))


def recorded() -> PooledOptimizer:
    """Return a search of four steps with made-up losses."""
    optimizer = PooledOptimizer(
        num_candidates=SPACE.num_candidates(), objectives=[Objective(tables={"params": WORK})]
    )
    rng = np.random.default_rng(0)
    for _ in range(4):
        choices = optimizer.ask(8, rng)
        optimizer.tell(choices, 2.0 - 0.1 * choices.sum(axis=1))
    return optimizer


NUM_LOSS_STEPS = 10


def adapted(supernet: Supernet, searched: PooledOptimizer, num_steps: int = NUM_LOSS_STEPS) -> Adapted:
    """Adapt the search to a cap."""
    return adapt(
        searched,
        objective=half(),
        mask=SPACE.full_mask(),
        supernet=supernet,
        valid=batches(5),
        num_steps=num_steps,
        num_loss_samples=6,
        rng=np.random.default_rng(0),
    )


def calls_of(supernet: Supernet) -> Callable[[], int]:
    """Return a function that tells how often the supernet was evaluated from now on."""
    calls: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(1)

    supernet.register_forward_pre_hook(note)
    return lambda: len(calls)


def test_a_profile_is_adapted_without_training() -> None:
    supernet, searched = make_supernet(), recorded()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    state, calls = searched.state_dict(), calls_of(supernet)
    found = adapted(supernet, searched)
    after = supernet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert searched.state_dict() == state  # the profiles that were searched for keep theirs
    assert sum(len(one.losses) for one in found.told) == NUM_LOSS_STEPS * 6 >= calls() > NUM_LOSS_STEPS
    archive = found.optimizer.archive
    assert len(archive.losses) == len(searched.archive.losses) + NUM_LOSS_STEPS * 6
    assert archive.losses[-6:].tolist() == found.told[-1].losses.tolist()
    assert archive.steps[-1] == searched.num_steps + NUM_LOSS_STEPS - 1
    drawn = found.optimizer.ask(64, np.random.default_rng(1))
    assert float(half().feasible(drawn).mean()) > 0.9


def test_a_profile_may_be_answered_without_any_evaluation() -> None:
    supernet, searched = make_supernet(), recorded()
    calls = calls_of(supernet)
    found = adapted(supernet, searched, num_steps=0)
    assert calls() == len(found.told) == 0
    assert np.array_equal(found.optimizer.archive.choices, searched.archive.choices)
    assert half().feasible(found.optimizer.modes())[0]


def test_a_loss_that_is_not_finite_stops_the_adaptation() -> None:
    supernet = make_supernet()
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        adapted(supernet, recorded())


def test_a_candidate_that_no_profile_allowed_is_not_covered() -> None:
    full, wide = SPACE.full_mask(), SPACE.candidate_mask(8)  # without widths of 4
    assert uncovered(SPACE, searched=[full], wanted=wide) is None
    assert uncovered(SPACE, searched=[wide, full], wanted=full) is None
    assert uncovered(SPACE, searched=[wide], wanted=full) == "stem.width = 4"
    assert uncovered(SPACE, searched=[wide], wanted=wide) is None
