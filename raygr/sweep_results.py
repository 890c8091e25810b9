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
import pandas as pd
import pyarrow as pa

from raygr import runs
from raygr.config import ConfigError
from raygr.config_results import SweepConfig
from raygr.evaluation import METRICS as METRIC_NAMES
from raygr.evaluation import metric_name
from raygr.schema import HISTORY, METRICS, TEST
from raygr.sweep_figure import write_figure
from raygr.sweep_space import GUIDED_DIMENSION, SEED, aspect_names, train_config

logger = logging.getLogger(__name__)

RESULTS, SUMMARY = "results.parquet", "summary.md"
FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"
CHOSEN_BY = "validation_ndcg@10"
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
    """Writes the files; the counts of run.json. RuntimeError where no trial finished."""
    table = result_table(config, ended)
    runs.write_table(pa.Table.from_pandas(table, preserve_index=False), run.file(RESULTS))
    statuses = Counter(table["status"])
    for row in table[table["status"] == FAILED].itertuples():
        logger.error("trial %s failed: %s", row.run, row.error)
    if not statuses[FINISHED]:
        first = next(iter(table["error"].dropna()), "all were stopped early")
        raise RuntimeError(f"no trial of {config.output} finished: {first}")
    configurations = ranked_configurations(config, table)
    test = test_metrics(configurations[0])
    runs.write_text(summary(config, table, configurations, test), run.file(SUMMARY))
    names = [name for name in config.space if name != SEED]
    write_figure(table[table["status"] == FINISHED], names, run)
    counts = {name.replace(" ", "_"): statuses[name] for name in (FINISHED, STOPPED, FAILED)}
    return {"trials": {"all": len(table), **counts}, "chosen": configurations[0]._asdict()}


def result_table(config: SweepConfig, ended: list[Ended]) -> pd.DataFrame:
    rows = pd.DataFrame([result_row(config, trial) for trial in ended])
    # whole numbers that some rows lack stay whole
    return rows.convert_dtypes(convert_string=False, convert_boolean=False, convert_floating=False)


def result_row(config: SweepConfig, trial: Ended) -> dict[str, Any]:
    status = FAILED if trial.error else FINISHED if runs.is_finished(trial.run) else STOPPED
    row = {name: trial.point[name] for name in config.space if name != GUIDED_DIMENSION} | trained_with(config, trial)
    row |= {"status": status, "run": trial.run, "error": trial.error and last_line(trial.error)}
    return row | training_figures(epoch_lines(trial.run))


def trained_with(config: SweepConfig, trial: Ended) -> dict[str, Any]:
    """What every trial is described by; nothing for a point that train refused, which only tpe proposes."""
    try:
        trained = train_config(config, trial.point, name="")
    except ConfigError:
        return {}
    aspects = trained.aspects or aspect_names(trained)
    return {
        GUIDED_DIMENSION: len(aspects),
        "aspects": ", ".join(aspects),
        "guided_weight": trained.guided_weight,
        "base_width": trained.base_width,
        "model": trained.model,
        "fusion": trained.fusion,
        SEED: trained.seed,
    }


def epoch_lines(run: str) -> list[dict[str, Any]]:
    """All epochs of a train run, finished or not."""
    path = runs.join(run, HISTORY)
    if not runs.exists(path):
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


def ranked_configurations(config: SweepConfig, table: pd.DataFrame) -> list[Chosen]:
    """The best first, by mean validation NDCG@10 over the finished runs.

    Only configurations with as many finished runs as any: early stopping and failures leave others with their luckiest.
    """
    names = described_by(config)
    finished = table[table["status"] == FINISHED]
    if not names:
        return [chosen({}, finished)]
    groups = [
        chosen(dict(zip(names, values, strict=True)), rows) for values, rows in finished.groupby(names, dropna=False)
    ]
    most = max(len(found.runs) for found in groups)
    return sorted((found for found in groups if len(found.runs) == most), key=lambda found: -found.validation)


def described_by(config: SweepConfig) -> list[str]:
    """The columns that tell configurations apart: all searched names but the seed."""
    guided = ["aspects"] if GUIDED_DIMENSION in config.space else []
    return [name for name in config.space if name != SEED] + guided


def chosen(values: dict[str, Any], rows: pd.DataFrame) -> Chosen:
    plain = {name: None if pd.isna(value) else value for name, value in values.items()}
    return Chosen(plain, list(rows["run"]), float(rows[CHOSEN_BY].mean()))


def test_metrics(best: Chosen) -> dict[str, dict[str, float]]:
    """By ranking: means over the chosen configuration's runs, the only ones whose test metrics are read."""
    found = [runs.read_json(runs.join(run, METRICS))[TEST] for run in best.runs]
    return {
        ranking: {name: statistics.fmean(run[ranking][name] for run in found) for name in METRIC_NAMES}
        for ranking in found[0]
    }


# --- the page ----------------------------------------------------------------------------------


def summary(
    config: SweepConfig, table: pd.DataFrame, configurations: list[Chosen], test: dict[str, dict[str, float]]
) -> str:
    """summary.md."""
    statuses, best = Counter(table["status"]), configurations[0]
    counted = ", ".join(f"{statuses[name]} {name}" for name in (FINISHED, STOPPED, FAILED))
    names = described_by(config)
    ranked = [
        [*map(shown, found.values.values()), len(found.runs), f"{found.validation:.4f}"] for found in configurations
    ]
    tested = [[ranking, *(f"{metrics[name]:.4f}" for name in METRIC_NAMES)] for ranking, metrics in test.items()]
    failed = [[row.run, row.error] for row in table[table["status"] == FAILED].itertuples()]
    parts = [
        f"# {len(table)} trials: {counted}",
        "Configurations by the mean validation NDCG@10 of their finished runs; only those with as many as any:",
        markdown([*names, "runs", "validation NDCG@10"], ranked),
        "Test metrics of the first, chosen by validation; of no other are they read:",
        markdown(["candidates", *map(metric_name, METRIC_NAMES)], tested),
        "Its runs: " + ", ".join(best.runs),
    ]
    if failed:
        parts += ["Failed trials:", markdown(["run", "error"], failed)]
    return "\n\n".join(parts) + "\n"


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines)


def shown(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
