"""What a build is told: pydantic models, so that a file, the command line and the Python API share one check.

Every field has the default of the main job. ``nasdeploy build`` writes the resolved settings to ``config.toml``.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nasdeploy.errors import ConfigError
from nasdeploy.profiles import DEFAULT_PROFILES

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


RUNGS = ("ridge", "pairs", "graph")
"""Models that proxy validation chooses among, the simplest first."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RandomWeightSettings(_Settings):
    """The evaluation of networks whose weights stay random (``nasdeploy.searchers.random_weight``)."""

    num_evaluations: Annotated[int, Field(ge=2)] = Field(
        default=200, description="architectures, over all generations"
    )
    population_size: Annotated[int, Field(ge=4)] = Field(default=24, description="of a generation")
    num_images: Annotated[int, Field(ge=50)] = Field(
        default=5_000,
        description="training images, and as many validation images, that the head is fitted and tested on",
    )
    num_seeds: Annotated[int, Field(ge=2)] = Field(
        default=4,
        description="draws of the weights, the same for every architecture; their spread is the standard error",
    )
    head: Literal["ridge", "softmax"] = Field(
        default="ridge",
        description="how the last layer is trained: a ridge regression, or a soft-max regression",
    )
    ridge: Rate = Field(default=1.0, description="penalty on the weights of the last layer")
    num_elite: Positive = Field(
        default=8, description="of a warm start: architectures a profile that its distribution starts from"
    )
    smoothing: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.4, description="of a warm start: share of the uniform distribution"
    )


class ProxySettings(_Settings):
    """Proxy validation: how the model of the losses is chosen (``nasdeploy.optim.ladder``)."""

    rungs: tuple[Literal["ridge", "pairs", "graph"], ...] = Field(
        default=("ridge", "pairs", "graph"),
        min_length=1,
        description="models to choose among, the simplest first: single decisions, neighbouring pairs, a graph network",
    )
    num_repeats: Positive = Field(default=2, description="of the cross-validation that chooses")
    num_folds: Annotated[int, Field(ge=2)] = Field(
        default=5, description="of the cross-validation that chooses"
    )

    @field_validator("rungs", mode="before")
    @classmethod
    def _simplest_first(cls, value: object) -> object:
        """Return each rung once, in the order of :data:`RUNGS`: no other order means anything."""
        given = list(value) if isinstance(value, list | tuple) else []
        if not given or not all(rung in RUNGS for rung in given):
            raise ValueError(f"expected {EXPECTED['search.proxy.rungs']}")
        return tuple(rung for rung in RUNGS if rung in given)


