"""An experiment's comparison beside the paper's numbers: Markdown, CSV, and LaTeX with the paper's columns.

Each is written under the paper's protocols (its GRU4Rec rows rank the whole catalogue, its SASRec and BERT4Rec rows
sampled candidates) and under every single one of them.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import fsspec

from raygr import files, runs, schema
from raygr.compare.comparison import ArmGain, Comparison
from raygr.compare.gain_words import gain_mark, gain_text, mark_notes, table_notes
from raygr.compare.tables import (
    GAIN_NAMES,
    Pair,
    gain_cells,
    latex_of_pairs,
    markdown_rows,
    pair_cells,
    stamp_lines,
    stamp_text,
)
from raygr.config import ConfigError
from raygr.metrics.ranking import METRICS, metric_name
from raygr.reproduce.config import ReproduceConfig
from raygr.reproduce.costs import ScoringCost
from raygr.reproduce.experiments import Arm, Plan, Sources, candidate_sets, compared_arms, points_of, trainings_of

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
"""Where a figure's curves meet the paper's table: its refined arm, or, in figure-4, its base."""
PAPER_FIELDS = ["recommender", "arm", "metric", "base", "refined", "improvement"]


class PaperNumbers(NamedTuple):
    """As printed; the improvement in percent."""

    base: str
    refined: str
    improvement: str


UNKNOWN = PaperNumbers("", "", "")
Paper = Mapping[tuple[str, str, str], PaperNumbers]
"""By recommender, arm and metric."""


class Experiment(NamedTuple):
    """All that its table or figure is made from."""

    config: ReproduceConfig
    sources: Sources
    plan: Plan
    comparison: Comparison
    twins: Mapping[str, str]
    """Arm -> the arm that it is compared with besides its base."""
    twin_comparison: Comparison | None
    """Of these; None without any."""
    paper: Paper
    costs: Sequence[ScoringCost]
    """figure-3: of the item scores by guided dimension, where they are a score run."""


class Protocol(NamedTuple):
    """Which candidates each recommender's rows rank."""

    name: str
    ranking_of: Mapping[str, str]
    is_papers: bool


def read_paper(path: str) -> Paper:
    """The CSV of the paper's numbers; ConfigError where it is none."""
    if not files.exists(path):
        raise ConfigError(f"paper: {path}: no such file")
    with fsspec.open(path, "r", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != PAPER_FIELDS:
            raise ConfigError(f"paper: {path} has the columns {reader.fieldnames}, expected {PAPER_FIELDS}")
        return {
            (row["recommender"], row["arm"], row["metric"]): PaperNumbers(
                row["base"], row["refined"], row["improvement"]
            )
            for row in reader
        }


def protocols(config: ReproduceConfig) -> list[Protocol]:
    """The paper's, and each single one; once, where they are the same."""
    papers = {name: config.protocol[name] for name in config.recommenders}
    singles = {name: dict.fromkeys(config.recommenders, name) for name in candidate_sets(config)}
    others = [Protocol(name, found, False) for name, found in singles.items() if found != papers]
    return [Protocol("paper", papers, True), *others]


# --- Markdown -----------------------------------------------------------------------------------


def markdown_text(experiment: Experiment) -> str:
    """What was run on what, then a table per protocol, the paper's first."""
    config, comparison = experiment.config, experiment.comparison
    parts = [f"# {TITLES[config.experiment]}\n", setting_text(experiment), run_table(experiment)]
    for protocol in protocols(config):
        title = "The paper's protocols" if protocol.is_papers else f"One protocol: {protocol.name}"
        parts += [f"## {title}\n", protocol_text(experiment, protocol)]
    if experiment.costs:
        parts.append(cost_table(experiment))
    parts += [f"{text}\n" for text in comparison.remarks]
    notes = " ".join(note.replace("*", "\\*") for note in table_notes(comparison))
    parts.append(
        "Gains are of unrounded means, with 95% intervals over users and runs. Each run's own gains, cold-start "
        f"targets and lists: comparison/table.md. {notes}\n"
    )
    return "\n".join([*parts, *stamp_lines(comparison)])


def setting_text(experiment: Experiment) -> str:
    config, sources = experiment.config, experiment.sources
    records = [runs.read_run(train.output, job="train") for train in trainings_of(experiment.plan)]
    counts, seconds = records[0]["counts"], sum(record["seconds"] for record in records)
    users = " and ".join(filter(None, (sources.user_scores, sources.classification_scores)))
    return (
        f"{counts['interactions']:,} interactions with {counts['items']:,} items ({sources.data}), "
        f"{counts['test_targets']:,} test targets; item scores: {sources.item_scores}; user scores: {users}. "
        f"{len(records)} train runs, seeds {', '.join(map(str, config.seeds))}, {seconds:.0f} s. "
        f"Refined: {stamp_text(config.refined)}. All runs: {stamp_text(config.train) or 'as in the files'}.\n"
    )


def run_table(experiment: Experiment) -> str:
    """Whether the epochs were enough: a best epoch that is the last one could have been followed by a better."""
    rows = [["recommender", "settings", "candidates in the paper", "runs", "best epoch", "trained epochs"]]
    for name, file in experiment.config.recommenders.items():
        trainings = trainings_of(experiment.plan, name)
        found = [files.read_json(files.join(train.output, schema.METRICS)) for train in trainings]
        spans = [span_text([metrics[field] for metrics in found]) for field in ("best_epoch", "epochs")]
        rows.append([name, file, experiment.config.protocol[name], str(len(trainings)), *spans])
    return markdown_rows(rows)


def span_text(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)}"


