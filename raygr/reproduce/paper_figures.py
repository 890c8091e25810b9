"""The paper's Figures 3, 4 and 6: a panel per recommender and metric, lines with their intervals, as PNG and SVG."""

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raygr.report.charts import BLUE, GREEN, GREY, LIGHT, ORANGE, STYLE
from raygr.reproduce.costs import ScoringCost
from raygr.reproduce.experiments import points_of
from raygr.reproduce.paper_tables import (
    FIGURE_METRICS,
    PAPER_VALUES,
    VALUE_NAMES,
    Experiment,
    Protocol,
    figure_metric_name,
    figure_value,
    paper_value,
)

PANEL_INCHES, ROW_INCHES, HEAD_INCHES = 2.2, 2.2, 0.8
APART = 0.08  # of two curves at one value, so that their intervals are told apart


def draw_experiment(experiment: Experiment, protocol: Protocol) -> Figure:
    """Recommenders from top to bottom, metrics from left to right; below them, where known, what scoring costs."""
    recommenders, costs = list(protocol.ranking_of), experiment.costs
    rows = len(recommenders) + bool(costs)
    with matplotlib.rc_context(STYLE):
        size = (PANEL_INCHES * len(FIGURE_METRICS), ROW_INCHES * rows + HEAD_INCHES)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(rows, len(FIGURE_METRICS))
        for row, recommender in enumerate(recommenders):
            # each panel has a scale of its own: the intervals of NDCG@1 would hide all others
            panels = [figure.add_subplot(grid[row, column]) for column in range(len(FIGURE_METRICS))]
            draw_row(panels, experiment, protocol, recommender)
            for axes, metric in zip(panels, FIGURE_METRICS, strict=True):
                axes.set_title(figure_metric_name(metric) if row == 0 else "", fontsize=10)
        if costs:
            draw_costs(figure.add_subplot(grid[rows - 1, :]), costs)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
        figure.supxlabel(VALUE_NAMES[experiment.config.experiment], fontsize=10)
    return figure


def draw_row(panels: Sequence[Axes], experiment: Experiment, protocol: Protocol, recommender: str) -> None:
    """One recommender's curves, a panel per metric."""
    values = sorted({point.value for point in experiment.plan.points})
    is_ratio = experiment.config.experiment == "figure-4"
    for axes, metric in zip(panels, FIGURE_METRICS, strict=True):
        axes.axhline(1 if is_ratio else 0, color="black", linewidth=0.8)
        draw_curves(axes, experiment, protocol, recommender, metric)
        draw_paper(axes, experiment, protocol, recommender, metric)
        # evenly spaced: the paper's values double, or step unevenly
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values], fontsize=8 if len(values) < 7 else 7)
        axes.set_xlim(-0.4, len(values) - 0.6)
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=8)
    unit = "ratio to refined" if is_ratio else "gain over base, %"
    panels[0].set_ylabel(f"{recommender}, {protocol.ranking_of[recommender]}\n{unit}")


def draw_curves(axes: Axes, experiment: Experiment, protocol: Protocol, recommender: str, metric: str) -> None:
    values = sorted({point.value for point in experiment.plan.points})
    arms, points = experiment.comparison.arms, points_of(experiment.plan, recommender)
    names = list(dict.fromkeys(point.curve for point in points))
    for number, (name, color) in enumerate(zip(names, (BLUE, ORANGE), strict=False)):
        chosen = [point for point in points if point.curve == name]
        gains = [arms[point.arm].against_base[protocol.ranking_of[recommender]][metric] for point in chosen]
        means, lows, highs = zip(*(figure_value(experiment.config, gain) for gain in gains), strict=True)
        places = [values.index(point.value) + APART * (number - (len(names) - 1) / 2) for point in chosen]
        axes.plot(places, means, color=color, marker="o", markersize=3.5, linewidth=1.4, label=name)
        axes.vlines(places, lows, highs, color=color, linewidth=1.2, alpha=0.6)


def draw_paper(axes: Axes, experiment: Experiment, protocol: Protocol, recommender: str, metric: str) -> None:
    """The one value of the paper's figure that its tables hold, where the curves have that place."""
    values = sorted({point.value for point in experiment.plan.points})
    place, value = PAPER_VALUES[experiment.config.experiment], paper_value(experiment, recommender, metric)
    if protocol.is_papers and value is not None and place in values:
        label = f"the paper's table ({VALUE_NAMES[experiment.config.experiment]} {place:g})"
        axes.scatter([values.index(place)], [value], marker="D", s=26, facecolors="none", edgecolors=GREY, label=label)


def draw_costs(axes: Axes, costs: Sequence[ScoringCost]) -> None:
    """Tokens of one subject, and its seconds on an axis of its own."""
    places = range(len(costs))
    axes.bar(places, [cost.tokens for cost in costs], width=0.5, color=LIGHT, label="tokens")
    axes.bar(places, [cost.computed for cost in costs], width=0.5, color=GREY, label="computed with a prefix cache")
    axes.set_xticks(places, [str(cost.aspects) for cost in costs])
    axes.set_ylabel("scoring:\ntokens of a subject")
    axes.spines[["top"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    if costs[0].seconds is not None:
        seconds = axes.twinx()
        seconds.plot(places, [cost.seconds for cost in costs], color=GREEN, marker="o", markersize=3.5)
        seconds.set_ylim(bottom=0)
        seconds.set_ylabel("seconds, in proportion", color=GREEN)
        seconds.spines[["top"]].set_visible(False)
