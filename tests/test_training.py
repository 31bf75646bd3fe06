"""Training as functions: statistics, steps, losses, schedules and retraining against closed forms and slow twins."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.checkpoints import load_checkpoint, save_checkpoint
from nasdeploy.data import Split, TrainingBatches, make_augmentation, training_batches
from nasdeploy.errors import ConfigError
from nasdeploy.networks import Network, Normalise, Supernet, build_network
from nasdeploy.settings import RetrainSettings
from nasdeploy.spaces import Architecture, make_space
from nasdeploy.training.evaluation import loss_and_accuracy, predict
from nasdeploy.training.losses import distillation_loss, mixed_loss, soft_targets
from nasdeploy.training.precision import resolve_device
from nasdeploy.training.recalibration import recalibrate
from nasdeploy.training.retraining import Retraining, Teacher
from nasdeploy.training.schedules import make_optimizer, one_cycle
from nasdeploy.training.supernet import MAX_GRADIENT_NORM, architecture_losses, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, NUM_CLASSES = (1, 28, 28), 4
SPACE = make_space("mobile", SHAPE, NUM_CLASSES)
SMALL, LARGE = SPACE.smallest(), SPACE.largest()


def bars(count: int, seed: int = 0) -> Split:
    """Return images of bars in four directions, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:28, 0:28]
    directions = np.stack([rows, columns, rows + columns, rows - columns])  # (4, 28, 28)
    labels = np.arange(count) % NUM_CLASSES
    phases = rng.integers(0, 6, size=(count, 1, 1))
    clean = np.where((directions[labels] + phases) % 6 < 3, 200, 50)
    images = np.clip(clean + rng.normal(0, 20, size=clean.shape), 0, 255).astype(np.uint8)
    return Split(torch.from_numpy(images[:, None]), torch.from_numpy(labels))


def make_network(architecture: Architecture = SMALL, seed: int = 0) -> Network:
    """Return a network with seeded weights."""
    return build_network(SPACE, architecture, normalise(), torch.Generator().manual_seed(seed))


def make_supernet(seed: int = 0) -> Supernet:
    """Return a supernet with seeded weights."""
    return Supernet(SPACE, normalise(), torch.Generator().manual_seed(seed))


def normalise() -> Normalise:
    """Return the normalisation of the bars."""
    return Normalise((125.0,), (78.0,))


def batches(count: int = 64, batch_size: int = 16, seed: int = 0) -> TrainingBatches:
    """Return the same endless batches of bars for the same arguments."""
    return training_batches(
        bars(count),
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        augment=make_augmentation("none", SHAPE),
    )


def first_norm(network: Network) -> nn.BatchNorm2d:
    """Return the batch norm of the stem."""
    norm = network.layers["stem"][1]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


@torch.no_grad()
def stem_outputs(network: Network, images: Tensor) -> np.ndarray:
    """Return what the stem's batch norm is given, as (channels, values) in float64."""
    x = network.layers["stem"][0](network.normalise(images.float()))
    return x.double().transpose(0, 1).flatten(1).numpy()


def test_recalibrated_statistics_are_those_of_all_images() -> None:
    network, images = make_network(), bars(48).images
    recalibrate(network, images, batch_size=48)
    values = stem_outputs(network, images)
    norm = first_norm(network)
    np.testing.assert_allclose(norm.running_mean, values.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var, values.var(axis=1, ddof=1), rtol=1e-4)


def test_recalibration_in_chunks_averages_the_chunks() -> None:
    network, images = make_network(), bars(48).images
    recalibrate(network, images, batch_size=12)
    chunks = [stem_outputs(network, chunk) for chunk in images.split(12)]
    means, variances = (
        [f(chunk) for chunk in chunks] for f in (lambda c: c.mean(1), lambda c: c.var(1, ddof=1))
    )
    norm = first_norm(network)
    np.testing.assert_allclose(norm.running_mean, np.mean(means, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.running_var, np.mean(variances, axis=0), rtol=1e-4)


def test_recalibration_forgets_what_the_statistics_were() -> None:
    fresh, polluted = make_network(), make_network()
    for norm in (module for module in polluted.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.fill_(100.0)
        norm.running_var.fill_(1e-3)
    for network in (fresh, polluted):
        recalibrate(network, bars(24).images)
    left, right = fresh.state_dict(), polluted.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_recalibration_restores_momentum_and_leaves_evaluation_mode() -> None:
    network = make_network().train()
    first_norm(network).momentum = 0.37
    weights = {name: value.clone() for name, value in network.named_parameters()}
    recalibrate(network, bars(24).images)
    assert first_norm(network).momentum == 0.37
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, weights[name]) for name, value in network.named_parameters())