def protocol_text(experiment: Experiment, protocol: Protocol) -> str:
    if not experiment.plan.points:
        tables = [metric_table(experiment, protocol)]
        tables += [arm_table(experiment, protocol)] if experiment.config.extra_arms else []
        return "\n".join([*tables, reference_table(experiment, protocol)])
    file = figure_file(experiment.config, protocol)
    return f"![{TITLES[experiment.config.experiment]}]({file}.png)\n\n" + point_table(experiment, protocol)


def metric_table(experiment: Experiment, protocol: Protocol) -> str:
    """A row per recommender and metric: base, refined arms, improvements, and the paper's under its protocols."""
    further = experiment.config.extra_arms
    labels = list(dict.fromkeys(arm.label for arm in experiment.plan.arms if arm.base and arm.label not in further))
    head = ["base", *labels, *(["improvement"] if len(labels) == 1 else [f"improvement, {one}" for one in labels])]
    papers = [f"paper: {name}" for name in head] if protocol.is_papers else []
    rows = [["recommender", "metric", *head, *papers]]
    for recommender, ranking in protocol.ranking_of.items():
        arms = [arm for arm in compared_arms(experiment.plan, recommender) if arm.label not in further]
        for place, metric in enumerate(METRICS):
            found = [pair_cells(experiment.comparison.arms, arm.name, ranking, metric) for arm in arms]
            cells = [found[0].base, *(one.refined for one in found), *(one.improvement for one in found)]
            if protocol.is_papers:
                cells += paper_cells(experiment, arms, metric)
            rows.append(["" if place else recommender, metric_name(metric), *cells])
    return markdown_rows(rows)


def arm_table(experiment: Experiment, protocol: Protocol) -> str:
    """A row per arm, those of the configuration among them: gains over the base, and over its twin where it has one."""
    over_base = [f"{metric_name(metric)} over base" for metric in ARM_METRICS]
    rows = [["recommender", "arm", metric_name(ARM_METRICS[-1]), *over_base, "its twin", *over_twin_names()]]
    for recommender, ranking in protocol.ranking_of.items():
        for arm in compared_arms(experiment.plan, recommender):
            found = experiment.comparison.arms[arm.name]
            mean = found.metrics[ranking][ARM_METRICS[-1]].mean
            gains = [gain_text(found.against_base[ranking][metric]) for metric in ARM_METRICS]
            rows.append([recommender, arm.label, f"{mean:.4f}", *gains, *twin_cells(experiment, arm, ranking)])
    return markdown_rows(rows)


def reference_table(experiment: Experiment, protocol: Protocol) -> str:
    """Popularity and chance among each of the protocol's candidates."""
    references = {name: arm for name, arm in experiment.comparison.arms.items() if arm.is_reference}
    rows = [["candidates", "reference", *map(metric_name, ARM_METRICS)]]
    for ranking in dict.fromkeys(protocol.ranking_of.values()):
        for name, arm in references.items():
            if ranking in arm.metrics:
                means = [arm.metrics[ranking][metric].mean for metric in ARM_METRICS]
                rows.append([ranking, name, *(f"{mean:.4f}" for mean in means)])
    return markdown_rows(rows) if len(rows) > 1 else ""


def over_twin_names() -> list[str]:
    return [f"{metric_name(metric)} over it" for metric in ARM_METRICS]


def twin_cells(experiment: Experiment, arm: Arm, ranking: str) -> list[str]:
    twin = experiment.twins.get(arm.name)
    if twin is None:
        return [""] * (1 + len(ARM_METRICS))
    gains = experiment.twin_comparison.arms[arm.name].against_base[ranking]
    return [twin.removeprefix(f"{arm.recommender} "), *(gain_text(gains[metric]) for metric in ARM_METRICS)]


def paper_cells(experiment: Experiment, arms: Sequence[Arm], metric: str) -> list[str]:
    found = [experiment.paper.get((arm.recommender, arm.label, metric), UNKNOWN) for arm in arms]
    improvements = [f"{float(one.improvement):+.2f}%" if one.improvement else "" for one in found]
    return [found[0].base, *(one.refined for one in found), *improvements]


