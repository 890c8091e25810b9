"""comparison.json as tables: Markdown, CSV and LaTeX, the last with the columns of the paper's Tables 2 to 4."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from raygr.compare.gain_words import gain_text, mark_notes, table_notes
from raygr.files import join, read_json
from raygr.metrics.ranking import METRICS, metric_name
from raygr.runs import RunError
from raygr.schema import COMPARISON

BRIEF_METRICS = ("ndcg_at_10", "recall_at_10", "mrr")
LIST_FIGURES = ("recall", "ndcg", "mmr", "intra_list_diversity")
GAIN_NAMES = ("difference", "low", "high", "relative", "relative_low", "relative_high", "p", "p_holm", "over")

Arms = Mapping[str, Mapping[str, Any]]


class Pair(NamedTuple):
    """A group of columns: an arm beside its base."""

    name: str
    base: str
    stamp: str
    """What of its protocol differs from another pair's."""
    cells: list["Cells"]
    """One per metric, in the order of METRICS."""


class Cells(NamedTuple):
    base: str
    refined: str
    improvement: str
    runs: str
    """Each run's own improvement, where there are several."""


def read_comparison(run: str) -> dict[str, Any]:
    """comparison.json of a compare run."""
    comparison = read_json(join(run, COMPARISON))
    if "primary_metric" not in comparison:
        raise RunError(f"{run} was compared by an earlier version, with other intervals: delete it and compare again")
    return comparison


def ranking_names(arms: Arms) -> list[str]:
    return list(dict.fromkeys(name for arm in arms.values() for name in arm["metrics"]))


def shown_pairs(comparison: Mapping[str, Any], ranking: str) -> list[Pair]:
    arms = comparison["arms"]
    names = [name for name in comparison["shown"] if ranking in arms[name]["metrics"]]
    unlike = unlike_fields([arms[name]["protocol"] for name in names])
    pairs = []
    for name in names:
        stamp = {field: arms[name]["protocol"].get(field) for field in unlike}
        cells = [pair_cells(arms, name, ranking, metric) for metric in METRICS]
        pairs.append(Pair(name, arms[name]["base"], stamp_text(stamp), cells))
    return pairs


def pair_cells(arms: Arms, name: str, ranking: str, metric: str) -> Cells:
    arm, base = arms[name], arms[arms[name]["base"]]
    gain = arm["against_base"][ranking][metric]
    runs = ", ".join(run_text(one) for one in gain["per_run"]) if len(gain["per_run"]) > 1 else ""
    values = [f"{one['metrics'][ranking][metric]['mean']:.4f}" for one in (base, arm)]
    return Cells(*values, gain_text(gain), runs)


def run_text(relative: float | None) -> str:
    return "base 0" if relative is None else f"{relative:+.1f}%"


def unlike_fields(stamps: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for stamp in stamps for name in stamp)
    return [name for name in names if any(stamp.get(name) != stamps[0].get(name) for stamp in stamps)]


def stamp_text(stamp: Mapping[str, Any]) -> str:
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


def markdown_table(comparison: Mapping[str, Any]) -> str:
    """Per ranking the arms in brief, Base beside Refined, cold-start targets; at the end lists and stamps."""
    arms, parts = comparison["arms"], []
    for ranking in ranking_names(arms):
        ranked = {name: arm for name, arm in arms.items() if ranking in arm["metrics"]}
        brief = {name: (arm["metrics"][ranking], gains_of(arm, ranking)) for name, arm in ranked.items()}
        parts.append(
            f"Candidates: {ranking}; gain over the base arm with its 95% interval\n\n" + brief_table(arms, brief)
        )
        pairs = shown_pairs(comparison, ranking)
        if pairs:
            parts.append(improvement_table(pairs))
        parts.append(cold_table(comparison, ranked, ranking))
    parts.append(list_table(arms))
    notes = [note.replace("*", "\\*") + "\n" for note in table_notes(comparison)]
    said = [text + "\n" for text in comparison["remarks"]]
    return "\n".join([*said, *filter(None, parts), *notes, *stamp_lines(comparison)])


def gains_of(arm: Mapping[str, Any], ranking: str) -> Mapping[str, Any] | None:
    return arm["against_base"][ranking] if arm["against_base"] else None


def brief_table(arms: Arms, found: Mapping[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]) -> str:
    """`found`: metrics and gains by arm."""
    rows = [["arm", "base", "runs", "parameters", *map(metric_name, BRIEF_METRICS)]]
    for name, (metrics, gains) in found.items():
        arm = arms[name]
        cells = [brief_cell(metrics, gains, metric) for metric in BRIEF_METRICS]
        own = ["", ""] if arm["is_reference"] else [str(len(arm["runs"])), str(arm["parameters"])]
        rows.append([name, arm["base"] or "", *own, *cells])
    return markdown_rows(rows)


def brief_cell(metrics: Mapping[str, Any] | None, gains: Mapping[str, Any] | None, metric: str) -> str:
    if metrics is None:
        return ""
    value = f"{metrics[metric]['mean']:.4f}"
    return f"{value} {gain_text(gains[metric])}" if gains else value