def fixed_batch(count: int = 32) -> tuple[Tensor, Tensor]:
    """Return bars as (pixels float32, labels)."""
    split = bars(count)
    return split.images.float(), split.labels


def test_training_steps_learn_a_fixed_batch() -> None:
    supernet, (images, labels) = make_supernet(), fixed_batch()
    optimizer = make_optimizer(supernet, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    losses = [
        float(
            train_step(
                supernet, optimizer, images=images, labels=labels, architectures=[SMALL], label_smoothing=0.0
            )
        )
        for _ in range(30)
    ]
    assert losses[0] == pytest.approx(math.log(NUM_CLASSES), abs=0.5)
    assert losses[-1] < 0.3 * losses[0]


def test_a_step_follows_the_mean_gradient_of_its_architectures() -> None:
    supernet, (images, labels) = make_supernet(), fixed_batch(8)
    twin = copy.deepcopy(supernet)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=1.0)
    loss = train_step(
        supernet, optimizer, images=images, labels=labels, architectures=[SMALL, LARGE], label_smoothing=0.1
    )
    losses = [F.cross_entropy(twin(images, a), labels, label_smoothing=0.1) for a in (SMALL, LARGE)]
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    norm = torch.stack([p.grad.norm() for p in twin.parameters() if p.grad is not None]).norm()
    scale = min(1.0, MAX_GRADIENT_NORM / float(norm))
    for moved, start in zip(supernet.parameters(), twin.parameters(), strict=True):
        gradient = torch.zeros_like(start) if start.grad is None else start.grad
        torch.testing.assert_close(moved.detach(), start.detach() - scale * gradient, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_to_norm_5() -> None:
    supernet, (images, labels) = make_supernet(), fixed_batch(8)
    with torch.no_grad():
        supernet.elastic_layers[-1].weight.mul_(1000.0)  # logits so large that the gradient explodes
    before = [parameter.detach().clone() for parameter in supernet.parameters()]
    optimizer = torch.optim.SGD(supernet.parameters(), lr=1.0)
    train_step(supernet, optimizer, images=images, labels=labels, architectures=[SMALL], label_smoothing=0.0)
    moves = [(new.detach() - old).norm() for new, old in zip(supernet.parameters(), before, strict=True)]
    assert float(torch.stack(moves).norm()) == pytest.approx(MAX_GRADIENT_NORM, rel=1e-3)


def test_losses_of_architectures_are_cross_entropies_and_equal_ones_are_computed_once() -> None:
    supernet, (images, labels) = make_supernet(), fixed_batch(8)
    computed: list[Architecture] = []
    hook = supernet.register_forward_hook(lambda module, args, output: computed.append(args[1]))
    losses = architecture_losses(supernet, [LARGE, SMALL, LARGE, LARGE], images, labels)
    hook.remove()
    assert computed == [LARGE, SMALL]
    with torch.no_grad():
        by_hand = {a: float(F.cross_entropy(supernet(images, a), labels)) for a in (SMALL, LARGE)}
    assert losses == [by_hand[LARGE], by_hand[SMALL], by_hand[LARGE], by_hand[LARGE]]
    assert all(parameter.grad is None for parameter in supernet.parameters())


RETRAIN = RetrainSettings(num_steps=8, batch_size=16, learning_rate=0.05, distillation_weight=0.3)


def retrain(
    network: nn.Module,
    data: TrainingBatches,
    settings: RetrainSettings,
    *,
    teacher: Teacher | None,
    report: Callable[[int, Tensor], None] = lambda step, loss: None,
) -> nn.Module:
    """Carry a retraining out to its end."""
    loop = Retraining(network, data, settings, teacher=teacher)
    while loop.num_done < loop.num_steps:
        loss = loop.step()
        report(loop.num_done, loss)
    return loop.result()


def test_the_retrained_network_is_a_moving_average() -> None:
    network = make_network()
    seen: list[dict[str, Tensor]] = []

    def keep(step: int, loss: Tensor) -> None:
        seen.append({name: value.detach().clone() for name, value in network.named_parameters()})

    average = retrain(network, batches(), RETRAIN, teacher=None, report=keep)
    decay = 1.0 - 5.0 / RETRAIN.num_steps  # shorter than 0.99 for so few steps
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: decay * expected[name] + (1.0 - decay) * weights[name] for name in weights}
    for name, value in average.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(expected["layers.stem.0.weight"], seen[-1]["layers.stem.0.weight"])