def point_table(experiment: Experiment, protocol: Protocol) -> str:
    """A row per point of the curves, and the paper's table where it is a point of them."""
    config, arms = experiment.config, experiment.comparison.arms
    rows = [["recommender", "curve", VALUE_NAMES[config.experiment], *map(figure_metric_name, FIGURE_METRICS)]]
    for recommender, ranking in protocol.ranking_of.items():
        for point in points_of(experiment.plan, recommender):
            gains = [arms[point.arm].against_base[ranking][metric] for metric in FIGURE_METRICS]
            cells = [point_text(config, gain) for gain in gains]
            rows.append([recommender, point.curve, f"{point.value:g}", *cells])
        found = [paper_value(experiment, recommender, metric) for metric in FIGURE_METRICS]
        if protocol.is_papers and None not in found:
            cells = [f"{one:.3f}" if config.experiment == "figure-4" else f"{one:+.2f}%" for one in found]
            rows.append([recommender, "the paper's table", f"{PAPER_VALUES[config.experiment]:g}", *cells])
    return markdown_rows(rows)


def point_text(config: ReproduceConfig, gain: ArmGain) -> str:
    if config.experiment != "figure-4" or gain.relative_low is None:
        return gain_text(gain)
    value, low, high = figure_value(config, gain)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]{gain_mark(gain)}"


def cost_table(experiment: Experiment) -> str:
    rows = [["guided dimension", "tokens of a subject", "computed with a prefix cache", "seconds"]]
    for cost in experiment.costs:
        seconds = "" if cost.seconds is None else f"{cost.seconds:.3f}"
        rows.append([str(cost.aspects), f"{cost.tokens:.0f}", f"{cost.computed:.0f}", seconds])
    text = (
        f"Scoring one item ({experiment.sources.item_scores}): tokens counted with the first aspects alone; seconds "
        "are the run's, on all aspects, in proportion to the tokens computed\n\n"
    )
    return text + markdown_rows(rows)


# --- points of figures --------------------------------------------------------------------------


def figure_metric_name(metric: str) -> str:
    """NDCG@1 is Recall@1, with one target per user."""
    return "NDCG@1" if metric == "recall_at_1" else metric_name(metric)


def figure_value(config: ReproduceConfig, gain: ArmGain) -> tuple[float, float, float]:
    """A point with its interval: percent over the base; in figure-4 a ratio to the refined arm; NaN where unknown."""
    found = [math.nan if one is None else one for one in (gain.relative, gain.relative_low, gain.relative_high)]
    return tuple(1 + one / 100 for one in found) if config.experiment == "figure-4" else tuple(found)


def paper_value(experiment: Experiment, recommender: str, metric: str) -> float | None:
    """The point of the paper's curve that its table holds; its figures' own numbers are not in its text."""
    numbers = experiment.paper.get((recommender, "refined", metric))
    if numbers is None:
        return None
    if experiment.config.experiment == "figure-4":
        return float(numbers.base) / float(numbers.refined)
    return float(numbers.improvement)


def figure_file(config: ReproduceConfig, protocol: Protocol) -> str:
    """Without its ending."""
    return config.experiment if protocol.is_papers else f"{config.experiment}-{protocol.name}"


# --- CSV and LaTeX ------------------------------------------------------------------------------


def csv_text(experiment: Experiment) -> str:
    """One line per protocol, arm and metric, unrounded, with the paper's numbers as printed."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["protocol", "candidates", "recommender", "arm", "base", "curve", "value", "metric", "mean", "base_mean"]
    writer.writerow([*head, *GAIN_NAMES, "each_run", *(f"paper_{name}" for name in PaperNumbers._fields)])
    arms = experiment.comparison.arms
    for protocol in protocols(experiment.config):
        for recommender, ranking in protocol.ranking_of.items():
            for name, label, curve, value in csv_groups(experiment.plan, recommender):
                base = arms[name].base
                for metric in METRICS:
                    means = [arms[one].metrics[ranking][metric].mean for one in (name, base)]
                    gain = arms[name].against_base[ranking][metric]
                    paper = experiment.paper.get((recommender, label, metric)) if protocol.is_papers else None
                    names = [protocol.name, ranking, recommender, name, base, curve, value, metric]
                    cells = gain_cells(gain)
                    writer.writerow([*names, *means, *cells, *(paper or UNKNOWN)])
    return file.getvalue()


def csv_groups(plan: Plan, recommender: str) -> Iterable[tuple[str, str, str, float | str]]:
    """(arm, its label in the paper's numbers, curve, value): the points of a figure, or the arms of a table."""
    for point in points_of(plan, recommender):
        yield point.arm, "", point.curve, point.value
    for arm in [] if plan.points else compared_arms(plan, recommender):
        yield arm.name, arm.label, "", ""


def latex_text(experiment: Experiment) -> str:
    """The table under the paper's protocols, which its columns name; comparison/table.tex has the single ones."""
    [protocol, *_] = protocols(experiment.config)
    arms, pairs = experiment.comparison.arms, []
    for recommender, ranking in protocol.ranking_of.items():
        for arm in compared_arms(experiment.plan, recommender):
            cells = [pair_cells(arms, arm.name, ranking, metric) for metric in METRICS]
            pairs.append(Pair(arm.name, arm.base, f"candidates: {ranking}", cells))
    stamp = experiment.comparison.protocol
    note = f" Protocol: {stamp_text(stamp)}." if stamp else ""
    return "% \\usepackage{booktabs}\n" + latex_of_pairs(
        "as named in the columns", pairs, note, mark_notes(experiment.comparison)
    )
