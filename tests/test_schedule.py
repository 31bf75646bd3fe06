"""The schedule: what a time budget says, and how it scales the steps."""

from __future__ import annotations

import pytest

from nasdeploy.errors import ConfigError
from nasdeploy.pipeline.schedule import planned_phases, scaled
from nasdeploy.settings import BuildSettings, parse_duration

SPEED = 800.0
"""Images per second of the largest network: about two cores of a laptop."""


def budgeted(text: str | None, speed: float = SPEED) -> BuildSettings:
    """Return the default settings scaled to a time budget."""
    return scaled(BuildSettings(time_budget=text), image_sizes=(28,), num_runtimes=1, images_per_second=speed)


def total_seconds(settings: BuildSettings) -> float:
    """Return how long a build is expected to take."""
    return sum(
        p.seconds
        for p in planned_phases(settings, image_sizes=(28,), num_runtimes=1, images_per_second=SPEED)
    )


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), (" 2 min ", 120), ("0.5s", 0.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "0s", "0.0h", "-5min", "5 minutes", "1h30min", "min", "1e3s", "nan s"]
)
def test_other_texts_are_no_durations(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_duration(text)
    assert f'--time-budget "{text}": expected a time in s, min or h' in str(refused.value)


def test_without_a_budget_the_schedule_stays() -> None:
    assert budgeted(None) == BuildSettings()


@pytest.mark.parametrize("text", ["6min", "10min", "30min", "2h"])
def test_a_scaled_schedule_is_expected_to_take_its_budget(text: str) -> None:
    assert total_seconds(budgeted(text)) == pytest.approx(parse_duration(text), rel=0.01)


def test_more_time_is_more_steps() -> None:
    found = [budgeted(f"{minutes}min") for minutes in (1, 2, 4, 8, 16, 32, 64)]
    search, retrain = ([getattr(one, part).num_steps for one in found] for part in ("search", "retrain"))
    assert search == sorted(search)
    assert retrain == sorted(retrain)
    assert search[-1] > 4 * search[3]


def test_faster_machines_take_more_steps() -> None:
    steps = [budgeted("10min", speed).search.num_steps for speed in (200.0, 400.0, 800.0)]
    assert steps == sorted(set(steps))


def test_a_hopeless_budget_gets_the_smallest_schedule() -> None:
    settings = budgeted("1s")
    assert settings.search.num_steps == round(0.02 * BuildSettings().search.num_steps)
    assert settings.retrain.num_steps == round(0.02 * BuildSettings().retrain.num_steps)
    assert settings == budgeted("2s").model_copy(update={"time_budget": "1s"})


def test_no_schedule_falls_below_ten_steps() -> None:
    short = BuildSettings(time_budget="1s", search={"num_steps": 20}, retrain={"num_steps": 20})
    found = scaled(short, image_sizes=(28,), num_runtimes=1, images_per_second=SPEED)
    assert (found.search.num_steps, found.retrain.num_steps) == (10, 10)


def test_only_the_numbers_of_steps_are_scaled() -> None:
    settings, default = budgeted("10min"), BuildSettings(time_budget="10min")
    update = {
        part: getattr(settings, part).model_copy(update={"num_steps": getattr(default, part).num_steps})
        for part in ("search", "retrain")
    }
    assert settings.model_copy(update=update) == default


def test_work_of_retraining_by_hand() -> None:
    phases = {
        p.name: p.seconds
        for p in planned_phases(BuildSettings(), image_sizes=(28,), num_runtimes=1, images_per_second=100.0)
    }
    # 3 networks of half the largest one's work, and one forward pass of the largest for all of them
    images = BuildSettings().retrain.num_steps * 64
    assert phases["retrain"] == pytest.approx(images * (3 * 0.5 + 1 / 6) / 100.0)


def test_baselines_are_two_more_networks_a_profile() -> None:
    def retraining(baselines: bool) -> float:
        settings = BuildSettings(baselines=baselines)
        phases = planned_phases(settings, image_sizes=(28,), num_runtimes=1, images_per_second=100.0)
        return next(phase.seconds for phase in phases if phase.name == "retrain")

    images = BuildSettings().retrain.num_steps * 64
    assert retraining(True) - retraining(False) == pytest.approx(6 * 0.5 * images / 100.0)


@pytest.mark.parametrize("method", ["evaluator", "warm_start"])
def test_networks_with_random_weights_are_a_part_of_the_schedule(method: str) -> None:
    search = {method: "random-weight"}

    def found(budget: str | None) -> BuildSettings:
        settings = BuildSettings(time_budget=budget, search=search)
        return scaled(settings, image_sizes=(28,), num_runtimes=1, images_per_second=SPEED)

    phases = [
        p.name
        for p in planned_phases(found(None), image_sizes=(28,), num_runtimes=1, images_per_second=SPEED)
    ]
    assert "random weights" in phases
    assert ("search" in phases) == (method == "warm_start")
    numbers = [found(text).search.random_weight.num_evaluations for text in ("1s", "30min", "8h")]
    assert numbers[0] == BuildSettings().search.random_weight.population_size < numbers[1] < numbers[2]
    assert total_seconds(found("1h")) == pytest.approx(3600, rel=0.01)
    assert found(None).search.random_weight == BuildSettings().search.random_weight


def test_the_graph_network_of_proxy_validation_is_a_part_of_the_schedule() -> None:
    def selecting(**search: object) -> float:
        settings = BuildSettings.model_validate({"search": search})
        phases = planned_phases(settings, image_sizes=(28,), num_runtimes=1, images_per_second=SPEED)
        return next(phase.seconds for phase in phases if phase.name == "select")

    assert selecting(predictor="proxy") > selecting() + 10.0
    assert selecting(predictor="proxy", proxy={"rungs": ["ridge", "pairs"]}) == selecting()
