"""What a report says: finished runs -> sections of tables and charts, the same for the page and for Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from raygr.figures import Interval, agreement_chart, gain_chart, profile_chart, share_chart
from raygr.report_scores import Agreement, ScoreMatrix

METRICS = (
    *("mrr", "recall_at_1", "recall_at_5", "recall_at_10", "recall_at_20"),
    *("ndcg_at_5", "ndcg_at_10", "ndcg_at_20"),
)
CHARTED_METRIC = "ndcg_at_10"
NOTHING = "–"


class Table(NamedTuple):
    """Rows of text; a line break inside a cell is kept. The first cell of a row names it."""

    caption: str
    header: list[str]
    rows: list[list[str]]


class Chart(NamedTuple):
    """A figure for the page; its numbers stand in a table too, for Markdown and for readers who hear the page."""

    caption: str
    svg: Markup


class Section(NamedTuple):
    title: str
    text: str
    tables: list[Table]
    charts: list[Chart]


class Subject(NamedTuple):
    """An item or user that is drawn."""

    name: str
    note: str
    scores_A: np.ndarray


def data_section(statistics: Mapping[str, Any], counts: Mapping[str, Any]) -> Section:
    tables = [fact_table("What the data holds", statistics), fact_table("Rows in and out, by reason", counts)]
    return Section("Data", "", [table for table in tables if table.rows], [])


def comparison_section(comparison: Mapping[str, Any]) -> Section:
    """Metrics per arm with gains over the base arm, one table per candidate set, and where the scores come from."""
    arms, base = comparison["arms"], comparison["base"]
    candidate_sets = list(arms[base]["metrics"])
    tables = [metric_table(arms, base, candidates) for candidates in candidate_sets]
    tables += [share_table(arms)] if any(arm["shares"] for arm in arms.values()) else []
    tables += [settings_table(arms), fact_table("Protocol", comparison["protocol"])]
    text = (
        f"Below each value stands its gain over “{base}” in percent, with the 95% interval of a paired "
        "bootstrap; an asterisk marks an interval without zero."
    )
    return Section("Comparison", text, tables, comparison_charts(arms, base, candidate_sets[0]))


def metric_table(arms: Mapping[str, Any], base: str, candidates: str) -> Table:
    metrics = [name for name in METRICS if name in arms[base]["metrics"][candidates]]
    rows = [[name, *(metric_cell(arm, candidates, metric) for metric in metrics)] for name, arm in arms.items()]
    return Table(f"Metrics, candidates: {candidates}", ["arm", *map(metric_name, metrics)], rows)


def metric_cell(arm: Mapping[str, Any], candidates: str, metric: str) -> str:
    value = f"{arm['metrics'][candidates][metric]['mean']:.4f}"
    gain = (arm["against_base"] or {}).get(candidates, {}).get(metric)
    if gain is None or gain["relative"] is None:
        return value
    mark = "*" if gain["low"] > 0 or gain["high"] < 0 else ""
    return f"{value}\n{gain['relative']:+.1f}%{mark}\n({gain['relative_low']:+.1f} to {gain['relative_high']:+.1f})"


def metric_name(metric: str) -> str:
    name, _, cutoff = metric.partition("_at_")
    words = name.capitalize() if name == "recall" else name.upper()
    return f"{words}@{cutoff}" if cutoff else words


def comparison_charts(arms: Mapping[str, Any], base: str, candidates: str) -> list[Chart]:
    """The chart of gains and the chart of shares; either is left out where no arm has any."""
    gains = list(gain_intervals(arms, candidates))
    shares = {name: arm["shares"] for name, arm in arms.items() if arm["shares"]}
    axis = f"{metric_name(CHARTED_METRIC)} against {base}, %"
    caption = f"Gain in {metric_name(CHARTED_METRIC)} over “{base}” ({candidates}), with 95% intervals"
    share_caption = "Where the spread of a recommendation's score comes from"
    charts = []
    if gains:
        charts.append(Chart(caption, gain_chart(gains, figure_id="gains", label=caption, axis=axis)))
    if shares:
        charts.append(Chart(share_caption, share_chart(shares, figure_id="shares", label=share_caption)))
    return charts


def gain_intervals(arms: Mapping[str, Any], candidates: str) -> Iterable[Interval]:
    for name, arm in arms.items():
        gain = (arm["against_base"] or {}).get(candidates, {}).get(CHARTED_METRIC)
        if gain is not None and gain["relative"] is not None:
            yield Interval(name, gain["relative"], gain["relative_low"], gain["relative_high"])


def share_table(arms: Mapping[str, Any]) -> Table:
    header = ["arm", "base part", "encoder × guided items", "user × guided items"]
    parts = ("base", "encoder_guided", "user_guided")
    rows = [[name, *(f"{arm['shares'][part]:.1%}" for part in parts)] for name, arm in arms.items() if arm["shares"]]
    return Table("Where the spread of a recommendation's score comes from", header, rows)


def settings_table(arms: Mapping[str, Any]) -> Table:
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm["settings"]))
    rows = [
        [name, *(show(arm["settings"].get(n)) for n in names), show(arm["parameters"]), show(len(arm["runs"]))]
        for name, arm in arms.items()
    ]
    return Table("Settings of the arms", ["arm", *(n.replace("_", " ") for n in names), "parameters", "runs"], rows)


def quality_section(quality: Mapping[str, Any], subjects: str) -> Section:
    """How many subjects were read, and whether each aspect tells them apart. `subjects` is item or user."""
    whole = {name: value for name, value in quality.items() if name != "aspects"}
    header = ["aspect", "mean", "spread", "identical", "dead"]
    rows = [
        [name, decimals(a["mean"]), decimals(a["spread"]), percent(a["identical_share"]), show(a["dead"])]
        for name, a in quality["aspects"].items()
    ]
    text = "A dead aspect gives all subjects nearly the same score, so it can tell none of them apart."
    tables = [fact_table("Run", whole), Table("Scores per aspect, on 1 to 10", header, rows)]
    return Section(f"Quality of the {subjects} scores", text, tables, [])


def agreement_section(agreements: Sequence[Agreement], reference: str) -> Section:
    """Our item scores beside another model's, aspect by aspect."""
    title, caption = "Agreement with reference scores", "Rank correlation per aspect"
    if not agreements:
        return Section(title, f"{reference} shares no aspect with the item scores.", [], [])
    rows = [[a.aspect, signed(a.correlation), show(a.items)] for a in agreements]
    known = {a.aspect: a.correlation for a in agreements if a.correlation is not None}
    label = f"{caption}, from {min(known.values(), default=0):.2f} to {max(known.values(), default=0):.2f}"
    charts = [Chart(caption, agreement_chart(known, figure_id="agreement", label=label))] if known else []
    text = f"Spearman's correlation over the items that {reference} scores too: 1 is the same order, 0 is none."
    return Section(title, text, [Table(caption, ["aspect", "correlation", "items"], rows)], charts)


