"""The report's figures as inline SVG: small enough for a phone, with text as text, and without outside files.

`save_figure` writes the figures of other stages to files.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import fsspec
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE, GREEN, GREY, VIOLET, LIGHT = "#0b66a0", "#c96f00", "#3f8f5b", "#6b7280", "#8a4fa3", "#d5dae1"
CURVES = (BLUE, ORANGE, GREEN, GREY, VIOLET)
WIDTH_INCHES, ROW_INCHES, MARGIN_INCHES = 4.8, 0.27, 0.85  # about the width of a phone
CURVE_INCHES, PANEL_INCHES = 2.6, 1.15
LEGEND_LETTERS = 70  # more do not fit into one line
LARGEST_SQUARE = 200  # points squared
# The page's names of the colours, so that figures are dark or light with it; black is text, white the background.
PAGE_COLORS = {
    BLUE: "blue", ORANGE: "orange", GREEN: "green", GREY: "grey", VIOLET: "violet", LIGHT: "line",
    "#000000": "ink", "#ffffff": "paper",
}  # fmt: skip
# Fixed ids give equal figures equal bytes. Text stays text, so that it can be searched and read aloud, and is small.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "raygr", "font.size": 9, "font.family": "sans-serif"}
SHARE_PARTS = (
    ("base", "base part", BLUE),
    ("encoder_guided", "encoder × guided", ORANGE),
    ("user_guided", "user × guided", GREEN),
)
SMALLEST_LABELLED_SHARE = 0.08


class Interval(NamedTuple):
    """An arm's value and its bounds, in the unit of the axis."""

    name: str
    value: float
    low: float
    high: float


class Panel(NamedTuple):
    """An arm's values by group, with the labels of the groups."""

    name: str
    bars: Sequence[Interval]


