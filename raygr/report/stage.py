"""Finished runs -> report.html, one page that needs nothing from outside, and report.md with the same tables.

Reads a prepare run and whatever of score runs, comparison and reference scores the configuration
names; what it does not name, the report leaves out.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from pydantic_core import to_jsonable_python

from raygr.compare.comparison import read_comparison
from raygr.compare.config import CompareConfig
from raygr.compare.tables import Table
from raygr.config import check_config, override
from raygr.files import join, read_json, read_table, write_text
from raygr.finetune.config import FinetuneConfig
from raygr.prepare.config import PrepareConfig
from raygr.report.config import ReportConfig
from raygr.report.scores import ScoreMatrix, compare_scores, read_reference, read_scores
from raygr.report.sections import (
    Section,
    Subject,
    agreement_section,
    comparison_section,
    data_section,
    quality_section,
    show,
    subject_section,
)
from raygr.report.tuning import tuning_section
from raygr.runs import Run, finish_run, is_finished, read_run, start_run
from raygr.schema import INTERACTIONS, ITEMS, QUALITY, STATISTICS, TRAIN, USERS
from raygr.score.config import ScoreConfig
from raygr.train.config import TrainConfig

HTML, MARKDOWN = "report.html", "report.md"
DRAWN_SUBJECTS, NEWEST_TITLES, LONGEST_NAME = 3, 3, 60
JOB_CONFIGS = {
    "prepare": PrepareConfig,
    "score": ScoreConfig,
    "finetune": FinetuneConfig,
    "train": TrainConfig,
    "compare": CompareConfig,
}


class RunNote(NamedTuple):
    """What the report says of one run behind it."""

    path: str
    job: str
    config: str  # JSON
    command: str  # that repeats the run


class Report(NamedTuple):
    """All that the two templates print."""

    title: str
    notice: str
    sections: list[Section]
    runs: list[RunNote]
    versions: Table


def report(config: ReportConfig) -> Run:
    """The run that holds report.html and report.md; RunError names an input run that is not finished."""
    records = read_records(config)
    content = Report(
        title=config.title,
        notice=config.notice,
        sections=list(report_sections(config, records)),
        runs=[run_note(path, record) for path, record in records.items()],
        versions=version_table(records),
    )
    run = start_run(config.output, job="report", config=config)
    write_text(render(content, "report.html.jinja", escape_html=True), run.file(HTML))
    write_text(render(content, "report.md.jinja", escape_html=False), run.file(MARKDOWN))
    inputs = [config.data, config.comparison, config.item_score_run, config.user_score_run, config.reference_scores]
    inputs += config.finetune
    finish_run(run, inputs=[path for path in inputs if path], counts={"sections": len(content.sections)})
    return run


def read_records(config: ReportConfig) -> dict[str, dict[str, Any]]:
    """run.json by path of every run behind the report, in the order of the stages.

    A comparison's train runs are among them only where they still exist.
    """
    jobs = {config.data: "prepare", config.item_score_run: "score", config.user_score_run: "score"}
    jobs |= dict.fromkeys(config.finetune, "finetune")
    if config.comparison:
        arms = read_run(config.comparison, job="compare")["config"]["arms"]
        jobs |= {path: "train" for runs in arms.values() for path in runs if is_finished(path)}
        jobs[config.comparison] = "compare"
    return {path: read_run(path, job=job) for path, job in jobs.items() if path}


def report_sections(config: ReportConfig, records: Mapping[str, Mapping[str, Any]]) -> Iterable[Section]:
    yield data_section(read_json(join(config.data, STATISTICS)), records[config.data]["counts"])
    if config.comparison:
        yield comparison_section(read_comparison(config.comparison))
    if config.item_score_run:
        yield from item_score_sections(config.item_score_run, config.data, config.reference_scores)
    if config.user_score_run:
        yield from user_score_sections(config.user_score_run, config.data)
    for number, path in enumerate(config.finetune):
        yield tuning_section(path, records[path]["config"], figure_id=f"tuning-{number}")


def item_score_sections(item_scores: str, data: str, reference: str | None) -> Iterable[Section]:
    yield quality_section(read_json(join(item_scores, QUALITY)), "item")
    matrix = read_scores(item_scores)
    if reference:
        yield agreement_section(compare_scores(matrix, read_reference(reference)), reference)
    subjects = most_reviewed_items(matrix, data)
    if subjects:
        text = "The most reviewed items among those that were scored."
        yield subject_section("Three items", text, subjects, matrix)


def user_score_sections(user_scores: str, data: str) -> Iterable[Section]:
    yield quality_section(read_json(join(user_scores, QUALITY)), "user")
    matrix = read_scores(user_scores)
    subjects = longest_histories(matrix, data)
    if subjects:
        text = "The users with the longest histories among those that were scored, with their newest training items."
        yield subject_section("Three users", text, subjects, matrix)


def most_reviewed_items(matrix: ScoreMatrix, data: str) -> list[Subject]:
    """The scored items with the most train interactions; equal ones in the order of their index."""
    items = read_table(join(data, ITEMS), ["item_index", "item_id", "title", "train_rating_count"])
    chosen = largest(items, matrix, id_name="item_id", count="train_rating_count", index="item_index")
    return [
        Subject(
            short(row["title"] or row["item_id"]),
            f"{show(row['train_rating_count'])} training reviews",
            matrix.scores_SA[matrix.ids.index(row["item_id"])],
        )
        for row in chosen
    ]


def longest_histories(matrix: ScoreMatrix, data: str) -> list[Subject]:
    """The scored users with the most interactions; equal ones in the order of their index."""
    users = read_table(join(data, USERS), ["user_index", "user_id", "interactions"])
    chosen = largest(users, matrix, id_name="user_id", count="interactions", index="user_index")
    newest = newest_titles([row["user_index"] for row in chosen], data)
    return [
        Subject(
            short(f"User {row['user_id']}"),
            f"{show(row['interactions'])} interactions; newest: {'; '.join(titles)}",
            matrix.scores_SA[matrix.ids.index(row["user_id"])],
        )
        for row, titles in zip(chosen, newest, strict=True)
    ]


def largest(table: pa.Table, matrix: ScoreMatrix, *, id_name: str, count: str, index: str) -> list[dict[str, Any]]:
    """The rows of the scored subjects with the largest counts, at most DRAWN_SUBJECTS."""
    scored = table.filter(pc.is_in(table[id_name], pa.array(matrix.ids, pa.string())))
    return scored.sort_by([(count, "descending"), (index, "ascending")]).slice(0, DRAWN_SUBJECTS).to_pylist()


def newest_titles(user_indices: list[int], data: str) -> list[list[str]]:
    """Per user the titles of the last train items, newest first."""
    history = read_table(join(data, INTERACTIONS), ["user_index", "item_index", "position", "split"])
    items = read_table(join(data, ITEMS), ["item_index", "item_id", "title"])
    train = history.filter(pc.equal(history["split"], TRAIN))
    return [user_titles(train.filter(pc.equal(train["user_index"], user)), items) for user in user_indices]


def user_titles(history: pa.Table, items: pa.Table) -> list[str]:
    newest = history.sort_by([("position", "descending")])["item_index"].slice(0, NEWEST_TITLES)
    rows = items.filter(pc.is_in(items["item_index"], newest.combine_chunks())).to_pylist()
    titles = {row["item_index"]: short(row["title"] or row["item_id"]) for row in rows}
    return [titles[item] for item in newest.to_pylist()]


def short(text: str) -> str:
    """One line of at most LONGEST_NAME characters: shops put whole paragraphs into titles."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1].rstrip() + "…"


