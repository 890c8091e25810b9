"""An experiment's comparison beside the paper's numbers: Markdown, CSV, and LaTeX with the paper's columns.

Each is written under the paper's protocols (its GRU4Rec rows rank the whole catalogue, its SASRec and BERT4Rec rows
sampled candidates) and under every single one of them.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import fsspec

from raygr import files, runs
from raygr.compare import tables
from raygr.compare.comparison import ArmGain, Comparison
from raygr.compare.gain_words import gain_mark, gain_text, mark_notes, table_notes
from raygr.config import ConfigError
from raygr.metrics.ranking import METRICS, metric_name
from raygr.reproduce.config import REFINED, TABLES, Candidates, ReproduceConfig, refined_labels
from raygr.reproduce.experiments import Arm, trainings_of, twins_of
from raygr.train.run_metrics import read_metrics

TITLES = {
    "table-2": "Table 2 (the paper's data: Clothing): base embedding against the refined one of the same total width",
    "table-3": "Table 3 (the paper's data: Movies): base embedding against the refined one of the same total width",
    "table-4": "Table 4 (the paper's data: Games): base embedding against the refined one of the same total width",
    "table-5": "Table 5: user scores tuned on the base task and on the classification task",
    "figure-3": "Figure 3: gain over the base embedding by guided dimension",
    "figure-4": "Figure 4: base embeddings of several widths, the refined one being 1",
    "figure-6": "Figure 6: gain over the base embedding by the weight lambda of the guided one",
}
VALUE_NAMES = {"figure-3": "guided dimension", "figure-4": "base width", "figure-6": "lambda"}
FIGURE_METRICS = ("mrr", "recall_at_1", "ndcg_at_5", "ndcg_at_10", "ndcg_at_20")
ARM_METRICS = ("mrr", "recall_at_10", "ndcg_at_10")
PAPER_VALUES = {"figure-3": 12, "figure-4": 60, "figure-6": 1.0}
"""Where a figure's curves meet the paper's table: its refined arm or, in figure-4, its base."""
PAPER_FIELDS = ["recommender", "arm", "metric", "base", "refined", "improvement"]
PAPER = "paper"
"""The protocol that ranks each recommender's candidates as the paper does."""


class PaperNumbers(NamedTuple):
    """As printed; the improvement in percent."""

    base: str
    refined: str
    improvement: str


UNKNOWN = PaperNumbers("", "", "")
Paper = Mapping[tuple[str, str, str], PaperNumbers]
"""By recommender, arm and metric."""


class Experiment(NamedTuple):
    """What a table or figure is made from."""

    config: ReproduceConfig
    """With data and scores."""
    arms: Sequence[Arm]
    paper: Paper
    comparison: Comparison
    twin_comparison: Comparison | None
    """Of the arms that have a twin, each with its twin as base."""

    @property
    def protocols(self) -> dict[str, dict[str, Candidates]]:
        """Protocol -> recommender -> candidates: the paper's, then each single one that differs from it."""
        names = self.config.recommenders
        papers = {name: self.config.protocol[name] for name in names}
        singles = {single: dict.fromkeys(names, single) for single in sorted(set(self.config.protocol.values()))}
        return {PAPER: papers} | {single: found for single, found in singles.items() if found != papers}

    def rows(self, recommender: str) -> list[Arm]:
        """The recommender's arms that have a base: rows of a table, points of a figure."""
        return [arm for arm in self.arms if arm.recommender == recommender and arm.base]

    def gain(self, arm: Arm, ranking: str, metric: str) -> ArmGain:
        """The arm's gain over its base."""
        return (self.comparison.arms[arm.name].against_base or {})[ranking][metric]


