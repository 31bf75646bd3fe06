"""Which decisions matter, drawn: a row a decision, a cell a candidate, behind them how much the decision matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nasdeploy.reporting.plots import COLOURS, GRID, INK, MARKERS, inline_svg
from nasdeploy.reporting.views import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["effects_plot", "weights_plot"]

LESS, MORE, WEIGHT = COLOURS[0], COLOURS[1], COLOURS[2]
FAINTEST, STRONGEST = 0.06, 0.72  # opacities: the text of a cell is legible on both themes
ROW_HEIGHT, CELL_WIDTH, MARGIN = 0.3, 0.95, 0.9  # inches
GAP = 0.06  # between cells, in cells
BAR_AT, BAR_WIDTH, TEXT_WIDTH = 0.25, 1.5, 1.3  # behind the last candidate, in cells
MAX_LETTERS = 11
FONT_SIZE = 7.5


def effects_plot(report: Report) -> str | None:
    """Return the effect of every candidate on the modelled loss, None where no model has said so."""
    importance = report["search"]["importance"]
    if importance is None:
        return None
    decisions = importance["decisions"]
    most = _largest([abs(one["effect"] or 0.0) for row in decisions for one in row["candidates"]])

    def draw(axes: Axes) -> None:
        for r, row in enumerate(decisions):
            for c, one in enumerate(row["candidates"]):
                if one["effect"] is None:
                    _draw_cell(axes, r, c, one["name"], colour=None, share=0.0)
                else:
                    colour = LESS if one["effect"] < 0.0 else MORE
                    _draw_cell(axes, r, c, one["name"], colour=colour, share=abs(one["effect"]) / most)
        _draw_ranges(axes, decisions)
        _draw_choices(axes, report["profiles"], decisions)
        _frame(axes, decisions)

    title = "change of the modelled loss by the candidates of every decision"
    return inline_svg("effects", title, _size(decisions), draw)


def weights_plot(report: Report) -> str | None:
    """Return the importance weight of every candidate, None where the model has none."""
    importance = report["search"]["importance"]
    if importance is None or not _weighed(importance["decisions"]):
        return None
    decisions = importance["decisions"]

    def draw(axes: Axes) -> None:
        for r, row in enumerate(decisions):
            for c, one in enumerate(row["candidates"]):
                colour = None if one["weight"] is None else WEIGHT
                _draw_cell(axes, r, c, one["name"], colour=colour, share=one["weight"] or 0.0)
            known = [one["weight"] for one in row["candidates"] if one["weight"] is not None]
            beside = ", ".join(f"{weight:.2f}" for weight in known)
            axes.text(_width(decisions) + BAR_AT, r, beside, va="center", fontsize=FONT_SIZE)
        _frame(axes, decisions)

    title = "importance weights of the candidates of every decision"
    return inline_svg("weights", title, _size(decisions), draw)


def _weighed(decisions: Sequence[Mapping[str, Any]]) -> bool:
    return any(one["weight"] is not None for row in decisions for one in row["candidates"])


def _width(decisions: Sequence[Mapping[str, Any]]) -> int:
    return max(len(row["candidates"]) for row in decisions)


def _columns(decisions: Sequence[Mapping[str, Any]]) -> float:
    """Return how wide the picture is, in cells: the same for all pictures of a run, so that they are to one scale."""
    return _width(decisions) + BAR_AT + BAR_WIDTH + TEXT_WIDTH


def _size(decisions: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    return MARGIN + CELL_WIDTH * _columns(decisions), MARGIN + ROW_HEIGHT * len(decisions)


def _largest(values: Sequence[float]) -> float:
    """Return the largest of ``values``, 1 where all are 0: a scale is never empty."""
    return max(values) or 1.0


def _short(name: str) -> str:
    return name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"


def _draw_cell(axes: Axes, r: int, c: int, label: str, *, colour: str | None, share: float) -> None:
    """Draw candidate ``c`` of row ``r``; share: of the strongest colour. colour: None for one nobody may take."""
    axes.barh(
        r,
        1.0 - GAP,
        left=c,
        height=1.0 - 2 * GAP,
        color="none" if colour is None else colour,
        alpha=None if colour is None else FAINTEST + (STRONGEST - FAINTEST) * share,
        edgecolor=GRID if colour is None else "none",
        linewidth=0.6,
    )
    axes.text(c + 0.5 - GAP / 2, r, _short(label), ha="center", va="center", fontsize=FONT_SIZE)


def _draw_ranges(axes: Axes, decisions: Sequence[Mapping[str, Any]]) -> None:
    """Draw how much each decision matters as a bar behind its candidates, with two standard errors."""
    at = _width(decisions) + BAR_AT
    ends = [row["range"] + 2 * (row["error"] or 0.0) for row in decisions]
    unit = BAR_WIDTH / _largest(ends)
    for r, row in enumerate(decisions):
        error = row["error"]
        axes.barh(r, row["range"] * unit, left=at, height=0.4, color=INK, alpha=0.45)
        if error is not None:
            low, high = max(0.0, row["range"] - 2 * error), row["range"] + 2 * error
            axes.plot([at + low * unit, at + high * unit], [r, r], color=INK, linewidth=1.0)
        beside = "" if error is None else f" \N{PLUS-MINUS SIGN} {2 * error:.3f}"
        axes.text(
            at + ends[r] * unit + 0.1, r, f"{row['range']:.3f}{beside}", va="center", fontsize=FONT_SIZE
        )
    axes.text(at, -0.75, "from best to worst", va="center", fontsize=FONT_SIZE)


def _draw_choices(
    axes: Axes, profiles: Sequence[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]]
) -> None:
    """Mark the candidates that the network of every profile took, below their names."""
    for i, profile in enumerate(profiles):
        if profile["architecture"] is None:
            continue
        names = profile["architecture"]["names"]
        places = [
            (c, r)
            for r, row in enumerate(decisions)
            for c, one in enumerate(row["candidates"])
            if names.get(row["name"]) == one["name"]
        ]
        shift = (i + 1) / (len(profiles) + 1) * (1.0 - GAP)
        axes.plot(
            [c + shift for c, _ in places],
            [r + 0.34 for _, r in places],
            marker=MARKERS[i % len(MARKERS)],
            markersize=3.4,
            markeredgecolor=INK,
            markeredgewidth=0.4,
            color=COLOURS[i % len(COLOURS)],
            linestyle="none",
            label=profile["name"],
        )


def _frame(axes: Axes, decisions: Sequence[Mapping[str, Any]]) -> None:
    """Name the rows, put the first one on top, and leave out what belongs to plots of numbers."""
    axes.set_yticks(range(len(decisions)), [row["name"] for row in decisions])
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_xlim(0.0, _columns(decisions))
    axes.set_ylim(len(decisions) - 0.4, -1.0)
    count = len(axes.get_legend_handles_labels()[1])
    if count:
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 0.0), ncols=min(3, count), handletextpad=0.2)
