"""One table and one figure of the tabular benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from statistics_of_pairs import interval

from nasdeploy.reporting.plots import COLOURS, MARKERS, STYLE

Line = Mapping[str, Any]
"""A run: arm, total, seed, regrets by budget, violated budgets, evaluations and seconds."""


SELECTION = " + selection"
"""How the names of arms end that are others with a selection of their own: drawn in the colour of those."""


class Runs:
    """The runs of one problem. Where its optimum is only the best that was found, a better answer moves it."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = {(line["arm"], line["total"], line["seed"]): line for line in lines}
        self.budgets = tuple(lines[0]["regrets"])
        self.arms = tuple(dict.fromkeys(line["arm"] for line in lines))
        self.totals = tuple(sorted({line["total"] for line in lines}))
        self._lowest = {name: min(0.0, *(line["regrets"][name] for line in lines)) for name in self.budgets}

    def of(self, arm: str, total: int) -> dict[int, Line]:
        """Return the runs of an arm by seed."""
        return {seed: line for (a, t, seed), line in sorted(self._lines.items()) if (a, t) == (arm, total)}

    def regret(self, line: Line, budget: str) -> float:
        """Return the regret of one run at one budget."""
        return float(line["regrets"][budget] - self._lowest[budget])

    def mean_regret(self, line: Line) -> float:
        """Return the mean regret of one run over its budgets."""
        return statistics.fmean(self.regret(line, budget) for budget in self.budgets)


def comparison(runs: Runs, *, default: str) -> str:
    """Return the table: mean regret by arm and total, and its paired difference to the default arm.

    The interval is that of the mean over seeds, by Student's t.
    """
    header = [
        "arm",
        *(f"{total}: regret, minus default [95 %]" for total in runs.totals),
        "violated",
        "s/run",
    ]
    rows = [header]
    for arm in runs.arms:
        found = [runs.of(arm, total) for total in runs.totals]
        lines = [line for by_seed in found for line in by_seed.values()]
        answers = sum(len(line["regrets"]) for line in lines)
        rows.append(
            [
                arm,
                *(
                    _cell(runs, by_seed, runs.of(default, t))
                    for t, by_seed in zip(runs.totals, found, strict=True)
                ),
                f"{sum(len(line['violated']) for line in lines)} of {answers}",
                f"{statistics.fmean(line['seconds'] for line in lines):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(runs: Runs, by_seed: Mapping[int, Line], default: Mapping[int, Line]) -> str:
    if not by_seed:
        return "-"
    mean = f"{statistics.fmean(map(runs.mean_regret, by_seed.values())):.3f}"
    pairs = [
        runs.mean_regret(by_seed[seed]) - runs.mean_regret(default[seed])
        for seed in by_seed.keys() & default.keys()
    ]
    return f"{mean} {interval(pairs)}" if len(pairs) > 1 and any(pairs) else mean


def write_figure(runs: Runs, path: Path, *, title: str, default: str) -> None:
    """Write an SVG: mean regret over evaluations, one panel for the mean of all budgets and one per budget."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = ["mean of all budgets", *runs.budgets]
    columns = int(np.ceil(np.sqrt(len(panels))))
    style: Any = {
        key: "black" if "color" in key and "face" not in key else value for key, value in STYLE.items()
    }
    faces: Any = {"axes.facecolor": "white", "figure.facecolor": "white", "grid.color": "#dddddd"}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style, **faces}):
        figure = Figure(figsize=(2.9 * columns, 2.2 * int(np.ceil(len(panels) / columns)) + 1.0))
        grid = figure.subplots(
            int(np.ceil(len(panels) / columns)), columns, sharex=True, squeeze=False
        ).ravel()
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, runs, panel, default=default)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.suptitle(title)
        figure.supxlabel("evaluations in total")
        figure.supylabel("mean regret")
        figure.tight_layout()
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, columns))
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")


def _draw_panel(axes: Any, runs: Runs, panel: str, *, default: str) -> None:
    bases = list(dict.fromkeys(arm.removesuffix(SELECTION) for arm in runs.arms))
    for arm in runs.arms:
        i = bases.index(arm.removesuffix(SELECTION))
        axes.plot(
            *_points(runs, arm, panel),
            color="black" if arm == default else COLOURS[i % len(COLOURS)],
            marker=MARKERS[i // len(COLOURS) % len(MARKERS)],
            linestyle="-" if arm.endswith(SELECTION) else "--",
            linewidth=2.0 if arm == default else 1.1,
            markersize=3.5,
            label=arm,
        )
    axes.set_ylim(bottom=0.0)
    axes.set_xticks(runs.totals)
    axes.tick_params(labelbottom=True)
    axes.set_title(panel, fontsize=9.0)


def _points(runs: Runs, arm: str, panel: str) -> tuple[list[int], list[float]]:
    """Return the totals of an arm and its mean regrets at them, of one budget or over all."""
    means = {}
    for total in runs.totals:
        if lines := list(runs.of(arm, total).values()):
            each = [runs.regret(x, panel) if panel in runs.budgets else runs.mean_regret(x) for x in lines]
            means[total] = statistics.fmean(each)
    return list(means), list(means.values())