def read_paper(path: str) -> Paper:
    """Reads the CSV of the paper's numbers; ConfigError for a missing file or other columns."""
    if not files.exists(path):
        raise ConfigError(f"paper: {path}: no such file")
    with fsspec.open(path, "r", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if header != PAPER_FIELDS:
        raise ConfigError(f"paper: {path} has the columns {header}, expected {PAPER_FIELDS}")
    return {(recommender, arm, metric): PaperNumbers(*numbers) for recommender, arm, metric, *numbers in rows}


# --- Markdown -----------------------------------------------------------------------------------


def markdown_text(experiment: Experiment) -> str:
    """What was run on what, then a table per protocol, the paper's first."""
    config, comparison, title = experiment.config, experiment.comparison, TITLES[experiment.config.experiment]
    parts = [f"# {title}\n", setting_text(experiment), run_table(experiment)]
    for protocol, ranking_of in experiment.protocols.items():
        parts.append("## The paper's protocols\n" if protocol == PAPER else f"## One protocol: {protocol}\n")
        if config.experiment in TABLES:
            parts.append(paper_table(experiment, protocol, ranking_of))
            parts += [arm_table(experiment, ranking_of)] if config.extra_arms else []
            parts.append(reference_table(experiment, ranking_of))
        else:
            parts.append(f"![{title}]({figure_file(config.experiment, protocol)}.png)\n")
            parts.append(point_table(experiment, protocol, ranking_of))
    parts += [f"{text}\n" for text in comparison.remarks]
    notes = " ".join(note.replace("*", "\\*") for note in table_notes(comparison))
    parts.append(
        "Gains are of unrounded means, with 95% intervals over users and runs. Each run's own gains, cold-start "
        f"targets and lists: comparison/table.md. {notes}\n"
    )
    if config.experiment == "figure-3":
        parts.append("Earlier versions also showed what scoring costs by guided dimension; this one does not.\n")
    return "\n".join([*parts, *tables.stamp_lines(comparison)])


def setting_text(experiment: Experiment) -> str:
    config = experiment.config
    records = [runs.read_run(train.output, job="train") for train in trainings_of(experiment.arms)]
    counts, seconds = records[0]["counts"], sum(record["seconds"] for record in records)
    users = " and ".join(filter(None, (config.user_score_run or config.user_scores, config.classification_scores)))
    refined, every = tables.stamp_text(dict(config.refined)), tables.stamp_text(dict(config.train)) or "as in the files"
    return (
        f"{counts['interactions']:,} interactions with {counts['items']:,} items ({config.data}), "
        f"{counts['test_targets']:,} test targets; item scores: {config.item_scores}; user scores: {users}. "
        f"{len(records)} train runs, seeds {', '.join(map(str, config.seeds))}, {seconds:.0f} s. "
        f"Refined: {refined}. All runs: {every}.\n"
    )


def run_table(experiment: Experiment) -> str:
    """Whether the epochs were enough: after a best epoch that is the last one, a better one could have followed."""
    rows = [["recommender", "settings", "candidates in the paper", "runs", "best epoch", "trained epochs"]]
    for name, file in experiment.config.recommenders.items():
        trainings = trainings_of([arm for arm in experiment.arms if arm.recommender == name])
        found = [read_metrics(train.output) for train in trainings]
        epochs = [[metrics.best_epoch for metrics in found], [metrics.epochs for metrics in found]]
        spans = [f"{min(values)} to {max(values)}" for values in epochs]
        rows.append([name, file, experiment.config.protocol[name], str(len(trainings)), *spans])
    return tables.markdown_rows(rows)


def paper_table(experiment: Experiment, protocol: str, ranking_of: Mapping[str, str]) -> str:
    """A row per recommender and metric: base, refined arms, improvements, and the paper's under its protocols."""
    labels = refined_labels(experiment.config)
    head = ["base", *labels, *(["improvement"] if len(labels) == 1 else [f"improvement, {one}" for one in labels])]
    rows = [["recommender", "metric", *head, *(f"paper: {name}" for name in head if protocol == PAPER)]]
    for recommender, ranking in ranking_of.items():
        for place, metric in enumerate(METRICS):
            arms = [f"{recommender} {label}" for label in labels]
            found = [tables.pair_cells(experiment.comparison.arms, arm, ranking, metric) for arm in arms]
            cells = [found[0].base, *(one.refined for one in found), *(one.improvement for one in found)]
            if protocol == PAPER:
                numbers = [experiment.paper.get((recommender, label, metric), UNKNOWN) for label in labels]
                cells += [numbers[0].base, *(one.refined for one in numbers)]
                cells += [f"{float(one.improvement):+.2f}%" if one.improvement else "" for one in numbers]
            rows.append(["" if place else recommender, metric_name(metric), *cells])
    return tables.markdown_rows(rows)


def arm_table(experiment: Experiment, ranking_of: Mapping[str, str]) -> str:
    """A row per arm, the extra arms included: gains over the base, and over its twin where it has one."""
    over_base, over_twin = ([f"{metric_name(metric)} over {one}" for metric in ARM_METRICS] for one in ("base", "it"))
    rows = [["recommender", "arm", metric_name(ARM_METRICS[-1]), *over_base, "its twin", *over_twin]]
    twins = twins_of(experiment.config)
    for recommender, ranking in ranking_of.items():
        for arm in experiment.rows(recommender):
            mean = experiment.comparison.arms[arm.name].metrics[ranking][ARM_METRICS[-1]].mean
            row = [recommender, arm.label, f"{mean:.4f}"]
            row += [gain_text(experiment.gain(arm, ranking, metric)) for metric in ARM_METRICS]
            if experiment.twin_comparison and arm.name in twins:
                over_it = (experiment.twin_comparison.arms[arm.name].against_base or {})[ranking]
                row += [twins[arm.name].removeprefix(f"{recommender} ")]
                row += [gain_text(over_it[metric]) for metric in ARM_METRICS]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
    return tables.markdown_rows(rows)


def reference_table(experiment: Experiment, ranking_of: Mapping[str, str]) -> str:
    """Popularity and chance among each of the protocol's candidates."""
    rows = [["candidates", "reference", *map(metric_name, ARM_METRICS)]]
    for ranking in dict.fromkeys(ranking_of.values()):
        for name, arm in tables.ranked_arms(experiment.comparison, ranking).items():
            if arm.is_reference:
                rows.append([ranking, name, *(f"{arm.metrics[ranking][metric].mean:.4f}" for metric in ARM_METRICS)])
    return tables.markdown_rows(rows) if len(rows) > 1 else ""


def point_table(experiment: Experiment, protocol: str, ranking_of: Mapping[str, str]) -> str:
    """A row per point of the curves, and the point that the paper's table holds."""
    name = experiment.config.experiment
    rows = [["recommender", "curve", VALUE_NAMES[name], *map(figure_metric_name, FIGURE_METRICS)]]
    for recommender, ranking in ranking_of.items():
        for arm in experiment.rows(recommender):
            cells = [point_text(name, experiment.gain(arm, ranking, metric)) for metric in FIGURE_METRICS]
            rows.append([recommender, arm.curve, f"{arm.value:g}", *cells])
        found = [paper_value(experiment, recommender, metric) for metric in FIGURE_METRICS]
        if protocol == PAPER and None not in found:
            cells = [f"{one:.3f}" if name == "figure-4" else f"{one:+.2f}%" for one in found]
            rows.append([recommender, "the paper's table", f"{PAPER_VALUES[name]:g}", *cells])
    return tables.markdown_rows(rows)


def point_text(experiment: str, gain: ArmGain) -> str:
    if experiment != "figure-4" or gain.relative_low is None:
        return gain_text(gain)
    value, low, high = figure_value(experiment, gain)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]{gain_mark(gain)}"