class Curve(NamedTuple):
    """Values by step, with bounds where there are any."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    lows: Sequence[float] | None
    highs: Sequence[float] | None


def gain_chart(gains: Sequence[Interval], *, figure_id: str, label: str, axis: str) -> Markup:
    """A bar per arm from zero to the gain, with the gain's interval; the first arm is on top."""
    figure, axes = horizontal_axes([gain.name for gain in gains])
    rows, lows, highs = range(len(gains)), [gain.low for gain in gains], [gain.high for gain in gains]
    axes.barh(rows, [gain.value for gain in gains], height=0.55, color=BLUE, alpha=0.7)
    axes.hlines(rows, lows, highs, color="black", linewidth=1.2)
    axes.scatter([*lows, *highs], [*rows, *rows], marker="|", s=40, color="black", linewidth=1.2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(axis)
    return inline_svg(figure, figure_id=figure_id, label=label)


def panel_chart(panels: Sequence[Panel], *, figure_id: str, label: str, axis: str) -> Markup:
    """One small chart per arm, below each other on one scale: a bar per group from zero, with its interval."""
    with matplotlib.rc_context(STYLE):
        size = (WIDTH_INCHES, MARGIN_INCHES + PANEL_INCHES * len(panels))
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subplots(len(panels), sharey=True, squeeze=False)[:, 0]
    # where all arms have the same groups, the lowest chart alone names them
    named = {tuple(bar.name for bar in panel.bars) for panel in panels}
    for axes, panel in zip(rows, panels, strict=True):
        places, values = range(len(panel.bars)), [bar.value for bar in panel.bars]
        below, above = [bar.value - bar.low for bar in panel.bars], [bar.high - bar.value for bar in panel.bars]
        axes.bar(places, values, width=0.6, color=BLUE, alpha=0.7)
        axes.errorbar(places, values, [below, above], fmt="none", ecolor="black", elinewidth=1.1, capsize=3)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(panel.name.replace("$", r"\$"), fontsize=9, loc="left")
        is_named = len(named) > 1 or panel is panels[-1]
        axes.set_xticks(places, [bar.name for bar in panel.bars] if is_named else [""] * len(panel.bars))
        axes.tick_params(axis="x", length=0)
        plain_frame(axes, grid="y")
    rows[-1].set_xlabel(axis)
    return inline_svg(figure, figure_id=figure_id, label=label)


def share_chart(shares: Mapping[str, Mapping[str, float]], *, figure_id: str, label: str) -> Markup:
    """A stacked bar per arm: the shares of base part, encoder and user side in the spread of its scores.

    Shares are fractions of 1. A part that works against the others has a negative share, which is left of zero.
    """
    figure, axes = horizontal_axes(list(shares))
    ends = {negative: [0.0] * len(shares) for negative in (False, True)}
    for part, words, color in SHARE_PARTS:
        widths = [arm[part] for arm in shares.values()]
        left = [ends[width < 0][row] for row, width in enumerate(widths)]
        bars = axes.barh(range(len(shares)), widths, left=left, height=0.6, color=color, label=words)
        labels = [f"{w:.0%}" if abs(w) >= SMALLEST_LABELLED_SHARE else "" for w in widths]
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
        for row, width in enumerate(widths):
            ends[width < 0][row] += width
    axes.set_xlim(min(0.0, *ends[True]), max(1.0, *ends[False]))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside upper center", ncols=len(SHARE_PARTS), frameon=False, fontsize=8)
    return inline_svg(figure, figure_id=figure_id, label=label)


def agreement_chart(correlations: Mapping[str, float], *, figure_id: str, label: str) -> Markup:
    """A bar per aspect: its rank correlation, -1..1."""
    figure, axes = horizontal_axes(list(correlations))
    axes.barh(range(len(correlations)), list(correlations.values()), height=0.6, color=BLUE)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(min(0.0, *correlations.values()) * 1.1, 1)
    axes.set_xlabel("rank correlation (Spearman)")
    return inline_svg(figure, figure_id=figure_id, label=label)


def profile_chart(
    aspects: Sequence[str], differences: Sequence[float], *, reach: float, figure_id: str, label: str
) -> Markup:
    """A bar per aspect from zero, the average of all, to a subject's difference from it; the axis ends at `reach`."""
    figure, axes = horizontal_axes(aspects)
    colors = [BLUE if one >= 0 else ORANGE for one in differences]
    axes.barh(range(len(aspects)), differences, height=0.6, color=colors)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("points from the average")
    return inline_svg(figure, figure_id=figure_id, label=label)


def correlation_map(names: Sequence[str], correlations_AA: np.ndarray, *, figure_id: str, label: str) -> Markup:
    """A square per pair of aspects, as large as the correlation's magnitude: blue above 0 and orange below.

    An aspect without spread has NaN, and no square.
    """
    figure, axes = horizontal_axes(names)
    figure.set_size_inches(WIDTH_INCHES, MARGIN_INCHES + ROW_INCHES * len(names) * 1.1)
    rows, columns = np.tril_indices(len(names), k=-1)
    values = correlations_AA[rows, columns]
    known = np.isfinite(values)
    rows, columns, values = rows[known], columns[known], values[known]
    colors = [BLUE if one >= 0 else ORANGE for one in values]
    axes.scatter(columns, rows, s=LARGEST_SQUARE * np.abs(values), c=colors, marker="s", linewidths=0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(len(names)), [name.replace("$", r"\$") for name in names], rotation=90, fontsize=7)
    axes.grid(axis="both", color=LIGHT, linewidth=0.6)
    return inline_svg(figure, figure_id=figure_id, label=label)


def curve_chart(curves: Sequence[Curve], *, figure_id: str, label: str, axis: str) -> Markup:
    """At most five lines over the steps, each with a band between its bounds."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, CURVE_INCHES), layout="constrained")
        axes = figure.add_subplot()
    for curve, color in zip(curves, CURVES[: len(curves)], strict=True):
        axes.plot(curve.steps, curve.values, color=color, linewidth=1.4, label=curve.name.replace("$", r"\$"))
        if curve.lows is not None and curve.highs is not None:
            axes.fill_between(curve.steps, curve.lows, curve.highs, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel(axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_frame(axes)
    letters = sum(len(curve.name) for curve in curves)
    columns = len(curves) if letters <= LEGEND_LETTERS else 1
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
    return inline_svg(figure, figure_id=figure_id, label=label)


def horizontal_axes(names: Sequence[str]) -> tuple[Figure, Axes]:
    """An empty chart with one named row per entry, the first on top."""
    with matplotlib.rc_context(STYLE):
        size = (WIDTH_INCHES, MARGIN_INCHES + ROW_INCHES * len(names))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        # matplotlib would read a dollar sign as the start of a formula
        axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    plain_frame(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def plain_frame(axes: Axes, *, grid: Literal["x", "y", "both"] = "both") -> None:
    """Draws a light grid behind the data, and no frame at the top and the right."""
    axes.grid(axis=grid, color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def inline_svg(figure: Figure, *, figure_id: str, label: str) -> Markup:
    """The figure as one <svg> element that `label` describes; its ids start with `figure_id`, unique in the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{figure_id}-", drawing).replace("xlink:href", "href")
    for color, name in PAGE_COLORS.items():
        drawing = drawing.replace(f": {color}", f": var(--{name})")
    view_box = re.findall(r'viewBox="[^"]*"', drawing)[0]
    content = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    # Safe as markup: the label is escaped here, and matplotlib escapes all text of the content.
    return Markup(f'<svg {view_box} role="img" aria-label="{escape(label)}">{content}')


def save_figure(figure: Figure, path: str, *, dots_per_inch: int = 150) -> None:
    """Writes `path`.png and `path`.svg to any fsspec file system; equal figures give equal bytes."""
    with matplotlib.rc_context(STYLE):
        for ending, metadata in (("png", None), ("svg", {"Date": None})):
            with fsspec.open(f"{path}.{ending}", "wb") as file:
                figure.savefig(file, format=ending, dpi=dots_per_inch, metadata=metadata)