def subject_section(title: str, text: str, subjects: Sequence[Subject], matrix: ScoreMatrix) -> Section:
    """The subjects' scores beside the average over all subjects of `matrix`."""
    averages_A = np.nanmean(matrix.scores_SA, axis=0)
    charts = [
        Chart(f"{subject.name}: {subject.note}", subject_chart(subject, matrix.aspects, averages_A, figure_id))
        for subject, figure_id in zip(subjects, figure_ids(title, len(subjects)), strict=True)
    ]
    rows = [
        [aspect, *(f"{s.scores_A[column]:.1f}" for s in subjects), f"{averages_A[column]:.1f}"]
        for column, aspect in enumerate(matrix.aspects)
    ]
    table = Table("Scores, on 1 to 10", ["aspect", *(s.name for s in subjects), "average of all"], rows)
    return Section(title, text, [table], charts)


def subject_chart(subject: Subject, aspects: list[str], averages_A: np.ndarray, figure_id: str) -> Markup:
    label = f"Scores of {subject.name} from 1 to 10, beside the average; the numbers are in the table"
    return profile_chart(aspects, list(subject.scores_A), list(averages_A), figure_id=figure_id, label=label)


def figure_ids(title: str, number: int) -> list[str]:
    return [f"{title.lower().replace(' ', '-')}-{position}" for position in range(number)]


def fact_table(caption: str, facts: Mapping[str, Any]) -> Table:
    """Nested facts as rows of name and value, the names joined by a dot."""
    rows = [[name.replace("_", " "), show(value)] for name, value in flat_facts(facts)]
    return Table(caption, ["name", "value"], rows)


def flat_facts(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from ((f"{name} · {inner}", fact) for inner, fact in flat_facts(value))
        else:
            yield name, value


def show(value: Any) -> str:
    """A value in words: 12,345, 0.1235, yes, and a dash for none."""
    match value:
        case None | "":
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(show, value)) or NOTHING
        case _:
            return str(value)


def signed(correlation: float | None) -> str:
    return NOTHING if correlation is None else f"{round(correlation, 2) + 0.0:+.2f}"  # no -0.00


def decimals(score: float | None) -> str:
    return NOTHING if score is None else f"{score:.2f}"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"
