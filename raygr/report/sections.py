"""The sections of a report: text, tables and charts, which the page and the Markdown file both print."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from raygr.compare.comparison import Comparison
from raygr.compare.gain_words import table_notes
from raygr.compare.tables import (
    NOTHING,
    Arms,
    Table,
    count_table,
    count_words,
    list_table,
    metric_table,
    ranking_names,
    way_table,
)
from raygr.metrics.ranking import metric_name
from raygr.report.charts import (
    Interval,
    Panel,
    agreement_chart,
    correlation_map,
    gain_chart,
    panel_chart,
    profile_chart,
    share_chart,
)
from raygr.report.scored_subjects import Agreement, ScoreMatrix, Subject
from raygr.schema import CALIBRATED, NEW_ITEMS, WHOLE
from raygr.score.quality import DEAD_SHARE, DEAD_SPREAD, AspectQuality

LEAST_REACH = 0.5  # points of a profile's axis
SHOWN_PAIRS = 5


class Chart(NamedTuple):
    """A figure of the page. A table has the same numbers, for Markdown and for screen readers."""

    caption: str
    svg: Markup


class Section(NamedTuple):
    """A heading with its text, remarks, charts and tables."""

    title: str
    text: str
    tables: list[Table]
    charts: list[Chart]
    remarks: Sequence[str] = ()
    """Warnings: they head the report, too."""
    appendix: Sequence[Table] = ()
    """Tables that the page folds at its end: settings, protocols and counts."""
    live: Mapping[str, Any] | None = None
    """The data of lists that the page ranks again; they take the place of the tables where scripts run."""


def comparison_section(comparison: Comparison) -> Section:
    """The arms' metrics with gains over their bases, lists, score shares, settings and protocols."""
    arms = comparison.arms
    rankings = [name for name in ranking_names(arms) if not has_new_items(name)]
    tables = [metric_table(comparison, ranking) for ranking in rankings]
    tables += [way_table(comparison, ranking) for ranking in rankings]
    tables += [metric_table(comparison, ranking, cold=True) for ranking in rankings]
    tables += [count_table(comparison, ranking) for ranking in rankings]
    tables += [list_table(arms), share_table(arms)]
    text = (
        f"Below each value stands its gain over {base_words(arms)} in percent, with its 95% interval over users, and "
        "over runs where there are two or more."
    )
    charts = comparison_charts(arms, rankings[0], comparison.primary_metric)
    return Section(
        "Comparison",
        " ".join([text, *table_notes(comparison)]),
        [table for table in tables if table.rows],
        charts,
        comparison.remarks,
        [settings_table(arms), *protocol_tables(comparison)],
    )


def new_items_section(comparison: Comparison) -> Section | None:
    """The rankings of items that training does not know; None where no arm has any."""
    rankings = [name for name in ranking_names(comparison.arms) if has_new_items(name)]
    if not rankings:
        return None
    metric = metric_name(comparison.primary_metric)
    caption = f"Gain in {metric} over {base_words(comparison.arms)} ({rankings[0]}), with 95% intervals"
    gains = list(gain_intervals(comparison.arms, rankings[0], comparison.primary_metric))
    axis = f"{metric} against the base, %"
    charts = [Chart(caption, gain_chart(gains, figure_id="new-items", label=caption, axis=axis))] if gains else []
    text = (
        f"Items that training does not know have no learned part, so their item scores alone rank them. “{NEW_ITEMS}” "
        f"ranks them among themselves, “{WHOLE}” among all items; “{CALIBRATED}” adds the offset that makes their "
        "scores comparable with the others. Rankings without “new targets” are of the ordinary targets, and show what "
        "new items cost them."
    )
    return Section("New items", text, [metric_table(comparison, name) for name in rankings], charts)


def has_new_items(ranking: str) -> bool:
    return ranking.split(",")[0] in (NEW_ITEMS, WHOLE, CALIBRATED)


def base_words(arms: Arms) -> str:
    bases = list(dict.fromkeys(arm.base for arm in arms.values() if arm.base))
    return f"“{bases[0]}”" if len(bases) == 1 else "the arm's own base (see the appendix)"


def protocol_tables(comparison: Comparison) -> list[Table]:
    if comparison.protocol is not None:
        return [fact_table("Protocol", comparison.protocol)]
    arms = {name: arm for name, arm in comparison.arms.items() if not arm.is_reference}
    return [fact_table(f"Protocol of {name}", arm.protocol) for name, arm in arms.items()]