def improvement_table(pairs: Sequence[Pair]) -> str:
    """The paper's layout: a row per metric, per arm the columns base, refined, improvement, each run's own."""
    rows = [["metric", *(head for pair in pairs for head in (pair.base, pair.name, "improvement", "each run"))]]
    if any(pair.stamp for pair in pairs):
        rows.append(["protocol", *(cell for pair in pairs for cell in (pair.stamp, pair.stamp, "", ""))])
    for place, metric in enumerate(METRICS):
        rows.append([metric_name(metric), *(cell for pair in pairs for cell in pair.cells[place])])
    return markdown_rows(rows)


def cold_table(comparison: Mapping[str, Any], ranked: Arms, ranking: str) -> str:
    cold = {name: arm["cold"][ranking] for name, arm in ranked.items()}
    counts = next(iter(cold.values()))
    text = f"Of these, cold-start targets (fewer than {comparison['cold_below']} train interactions): "
    text += f"{counts['targets']} targets of {counts['users']} users\n"
    if not counts["targets"]:
        return text
    found = {name: (record["metrics"], record["against_base"]) for name, record in cold.items()}
    return text + "\n" + brief_table(comparison["arms"], found)


def list_table(arms: Arms) -> str:
    """Diversity of the lists as ranked and re-ranked; "" where the arms measured it in unlike ways."""
    arms = {name: arm for name, arm in arms.items() if not arm["is_reference"]}
    settings = [{name: arm["lists"][name] for name in ("length", "mmr_weight", "scores")} for arm in arms.values()]
    if any(one != settings[0] for one in settings):
        return ""
    space = settings[0]["scores"] or "each model's own item vectors (not comparable between arms)"
    text = f"Lists of {settings[0]['length']}, MMR weight {settings[0]['mmr_weight']}, alike by {space}\n\n"
    rows = [["arm", "order", *(name.replace("_", " ") for name in LIST_FIGURES)]]
    for name, arm in arms.items():
        for order in ("ranked", "reranked"):
            rows.append([name, order, *(f"{arm['lists'][order][figure]:.4f}" for figure in LIST_FIGURES)])
    return text + markdown_rows(rows)


def stamp_lines(comparison: Mapping[str, Any]) -> Iterable[str]:
    if comparison["protocol"] is not None:
        yield f"Protocol: {stamp_text(comparison['protocol'])}\n"
        return
    for name, arm in comparison["arms"].items():
        if not arm["is_reference"]:
            yield f"Protocol of {name}: {stamp_text(arm['protocol'])}\n"


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header; a bar in a cell stays text."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# --- CSV ----------------------------------------------------------------------------------------


def csv_table(comparison: Mapping[str, Any]) -> str:
    """One line per arm, ranking, choice of targets and metric, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["arm", "base", "candidates", "targets", "metric", "mean", "base_mean", *GAIN_NAMES, "each_run", "protocol"]
    )
    arms = comparison["arms"]
    for name, arm in arms.items():
        for ranking in arm["metrics"]:
            for targets, metrics, gains, base in csv_groups(arms, name, ranking):
                for metric, values in (metrics or {}).items():
                    gain = gains[metric] if gains else {}
                    base_mean = base[metric]["mean"] if base else ""
                    cells = [values["mean"], base_mean, *(gain.get(one, "") for one in GAIN_NAMES)]
                    head = [name, arm["base"] or "", ranking, targets, metric]
                    writer.writerow([*head, *cells, each_run_cell(gain), stamp_text(arm["protocol"])])
    return file.getvalue()


def each_run_cell(gain: Mapping[str, Any]) -> str:
    """Each run's own gain in percent; nan over a base of 0."""
    return " ".join("nan" if one is None else str(one) for one in gain.get("per_run", []))


def csv_groups(arms: Arms, name: str, ranking: str) -> Iterable[tuple[str, Any, Any, Any]]:
    """(all or cold, metrics, gains, the base's metrics)."""
    arm, base = arms[name], arms[arms[name]["base"]] if arms[name]["base"] else None
    yield "all", arm["metrics"][ranking], gains_of(arm, ranking), base and base["metrics"][ranking]
    cold = arm["cold"][ranking]
    yield "cold", cold["metrics"], cold["against_base"], base and base["cold"][ranking]["metrics"]


# --- LaTeX --------------------------------------------------------------------------------------


def latex_table(comparison: Mapping[str, Any]) -> str:
    """One table per ranking with the columns of the paper's Tables 2 to 4; needs the package booktabs."""
    tables = [(name, shown_pairs(comparison, name)) for name in ranking_names(comparison["arms"])]
    stamps = [arm["protocol"] for arm in comparison["arms"].values()]
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
    rows = [
        " & ".join([metric_name(metric), *(cell for pair in pairs for cell in latex_cells(pair.cells[place]))])
        for place, metric in enumerate(METRICS)
    ]
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


def latex_cells(cells: Cells) -> list[str]:
    runs = f" {{\\scriptsize ({latex(cells.runs)})}}" if cells.runs else ""
    return [cells.base, cells.refined, latex(cells.improvement) + runs]


def latex(text: str) -> str:
    """Plain text that stays text."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        "°": "$^\\circ$",
    }
    special |= {one: "\\" + one for one in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
