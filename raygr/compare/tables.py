"""Tables of a comparison: table.md, table.csv, and table.tex with the columns of the paper's Tables 2 to 4.

The report shows the same tables as `Table` records.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from raygr.compare.comparison import ArmGain, ArmRecord, Comparison, CountGain, Gains, Metrics, Protocol
from raygr.compare.gain_words import gain_text, mark_notes, table_notes, way_text
from raygr.metrics.ranking import METRICS, metric_name

BRIEF_METRICS = ("ndcg_at_10", "recall_at_10", "mrr")
LIST_FIGURES = ("recall", "ndcg", "mmr", "intra_list_diversity")
GAIN_NAMES = ("difference", "low", "high", "relative", "relative_low", "relative_high", "p", "p_holm", "over")
WAY_NAMES = ("way_to_truth", "way_low", "way_high")
NOTHING = "–"

Arms = Mapping[str, ArmRecord]


class Table(NamedTuple):
    """Rows of text; a cell may have line breaks. The first cell of a row is its name."""

    caption: str
    header: list[str]
    rows: list[list[str]]


class Cells(NamedTuple):
    """One metric of an arm beside its base."""

    base: str
    refined: str
    improvement: str
    runs: str
    """Each run's own improvement, where there are several runs."""


class Pair(NamedTuple):
    """A group of columns: an arm beside its base."""

    name: str
    base: str
    stamp: str
    """The part of its protocol in which pairs differ."""
    cells: list[Cells]
    """One per metric, in the order of METRICS."""


# --- tables that the report shows, too ----------------------------------------------------------


def metric_table(comparison: Comparison, ranking: str, *, cold: bool = False, brief: bool = False) -> Table:
    """A row per arm: its metrics, each with its gain over the base arm. No rows without targets.

    `cold`: of the cold-start targets alone. `brief`: three metrics in one line each, and the arm's base, number of runs
    and number of parameters.
    """
    names = BRIEF_METRICS if brief else METRICS
    arms = {name: arm for name, arm in comparison.arms.items() if ranking in arm.metrics}
    rows = []
    for arm_name, arm in arms.items():
        metrics, gains = results_of(arm, ranking, cold=cold)
        size = ["", ""] if arm.is_reference else [str(len(arm.runs)), str(arm.parameters)]
        own = [arm.base or "", *size] if brief else []
        rows.append([arm_name, *own, *(metric_cell(name, metrics, gains, in_lines=not brief) for name in names)])
    header = ["arm", *(["base", "runs", "parameters"] if brief else []), *map(metric_name, names)]
    if not cold:
        return Table(f"Candidates: {ranking}; gains over the base arm with 95% intervals", header, rows)
    found = [arm.cold[ranking] for arm in arms.values()]
    caption = (
        f"Cold-start targets (fewer than {comparison.cold_below} train interactions), candidates: {ranking}: "
        f"{found[0].targets:,} targets of {found[0].users:,} users"
    )
    return Table(caption, header, rows if any(one.targets for one in found) else [])


def metric_cell(name: str, metrics: Metrics | None, gains: Gains | None, *, in_lines: bool) -> str:
    if metrics is None:
        return NOTHING
    value = f"{metrics[name].mean:.4f}"
    return ("\n" if in_lines else " ").join([value, *([gain_text(gains[name], in_lines=in_lines)] if gains else [])])


def way_table(comparison: Comparison, ranking: str) -> Table:
    """Each arm's share of the way from its base to the truth. No rows without a truth."""
    ways = {name: arm.way_to_truth[ranking] for name, arm in comparison.arms.items() if ranking in arm.way_to_truth}
    rows = [[name, *(way_text(way[metric]) for metric in BRIEF_METRICS)] for name, way in ways.items()]
    caption = f"Share of the way from the base arm to the truth, with 95% intervals (candidates: {ranking})"
    return Table(caption, ["arm", *map(metric_name, BRIEF_METRICS)], rows)


def count_table(comparison: Comparison, ranking: str) -> Table:
    """The gain of each arm in the primary metric, by how often the target was bought in training."""
    metric = metric_name(comparison.primary_metric)
    rows = []
    for name, arm in comparison.arms.items():
        for one in arm.by_train_count.get(ranking, []):
            gain = one.gain
            bounds = NOTHING if gain.low is None else f"{gain.low:+.4f} to {gain.high:+.4f}"
            cells = [f"{one.targets:,}", f"{one.base:.4f}", f"{gain.difference:+.4f}", bounds]
            rows.append([name, count_words(one), *cells])
    caption = f"Gain in {metric} by how often the target was bought in training (candidates: {ranking})"
    return Table(caption, ["arm", "bought in training", "targets", f"base {metric}", "gain", "95% interval"], rows)


def count_words(one: CountGain) -> str:
    return str(one.least) if one.least == one.most else f"{one.least}–{one.most}"