def comparison_charts(arms: Arms, ranking: str, metric: str) -> list[Chart]:
    """Gains over the base, in all and by train count, shares of the way to the truth and of the scores' spread.

    A chart is left out where no arm has its values.
    """
    gains = list(gain_intervals(arms, ranking, metric))
    shares = {name: arm.shares for name, arm in arms.items() if arm.shares}
    axis = f"{metric_name(metric)} against the base, %"
    caption = f"Gain in {metric_name(metric)} over {base_words(arms)} ({ranking}), with 95% intervals"
    share_caption = "Where the spread of a recommendation's score comes from"
    charts = []
    if gains:
        charts.append(Chart(caption, gain_chart(gains, figure_id="gains", label=caption, axis=axis)))
    ways = list(way_intervals(arms, ranking, metric))
    if ways:
        way_words = f"Share of the way from {base_words(arms)} to the truth in {metric_name(metric)}"
        way_caption = f"{way_words} ({ranking}), with 95% intervals"
        axis = "0 is the base, 100 the truth, %"
        charts.append(Chart(way_caption, gain_chart(ways, figure_id="ways", label=way_caption, axis=axis)))
    if shares:
        charts.append(Chart(share_caption, share_chart(shares, figure_id="shares", label=share_caption)))
    panels = list(count_panels(arms, ranking))
    if panels:
        count_caption = (
            f"Gain in {metric_name(metric)} over {base_words(arms)} ({ranking}) by how often the target was bought in "
            "training: groups of about equally many targets, with 95% intervals"
        )
        axis = "train interactions with the target item"
        charts.append(Chart(count_caption, panel_chart(panels, figure_id="counts", label=count_caption, axis=axis)))
    return charts


def gain_intervals(arms: Arms, ranking: str, metric: str) -> Iterable[Interval]:
    """Gains in percent; without popularity and chance, whose large losses would hide the arms' gains."""
    for name, arm in arms.items():
        gain = (arm.against_base or {}).get(ranking, {}).get(metric)
        if gain is None or arm.is_reference:
            continue
        value, low, high = gain.relative, gain.relative_low, gain.relative_high
        if value is not None and low is not None and high is not None:
            yield Interval(name, value, low, high)


def way_intervals(arms: Arms, ranking: str, metric: str) -> Iterable[Interval]:
    """Shares of the way to the truth in percent, of arms that were trained."""
    for name, arm in arms.items():
        way = arm.way_to_truth.get(ranking, {}).get(metric)
        if way is not None and way.low is not None and way.high is not None and not arm.is_reference:
            yield Interval(name, 100 * way.share, 100 * way.low, 100 * way.high)


def count_panels(arms: Arms, ranking: str) -> Iterable[Panel]:
    """Gains of each arm by train count of the target, without groups of one user, which have no interval."""
    for name, arm in arms.items():
        gains = {count_words(one): one.gain for one in arm.by_train_count.get(ranking, [])}
        bars = [
            Interval(words, gain.difference, gain.low, gain.high)
            for words, gain in gains.items()
            if gain.low is not None and gain.high is not None
        ]
        if bars:
            yield Panel(name, bars)


def share_table(arms: Arms) -> Table:
    """How the scores' spread splits up in the last product, and how far the base part depends on aspects, too."""
    header = ["arm", "base part", "encoder × guided items", "user × guided items", "base part moves by"]
    parts = ("base", "encoder_guided", "user_guided")
    rows = [
        [name, *(f"{arm.shares[part]:.1%}" for part in parts), percent(arm.base_moved)]
        for name, arm in arms.items()
        if arm.shares
    ]
    caption = (
        "Where the spread of a recommendation's score comes from: an exact split of its last product, not of causes. "
        "The encoder reads the history's aspects; with all of them at the catalogue's mean, the base part moves by the "
        "last column's share of its own spread"
    )
    return Table(caption, header, rows)


def settings_table(arms: Arms) -> Table:
    arms = {name: arm for name, arm in arms.items() if not arm.is_reference}
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm.settings))
    rows = []
    for name, arm in arms.items():
        values = [arm.base, *(arm.settings.get(setting) for setting in names), arm.parameters, len(arm.runs)]
        rows.append([name, *map(show, values)])
    header = ["arm", "base", *(setting.replace("_", " ") for setting in names), "parameters", "runs"]
    return Table("Settings of the arms", header, rows)


def quality_section(facts: Mapping[str, Any], aspects: Mapping[str, AspectQuality], subjects: str) -> Section:
    """How many subjects have scores, and how well each aspect separates them. `subjects` is `item` or `user`."""
    header = ["aspect", "mean", "spread", "identical", "dead"]
    rows = [
        [name, decimals(aspect.mean), decimals(aspect.spread), percent(aspect.identical_share), show(aspect.dead)]
        for name, aspect in aspects.items()
    ]
    text = (
        "A dead aspect gives all subjects nearly the same score, so it tells none of them apart: its expected ratings "
        f"spread by less than {DEAD_SPREAD:g}, or {DEAD_SHARE:.0%} or more of the integer ratings are the same."
    )
    dead = [name for name, aspect in aspects.items() if aspect.dead]
    remarks = []
    if dead:
        named = ", ".join(dead)
        remarks.append(f"{len(dead)} of {len(aspects)} aspects of the {subjects} scores are dead: {named}.")
    if facts.get("valid_share", 1) < 1:
        remarks.append(
            f"{1 - facts['valid_share']:.1%} of the {subjects}s have no scores; the reasons are in the appendix."
        )
    tables = [Table("Scores per aspect, on 1 to 10", header, rows)]
    title = f"Quality of the {subjects} scores"
    return Section(title, text, tables, [], remarks, [fact_table("Score run", facts)])


