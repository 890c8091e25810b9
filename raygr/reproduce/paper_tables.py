"""An experiment's comparison beside the paper's numbers: Markdown, CSV, and LaTeX with the paper's columns.

Each is written under the paper's protocols (its GRU4Rec rows rank the whole catalogue, its SASRec and BERT4Rec rows
sampled candidates) and under every single one of them.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import fsspec

from raygr import files, runs, schema
from raygr.compare.gain_words import gain_mark, gain_text, mark_notes, table_notes
from raygr.compare.tables import (
    GAIN_NAMES,
    Pair,
    each_run_cell,
    latex_of_pairs,
    markdown_rows,
    pair_cells,
    stamp_lines,
    stamp_text,
)
from raygr.config import ConfigError
from raygr.metrics.ranking import METRICS, metric_name
from raygr.reproduce.config import TABLES, ReproduceConfig, refined_labels
from raygr.reproduce.experiments import Arm, trainings_of, twins_of

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
    comparison: Mapping[str, Any]
    twin_comparison: Mapping[str, Any] | None
    """Of arms with their twins as bases."""


def read_paper(path: str) -> Paper:
    """Reads the CSV of the paper's numbers; ConfigError for a missing file or other columns."""
    if not files.exists(path):
        raise ConfigError(f"paper: {path}: no such file")
    with fsspec.open(path, "r", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != PAPER_FIELDS:
            raise ConfigError(f"paper: {path} has the columns {reader.fieldnames}, expected {PAPER_FIELDS}")
        rows = [tuple(row.values()) for row in reader]
    return {(recommender, arm, metric): PaperNumbers(*numbers) for recommender, arm, metric, *numbers in rows}


def protocols(config: ReproduceConfig) -> dict[str, dict[str, str]]:
    """Protocol -> recommender -> candidates: the paper's, then each single one that differs from it."""
    papers = {name: config.protocol[name] for name in config.recommenders}
    singles = {name: dict.fromkeys(config.recommenders, name) for name in sorted(set(config.protocol.values()))}
    return {PAPER: papers} | {name: found for name, found in singles.items() if found != papers}


def compared_arms(experiment: Experiment, recommender: str) -> list[Arm]:
    """The recommender's arms that have a base: the rows of a table, the points of a figure."""
    return [arm for arm in experiment.arms if arm.recommender == recommender and arm.base]


# --- Markdown -----------------------------------------------------------------------------------


def markdown_text(experiment: Experiment) -> str:
    """What was run on what, then a table per protocol, the paper's first."""
    config, comparison = experiment.config, experiment.comparison
    title = TITLES[config.experiment]
    parts = [f"# {title}\n", setting_text(experiment), run_table(experiment)]
    for protocol, ranking_of in protocols(config).items():
        parts.append("## The paper's protocols\n" if protocol == PAPER else f"## One protocol: {protocol}\n")
        if config.experiment in TABLES:
            parts.append(metric_table(experiment, protocol, ranking_of))
            parts += [arm_table(experiment, ranking_of)] if config.extra_arms else []
            parts.append(reference_table(experiment, ranking_of))
        else:
            parts.append(f"![{title}]({figure_file(config.experiment, protocol)}.png)\n")
            parts.append(point_table(experiment, protocol, ranking_of))
    parts += [f"{text}\n" for text in comparison["remarks"]]
    notes = " ".join(note.replace("*", "\\*") for note in table_notes(comparison))
    parts.append(
        "Gains are of unrounded means, with 95% intervals over users and runs. Each run's own gains, cold-start "
        f"targets and lists: comparison/table.md. {notes}\n"
    )
    if config.experiment == "figure-3":
        parts.append("Earlier versions also showed what scoring costs by guided dimension; this one does not.\n")
    return "\n".join([*parts, *stamp_lines(comparison)])


def setting_text(experiment: Experiment) -> str:
    config = experiment.config
    records = [runs.read_run(train.output, job="train") for train in trainings_of(experiment.arms)]
    counts, seconds = records[0]["counts"], sum(record["seconds"] for record in records)
    users = " and ".join(filter(None, (config.user_score_run or config.user_scores, config.classification_scores)))
    return (
        f"{counts['interactions']:,} interactions with {counts['items']:,} items ({config.data}), "
        f"{counts['test_targets']:,} test targets; item scores: {config.item_scores}; user scores: {users}. "
        f"{len(records)} train runs, seeds {', '.join(map(str, config.seeds))}, {seconds:.0f} s. "
        f"Refined: {stamp_text(config.refined)}. All runs: {stamp_text(config.train) or 'as in the files'}.\n"
    )


def run_table(experiment: Experiment) -> str:
    """Whether the epochs were enough: after a best epoch that is the last one, a better one could have followed."""
    rows = [["recommender", "settings", "candidates in the paper", "runs", "best epoch", "trained epochs"]]
    for name, file in experiment.config.recommenders.items():
        trainings = trainings_of([arm for arm in experiment.arms if arm.recommender == name])
        found = [files.read_json(files.join(train.output, schema.METRICS)) for train in trainings]
        epochs = [[metrics[field] for metrics in found] for field in ("best_epoch", "epochs")]
        spans = [f"{min(values)} to {max(values)}" for values in epochs]
        rows.append([name, file, experiment.config.protocol[name], str(len(trainings)), *spans])
    return markdown_rows(rows)


def metric_table(experiment: Experiment, protocol: str, ranking_of: Mapping[str, str]) -> str:
    """A row per recommender and metric: base, refined arms, improvements, and the paper's under its protocols."""
    labels = refined_labels(experiment.config)
    head = ["base", *labels, *(["improvement"] if len(labels) == 1 else [f"improvement, {one}" for one in labels])]
    papers = [f"paper: {name}" for name in head] if protocol == PAPER else []
    rows = [["recommender", "metric", *head, *papers]]
    for recommender, ranking in ranking_of.items():
        for place, metric in enumerate(METRICS):
            arms = experiment.comparison["arms"]
            found = [pair_cells(arms, f"{recommender} {label}", ranking, metric) for label in labels]
            cells = [found[0].base, *(one.refined for one in found), *(one.improvement for one in found)]
            if protocol == PAPER:
                numbers = [experiment.paper.get((recommender, label, metric), UNKNOWN) for label in labels]
                cells += [numbers[0].base, *(one.refined for one in numbers)]
                cells += [f"{float(one.improvement):+.2f}%" if one.improvement else "" for one in numbers]
            rows.append(["" if place else recommender, metric_name(metric), *cells])
    return markdown_rows(rows)


def arm_table(experiment: Experiment, ranking_of: Mapping[str, str]) -> str:
    """A row per arm, the extra arms included: gains over the base, and over its twin where it has one."""
    over_base, over_twin = ([f"{metric_name(metric)} over {one}" for metric in ARM_METRICS] for one in ("base", "it"))
    rows = [["recommender", "arm", metric_name(ARM_METRICS[-1]), *over_base, "its twin", *over_twin]]
    twins = twins_of(experiment.config)
    for recommender, ranking in ranking_of.items():
        for arm in compared_arms(experiment, recommender):
            mean = mean_of(experiment, arm.name, ranking, ARM_METRICS[-1])
            cells = [f"{mean:.4f}", *gain_cells(experiment.comparison, arm.name, ranking)]
            if arm.name in twins:
                twin = twins[arm.name].removeprefix(f"{recommender} ")
                cells += [twin, *gain_cells(experiment.twin_comparison, arm.name, ranking)]
            rows.append([recommender, arm.label, *cells, *[""] * (len(rows[0]) - 2 - len(cells))])
    return markdown_rows(rows)


def gain_cells(comparison: Mapping[str, Any], arm: str, ranking: str) -> list[str]:
    gains = comparison["arms"][arm]["against_base"][ranking]
    return [gain_text(gains[metric]) for metric in ARM_METRICS]


def mean_of(experiment: Experiment, arm: str, ranking: str, metric: str) -> float:
    return experiment.comparison["arms"][arm]["metrics"][ranking][metric]["mean"]


def reference_table(experiment: Experiment, ranking_of: Mapping[str, str]) -> str:
    """Popularity and chance among each of the protocol's candidates."""
    rows = [["candidates", "reference", *map(metric_name, ARM_METRICS)]]
    for ranking in dict.fromkeys(ranking_of.values()):
        for name, arm in experiment.comparison["arms"].items():
            if arm["is_reference"] and ranking in arm["metrics"]:
                means = [mean_of(experiment, name, ranking, metric) for metric in ARM_METRICS]
                rows.append([ranking, name, *(f"{mean:.4f}" for mean in means)])
    return markdown_rows(rows) if len(rows) > 1 else ""


def point_table(experiment: Experiment, protocol: str, ranking_of: Mapping[str, str]) -> str:
    """A row per point of the curves, and the point that the paper's table holds."""
    name = experiment.config.experiment
    rows = [["recommender", "curve", VALUE_NAMES[name], *map(figure_metric_name, FIGURE_METRICS)]]
    for recommender, ranking in ranking_of.items():
        for arm in compared_arms(experiment, recommender):
            cells = [point_text(name, gain_of(experiment, arm, ranking, metric)) for metric in FIGURE_METRICS]
            rows.append([recommender, arm.curve, f"{arm.value:g}", *cells])
        found = [paper_value(experiment, recommender, metric) for metric in FIGURE_METRICS]
        if protocol == PAPER and None not in found:
            cells = [f"{one:.3f}" if name == "figure-4" else f"{one:+.2f}%" for one in found]
            rows.append([recommender, "the paper's table", f"{PAPER_VALUES[name]:g}", *cells])
    return markdown_rows(rows)


def point_text(experiment: str, gain: Mapping[str, Any]) -> str:
    if experiment != "figure-4" or gain["relative_low"] is None:
        return gain_text(gain)
    value, low, high = figure_value(experiment, gain)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]{gain_mark(gain)}"