# --- points of figures --------------------------------------------------------------------------


def figure_metric_name(metric: str) -> str:
    """NDCG@1 is Recall@1, with one target per user."""
    return "NDCG@1" if metric == "recall_at_1" else metric_name(metric)


def figure_value(experiment: str, gain: ArmGain) -> tuple[float, float, float]:
    """A point with its interval: percent over the base; in figure-4 a ratio to the refined arm; NaN where unknown."""
    found = [math.nan if one is None else one for one in (gain.relative, gain.relative_low, gain.relative_high)]
    value, low, high = [1 + one / 100 for one in found] if experiment == "figure-4" else found
    return value, low, high


def paper_value(experiment: Experiment, recommender: str, metric: str) -> float | None:
    """The point of the paper's curve that its table holds; the text that we work from has no numbers of figures."""
    numbers = experiment.paper.get((recommender, REFINED, metric))
    if numbers is None:
        return None
    is_ratio = experiment.config.experiment == "figure-4"
    return float(numbers.base) / float(numbers.refined) if is_ratio else float(numbers.improvement)


def figure_file(experiment: str, protocol: str) -> str:
    """Name without its extension."""
    return experiment if protocol == PAPER else f"{experiment}-{protocol}"


# --- CSV and LaTeX ------------------------------------------------------------------------------


def csv_text(experiment: Experiment) -> str:
    """One line per protocol, arm and metric, unrounded, with the paper's numbers as printed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["protocol", "candidates", "recommender", "arm", "base", "curve", "value", "metric", "mean", "base_mean"]
    writer.writerow([*head, *tables.GAIN_NAMES, "each_run", *(f"paper_{name}" for name in PaperNumbers._fields)])
    arms = experiment.comparison.arms
    for protocol, ranking_of in experiment.protocols.items():
        paper = experiment.paper if protocol == PAPER else {}
        for recommender, ranking in ranking_of.items():
            for arm in experiment.rows(recommender):
                names = [protocol, ranking, recommender, arm.name, arm.base, arm.curve, arm.value if arm.curve else ""]
                for metric in METRICS:
                    means = [arms[name].metrics[ranking][metric].mean for name in (arm.name, arm.base)]
                    gain = tables.gain_cells(experiment.gain(arm, ranking, metric))
                    numbers = paper.get((recommender, arm.label, metric), UNKNOWN)
                    writer.writerow([*names, metric, *means, *gain, *numbers])
    return file.getvalue()


def latex_text(experiment: Experiment) -> str:
    """The table under the paper's protocols, which its columns name; comparison/table.tex has the single ones."""
    comparison, pairs = experiment.comparison, []
    for recommender, ranking in experiment.protocols[PAPER].items():
        for arm in experiment.rows(recommender):
            cells = [tables.pair_cells(comparison.arms, arm.name, ranking, metric) for metric in METRICS]
            pairs.append(tables.Pair(arm.name, arm.base, f"candidates: {ranking}", cells))
    note = f" Protocol: {tables.stamp_text(comparison.protocol)}." if comparison.protocol else ""
    found = tables.latex_of_pairs("as named in the columns", pairs, note, mark_notes(comparison))
    return f"% \\usepackage{{booktabs}}\n{found}"