class SearchSettings(_Settings):
    """The search: which method, and the one-shot search (``nasdeploy.searchers.oneshot``)."""

    evaluator: Literal["supernet", "random-weight"] = Field(
        default="supernet",
        description="what architectures are judged by: shared weights that are trained, or, in minutes, random weights "
        "with a trained last layer",
    )
    warm_start: Literal["none", "random-weight"] = Field(
        default="none",
        description="with evaluator = supernet: distributions start uniform, or from what is best with random weights",
    )
    predictor: Literal["gaussian-process", "proxy"] = Field(
        default="gaussian-process",
        description="model of the losses, for selection and for doubly_robust: a Gaussian process, or proxy validation",
    )
    proposer: Literal["knowledge-gradient", "evolution"] = Field(
        default="knowledge-gradient",
        description="with doubly_robust: who proposes the guided share",
    )
    estimator: Literal["importance", "doubly_robust", "independent"] = Field(
        default="importance",
        description="pool the samples of all profiles, learn a model of the loss besides, or give each its own "
        "samples (the baseline)",
    )
    guided_share: Share = Field(
        default=0.75,
        description="with doubly_robust: share of the evaluated architectures that a model of the loss proposes; the "
        "others are drawn, and correct the model",
    )
    num_added_steps: int = Field(
        default=10,
        ge=0,
        description="steps of evaluations for a profile that is added later; 0: the recorded losses alone answer",
    )
    num_steps: Positive = Field(default=900, description="steps of the shared weights")
    batch_size: Positive = 64
    learning_rate: Rate = 0.1
    weight_decay: NotNegative = 5e-4
    label_smoothing: Share = 0.1
    num_weight_samples: Positive = Field(
        default=1, description="architectures drawn a step to train the shared weights on"
    )
    sandwich_interval: Positive = Field(
        default=4, description="every so many steps the smallest and the largest network are trained too"
    )
    uniform_share: Share = Field(
        default=0.1, description="share of them drawn uniformly; more serves profiles that are added later"
    )
    warm_up_share: Share = Field(default=0.2, description="share of the steps before the distributions move")
    num_loss_samples: Positive = Field(
        default=12, description="architectures evaluated at once, for all profiles"
    )
    loss_interval: Positive = Field(default=3, description="steps of the weights a step of the distributions")
    loss_batch_size: Positive = Field(default=128, description="validation images that they are evaluated on")
    num_finalists: Positive = Field(
        default=8, description="architectures a profile that are evaluated on the whole validation split"
    )
    random_weight: RandomWeightSettings = RandomWeightSettings()
    proxy: ProxySettings = ProxySettings()

    @property
    def trains_weights(self) -> bool:
        """Whether shared weights are trained, which what ships may start from."""
        return self.evaluator == "supernet"

    @property
    def weighs_at_random(self) -> bool:
        """Whether networks with random weights are evaluated, for the answer or for a warm start."""
        return "random-weight" in (self.evaluator, self.warm_start)

    def unused(self) -> dict[str, Any]:
        """Return what the chosen methods do not look at, as pydantic's ``exclude``: in no fingerprint.

        A setting that came after version 0.1 is left out where it changes nothing, so that older runs are continued.
        """
        unused: dict[str, Any] = {"num_added_steps": True}
        defaults = {"evaluator": "supernet", "warm_start": "none", "predictor": "gaussian-process"}
        unused |= {name: True for name, value in defaults.items() if getattr(self, name) == value}
        if self.estimator != "doubly_robust":
            unused["guided_share"] = True
        if self.proposer == "knowledge-gradient":
            unused["proposer"] = True
        if self.predictor != "proxy":
            unused["proxy"] = True
        if not self.weighs_at_random:
            unused["random_weight"] = True
        else:
            unused["random_weight"] = (
                set() if self.warm_start == "random-weight" else {"num_elite", "smoothing"}
            )
        return unused

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        """Refuse steps in which doubly_robust has nothing to compare a sample with."""
        if self.estimator == "doubly_robust" and self.num_loss_samples < 2:
            raise ValueError(
                f"num_loss_samples = {self.num_loss_samples} with estimator = doubly_robust: expected at least 2"
            )
        return self

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        """Refuse settings that the chosen methods would silently ignore."""
        if self.evaluator == "random-weight":
            nothing = {
                "warm_start": "none",
                "predictor": "gaussian-process",
                "proposer": "knowledge-gradient",
                "estimator": "importance",
            }
            for name, default in nothing.items():
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name} = {value} with evaluator = random-weight, which has no distributions: expected "
                        f"{name} = {default}, or evaluator = supernet"
                    )
        if self.proposer == "evolution" and self.estimator != "doubly_robust":
            raise ValueError(
                f"proposer = evolution with estimator = {self.estimator}, which asks no proposer: expected estimator = "
                "doubly_robust"
            )
        if self.proposer == "evolution" and self.guided_share == 0.0:
            raise ValueError(
                "proposer = evolution with guided_share = 0, which leaves it nothing to propose: expected a share "
                "above 0, such as guided_share = 0.75"
            )
        return self


class RetrainSettings(_Settings):
    """Training of a selected network (``nasdeploy.training.retraining``)."""

    start: Literal["supernet", "scratch"] = Field(
        default="supernet", description="from the supernet's weights, or from random ones"
    )
    num_steps: Positive = 900
    batch_size: Positive = 64
    learning_rate: Rate = 0.2
    weight_decay: NotNegative = 5e-4
    label_smoothing: Share = 0.1
    distillation_weight: Share = Field(
        default=0.3, description="of the largest network's outputs at the start; falls to 0"
    )
    ema_decay: Share = Field(
        default=0.99, description="of the moving average of the weights, which is what ships"
    )


