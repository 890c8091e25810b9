"""The paper's Figures 3, 4 and 6: a panel per recommender and metric, with curves and their intervals."""

from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raygr.report.charts import BLUE, GREY, LIGHT, ORANGE, STYLE
from raygr.reproduce import paper_tables
from raygr.reproduce.paper_tables import FIGURE_METRICS, PAPER, PAPER_VALUES, VALUE_NAMES, Experiment

PANEL_INCHES, ROW_INCHES, HEAD_INCHES = 2.2, 2.2, 0.8
APART = 0.08  # of two curves at one value, so that their intervals are told apart


def draw_experiment(experiment: Experiment, protocol: str, ranking_of: Mapping[str, str]) -> Figure:
    """Recommenders from top to bottom, metrics from left to right."""
    unit = "ratio to refined" if experiment.config.experiment == "figure-4" else "gain over base, %"
    with matplotlib.rc_context(STYLE):
        size = (PANEL_INCHES * len(FIGURE_METRICS), ROW_INCHES * len(ranking_of) + HEAD_INCHES)
        figure = Figure(figsize=size, layout="constrained")
        # each panel has a scale of its own: the intervals of NDCG@1 would hide all others
        panels = figure.subplots(len(ranking_of), len(FIGURE_METRICS), squeeze=False)
        for row, (recommender, ranking) in zip(panels, ranking_of.items(), strict=True):
            for axes, metric in zip(row, FIGURE_METRICS, strict=True):
                draw_panel(axes, experiment, protocol, recommender, ranking, metric)
            row[0].set_ylabel(f"{recommender}, {ranking}\n{unit}")
        for axes, metric in zip(panels[0], FIGURE_METRICS, strict=True):
            axes.set_title(paper_tables.figure_metric_name(metric), fontsize=10)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
        figure.supxlabel(VALUE_NAMES[experiment.config.experiment], fontsize=10)
    return figure


def draw_panel(axes: Axes, experiment: Experiment, protocol: str, recommender: str, ranking: str, metric: str) -> None:
    """The recommender's curves, and the one value of the paper's curve that its tables hold."""
    name, arms = experiment.config.experiment, experiment.rows(recommender)
    values = sorted({arm.value for arm in arms})
    curves = list(dict.fromkeys(arm.curve for arm in arms))
    axes.axhline(1 if name == "figure-4" else 0, color="black", linewidth=0.8)
    for number, (curve, color) in enumerate(zip(curves, (BLUE, ORANGE), strict=False)):
        chosen = [arm for arm in arms if arm.curve == curve]
        points = [paper_tables.figure_value(name, experiment.gain(arm, ranking, metric)) for arm in chosen]
        means, lows, highs = zip(*points, strict=True)
        places = [values.index(arm.value) + APART * (number - (len(curves) - 1) / 2) for arm in chosen]
        axes.plot(places, means, color=color, marker="o", markersize=3.5, linewidth=1.4, label=curve)
        axes.vlines(places, lows, highs, color=color, linewidth=1.2, alpha=0.6)
    place, value = PAPER_VALUES[name], paper_tables.paper_value(experiment, recommender, metric)
    if protocol == PAPER and value is not None and place in values:
        label = f"the paper's table ({VALUE_NAMES[name]} {place:g})"
        axes.scatter([values.index(place)], [value], marker="D", s=26, facecolors="none", edgecolors=GREY, label=label)
    # evenly spaced: the paper's values double, or step unevenly
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values], fontsize=8 if len(values) < 7 else 7)
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=8)
