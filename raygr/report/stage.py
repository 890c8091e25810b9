"""The report stage: finished runs -> report.html, a page without outside files, and report.md with the same tables.

Reads a prepare run, and those of score runs, comparison, fine-tunes and reference scores that the configuration names.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from pydantic_core import to_jsonable_python

from raygr.compare.comparison import Comparison, read_comparison
from raygr.compare.config import CompareConfig
from raygr.compare.tables import Table
from raygr.config import ConfigError, check_config, input_paths
from raygr.files import join, read_json, write_text
from raygr.finetune.config import FinetuneConfig
from raygr.flags import flag_words, settings_of
from raygr.prepare.config import PrepareConfig
from raygr.report.config import ReportConfig
from raygr.report.data_section import data_section
from raygr.report.faithful_section import can_explain, faithfulness_section
from raygr.report.finetune_section import finetune_section
from raygr.report.live_lists import can_steer, live_section
from raygr.report.scored_subjects import (
    compare_scores,
    longest_histories,
    most_reviewed_items,
    read_reference,
    read_scores,
)
from raygr.report.sections import (
    Section,
    agreement_section,
    comparison_section,
    correlation_section,
    new_items_section,
    quality_section,
    show,
    subject_section,
)
from raygr.report.training_section import training_section
from raygr.report.verdict import Verdict, comparison_verdict, headline_arm
from raygr.runs import Run, RunRecord, finish_run, is_finished, read_run, start_run
from raygr.schema import QUALITY
from raygr.score.config import ScoreConfig
from raygr.score.quality import AspectQuality
from raygr.train.config import TrainConfig
from raygr.vectors.config import VectorsConfig

HTML, MARKDOWN = "report.html", "report.md"
JOB_CONFIGS = {
    "prepare": PrepareConfig,
    "score": ScoreConfig,
    "vectors": VectorsConfig,
    "finetune": FinetuneConfig,
    "train": TrainConfig,
    "compare": CompareConfig,
}


class RunNote(NamedTuple):
    """A run that the report is made from."""

    path: str
    job: str
    config: str
    """JSON."""
    command: str
    """The command line that repeats the run."""


class Report(NamedTuple):
    """The content of both templates."""

    title: str
    notice: str
    verdict: Verdict | None
    warnings: list[str]
    """Those of the verdict and of all sections."""
    sections: list[Section]
    runs: list[RunNote]
    versions: Table


def report(config: ReportConfig) -> Run:
    """Writes report.html and report.md; RunError names an input run that is not finished."""
    records = read_records(config)
    comparison = read_comparison(config.comparison) if config.comparison else None
    verdict = comparison_verdict(comparison) if comparison else None
    sections = list(report_sections(config, records, comparison))
    warnings = [*(verdict.warnings if verdict else []), *(remark for one in sections for remark in one.remarks)]
    content = Report(
        title=config.title,
        notice=config.notice,
        verdict=verdict,
        warnings=list(dict.fromkeys(warnings)),
        sections=sections,
        runs=[
            RunNote(
                path,
                record.job,
                json.dumps(record.config, indent=1, ensure_ascii=False),
                run_command(record.job, record.config),
            )
            for path, record in records.items()
        ],
        versions=version_table(records),
    )
    run = start_run(config.output, job="report", config=config)
    write_text(render(content, "report.html.jinja", escape_html=True), run.file(HTML))
    write_text(render(content, "report.md.jinja", escape_html=False), run.file(MARKDOWN))
    inputs = [given.path for given in input_paths(config)]
    finish_run(run, inputs=inputs, counts={"sections": len(content.sections)})
    return run


def read_records(config: ReportConfig) -> dict[str, RunRecord]:
    """Path -> run.json of every run that the report is made from, in the order of the stages.

    A comparison's train runs that no longer exist are left out.
    """
    jobs: dict[str | None, str] = {config.data: "prepare"}
    jobs |= dict.fromkeys([config.item_score_run, config.taught_score_run, config.user_score_run], "score")
    jobs |= dict.fromkeys(config.finetune, "finetune")
    if config.comparison:
        arms = read_run(config.comparison, job="compare").config["arms"]
        jobs |= {path: "train" for runs in arms.values() for path in runs if is_finished(path)}
        jobs[config.comparison] = "compare"
    if config.train_run:
        jobs[config.train_run] = "train"
    return {path: read_run(path, job=job) for path, job in jobs.items() if path}


def report_sections(
    config: ReportConfig, records: Mapping[str, RunRecord], comparison: Comparison | None
) -> Iterable[Section]:
    if comparison:
        yield comparison_section(comparison)
        yield from filter(None, (new_items_section(comparison), training_section(comparison)))
    yield from live_sections(config, records, comparison)
    yield from faithfulness_sections(config, records, comparison)
    yield data_section(config.data, records[config.data])
    if config.item_score_run:
        yield from item_score_sections(config, config.item_score_run)
    if config.user_score_run:
        yield from user_score_sections(config.user_score_run, config.data)
    names = short_names(config.finetune)
    for number, path in enumerate(config.finetune):
        yield finetune_section(path, records[path].config, name=names[path], figure_id=f"tuning-{number}")


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> its last folders, as few as tell all paths apart."""
    parts = {path: path.rstrip("/").split("/") for path in paths}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {path: "/".join(folders[-length:]) for path, folders in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {}


def live_sections(
    config: ReportConfig, records: Mapping[str, RunRecord], comparison: Comparison | None
) -> Iterable[Section]:
    """The steered lists of the chosen train run; ConfigError where it cannot be steered.

    Without a choice: of the first run of the verdict's arm, and nothing where it cannot be steered or is gone.
    """
    if config.train_run:
        if not can_steer(config.train_run, records[config.train_run].config):
            raise ConfigError(
                f"train_run: {config.train_run} has no guided user state: train with user_scores: history"
            )
        yield live_section(config.train_run, config.data, name=short_names([config.train_run])[config.train_run])
    elif comparison and (arm := headline_arm(comparison)):
        runs = [path for path in comparison.arms[arm].runs if path in records and can_steer(path, records[path].config)]
        if runs:
            yield live_section(runs[0], config.data, name=arm)


def faithfulness_sections(
    config: ReportConfig, records: Mapping[str, RunRecord], comparison: Comparison | None
) -> Iterable[Section]:
    """What holds of the explanations of the chosen train run and the other runs of its arm, or of the verdict's arm.

    Nothing where these runs have no aspects of their own items or are gone.
    """
    arms = {name: arm.runs for name, arm in comparison.arms.items()} if comparison else {}
    if config.train_run:
        chosen = next((name for name, paths in arms.items() if config.train_run in paths), None)
        paths = [config.train_run, *(path for path in arms.get(chosen or "", []) if path != config.train_run)]
        name = chosen or short_names(paths)[config.train_run]
    else:
        name = (comparison and headline_arm(comparison)) or ""
        paths = arms.get(name, [])
    runs = [path for path in paths if path in records and can_explain(path, records[path].config)]
    if runs:
        yield faithfulness_section(runs, config.data, name=name)


def item_score_sections(config: ReportConfig, item_scores: str) -> Iterable[Section]:
    yield quality_section(*read_quality(item_scores), "item")
    matrix = read_scores(item_scores)
    if config.reference_scores:
        reference, name = read_reference(config.reference_scores), short_names([config.reference_scores])
        taught = read_scores(config.taught_score_run) if config.taught_score_run else None
        # both over the same items: the table's own scores agree with themselves
        asked = matrix._replace(taught_ids=taught.taught_ids) if taught else matrix
        yield agreement_section(compare_scores(asked, reference), name[config.reference_scores])
        if taught:
            agreements = compare_scores(taught, reference)
            yield agreement_section(agreements, name[config.reference_scores], taught=len(taught.taught_ids))
    if len(matrix.ids) > 1 and len(matrix.aspects) > 1:
        yield correlation_section(matrix)
    subjects = most_reviewed_items(matrix, config.data)
    if subjects:
        text = "The most reviewed items among those that were scored."
        yield subject_section("Three items", text, subjects, matrix)


def user_score_sections(user_scores: str, data: str) -> Iterable[Section]:
    yield quality_section(*read_quality(user_scores), "user")
    matrix = read_scores(user_scores)
    subjects = longest_histories(matrix, data)
    if subjects:
        text = "The users with the longest histories among those that were scored, with their newest training items."
        yield subject_section("Three users", text, subjects, matrix)


def read_quality(run: str) -> tuple[dict[str, Any], dict[str, AspectQuality]]:
    """quality.json of a score run: facts of all subjects, and the quality of each aspect."""
    quality = read_json(join(run, QUALITY))
    aspects = {name: AspectQuality(**found) for name, found in quality.pop("aspects").items()}
    return quality, aspects


def run_command(job: str, config: Mapping[str, Any]) -> str:
    """The command line that repeats a run, with all settings that differ from the defaults."""
    kind = JOB_CONFIGS[job]
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    smallest: object = check_config(kind, {name: config[name] for name in required}, source="run.json")
    defaults, words = to_jsonable_python(smallest), ["raygr", job]
    given: Any
    default: Any
    for name, hint, field in settings_of(kind):
        outer, _, inner = name.partition(".")
        given, default = (found.get(outer) for found in (config, defaults))
        given, default = (given[inner], default[inner]) if inner and given else (given, default)
        if outer in config and (field.is_required() or given != default):
            words += flag_words(name, hint, given)
    return shlex.join(words)


def version_table(records: Mapping[str, RunRecord]) -> Table:
    rows = [
        [
            path,
            record.job,
            show(round(record.seconds, 1)),
            show(record.git_commit[:12]),
            ", ".join(f"{name} {version}" for name, version in record.packages.items()),
        ]
        for path, record in records.items()
    ]
    return Table("Versions", ["run", "job", "seconds", "commit", "packages"], rows)


def render(content: Report, template: str, *, escape_html: bool) -> str:
    """Fills one of the package's templates; the Markdown template escapes each text with `markdown`."""
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
    """Escapes text for a Markdown cell: one line, without markup or HTML."""
    escaped = re.sub(r"([\\`*\[\]|~#])", r"\\\1", text)
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("\r", "").replace("\n", "<br>")