def test_a_decay_of_zero_returns_the_last_weights() -> None:
    network = make_network()
    average = retrain(network, batches(), RETRAIN.model_copy(update={"ema_decay": 0.0}), teacher=None)
    left, right = network.state_dict(), average.state_dict()
    assert all(torch.allclose(left[name], right[name]) for name in left)


def test_retraining_reports_every_step_and_ends_in_evaluation_mode() -> None:
    steps: list[int] = []
    average = retrain(make_network(), batches(), RETRAIN, teacher=None, report=lambda s, _: steps.append(s))
    assert steps == list(range(1, 9))
    assert not any(module.training for module in average.modules())


def test_retraining_gives_the_same_bits_again() -> None:
    torch.manual_seed(1)
    first, again, other = (
        retrain(
            make_network(), batches(seed=seed), RETRAIN, teacher=Teacher(make_network(LARGE))
        ).state_dict()
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.stem.0.weight"], other["layers.stem.0.weight"])


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_retraining_that_was_stored_continues_bit_by_bit(stop: int, tmp_path: Path) -> None:
    def make() -> Retraining:
        return Retraining(make_network(), batches(), RETRAIN, teacher=Teacher(make_network(LARGE)))

    whole, first = make(), make()
    losses = [float(whole.step()) for _ in range(8)]
    for _ in range(stop):
        first.step()
    save_checkpoint(tmp_path / "state", first.state_dict(), schema="test/1")
    second = make()
    second.load_state_dict(load_checkpoint(tmp_path / "state", schema="test/1"))
    assert [float(second.step()) for _ in range(8 - stop)] == losses[stop:]
    left, right = whole.result().state_dict(), second.result().state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_rare_classes_count_as_much_as_their_weight() -> None:
    network, split = make_network(), bars(64)
    logits = predict(network, split.images)
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0])
    each = F.cross_entropy(logits, split.labels, reduction="none")
    expected = float((each * weights[split.labels]).sum() / weights[split.labels].sum())
    loss, _ = loss_and_accuracy(network, split.images, split.labels, class_weights=weights)
    assert loss == pytest.approx(expected, rel=1e-5)
    only_last = torch.tensor([0.0, 0.0, 0.0, 1.0])
    loop = Retraining(
        make_network(),
        batches(),
        RETRAIN.model_copy(update={"num_steps": 40}),
        teacher=None,
        class_weights=only_last,
    )
    for _ in range(40):
        loop.step()
    assert bool((predict(loop.result(), split.images).argmax(dim=1) == 3).all())


def test_retraining_learns() -> None:
    network = make_network()
    settings = RETRAIN.model_copy(update={"num_steps": 40, "learning_rate": 0.1})
    average = retrain(network, batches(), settings, teacher=None)
    test = bars(64, seed=5)
    assert loss_and_accuracy(average, test.images, test.labels)[1] > 0.6  # chance is 0.25


@pytest.mark.parametrize("num_steps", range(1, 13))
def test_retraining_takes_any_number_of_steps(num_steps: int) -> None:
    settings = RETRAIN.model_copy(update={"num_steps": num_steps})
    steps: list[int] = []
    retrain(
        nets_of_one_linear_layer(), batches(), settings, teacher=None, report=lambda s, _: steps.append(s)
    )
    assert steps[-1] == num_steps