class MeasureSettings(_Settings):
    """How exported files are measured (``nasdeploy.costs.latency``)."""

    blocks: Annotated[int, Field(ge=5)] = Field(default=5, description="fresh processes")
    min_runs: Positive = Field(default=300, description="a model, over all blocks")
    min_seconds: NotNegative = Field(default=1.0, description="a model, over all blocks")
    cache: bool = Field(
        default=True, description="use latency tables that this machine measured before, and keep new ones"
    )


class BuildSettings(_Settings):
    """Everything that a build depends on."""

    data: str = Field(
        default="fashion-mnist",
        description="name of a data set; folder of images, parquet, CIFAR or IDX files; .npz file; file.py:function",
    )
    image_size: Positive | tuple[Positive, ...] | None = Field(
        default=None,
        description="resize images to this many pixels; several: the search chooses one for each profile",
    )
    augment: Literal["none", "light", "standard"] | None = Field(
        default=None, description="None: none for the embedded data, light (no flips) for any other"
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: every class counts alike in training, however rare"
    )
    space: str = "mobile"
    profiles: tuple[str, ...] = Field(
        default=DEFAULT_PROFILES, min_length=1, description="names of profiles or paths of TOML files"
    )
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive | None = Field(
        default=None, description="of training on a CPU; None: all cores allowed"
    )
    time_budget: str | None = Field(
        default=None, description='scales the schedule, such as "10min"; None: the schedule as it is'
    )
    exporter: str = "graph"
    dynamic_batch: bool = Field(default=True, description="any batch size, or the profile's alone")
    baselines: bool = Field(
        default=False, description="also a random and a uniformly narrowed network a profile"
    )
    latency_from: str | None = Field(
        default=None, description="run folder whose latency tables are used again"
    )
    search: SearchSettings = SearchSettings()
    retrain: RetrainSettings = RetrainSettings()
    measure: MeasureSettings = MeasureSettings()

    @field_validator("image_size", mode="before")
    @classmethod
    def _ascending(cls, value: object) -> object:
        """Sort several sizes; one in a list is the same as one alone."""
        if value is None:
            return None
        given = list(value) if isinstance(value, list | tuple) else [value]
        sizes = sorted({size for size in given if isinstance(size, int) and size is not True and size > 0})
        if not sizes or set(given) != set(sizes):
            raise ValueError(f"expected {EXPECTED['image_size']}")
        return sizes[0] if len(sizes) == 1 else tuple(sizes)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The sizes to choose from, ascending; empty where the images stay as they are."""
        if self.image_size is None:
            return ()
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)

    def fingerprint(self) -> str:
        """Return a short hash of all settings that a run depends on: not of profiles added later, nor of caches."""
        settings = self.model_dump(
            mode="json", exclude={"profiles": True, "measure": {"cache"}, "search": self.search.unused()}
        )
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


EXPECTED: dict[str, str] = {
    "search.num_steps": "a whole number from 1, such as 900",
    "retrain.num_steps": "a whole number from 1, such as 900",
    "seed": "a whole number from 0, such as 0",
    "image_size": "a number of pixels, such as 64, or several, such as [96, 128]",
    "search.random_weight.num_evaluations": "a whole number from 2, such as 200",
    "search.random_weight.population_size": "a whole number from 4, such as 24",
    "search.random_weight.num_images": "a whole number from 50, such as 5000",
    "search.random_weight.num_seeds": "a whole number from 2, such as 4",
    "search.proxy.rungs": 'one or more of "ridge", "pairs" and "graph", such as ["ridge", "pairs"]',
    "search.proxy.num_repeats": "a whole number from 1, such as 2",
    "search.proxy.num_folds": "a whole number from 2, such as 5",
    "profiles": 'names or paths of profiles, such as ["cpu-tight"]',
}
"""What belongs in a key, with an example, for the messages of :func:`nasdeploy.profiles.messages.read_model`."""


def settings_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the settings."""
    return BuildSettings.model_json_schema()


_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Return the seconds of ``text``, such as "90s", "10min" or "1.5h". Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if match is None or float(match[1]) == 0.0:
        raise ConfigError(f'--time-budget "{text}": expected a time in s, min or h, such as "10min"')
    return float(match[1]) * _SECONDS[match[2]]