def list_table(arms: Arms) -> Table:
    """Accuracy and diversity of recommended lists. No rows if the arms measured them in different ways."""
    lists = {name: arm.lists for name, arm in arms.items() if arm.lists is not None}
    settings = [(one.length, one.mmr_weight, one.scores) for one in lists.values()]
    length, weight, scores = settings[0]
    own = "each model's own item vectors, which cannot be compared between arms"
    space = PurePosixPath(scores).name if scores else own
    rows = [
        [name, order, *(f"{figures[figure]:.4f}" for figure in LIST_FIGURES)]
        for name, one in lists.items()
        for order, figures in (("ranked", one.ranked), ("reranked", one.reranked))
    ]
    caption = f"Lists of {length} items, as ranked and re-ranked by MMR with weight {weight}; similarity by {space}"
    header = ["arm", "order", *(name.replace("_", " ") for name in LIST_FIGURES)]
    return Table(caption, header, rows if len(set(settings)) == 1 else [])


# --- parts of a comparison ----------------------------------------------------------------------


def ranking_names(arms: Arms) -> list[str]:
    return list(dict.fromkeys(name for arm in arms.values() for name in arm.metrics))


def results_of(arm: ArmRecord, ranking: str, *, cold: bool) -> tuple[Metrics | None, Gains | None]:
    """Metrics and gains of all targets, or of the cold-start ones."""
    if cold:
        return arm.cold[ranking].metrics, arm.cold[ranking].against_base
    return arm.metrics[ranking], arm.against_base[ranking] if arm.against_base else None


def shown_pairs(comparison: Comparison, ranking: str) -> list[Pair]:
    arms = comparison.arms
    names = [name for name in comparison.shown if ranking in arms[name].metrics]
    unlike = unlike_fields([arms[name].protocol for name in names])
    pairs = []
    for name in names:
        stamp = {field: arms[name].protocol.get(field) for field in unlike}
        cells = [pair_cells(arms, name, ranking, metric) for metric in METRICS]
        pairs.append(Pair(name, arms[name].base or "", stamp_text(stamp), cells))
    return pairs


def pair_cells(arms: Arms, name: str, ranking: str, metric: str) -> Cells:
    arm = arms[name]
    gain = (arm.against_base or {})[ranking][metric]
    runs = [("base 0" if one is None else f"{one:+.1f}%") for one in gain.per_run]
    base, refined = (f"{one.metrics[ranking][metric].mean:.4f}" for one in (arms[arm.base or ""], arm))
    return Cells(base, refined, gain_text(gain), ", ".join(runs) if len(runs) > 1 else "")


def unlike_fields(stamps: Sequence[Protocol]) -> list[str]:
    names = dict.fromkeys(name for stamp in stamps for name in stamp)
    return [name for name in names if any(stamp.get(name) != stamps[0].get(name) for stamp in stamps)]


def stamp_text(stamp: Protocol) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {stamp_value(value)}" for name, value in stamp.items())


def stamp_value(value: Any) -> str:
    match value:
        case list():
            return " + ".join(map(stamp_value, value))
        case dict():
            return " + ".join(f"{name} {stamp_value(inner)}" for name, inner in value.items())
        case str() if len(value) == 64:  # a sha256
            return value[:12]
    return str(value)


# --- Markdown -----------------------------------------------------------------------------------


def markdown_table(comparison: Comparison) -> str:
    """table.md: remarks, the tables of each ranking, those of lists, notes and protocols."""
    parts = [f"{text}\n" for text in comparison.remarks]
    for ranking in ranking_names(comparison.arms):
        parts.append(captioned_rows(metric_table(comparison, ranking, brief=True)))
        pairs = shown_pairs(comparison, ranking)
        if pairs:
            parts.append(improvement_table(pairs))
        parts.append(captioned_rows(metric_table(comparison, ranking, cold=True, brief=True)))
        parts += [
            captioned_rows(one)
            for one in (way_table(comparison, ranking), count_table(comparison, ranking))
            if one.rows
        ]
    lists = list_table(comparison.arms)
    parts += [captioned_rows(lists)] if lists.rows else []
    parts += [note.replace("*", "\\*") + "\n" for note in table_notes(comparison)]
    return "\n".join([*parts, *stamp_lines(comparison)])


def improvement_table(pairs: Sequence[Pair]) -> str:
    """The paper's layout: a row per metric, and for each arm the columns base, refined, improvement, each run's own."""
    rows = [["metric", *(head for pair in pairs for head in (pair.base, pair.name, "improvement", "each run"))]]
    if any(pair.stamp for pair in pairs):
        rows.append(["protocol", *(cell for pair in pairs for cell in (pair.stamp, pair.stamp, "", ""))])
    for place, metric in enumerate(METRICS):
        rows.append([metric_name(metric), *(cell for pair in pairs for cell in pair.cells[place])])
    return markdown_rows(rows)


def stamp_lines(comparison: Comparison) -> Iterable[str]:
    if comparison.protocol is not None:
        yield f"Protocol: {stamp_text(comparison.protocol)}\n"
        return
    for name, arm in comparison.arms.items():
        if not arm.is_reference:
            yield f"Protocol of {name}: {stamp_text(arm.protocol)}\n"