def run_note(path: str, record: Mapping[str, Any]) -> RunNote:
    settings = json.dumps(record["config"], indent=1, ensure_ascii=False)
    return RunNote(path, record["job"], settings, run_command(record["job"], record["config"]))


def run_command(job: str, config: Mapping[str, Any]) -> str:
    """The command line that repeats a run: every setting that is not the default."""
    kind = JOB_CONFIGS[job]
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    smallest = check_config(kind, {name: config[name] for name in required}, source="run.json")
    defaults = to_jsonable_python(smallest)
    changed = [name for name, value in config.items() if name in required or value != defaults.get(name)]
    flags = [f"--set {shlex.quote(override(name, config[name]))}" for name in changed]
    return " ".join(["raygr", job, *flags])


def version_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [
            path,
            record["job"],
            show(round(record["seconds"], 1)),
            show(record["git_commit"][:12]),
            ", ".join(f"{name} {version}" for name, version in record["packages"].items()),
        ]
        for path, record in records.items()
    ]
    return Table("Versions", ["run", "job", "seconds", "commit", "packages"], rows)


def render(content: Report, template: str, *, escape_html: bool) -> str:
    """`content` in one of the package's templates; Markdown escapes cell by cell with `markdown`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raygr.report"),
        autoescape=escape_html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown
    return environment.get_template(template).render(report=content)


def markdown(text: str) -> str:
    """Text that stays text in Markdown: on one line, nothing in it read as markup or HTML."""
    escaped = re.sub(r"([\\`*\[\]|~#])", r"\\\1", text)
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\r", "").replace("\n", "<br>")
