"""Quantities with units: expected values are worked out by hand beside each text."""

from __future__ import annotations

import math
import random

import pytest

from nasdeploy.errors import ConfigError
from nasdeploy.profiles import (
    METRICS,
    Percent,
    Quantity,
    format_limit,
    format_quantity,
    parse_limit,
    parse_quantity,
)
from nasdeploy.profiles.units import limit_json_schema, show_value

NAN = math.nan

READ = [
    ("latency", "15ms", 15.0),
    ("latency", "15 ms", 15.0),
    ("latency", "800us", 0.8),
    ("latency", "800\u00b5s", 0.8),  # micro sign
    ("latency", "800\u03bcs", 0.8),  # Greek mu
    ("latency", "1.2s", 1200.0),
    ("latency", "1e-2s", 10.0),
    ("params", "60M", 60e6),
    ("params", "1.5k", 1500.0),
    ("params", "1.5K", 1500.0),
    ("params", "60000", 60000.0),
    ("params", 60000, 60000.0),
    ("params", 6e4, 60000.0),
    ("flops", "2G", 2e9),
    ("flops", "0.1G", 1e8),
    ("file_size", "4MB", 4e6),
    ("file_size", "200kB", 200e3),
    ("file_size", "200KB", 200e3),
    ("file_size", "1KiB", 1024.0),
    ("file_size", "1MiB", 1048576.0),  # 1024 * 1024
    ("file_size", "0.5GiB", 536870912.0),  # 2 ** 29
    ("file_size", "300B", 300.0),
    ("peak_memory", "40MB", 4e7),
    ("peak_memory", "64MiB", 67108864.0),  # 64 * 1024 * 1024
]

WRONG: dict[str, list[object]] = {
    "latency": ["15MB", "15", 15, 15.0, "15MS", "15m", "ms", "", "-5ms", "0ms", "1,5ms", "٣ms", "15ms\n"],
    "params": ["60m", "60MB", "15ms", "-1", 0, -3, True, None, NAN, math.inf, "1e400", "nan", [], {}],
    "flops": ["2T", "2 G FLOPs", "0", "0.0M", "1_000"],
    "file_size": ["4M", "4mb", 4000000, "4", "4Mb", "0B", "1 0B"],
    "peak_memory": ["40M", 40000000, "40", "0B", "40ms"],
}  # fmt: skip
WRONG_PAIRS = [(metric, text) for metric, texts in WRONG.items() for text in texts]
EXAMPLES = {
    "latency": '"15ms"',
    "params": '"60M"',
    "flops": '"60M"',
    "file_size": '"4MB"',
    "peak_memory": '"40MB"',
}


@pytest.mark.parametrize(("metric", "text", "value"), READ)
def test_quantity_is_read_in_the_unit_of_its_metric(metric: str, text: object, value: float) -> None:
    assert parse_quantity(text, metric=metric, key="k") == value
    assert parse_limit(text, metric=metric, key="k") == Quantity(value)


@pytest.mark.parametrize(("metric", "text"), WRONG_PAIRS)
def test_wrong_quantity_is_refused_on_one_line_with_key_and_example(metric: str, text: object) -> None:
    for parse in (parse_quantity, parse_limit):
        with pytest.raises(ConfigError) as caught:
            parse(text, metric=metric, key=f"budget.{metric}.max")
        message = str(caught.value)
        assert message.startswith(f"budget.{metric}.max = {show_value(text)}: expected ")
        assert EXAMPLES[metric] in message
        assert len(message.splitlines()) == 1


def test_message_in_full() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_limit("15MB", metric="latency", key="budget.latency.max")
    assert str(caught.value) == (
        'budget.latency.max = "15MB": expected a time such as "15ms", "800us" or "1.2s", '
        'or a share such as "40%"'
    )


@pytest.mark.parametrize(("text", "fraction"), [("0%", 0.0), ("7%", 0.07), ("12.5 %", 0.125), ("100%", 1.0)])
def test_percentage_is_read_as_a_fraction(text: str, fraction: float) -> None:
    assert parse_limit(text, metric="latency", key="k") == Percent(fraction)


@pytest.mark.parametrize("text", ["120%", "100.1%", "-1%", "%", "forty%", "1e9%"])
def test_percentage_outside_0_to_100_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r'^k = "[^"]*": expected a share (from "0%"|such as "40%")'):
        parse_limit(text, metric="params", key="k")


def test_percentage_is_no_quantity() -> None:
    with pytest.raises(ConfigError, match="expected a time such as"):
        parse_quantity("40%", metric="latency", key="k")


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_quantity_holds_only_finite_values_above_zero(value: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        Quantity(value)


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan])
def test_percent_holds_only_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Percent(fraction)


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (15.0, "latency", "15ms"),
        (0.8, "latency", "800us"),
        (0.0005, "latency", "0.5us"),
        (1234.5678, "latency", "1.235s"),
        (999.99, "latency", "1s"),  # four digits: 1000 ms, and the unit follows the rounding
        (1500000, "params", "1.5M"),
        (60000, "flops", "60k"),
        (999, "params", "999"),
        (0, "params", "0"),
        (-0.25, "latency", "-250us"),
        (300e3, "file_size", "300kB"),
        (1048576, "file_size", "1.049MB"),
        (100, "file_size", "100B"),
        (12.34e6, "peak_memory", "12.34MB"),
    ],
)
def test_quantity_is_shown_with_four_digits(value: float, metric: str, text: str) -> None:
    assert format_quantity(value, metric) == text


def test_digits_can_be_asked_for() -> None:
    assert format_quantity(1234567, "params", digits=2) == "1.2M"
    assert format_quantity(1234567, "params", digits=None) == "1.234567M"


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_written_reads_back_as_the_same_float(metric: str) -> None:
    rng = random.Random(0)
    for _ in range(500):
        limits = (
            Quantity(10 ** rng.uniform(-6, 12)),
            Percent(rng.random()),
            Percent(rng.randrange(101) / 100),
        )
        for limit in limits:
            assert parse_limit(format_limit(limit, metric), metric=metric, key="k") == limit


def test_percentage_is_shown_without_rounding_noise() -> None:
    assert format_limit(Percent(0.07), "latency") == "7%"  # 0.07 * 100 is 7.000000000000001 in binary


def _schema_accepts(metric: str, text: object) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    return bool(jsonschema.Draft202012Validator(limit_json_schema(metric)).is_valid(text))


@pytest.mark.parametrize(("metric", "text", "value"), READ)
def test_json_schema_accepts_what_is_read(metric: str, text: object, value: float) -> None:
    assert value > 0
    assert _schema_accepts(metric, text)


@pytest.mark.parametrize(("metric", "text"), WRONG_PAIRS)
def test_json_schema_refuses_what_is_not_read(metric: str, text: object) -> None:
    # A pattern cannot tell 0 from other numbers, JSON has no nan, and `$` lets a last line end pass.
    beyond_a_schema = text in ("0ms", "0", "0.0M", "0B", "15ms\n", math.inf) or text is NAN
    assert _schema_accepts(metric, text) == beyond_a_schema


def test_shown_values_stay_on_one_line_and_short() -> None:
    assert show_value("a\nb\u2028c") == '"a\\nb\\u2028c"'
    assert show_value("µs") == '"µs"'
    assert show_value(True) == "true"
    assert len(show_value("x" * 1000)) == 60
