"""The chart of a bench: a bar a file, as long as its median, with the range of its blocks; colours tell precisions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nasdeploy.reporting.plots import COLOURS, GRID, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "Bar", "draw_bars"]

Format = Literal["png", "svg"]
FORMATS: tuple[Format, ...] = ("png", "svg")

# A file of its own has no page around it: inks and a ground that can be read everywhere.
GROUND = "#ffffff"
INKS = {INK: "#222222", GRID: "#dddddd", "none": GROUND}
COLOUR_OF = dict(zip(("fp32", "int8", "fp16"), COLOURS, strict=False))
OTHER_COLOUR = "#777777"

WIDTH, ROW_HEIGHT, MARGIN = 7.2, 0.42, 1.3  # inches
DOTS_PER_INCH = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A file. p50_ms, low_ms, high_ms: median of a run, smallest and largest block median.

    precision: of its weights, None where not known. note: beside the bar, such as "x0.62, faster".
    """

    label: str
    precision: str | None
    p50_ms: float
    low_ms: float
    high_ms: float
    note: str


def draw_bars(bars: Sequence[Bar], *, title: str, conditions: str, file_format: Format) -> bytes:
    """Return the picture: the first bar on top, times in ms from 0. Same bars, same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_style()}):
        figure = Figure(figsize=(WIDTH, MARGIN + ROW_HEIGHT * len(bars)))
        axes = figure.subplots()
        _draw(axes, bars)
        axes.set_title(f"{title}\n{conditions}", loc="left", fontsize=9.0)
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(buffer, format=file_format, metadata=metadata, dpi=DOTS_PER_INCH, bbox_inches="tight")
    return buffer.getvalue()


def _style() -> Any:  # matplotlib's stubs want a literal type for every key
    style = {key: INKS.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    return {**style, "axes.grid.axis": "x", "svg.fonttype": "none"}


def _draw(axes: Axes, bars: Sequence[Bar]) -> None:
    shown: set[str] = set()
    for row, bar in enumerate(bars):
        kind = bar.precision or "not known"
        colour = COLOUR_OF.get(kind, OTHER_COLOUR)
        axes.barh(
            row,
            bar.p50_ms,
            height=0.56,
            color=colour,
            alpha=0.75,
            label=None if kind in shown else kind,
            xerr=[[max(0.0, bar.p50_ms - bar.low_ms)], [max(0.0, bar.high_ms - bar.p50_ms)]],
            error_kw={"ecolor": INKS[INK], "elinewidth": 1.2, "capsize": 3.0},
        )
        axes.annotate(
            f"{bar.p50_ms:.3g} ms  {bar.note}".rstrip(),
            (max(bar.p50_ms, bar.high_ms), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.0,
        )
        shown.add(kind)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.02 * max(max(bar.p50_ms, bar.high_ms) for bar in bars))
    axes.set_xlabel("median of one run [ms wall time]; whiskers: smallest and largest block median")
    if len(shown) > 1:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0.0, -0.66 / (MARGIN + ROW_HEIGHT * len(bars))),
            ncols=len(shown),
        )