# --- points of figures --------------------------------------------------------------------------


def gain_of(experiment: Experiment, arm: Arm, ranking: str, metric: str) -> Mapping[str, Any]:
    return experiment.comparison["arms"][arm.name]["against_base"][ranking][metric]


def figure_metric_name(metric: str) -> str:
    """NDCG@1 is Recall@1, with one target per user."""
    return "NDCG@1" if metric == "recall_at_1" else metric_name(metric)


def figure_value(experiment: str, gain: Mapping[str, Any]) -> tuple[float, float, float]:
    """A point with its interval: percent over the base; in figure-4 a ratio to the refined arm; NaN where unknown."""
    found = [gain[name] for name in ("relative", "relative_low", "relative_high")]
    value, low, high = (math.nan if one is None else one for one in found)
    return (1 + value / 100, 1 + low / 100, 1 + high / 100) if experiment == "figure-4" else (value, low, high)


def paper_value(experiment: Experiment, recommender: str, metric: str) -> float | None:
    """The point of the paper's curve that its table holds; the text that we work from has no numbers of figures."""
    numbers = experiment.paper.get((recommender, "refined", metric))
    if numbers is None:
        return None
    if experiment.config.experiment == "figure-4":
        return float(numbers.base) / float(numbers.refined)
    return float(numbers.improvement)


