"""What a sweep leaves in its folder: results.parquet, a row per trial; summary.md; figure.svg and figure.png.

Columns of results.parquet: every searched name; guided_dimension, aspects, guided_weight, base_width, model, fusion
and seed of every trial, searched or not; status; run, the folder of its train run; error; epochs and seconds of
training and evaluation; best_epoch, and that epoch's metrics as `validation_ndcg@10`. No test metric is in it.
"""

import json
import logging
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from raygr import files, runs
from raygr.compare.tables import markdown_rows
from raygr.config import ConfigError
from raygr.metrics.ranking import METRICS as METRIC_NAMES
from raygr.metrics.ranking import metric_name
from raygr.schema import HISTORY, METRICS, TEST
from raygr.sweep.config import SweepConfig
from raygr.sweep.figure import CHOSEN_BY, write_figure
from raygr.sweep.space import GUIDED_DIMENSION, SEED, aspect_names, train_config

logger = logging.getLogger(__name__)

RESULTS, SUMMARY = "results.parquet", "summary.md"
FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"
DESCRIBED = (GUIDED_DIMENSION, "aspects", "guided_weight", "base_width", "model", "fusion", SEED)
LONGEST_ERROR = 400


class Ended(NamedTuple):
    """A trial that Tune is done with."""

    run: str
    point: Mapping[str, Any]
    error: str | None


class Chosen(NamedTuple):
    """A configuration: its searched values but the seed, and its finished runs."""

    values: dict[str, Any]
    runs: list[str]
    validation: float


def write_results(config: SweepConfig, run: runs.Run, ended: list[Ended]) -> dict[str, Any]:
    """Writes the files; the counts of run.json. RunError where no trial finished."""
    rows = [result_row(config, trial) for trial in ended]
    files.write_table(pa.Table.from_pylist(rows), run.file(RESULTS))
    for row in rows:
        if row["status"] == FAILED:
            logger.error("trial %s failed: %s", row["run"], row["error"])
    finished = [row for row in rows if row["status"] == FINISHED]
    if not finished:
        raise runs.RunError(f"no trial of {config.output} finished; the first: {rows[0]['error'] or STOPPED}")
    configurations = ranked_configurations(config, rows)
    best = configurations[0]
    logger.info("best by validation: %s, NDCG@10 %.4f", best.values, best.validation)
    test = test_metrics(best)
    files.write_text(summary(config, rows, configurations, test), run.file(SUMMARY))
    write_figure(finished, [name for name in config.space if name != SEED], run)
    statuses = Counter(row["status"] for row in rows)
    counts = {name.replace(" ", "_"): statuses[name] for name in (FINISHED, STOPPED, FAILED)}
    return {"trials": {"all": len(rows), **counts}, "chosen": best._asdict()}


def result_row(config: SweepConfig, trial: Ended) -> dict[str, Any]:
    status = FAILED if trial.error else FINISHED if runs.is_finished(trial.run) else STOPPED
    searched = {name: trial.point[name] for name in config.space if name != GUIDED_DIMENSION}
    row = trained_with(config, trial) | searched | {"status": status, "run": trial.run}
    row["error"] = last_line(trial.error) if trial.error else ""
    return row | training_figures(epoch_lines(trial.run))


def trained_with(config: SweepConfig, trial: Ended) -> dict[str, Any]:
    """What every trial is described by; nothing for a point that train refused, which only tpe proposes."""
    try:
        trained = train_config(config, trial.point, name="")
    except ConfigError:
        return dict.fromkeys(DESCRIBED)
    aspects = trained.aspect_names or aspect_names(trained)
    settings = (trained.guided_weight, trained.base_width, trained.model, trained.fusion, trained.seed)
    return dict(zip(DESCRIBED, (len(aspects), ", ".join(aspects), *settings), strict=True))