def agreement_section(agreements: Sequence[Agreement], reference: str, *, taught: int = 0) -> Section:
    """The rank correlation of our item scores with another model's, per aspect; `taught` items taught the LLM."""
    title, caption = "Agreement with reference scores", "Rank correlation per aspect"
    title += f", taught by {taught} items" if taught else ""
    if not agreements:
        return Section(title, f"{reference} shares no aspect with the item scores.", [], [])
    known = {a.aspect: a.correlation for a in agreements if a.correlation is not None}
    # no -0.00
    values = {aspect: f"{round(correlation, 2) + 0.0:+.2f}" for aspect, correlation in known.items()}
    rows = [[a.aspect, values.get(a.aspect, NOTHING), show(a.items)] for a in agreements]
    label = f"{caption}, from {min(known.values(), default=0):.2f} to {max(known.values(), default=0):.2f}"
    figure_id = "agreement-taught" if taught else "agreement"
    charts = [Chart(caption, agreement_chart(known, figure_id=figure_id, label=label))] if known else []
    text = f"Spearman's correlation over the items that {reference} scores too: 1 is the same order, 0 is none."
    text += f" Its mean over aspects is {sum(known.values()) / len(known):+.2f}." if known else ""
    text += " Items that were taught are left out." if taught else ""
    return Section(title, text, [Table(caption, ["aspect", "correlation", "items"], rows)], charts)


def correlation_section(matrix: ScoreMatrix) -> Section:
    """Which aspects say the same of the items: a map of all pairs, and the strongest ones as a table."""
    names, spread_A = matrix.aspects, np.nanstd(matrix.scores_SA, axis=0)
    correlations_AA = np.full((len(names), len(names)), np.nan)
    varied = np.flatnonzero(spread_A > 0)
    correlations_AA[np.ix_(varied, varied)] = np.corrcoef(matrix.scores_SA[:, varied], rowvar=False)
    pairs = [(correlations_AA[row, column], column, row) for column in varied for row in varied if column < row]
    pairs.sort(key=lambda pair: -abs(pair[0]))
    rows = [[names[left], names[right], f"{value:+.2f}"] for value, left, right in pairs[:SHOWN_PAIRS]]
    caption = "Correlation of the item scores of two aspects"
    text = (
        "Aspects that correlate strongly say the same of the items, and one of them would do. The larger a square, the "
        "stronger the correlation; blue is positive, orange negative, and an aspect without spread has none."
    )
    svg = correlation_map(names, correlations_AA, figure_id="correlations", label=f"{caption}, as a map")
    table = Table("The strongest correlations", ["aspect", "with", "correlation"], rows)
    return Section("Aspects that go together", text, [table], [Chart(caption, svg)])


def subject_section(title: str, text: str, subjects: Sequence[Subject], matrix: ScoreMatrix) -> Section:
    """The subjects' scores beside the average over all subjects of `matrix`."""
    averages_A = np.nanmean(matrix.scores_SA, axis=0)
    differences = [subject.scores_A - averages_A for subject in subjects]
    # one scale for all, and never so fine that rounding looks like a profile
    reach = max(LEAST_REACH, 1.05 * np.nanmax(np.abs(differences)))
    charts = []
    for number, subject in enumerate(subjects):
        label = f"Scores of {subject.name}, as differences from the average; the numbers are in the table"
        figure_id = f"{title.lower().replace(' ', '-')}-{number}"
        svg = profile_chart(matrix.aspects, list(differences[number]), reach=reach, figure_id=figure_id, label=label)
        charts.append(Chart(f"{subject.name}: {subject.note}", svg))
    rows = [
        [aspect, *(f"{s.scores_A[column]:.1f}" for s in subjects), f"{averages_A[column]:.1f}"]
        for column, aspect in enumerate(matrix.aspects)
    ]
    table = Table("Scores, on 1 to 10", ["aspect", *(s.name for s in subjects), "average of all"], rows)
    return Section(title, text, [table], charts)


def fact_table(caption: str, facts: Mapping[str, Any]) -> Table:
    """A row per fact; the names of nested facts are joined by a dot."""
    rows = [[name.replace("_", " "), show(value)] for name, value in flat_facts(facts)]
    return Table(caption, ["name", "value"], rows)


def flat_facts(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from ((f"{name} · {inner}", fact) for inner, fact in flat_facts(value))
        else:
            yield name, value


def show(value: Any) -> str:
    """A value as text: 12,345 or 0.1235 or yes, and a dash for None."""
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


def decimals(score: float | None) -> str:
    return NOTHING if score is None else f"{score:.2f}"


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"