def nets_of_one_linear_layer() -> nn.Module:
    """Return the cheapest network that takes the images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, NUM_CLASSES))


def test_the_teacher_computes_every_batch_once() -> None:
    network, (images, _) = make_network(), fixed_batch(8)
    computed: list[int] = []
    network.register_forward_hook(lambda module, args, output: computed.append(len(args[0])))
    teacher = Teacher(network)
    first = [teacher.targets(step, images[: step + 1]) for step in range(3)]
    again = [teacher.targets(step, images[: step + 1]) for step in range(3)]
    assert computed == [1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_teacher_gives_the_probabilities_of_its_network_in_evaluation_mode() -> None:
    network, (images, _) = make_network(), fixed_batch(8)
    recalibrate(network, images)
    with torch.no_grad():
        expected = torch.softmax(network(images), dim=1)
    targets = Teacher(network.train()).targets(0, images)
    torch.testing.assert_close(targets, expected)
    assert not targets.requires_grad


def random_logits(seed: int, count: int = 6) -> Tensor:
    """Return logits (count, classes)."""
    return torch.randn(count, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))


def test_distillation_has_the_gradient_of_the_divergence() -> None:
    targets = soft_targets(random_logits(1))
    left, right = (random_logits(2).requires_grad_() for _ in range(2))
    distillation_loss(left, targets).backward()
    F.kl_div(F.log_softmax(right, dim=1), targets, reduction="batchmean").backward()
    torch.testing.assert_close(left.grad, right.grad)
    torch.testing.assert_close(left.grad, (torch.softmax(random_logits(2), 1) - targets) / 6)


def test_distillation_of_a_network_by_itself_has_no_gradient() -> None:
    logits = random_logits(3).requires_grad_()
    distillation_loss(logits, soft_targets(logits)).backward()
    assert float(logits.grad.abs().max()) < 1e-7


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_mixed_loss_lies_between_labels_and_soft_targets(weight: float) -> None:
    logits, labels, targets = random_logits(4), torch.arange(6) % NUM_CLASSES, soft_targets(random_logits(5))
    loss = mixed_loss(logits, labels, soft_targets=targets, distillation_weight=weight, label_smoothing=0.1)
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, (1 - weight) * hard + weight * distillation_loss(logits, targets))


def test_without_soft_targets_the_mixed_loss_is_the_cross_entropy() -> None:
    logits, labels = random_logits(4), torch.arange(6) % NUM_CLASSES
    loss = mixed_loss(logits, labels, soft_targets=None, distillation_weight=0.7, label_smoothing=0.0)
    assert torch.equal(loss, F.cross_entropy(logits, labels))


def learning_rates(num_steps: int, learning_rate: float = 0.5) -> list[float]:
    """Return the learning rate of every step."""
    optimizer = make_optimizer(nn.Linear(2, 2), weight_decay=0.0)
    schedule = one_cycle(optimizer, learning_rate=learning_rate, num_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = learning_rates(100)
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(0.5)
    assert peak == 19  # a fifth of the steps
    assert np.all(np.diff(rates[: peak + 1]) > 0)
    assert np.all(np.diff(rates[peak:]) < 0)
    assert rates[-1] < 1e-4 * 0.5
    assert rates[60] == pytest.approx(0.25 * (1 + math.cos(math.pi * (60 - 19) / 80)), rel=1e-3)


@pytest.mark.parametrize("num_steps", range(1, 13))
def test_a_schedule_of_any_length_has_finite_rates(num_steps: int) -> None:
    rates = learning_rates(num_steps)
    assert len(rates) == num_steps
    assert all(0.0 < rate <= 0.5 for rate in rates)


def test_only_weight_matrices_decay() -> None:
    network = make_network()
    optimizer = make_optimizer(network, weight_decay=5e-4)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert {names[id(p)] for p in free["params"]} == {
        name for name, value in network.named_parameters() if value.dim() == 1
    }
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_decay_alone_shrinks_matrices_and_leaves_vectors() -> None:
    layer = nn.Linear(3, 3)
    start = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = make_optimizer(layer, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Nesterov's first step is lr · (1 + momentum) · decay · weight
    torch.testing.assert_close(layer.weight.detach(), (1 - 0.5 * 1.9 * 0.1) * start["weight"])
    assert torch.equal(layer.bias.detach(), start["bias"])


def test_predictions_do_not_depend_on_the_batch_size() -> None:
    network, split = make_network(), bars(20)
    recalibrate(network, split.images)
    logits = predict(network, split.images, batch_size=7)
    torch.testing.assert_close(logits, predict(network, split.images), rtol=1e-4, atol=1e-5)
    loss, accuracy = loss_and_accuracy(network, split.images, split.labels)
    assert loss == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    assert accuracy == pytest.approx(float((logits.argmax(1) == split.labels).float().mean()))


@pytest.mark.parametrize("name", ["tpu", "cuda:1", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        resolve_device(name)


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_recalibration_weighs_every_image_alike_whatever_their_number() -> None:
    norm = nn.BatchNorm2d(1)
    images = torch.zeros(251, 1, 2, 2)
    images[-1] = 100.0
    recalibrate(norm, images, batch_size=250)
    assert norm.running_mean is not None
    assert float(norm.running_mean) == pytest.approx(100.0 / 251, rel=0.01)
