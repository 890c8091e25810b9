"""A sweep's figure: a panel per searched name, and a line per combination of the searched names that are not numbers.

A line passes through the best configuration of its combination: the other numbers are fixed at their values there. Bars
are 95% intervals of the mean over runs (seeds and draws of random subsets), where there are two or more. Each run is a
dot.
"""

from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.api.typing import SeriesGroupBy
from scipy.stats import ttest_1samp

from raygr import runs
from raygr.report.charts import BLUE, GREEN, GREY, ORANGE, STYLE, plain_frame, save_figure

CHOSEN_BY = "validation_ndcg@10"
COLORS = (BLUE, ORANGE, GREEN, GREY, "#8a4fa3", "#b03a48")
PANEL_INCHES = (4.2, 3.0)


def write_figure(finished: list[dict[str, Any]], names: list[str], run: runs.Run) -> None:
    """Writes figure.svg and figure.png of rows of results.parquet; `names` are the searched names but the seed."""
    table = pd.DataFrame(finished)
    panels = [name for name in names if table[name].nunique(dropna=False) > 1] or names[:1]
    if not panels:
        return
    with matplotlib.rc_context(STYLE):
        size = (PANEL_INCHES[0] * len(panels), PANEL_INCHES[1])
        figure = Figure(figsize=size, layout="constrained")
        for place, name in enumerate(panels, start=1):
            axes = figure.add_subplot(1, len(panels), place)
            draw_panel(axes, table, name, others=[other for other in panels if other != name])
            axes.set_ylabel("validation NDCG@10" if place == 1 else "")
    save_figure(figure, run.file("figure"))


def draw_panel(axes: Axes, table: pd.DataFrame, name: str, *, others: list[str]) -> None:
    is_number = is_numeric(table[name])
    places = sorted(table[name].unique()) if is_number else list(dict.fromkeys(table[name].map(words)))
    for color, (label, rows) in zip(COLORS, lines_through_the_best(table, others), strict=False):
        x = rows[name] if is_number else rows[name].map(words).map(places.index)
        axes.scatter(x, rows[CHOSEN_BY], s=8, color=color, alpha=0.5, linewidth=0)
        means = rows[CHOSEN_BY].groupby(x).mean()
        axes.plot(means.index, means, "-o" if is_number else "o", color=color, markersize=4, linewidth=1.4, label=label)
        draw_intervals(axes, rows[CHOSEN_BY].groupby(x), color)
    if not is_number:
        axes.set_xticks(range(len(places)), places, rotation=20, ha="right")
    axes.set_xlabel(name)
    plain_frame(axes)
    if any(not is_numeric(table[other]) for other in others):
        axes.legend(frameon=False, fontsize=7)


def draw_intervals(axes: Axes, values_by_x: SeriesGroupBy, color: str) -> None:
    """Draws intervals without widening the axis, because those of two seeds are often wider than the rest."""
    limits = axes.get_ylim()
    for x, values in values_by_x:
        if len(values) > 1:
            low, high = ttest_1samp(values, 0).confidence_interval()
            axes.vlines(x, low, high, color=color, linewidth=1)
    axes.set_ylim(limits)


def lines_through_the_best(table: pd.DataFrame, others: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """Label and rows of each line, the best line first."""
    numbers = [name for name in others if is_numeric(table[name])]
    words_by = [name for name in others if name not in numbers]
    groups = table.groupby(words_by, dropna=False, sort=False) if words_by else [((), table)]
    lines = []
    for values, rows in groups:
        best = rows.groupby(numbers)[CHOSEN_BY].mean() if numbers else rows[CHOSEN_BY]
        for name, value in zip(numbers, best.idxmax() if len(numbers) > 1 else [best.idxmax()], strict=False):
            rows = rows[rows[name] == value]
        label = ", ".join(f"{name} {words(value)}" for name, value in zip(words_by, values, strict=True))
        lines.append((best.max(), label, rows))
    return [(label, rows) for _, label, rows in sorted(lines, key=lambda line: -line[0])]


def is_numeric(column: pd.Series) -> bool:
    """False also for flags and for numbers that some rows lack: each value gets its own line, as words do."""
    return pd.api.types.is_numeric_dtype(column) and column.dtype != bool and column.notna().all()


def words(value: object) -> str:
    return "none" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