def figure_file(experiment: str, protocol: str) -> str:
    """Name without its extension."""
    return experiment if protocol == PAPER else f"{experiment}-{protocol}"


# --- CSV and LaTeX ------------------------------------------------------------------------------


def csv_text(experiment: Experiment) -> str:
    """One line per protocol, arm and metric, unrounded, with the paper's numbers as printed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["protocol", "candidates", "recommender", "arm", "base", "curve", "value", "metric", "mean", "base_mean"]
    writer.writerow([*head, *GAIN_NAMES, "each_run", *(f"paper_{name}" for name in PaperNumbers._fields)])
    for protocol, ranking_of in protocols(experiment.config).items():
        paper = experiment.paper if protocol == PAPER else {}
        for recommender, ranking in ranking_of.items():
            for arm in compared_arms(experiment, recommender):
                for metric in METRICS:
                    means = [mean_of(experiment, name, ranking, metric) for name in (arm.name, arm.base)]
                    gain = gain_of(experiment, arm, ranking, metric)
                    names = [protocol, ranking, recommender, arm.name, arm.base, arm.curve, arm.value, metric]
                    cells = [*(gain[one] for one in GAIN_NAMES), each_run_cell(gain)]
                    writer.writerow([*names, *means, *cells, *paper.get((recommender, arm.label, metric), UNKNOWN)])
    return file.getvalue()


def latex_text(experiment: Experiment) -> str:
    """The table under the paper's protocols, which its columns name; comparison/table.tex has the single ones."""
    arms, pairs = experiment.comparison["arms"], []
    for recommender, ranking in protocols(experiment.config)[PAPER].items():
        for arm in compared_arms(experiment, recommender):
            cells = [pair_cells(arms, arm.name, ranking, metric) for metric in METRICS]
            pairs.append(Pair(arm.name, arm.base, f"candidates: {ranking}", cells))
    stamp = experiment.comparison["protocol"]
    note = f" Protocol: {stamp_text(stamp)}." if stamp else ""
    table = latex_of_pairs("as named in the columns", pairs, note, mark_notes(experiment.comparison))
    return "% \\usepackage{booktabs}\n" + table
