"""Random-weight evaluation: the head against closed forms, what it leaves alone, textures that it must tell apart."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdeploy.data import Split, StoredImages
from nasdeploy.data.stored import PixelFile
from nasdeploy.errors import ConfigError, DataError
from nasdeploy.networks import Normalise, build_network
from nasdeploy.searchers import random_weight
from nasdeploy.searchers.random_weight import (
    RandomWeightEvaluator,
    Sample,
    draw_weights,
    head_error,
    pooled_features,
    spread,
)
from nasdeploy.spaces import (
    Architecture,
    Decision,
    LayerSpec,
    MobileConfig,
    SearchSpace,
    Stage,
    make_slot,
    make_space,
    mobile_space,
    with_resolutions,
)
from nasdeploy.training.linear_head import (
    HEADS,
    Head,
    predicted,
    ridge_weights,
    softmax_weights,
    standardised,
)
from nasdeploy.training.recalibration import recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, NUM_CLASSES = 12, 2
CONFIG = MobileConfig(
    stem_widths=(4, 8),
    stem_stride=2,
    stages=(Stage(widths=(4, 8), num_blocks=2, stride=2),),
    head_widths=(8, 16),
    operations=((3, 1), (3, 2)),
)


def mobile(size: int = 28, num_classes: int = 3) -> SearchSpace:
    return mobile_space((1, size, size), num_classes, CONFIG)


def textures_space() -> SearchSpace:
    """Return the space of two: a filter of 1x1 or of 3x3 pixels, then 1x1 convolutions and a classifier."""
    decisions = (Decision(name="kernel", candidates=("1", "3")),)

    def stem(kernel: str) -> LayerSpec:
        return LayerSpec(kind="stem", in_channels=1, out_channels=8, size=SIZE, kernel=int(kernel))

    head = LayerSpec(kind="head", in_channels=8, out_channels=24, size=SIZE)
    classifier = LayerSpec(kind="classifier", in_channels=24, out_channels=NUM_CLASSES, size=SIZE)
    slots = (
        make_slot("stem", decisions, ["kernel"], stem),
        make_slot("head", decisions, [], lambda: head),
        make_slot("classifier", decisions, [], lambda: classifier),
    )
    return SearchSpace(
        name="textures",
        decisions=decisions,
        slots=slots,
        image_shape=(1, SIZE, SIZE),
        num_classes=NUM_CLASSES,
    )


def textures(count: int, seed: int) -> Split:
    """Return noise, and noise whose neighbours are alike: every image has the very same pixels in another order."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, SIZE, SIZE))
    smooth = sum(np.roll(noise, (i, j), axis=(1, 2)) for i in range(2) for j in range(2))
    labels = np.arange(count) % 2
    field = np.where(labels[:, None, None] == 1, smooth, noise).reshape(count, -1)
    ranks = field.argsort(axis=1).argsort(axis=1)
    images = (ranks + 40).astype(np.uint8).reshape(count, 1, SIZE, SIZE)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def blobs(count: int, seed: int, size: int = 28, num_classes: int = 3) -> Split:
    """Return noise with a bright square, whose place says the class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, size=(count, 1, size, size), dtype=np.uint8)
    labels = rng.integers(0, num_classes, size=count)
    for image, label in zip(images, labels, strict=True):
        start = 2 + label * (size // 4)
        image[0, start : start + 6, start : start + 6] = 250
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


TRAIN, VALID = blobs(120, seed=1), blobs(80, seed=2)
NORMALISE = ((60.0,), (40.0,))


def make_evaluator(
    space: SearchSpace | None = None, splits: tuple[Split, Split] = (TRAIN, VALID), **changes: object
) -> RandomWeightEvaluator:
    settings = {"images": lambda _: splits, "num_images": 100, "num_seeds": 3, **changes}
    return RandomWeightEvaluator(space or mobile(), Normalise(*NORMALISE), **settings)  # type: ignore[arg-type]


def augmented(features: Tensor) -> np.ndarray:
    return np.concatenate([features.numpy(), np.ones((len(features), 1))], axis=1)


def least_squares(
    features: Tensor, targets: Tensor, ridge: float, weights: Tensor | None = None
) -> np.ndarray:
    """Return the ridge solution (d + 1, c) by lstsq: a row of √λ for each weight below the rows of the images."""
    scale = np.ones(len(features)) if weights is None else weights.sqrt().numpy()
    penalty = np.sqrt(ridge) * np.eye(features.shape[1], features.shape[1] + 1)
    rows = np.concatenate([scale[:, None] * augmented(features), penalty])
    right = np.concatenate([scale[:, None] * targets.numpy(), np.zeros((len(penalty), targets.shape[1]))])
    found: np.ndarray = np.linalg.lstsq(rows, right, rcond=None)[0]
    return found


def random_problem(num: int = 60, size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(num, size, generator=generator, dtype=torch.float64) + 2.0
    return features, torch.randint(0, 4, (num,), generator=generator)


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
def test_ridge_equals_least_squares_on_the_augmented_system(ridge: float) -> None:
    features, labels = random_problem()
    targets = F.one_hot(labels, 4).double()
    found = ridge_weights(features, targets, ridge=ridge)
    np.testing.assert_allclose(found, least_squares(features, targets, ridge), atol=1e-8)


def test_weighted_ridge_equals_least_squares_on_weighted_rows() -> None:
    features, labels = random_problem()
    targets, weights = F.one_hot(labels, 4).double(), torch.linspace(0.2, 3.0, 60, dtype=torch.float64)
    found = ridge_weights(features, targets, ridge=2.0, image_weights=weights)
    np.testing.assert_allclose(found, least_squares(features, targets, 2.0, weights), atol=1e-8)


def test_more_features_than_images_and_collinear_ones_are_no_trouble() -> None:
    features, labels = random_problem(num=6)
    features = torch.cat([features, features], dim=1)
    targets = F.one_hot(labels, 4).double()
    found = ridge_weights(features, targets, ridge=1.0)
    np.testing.assert_allclose(found, least_squares(features, targets, 1.0), atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_head_is_a_stationary_point(weighted: bool) -> None:
    features, labels = random_problem()
    by_image = torch.linspace(0.2, 3.0, 60, dtype=torch.float64) if weighted else torch.ones(60).double()
    found = softmax_weights(
        features, labels, num_classes=4, ridge=1.5, image_weights=by_image if weighted else None
    )
    rows = torch.from_numpy(augmented(features))
    residual = by_image[:, None] * (F.softmax(rows @ found, dim=1) - F.one_hot(labels, 4))
    gradient = rows.T @ residual  # Σ v (p - y) xᵀ + λ W, the bias without λ
    gradient[:-1] += 1.5 * found[:-1]
    assert float(gradient.abs().max()) < 60 * 2e-5
    assert not found.requires_grad


def test_features_are_standardised_by_the_training_images() -> None:
    features, _ = random_problem()
    train, valid = standardised(features[:40], features[40:])
    np.testing.assert_allclose(train.mean(dim=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(train.std(dim=0, correction=0), 1.0, atol=1e-12)
    expected = (features[40:] - features[:40].mean(dim=0)) / features[:40].std(dim=0, correction=0)
    np.testing.assert_allclose(valid, expected, atol=1e-12)


def test_a_constant_column_counts_for_nothing() -> None:
    features, labels = random_problem()
    rounding = 1e-8 * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    disturbed = torch.cat([features, torch.full((60, 1), 5.0), (0.3 + rounding)[:, None]], dim=1)
    train, valid = standardised(disturbed[:40], disturbed[40:] * 7.0)
    assert not train[:, -2:].any()
    assert not valid[:, -2:].any()
    targets = F.one_hot(labels[:40], 4).double()
    whole, dropped = (ridge_weights(part, targets, ridge=1.0) for part in (train, train[:, :-2]))
    np.testing.assert_allclose(whole[[*range(7), -1]], dropped, atol=1e-12)


def state_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def sample(size: int = 28) -> Sample:
    train, valid = blobs(100, seed=1, size=size), blobs(80, seed=2, size=size)
    assert isinstance(train.images, Tensor)
    return Sample(
        train=train.images,
        train_labels=train.labels,
        valid=valid.images,
        valid_labels=valid.labels,
        recalibration=train.images,
    )


@pytest.mark.parametrize("head", HEADS)
def test_nothing_but_the_head_changes_or_gets_a_gradient(head: Head) -> None:
    space = mobile()
    network = build_network(space, space.largest(), Normalise(*NORMALISE))
    draw_weights(network, seed=0, draw=0)
    recalibrate(network, sample().recalibration)
    before = state_hash(network)
    error = head_error(network, sample(), num_classes=3, ridge=1.0, head=head)
    assert state_hash(network) == before
    assert not error.requires_grad
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("part", "broken"), [("train", slice(7, 8)), ("valid", slice(None))])
def test_a_feature_that_is_not_finite_is_an_error_and_no_exception(
    head: Head, part: str, broken: slice
) -> None:
    space, given = mobile(), sample()
    network = build_network(space, space.smallest(), Normalise(*NORMALISE))
    draw_weights(network, seed=0, draw=0)
    recalibrate(network, given.recalibration)
    images = getattr(given, part).float()
    images[broken] = torch.inf
    changed = replace(given, **{part: images})
    assert float(head_error(network, given, num_classes=3, ridge=1.0, head=head)) < 1.0
    assert float(head_error(network, changed, num_classes=3, ridge=1.0, head=head)) == 1.0


def test_what_is_not_finite_has_no_class() -> None:
    features = torch.tensor([[1.0, 0.0], [torch.inf, 0.0], [0.0, torch.nan], [0.0, 1.0]]).double()
    weights = ridge_weights(features[[0, 3]], torch.eye(2).double(), ridge=1.0)
    assert predicted(features, weights).tolist() == [0, -1, -1, 1]
    assert ridge_weights(features, torch.ones(4, 2).double(), ridge=1.0).isnan().all()


def by_hand(space: SearchSpace, architecture: Architecture, seed: int, num_seeds: int) -> list[float]:
    """Return the errors of all draws: features layer by layer, z-scores and ridge with NumPy."""
    evaluator = make_evaluator(space, num_seeds=num_seeds)
    drawn = evaluator.sample(architecture, seed=seed)
    errors = []
    for s in range(num_seeds):
        network = build_network(space, architecture, Normalise(*NORMALISE))
        draw_weights(network, seed=seed, draw=s)
        recalibrate(network, drawn.recalibration)
        values = []
        for images in (drawn.train, drawn.valid):
            x = network.normalise(images.float())
            with torch.no_grad():
                for layer in list(network.layers.values())[:-1]:
                    x = layer(x)
            values.append(x.mean(dim=(2, 3)).double().numpy())
        train, valid = values
        mean, std = train.mean(axis=0), train.std(axis=0)
        varies = std > 1e-6 * np.abs(mean)
        train, valid = ((v - mean)[:, varies] / std[varies] for v in (train, valid))
        targets = F.one_hot(drawn.train_labels, 3).double()
        weights = least_squares(torch.from_numpy(train), targets, 1.0)
        found = (augmented(torch.from_numpy(valid)) @ weights).argmax(axis=1)
        errors.append(float((found != drawn.valid_labels.numpy()).mean()))
    return errors


def test_the_score_is_the_mean_error_of_heads_fitted_by_hand() -> None:
    space = mobile()
    for architecture in (space.smallest(), space.largest()):
        expected = by_hand(space, architecture, seed=4, num_seeds=3)
        found = make_evaluator(space).score([architecture], seed=4)
        assert len(set(expected)) > 1
        assert found.losses[0] == pytest.approx(np.mean(expected), abs=1e-12)
        assert found.errors[0] == pytest.approx(np.std(expected, ddof=1) / np.sqrt(3), abs=1e-12)


def test_weights_have_the_variance_of_he_and_norms_are_neutral() -> None:
    space = mobile()
    network = build_network(space, space.largest(), Normalise(*NORMALISE))
    recalibrate(network, sample().recalibration)
    draw_weights(network, seed=0, draw=0)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            values = [state[key] for key in ("weight", "bias", "running_mean", "running_var")]
            assert [float(v.min()) for v in values] == [float(v.max()) for v in values] == [1, 0, 0, 1], name
    large = [p.detach() for p in network.parameters() if p.dim() > 1 and p.numel() >= 100]
    assert len(large) > 4
    for drawn in large:
        scaled = drawn * (drawn[0].numel() / 2.0) ** 0.5
        assert float(scaled.mean()) == pytest.approx(0.0, abs=4.0 / drawn.numel() ** 0.5)
        assert float(scaled.std()) == pytest.approx(1.0, abs=4.0 / (2.0 * drawn.numel()) ** 0.5)
    assert not network.layer("classifier").linear.bias.any()


def test_layers_that_two_architectures_share_have_common_random_numbers() -> None:
    space = mobile()
    small, wide = space.smallest(), Architecture((1, *space.smallest().choices[1:]))
    found = []
    for architecture in (small, wide):
        network = build_network(space, architecture, Normalise(*NORMALISE))
        draw_weights(network, seed=0, draw=1)
        found.append({name: p for name, p in network.named_parameters() if p.dim() > 1})
    shared = [name for name in found[0] if found[0][name].shape == found[1][name].shape]
    assert len(shared) == len(found[0]) - 4  # all but the stem, which is wider, and the block that reads it
    assert all(torch.equal(found[0][name], found[1][name]) for name in shared)
    draws = []
    for seed, draw in ((0, 0), (0, 1), (1, 0)):
        draw_weights(network, seed=seed, draw=draw)
        draws.append(state_hash(network))
    assert len(set(draws)) == 3


def test_the_seed_alone_decides_and_global_generators_are_left_alone() -> None:
    chosen = [mobile().smallest(), mobile().largest()]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    scores = [make_evaluator().score(chosen, seed=seed) for seed in (7, 8)]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    torch.rand(5)  # somebody draws from the global generator: that must not matter
    again = make_evaluator().score(chosen[::-1], seed=7)
    assert scores[0].losses.tobytes() == again.losses[::-1].tobytes()
    assert scores[0].errors.tobytes() == again.errors[::-1].tobytes()
    assert scores[0].losses.tobytes() != scores[1].losses.tobytes()


@pytest.mark.parametrize("head", HEADS)
def test_textures_of_one_histogram_need_more_than_single_pixels(head: Head) -> None:
    splits = textures(400, seed=1), textures(300, seed=2)
    evaluator = make_evaluator(textures_space(), splits, num_images=400, head=head)
    scores = evaluator.score([Architecture((0,)), Architecture((1,))], seed=0)
    assert scores.losses[0] == pytest.approx(0.5, abs=0.07)  # chance
    assert scores.losses[1] < 0.25


def test_an_architecture_is_evaluated_once_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []

    def drawing(network: nn.Module, *, seed: int, draw: int) -> None:
        draws.append(draw)
        draw_weights(network, seed=seed, draw=draw)

    monkeypatch.setattr(random_weight, "draw_weights", drawing)
    small = mobile().smallest()
    evaluator = make_evaluator()
    found = evaluator.score([small, small], seed=0)
    again = evaluator.score([small], seed=0)
    assert again.losses[0] == found.losses[0] == found.losses[1]
    assert draws == [0, 1, 2]
    evaluator.score([small], seed=1)
    assert draws == [0, 1, 2] * 2


def test_images_come_at_the_size_of_the_architecture() -> None:
    space = with_resolutions([mobile(28), mobile(32)])
    splits = {size: (blobs(60, seed=1, size=size), blobs(40, seed=2, size=size)) for size in (28, 32)}
    asked: list[int] = []

    def images(architecture: Architecture) -> tuple[Split, Split]:
        asked.append(space.input_shape(architecture)[1])
        return splits[asked[-1]]

    evaluator = make_evaluator(space, images=images)
    found = evaluator.score([space.smallest(), space.largest()], seed=0)
    assert asked == [28, 32]
    alone = make_evaluator(mobile(28), splits[28]).score([mobile(28).smallest()], seed=0)
    assert found.losses[0] == alone.losses[0]


def test_cells_have_features_too() -> None:
    space = make_space("cell", (1, 28, 28), 3)
    network = build_network(space, space.smallest(), Normalise(*NORMALISE))
    (linear,) = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert pooled_features(network, TRAIN.images).shape == (len(TRAIN), linear.in_features)
    found = make_evaluator(space).score([space.smallest()], seed=0)
    assert 0.0 <= found.losses[0] < 0.5  # of three classes


def test_images_in_a_file_give_the_same_scores(tmp_path: Path) -> None:
    stored = []
    for name, split in (("train", TRAIN), ("valid", VALID)):
        assert isinstance(split.images, Tensor)
        np.save(tmp_path / f"{name}.npy", split.images.numpy())
        stored.append(Split(StoredImages(PixelFile(tmp_path / f"{name}.npy")), split.labels))
    small = mobile().smallest()
    found = make_evaluator(splits=(stored[0], stored[1])).score([small], seed=0)
    assert found.losses[0] == make_evaluator().score([small], seed=0).losses[0]


def test_rare_classes_count_as_their_weights_say() -> None:
    space = textures_space()
    train, valid = textures(200, seed=1), textures(200, seed=2)
    rare = np.flatnonzero((np.arange(200) % 2 == 0) | (np.arange(200) % 20 == 1))
    splits = train.part(rare), valid.part(rare)
    kernel1 = [Architecture((0,))]
    plain = make_evaluator(space, splits, num_images=200).score(kernel1, seed=0)
    assert plain.losses[0] == pytest.approx(10 / 110)  # the frequent class, always
    weights = torch.tensor([1.0, 11.0])
    weighted = make_evaluator(space, splits, num_images=200, class_weights=weights).score(kernel1, seed=0)
    assert weighted.losses[0] == pytest.approx(100 / 210)  # the rare class, always


def test_a_head_has_at_most_a_fifth_as_many_features_as_images() -> None:
    features = torch.arange(12.0).repeat(3, 1)
    assert spread(features, 20) is features
    assert spread(features, 4)[0].tolist() == [0, 4, 7, 11]
    seen: list[int] = []

    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(784, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            y: Tensor = self.linear(x.flatten(1))
            return y

    network = Recorder()
    assert pooled_features(network, TRAIN.images).shape == (120, 784)
    # 784 features of 100 images would fit any labels; 20 of them do not
    assert 0.0 <= float(head_error(network, sample(), num_classes=3, ridge=1.0)) < 0.7
    assert sum(seen) == 120 + 100 + 80


def test_what_cannot_be_evaluated_is_said_in_a_line() -> None:
    with pytest.raises(ConfigError, match=r"num_seeds = 1; expected at least 2"):
        make_evaluator(num_seeds=1)
    with pytest.raises(DataError, match="30 training images; expected 50 or more"):
        make_evaluator(splits=(blobs(30, seed=1), VALID)).score([mobile().smallest()], seed=0)
    with pytest.raises(ConfigError, match="have no linear layer"):
        pooled_features(nn.Sequential(nn.Conv2d(1, 2, 3)), TRAIN.images)
