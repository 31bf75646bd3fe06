"""The pictures of the report as inline SVG: same data, same bytes; colours follow the page's light or dark theme."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nasdeploy.reporting.views import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["history_plot", "inline_svg", "table_plot", "tradeoff_plot"]

# Okabe and Ito's colours without black and yellow: told apart by colour-blind readers, legible on light and dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "D", "^", "v", "P")
BASELINE_MARKERS = {"random": "x", "uniform": "+"}

# matplotlib takes no CSS names: these stand for them until the SVG is written.
INK, GRID = "#010203", "#040506"
THEME = {INK: "currentColor", GRID: "var(--line)"}

STYLE: Any = {  # matplotlib's stubs want a literal type for every key
    "svg.fonttype": "none",
    "svg.hashsalt": "nasdeploy",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}


def tradeoff_plot(report: Report) -> str | None:
    """Return accuracy over latency, None when no profile has both."""
    profiles = [(i, profile) for i, profile in enumerate(report["profiles"]) if profile["accuracy"]]
    if not any(profile["latency"] for _, profile in profiles):
        return None

    def draw(axes: Axes) -> None:
        for i, profile in profiles:
            if profile["latency"]:
                _draw_profile(axes, profile, i)
            for baseline in profile["baselines"]:
                _draw_baseline(axes, baseline, i)
        axes.set_xlabel("median latency of one run [ms]")
        axes.set_ylabel("accuracy on the test images [%]")
        axes.set_xlim(0.0, 1.06 * axes.get_xlim()[1])
        _legend_below(axes)

    return inline_svg("tradeoff", "accuracy over latency of every profile", (5.4, 3.5), draw)


def _draw_profile(axes: Axes, profile: dict[str, Any], i: int) -> None:
    x = profile["latency"]["summary"]["p50_ms"]
    blocks = profile["latency"]["block_p50_ms"]
    accuracy, colour = profile["accuracy"], COLOURS[i % len(COLOURS)]
    y = 100 * accuracy["top1"]
    low, high = (100 * bound for bound in accuracy["interval95"] or (accuracy["top1"],) * 2)
    axes.errorbar(
        [x],
        [y],
        xerr=[[max(0.0, x - min(blocks))], [max(0.0, max(blocks) - x)]],
        yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
        color=colour,
        linestyle="none",
        elinewidth=1.0,
        capsize=2.0,
    )
    axes.plot(
        [x], [y], marker=MARKERS[i % len(MARKERS)], color=colour, linestyle="none", label=profile["name"]
    )


def _draw_baseline(axes: Axes, baseline: dict[str, Any], i: int) -> None:
    if baseline["predicted"].get("latency") is None:
        return
    axes.plot(
        [baseline["predicted"]["latency"]],
        [100 * baseline["top1"]],
        marker=BASELINE_MARKERS.get(baseline["kind"], "x"),
        color=COLOURS[i % len(COLOURS)],
        linestyle="none",
    )


def history_plot(report: Report, quantity: str) -> str | None:
    """Return "latency" (expected, ms) or "ess" of every profile over the steps, None without a history."""
    history = report["search"]["history"]
    labels = {"latency": "expected latency [ms]", "ess": "effective sample size"}
    if history is None or not any(_known(row[quantity]) for row in history["profiles"].values()):
        return None
    caps = {profile["name"]: _latency_cap(profile) for profile in report["profiles"]}

    def draw(axes: Axes) -> None:
        for i, (name, row) in enumerate(history["profiles"].items()):
            colour = COLOURS[i % len(COLOURS)]
            values = [float("nan") if value is None else value for value in row[quantity]]
            axes.plot(history["step"], values, color=colour, linewidth=1.2, label=name)
            if quantity == "latency" and (cap := caps.get(name)) is not None:
                axes.axhline(cap, color=colour, linewidth=1.0, linestyle=":")
        axes.set_xlabel("step of the search")
        axes.set_ylabel(labels[quantity])
        axes.set_ylim(bottom=0.0)
        _mark_warm_up(axes, history)
        _legend_below(axes)

    return inline_svg(f"history-{quantity}", f"{labels[quantity]} over the steps", (5.4, 2.9), draw)


def _mark_warm_up(axes: Axes, history: dict[str, Any]) -> None:
    steps = [
        step for step, stage in zip(history["step"], history["stage"], strict=True) if stage == "warm-up"
    ]
    if steps and len(steps) < len(history["step"]):
        axes.axvspan(steps[0], steps[-1], color=GRID, alpha=0.5, linewidth=0)
        axes.annotate(
            "warm-up", (steps[-1], 1.0), xycoords=("data", "axes fraction"), ha="right", va="bottom"
        )


def _latency_cap(profile: dict[str, Any]) -> float | None:
    for cap in profile["caps"]:
        if cap["metric"] == "latency":
            value = cap["cap"] if cap["unit"] == "ms" else cap["cap_ms"]
            return None if value is None else float(value)
    return None


def table_plot(report: Report) -> str | None:
    """Return predicted over measured latency of the networks that no table was fitted on, None without tables."""
    tables = [
        (i, p["name"], p["latency_table"]) for i, p in enumerate(report["profiles"]) if p["latency_table"]
    ]
    if not tables:
        return None

    def draw(axes: Axes) -> None:
        for i, name, table in tables:
            axes.plot(
                [row["measured_ms"] for row in table["held_out"]],
                [row["predicted_ms"] for row in table["held_out"]],
                marker=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                markersize=4.5,
                markerfacecolor="none",
                linestyle="none",
                label=name,
            )
        end = float(max(axes.get_xlim()[1], axes.get_ylim()[1]))
        axes.plot([0.0, end], [0.0, end], color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(0.0, end)
        axes.set_ylim(0.0, end)
        axes.set_xlabel("measured latency [ms CPU time]")
        axes.set_ylabel("predicted by the table [ms]")
        _legend_below(axes)

    return inline_svg("table", "predicted over measured latency of unseen networks", (5.4, 3.7), draw)


def _known(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)


def _legend_below(axes: Axes) -> None:
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=min(3, max(1, count)), handletextpad=0.4
    )


def inline_svg(name: str, title: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """Return what ``draw`` draws as an SVG for the middle of a page. name: of its ids. size: in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(
        {**matplotlib.rcParamsDefault, **STYLE}
    ):  # not what the user's matplotlibrc says
        figure = Figure(figsize=size)
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)
    return _inline(buffer.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> str:
    """Return ``svg`` fit for the middle of a page: own ids, no fixed size, no metadata, the page's fonts and inks."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s*<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('xlink:href="#', f'xlink:href="#{name}-').replace("url(#", f"url(#{name}-")
    for standing_in, css in THEME.items():
        svg = svg.replace(standing_in, css)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view_box[0] if view_box else ""} role="img"'
    return re.sub(r"^<svg[^>]*>", f'{opening} aria-label="{html.escape(title)}">', svg)