def epoch_lines(run: str) -> list[dict[str, Any]]:
    """All epochs of a train run, finished or not."""
    path = files.join(run, HISTORY)
    if not files.exists(path):
        return []
    with fsspec.open(path, "r", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def training_figures(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Epochs, seconds, and the metrics of the best evaluated epoch."""
    validations = {line["epoch"]: line["validation"] for line in lines if "validation" in line}
    best = max(validations, key=lambda epoch: validations[epoch]["ndcg_at_10"], default=None)
    metrics = validations.get(best, {})
    return {
        "epochs": len(lines),
        "seconds": sum(line["seconds"] + line.get("evaluation_seconds", 0) for line in lines),
        "best_epoch": best,
    } | {f"validation_{name.replace('_at_', '@')}": metrics.get(name) for name in METRIC_NAMES}


def last_line(error: str) -> str:
    """The exception itself, below Ray's tracebacks."""
    return error.strip().splitlines()[-1].strip()[:LONGEST_ERROR]


# --- choosing ----------------------------------------------------------------------------------


def ranked_configurations(config: SweepConfig, rows: list[dict[str, Any]]) -> list[Chosen]:
    """The best first, by mean validation NDCG@10 over its seeds; `rows` are all trials.

    A search may propose a configuration with the same seed again: each counts once. Left out is a configuration that
    early stopping or a failure left without some of the seeds that it was tried with, for it would be judged by its
    luckiest; only where that leaves none, those with the most finished seeds stand in.
    """
    names = described_by(config)
    asked: dict[tuple, set[int]] = {}
    finished: dict[tuple, dict[int, dict[str, Any]]] = {}
    for row in rows:
        values = tuple(row[name] for name in names)
        asked.setdefault(values, set()).add(row[SEED])
        if row["status"] == FINISHED:
            finished.setdefault(values, {}).setdefault(row[SEED], row)
    most = max(map(len, finished.values()))
    complete = [values for values, of_seed in finished.items() if of_seed.keys() == asked[values]]
    found = [
        Chosen(
            dict(zip(names, values, strict=True)),
            [row["run"] for row in finished[values].values()],
            statistics.fmean(row[CHOSEN_BY] for row in finished[values].values()),
        )
        for values in complete or [values for values, of_seed in finished.items() if len(of_seed) == most]
    ]
    return sorted(found, key=lambda configuration: -configuration.validation)


def described_by(config: SweepConfig) -> list[str]:
    """The columns that tell configurations apart: all searched names but the seed."""
    guided = ["aspects"] if GUIDED_DIMENSION in config.space else []
    return [name for name in config.space if name != SEED] + guided


def test_metrics(best: Chosen) -> dict[str, dict[str, float]]:
    """By ranking: means over the chosen configuration's runs, the only ones whose test metrics are read."""
    found = [files.read_json(files.join(run, METRICS))[TEST] for run in best.runs]
    return {
        ranking: {name: statistics.fmean(run[ranking][name] for run in found) for name in METRIC_NAMES}
        for ranking in found[0]
    }


# --- the page ----------------------------------------------------------------------------------


def summary(
    config: SweepConfig, rows: list[dict[str, Any]], configurations: list[Chosen], test: dict[str, dict[str, float]]
) -> str:
    """summary.md."""
    statuses, best = Counter(row["status"] for row in rows), configurations[0]
    counted = ", ".join(f"{statuses[name]} {name}" for name in (FINISHED, STOPPED, FAILED))
    names = described_by(config)
    ranked = [
        [*map(shown, found.values.values()), str(len(found.runs)), f"{found.validation:.4f}"]
        for found in configurations
    ]
    tested = [[ranking, *(f"{metrics[name]:.4f}" for name in METRIC_NAMES)] for ranking, metrics in test.items()]
    failed = [[row["run"], row["error"]] for row in rows if row["status"] == FAILED]
    parts = [
        f"# {len(rows)} trials: {counted}",
        "Configurations by the mean validation NDCG@10 over their seeds; those that lack a seed they were tried with, "
        "because it failed or was stopped early, are left out:",
        markdown_rows([[*names, "runs", "validation NDCG@10"], *ranked]).rstrip(),
        "Test metrics of the first, chosen by validation; of no other are they read:",
        markdown_rows([["candidates", *map(metric_name, METRIC_NAMES)], *tested]).rstrip(),
        "Its runs: " + ", ".join(best.runs),
    ]
    if failed:
        parts += ["Failed trials:", markdown_rows([["run", "error"], *failed]).rstrip()]
    return "\n\n".join(parts) + "\n"


def shown(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