def captioned_rows(table: Table) -> str:
    rows = f"\n{markdown_rows([table.header, *table.rows])}" if table.rows else ""
    return f"{table.caption}\n{rows}"


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose header is the first row; a bar in a cell is escaped."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def terminal_table(comparison: Comparison) -> str:
    """Each arm's mean of the primary metric in the first ranking, with its gain, in columns for a terminal."""
    ranking, metric = ranking_names(comparison.arms)[0], comparison.primary_metric
    rows = [("arm", metric_name(metric), f"gain over the base arm, 95% interval (candidates: {ranking})")]
    for name, arm in comparison.arms.items():
        gains = arm.against_base or {}
        mean = f"{arm.metrics[ranking][metric].mean:.4f}" if ranking in arm.metrics else ""
        rows.append((name, mean, gain_text(gains[ranking][metric]) if ranking in gains else ""))
    widths = [max(len(row[place]) for row in rows) for place in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {mean:<{widths[1]}}  {gain}".rstrip() for name, mean, gain in rows)


# --- CSV ----------------------------------------------------------------------------------------


def csv_table(comparison: Comparison) -> str:
    """One line per arm, ranking, choice of targets and metric, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "arm",
            "base",
            "candidates",
            "targets",
            "metric",
            "mean",
            "base_mean",
            *GAIN_NAMES,
            "each_run",
            "protocol",
            *WAY_NAMES,
        ]
    )
    for name, arm in comparison.arms.items():
        for ranking in arm.metrics:
            for cold in (False, True):
                metrics, gains = results_of(arm, ranking, cold=cold)
                base = results_of(comparison.arms[arm.base], ranking, cold=cold)[0] if arm.base else None
                for metric, values in (metrics or {}).items():
                    head = [name, arm.base or "", ranking, "cold" if cold else "all", metric]
                    means = [values.mean, base[metric].mean if base else ""]
                    gain = gain_cells(gains[metric]) if gains else [""] * (len(GAIN_NAMES) + 1)
                    way = None if cold else arm.way_to_truth.get(ranking, {}).get(metric)
                    shares = list(vars(way).values()) if way else [""] * len(WAY_NAMES)
                    writer.writerow([*head, *means, *gain, stamp_text(arm.protocol), *shares])
    return file.getvalue()


def gain_cells(gain: ArmGain) -> list[float | str | None]:
    """The columns GAIN_NAMES and each run's own gain in percent, which is nan over a base of 0."""
    each_run = " ".join("nan" if one is None else str(one) for one in gain.per_run)
    return [*(vars(gain)[name] for name in GAIN_NAMES), each_run]


# --- LaTeX --------------------------------------------------------------------------------------


def latex_table(comparison: Comparison) -> str:
    """One table per ranking with the columns of the paper's Tables 2 to 4; needs the package booktabs."""
    tables = [(name, shown_pairs(comparison, name)) for name in ranking_names(comparison.arms)]
    stamps = [arm.protocol for arm in comparison.arms.values()]
    unlike = unlike_fields(stamps)  # these stand in the columns
    protocol = f" Protocol: {stamp_text({name: stamps[0][name] for name in stamps[0] if name not in unlike})}."
    head = "% \\usepackage{booktabs}\n"
    return head + "\n".join(
        latex_of_pairs(name, pairs, protocol, mark_notes(comparison)) for name, pairs in tables if pairs
    )


def latex_of_pairs(ranking: str, pairs: Sequence[Pair], protocol: str, notes: Sequence[str]) -> str:
    groups = " & ".join(f"\\multicolumn{{3}}{{c}}{{{latex(pair.name)}}}" for pair in pairs)
    rules = " ".join(f"\\cmidrule(lr){{{3 * place + 2}-{3 * place + 4}}}" for place in range(len(pairs)))
    stamps = " & ".join(f"\\multicolumn{{3}}{{c}}{{\\scriptsize {latex(pair.stamp)}}}" for pair in pairs)
    rows = []
    for place, metric in enumerate(METRICS):
        row = [metric_name(metric)]
        for cells in (pair.cells[place] for pair in pairs):
            each_run = f" {{\\scriptsize ({latex(cells.runs)})}}" if cells.runs else ""
            row += [cells.base, cells.refined, latex(cells.improvement) + each_run]
        rows.append(" & ".join(row))
    caption = (
        f"Candidates: {ranking}. Improvements over the base with their 95% intervals"
        f" (in brackets each run's own); {' '.join(notes)}{protocol}"
    )
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{latex(caption)}}}",
        f"\\begin{{tabular}}{{l{'rrl' * len(pairs)}}}",
        "\\toprule",
        f" & {groups} \\\\",
        *([f" & {stamps} \\\\"] if any(pair.stamp for pair in pairs) else []),
        rules,
        " & ".join(["Metric", *["Base. & Ref. & Imp."] * len(pairs)]) + " \\\\",
        "\\midrule",
        *(f"{row} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Escapes plain text for LaTeX."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        "°": "$^\\circ$",
    }
    special |= {one: "\\" + one for one in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
