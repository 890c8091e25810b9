"""The files of a sweep: results.parquet with a row per trial, summary.md, figure.svg and figure.png.

Columns of results.parquet: guided_dimension, aspects, guided_weight, base_width, model, fusion and seed of every trial,
searched or not; the other searched names; status; run, the folder of its train run; error; epochs; seconds of training
and evaluation; best_epoch, and that epoch's metrics as `validation_ndcg@10`. It holds no test metric.
"""

import json
import logging
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from raygr import files, runs
from raygr.compare.tables import markdown_rows
from raygr.config import ConfigError
from raygr.metrics.ranking import METRICS, metric_name
from raygr.schema import HISTORY
from raygr.sweep.config import SweepConfig, Value
from raygr.sweep.figure import CHOSEN_BY, write_figure
from raygr.sweep.space import GUIDED_DIMENSION, SEED, train_config, trained_aspects
from raygr.train.run_metrics import read_metrics

logger = logging.getLogger(__name__)

RESULTS, SUMMARY = "results.parquet", "summary.md"
FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"
DESCRIBED = (GUIDED_DIMENSION, "aspects", "guided_weight", "base_width", "model", "fusion", SEED)
LONGEST_ERROR = 400


class Ended(NamedTuple):
    """A trial that Tune has ended."""

    run: str
    point: Mapping[str, Value]
    error: str | None


@dataclass(frozen=True)
class TrialResult:
    """A row of results.parquet."""

    settings: dict[str, Value]
    """DESCRIBED and the searched names; DESCRIBED are None for a point that train refuses, which only tpe proposes."""
    status: str
    run: str
    error: str
    epochs: int
    seconds: float
    best_epoch: int | None
    validation: dict[str, Any]
    """Metrics of the best epoch, by column; None without any evaluated epoch."""

    def row(self) -> dict[str, Value]:
        """The columns, without nesting."""
        own = {name: value for name, value in vars(self).items() if name not in ("settings", "validation")}
        return self.settings | own | self.validation


class TriedConfiguration(NamedTuple):
    """A configuration: its searched values without the seed, its finished runs, and their mean validation NDCG@10."""

    values: dict[str, Value]
    runs: list[str]
    validation: float


def write_results(config: SweepConfig, run: runs.Run, ended: list[Ended]) -> dict[str, Any]:
    """Writes the files and returns the counts of run.json. RunError if no trial finished."""
    trials = [trial_result(config, trial) for trial in ended]
    files.write_table(pa.Table.from_pylist([trial.row() for trial in trials]), run.file(RESULTS))
    for trial in trials:
        if trial.status == FAILED:
            logger.error("trial %s failed: %s", trial.run, trial.error)
    finished = [trial.row() for trial in trials if trial.status == FINISHED]
    if not finished:
        raise runs.RunError(f"no trial of {config.output} finished; the first: {trials[0].error or STOPPED}")
    configurations = ranked_configurations(config, trials)
    best = configurations[0]
    logger.info("best by validation: %s, NDCG@10 %.4f", best.values, best.validation)
    files.write_text(summary(config, trials, configurations, test_metrics(best)), run.file(SUMMARY))
    write_figure(finished, [name for name in config.space if name != SEED], run)
    statuses = Counter(trial.status for trial in trials)
    counts = {name.replace(" ", "_"): statuses[name] for name in (FINISHED, STOPPED, FAILED)}
    return {"trials": {"all": len(trials), **counts}, "chosen": best._asdict()}


def trial_result(config: SweepConfig, trial: Ended) -> TrialResult:
    searched = {name: trial.point[name] for name in config.space if name != GUIDED_DIMENSION}
    lines = epoch_lines(trial.run)
    validations = {line["epoch"]: line["validation"] for line in lines if "validation" in line}
    best = max(validations, key=lambda epoch: validations[epoch]["ndcg_at_10"], default=None)
    return TrialResult(
        settings=described(config, trial) | searched,
        status=FAILED if trial.error else FINISHED if runs.is_finished(trial.run) else STOPPED,
        run=trial.run,
        # the exception itself stands below Ray's tracebacks
        error=trial.error.strip().splitlines()[-1].strip()[:LONGEST_ERROR] if trial.error else "",
        epochs=len(lines),
        seconds=sum(line["seconds"] + line.get("evaluation_seconds", 0) for line in lines),
        best_epoch=best,
        validation={f"validation_{name.replace('_at_', '@')}": validations.get(best, {}).get(name) for name in METRICS},
    )


def described(config: SweepConfig, trial: Ended) -> dict[str, Value]:
    try:
        trained = train_config(config, trial.point, name="")
    except ConfigError:
        return dict.fromkeys(DESCRIBED)
    aspects = trained_aspects(trained)
    settings = (trained.guided_weight, trained.base_width, trained.model, trained.fusion, trained.seed)
    return dict(zip(DESCRIBED, (len(aspects), ", ".join(aspects), *settings), strict=True))


def epoch_lines(run: str) -> list[dict[str, Any]]:
    """All epochs of a train run, finished or not."""
    path = files.join(run, HISTORY)
    if not files.exists(path):
        return []
    with fsspec.open(path, "r", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- choosing ----------------------------------------------------------------------------------


def ranked_configurations(config: SweepConfig, trials: list[TrialResult]) -> list[TriedConfiguration]:
    """Configurations by mean validation NDCG@10 over their seeds, the best first.

    A configuration counts once per seed, even if a search proposed it again. One that lacks some of its seeds because
    of early stopping or a failure is left out: its luckiest seeds would be left to judge it by. If that leaves none,
    the configurations with the most finished seeds are ranked.
    """
    names = described_by(config)
    tried: dict[tuple, set[Value]] = {}
    finished: dict[tuple, dict[Value, TrialResult]] = {}
    for trial in trials:
        values, seed = tuple(trial.settings[name] for name in names), trial.settings[SEED]
        tried.setdefault(values, set()).add(seed)
        if trial.status == FINISHED:
            finished.setdefault(values, {}).setdefault(seed, trial)
    most = max(map(len, finished.values()))
    complete = [values for values, of_seed in finished.items() if of_seed.keys() == tried[values]]
    found = [
        TriedConfiguration(
            dict(zip(names, values, strict=True)),
            [trial.run for trial in finished[values].values()],
            statistics.fmean(trial.validation[CHOSEN_BY] for trial in finished[values].values()),
        )
        for values in complete or [values for values, of_seed in finished.items() if len(of_seed) == most]
    ]
    return sorted(found, key=lambda configuration: -configuration.validation)


def described_by(config: SweepConfig) -> list[str]:
    """The columns that tell configurations apart: all searched names but the seed."""
    return [name for name in config.space if name != SEED] + (["aspects"] if GUIDED_DIMENSION in config.space else [])


def test_metrics(best: TriedConfiguration) -> dict[str, dict[str, float]]:
    """By ranking: means over the runs of the chosen configuration. No other run's test metrics are read."""
    found = [read_metrics(run).test for run in best.runs]
    return {
        ranking: {name: statistics.fmean(run[ranking][name] for run in found) for name in METRICS}
        for ranking in found[0]
    }


# --- the page ----------------------------------------------------------------------------------


def summary(
    config: SweepConfig,
    trials: list[TrialResult],
    configurations: list[TriedConfiguration],
    test: dict[str, dict[str, float]],
) -> str:
    """summary.md: configurations by validation, test metrics of the best, failed trials."""
    statuses, best = Counter(trial.status for trial in trials), configurations[0]
    counted = ", ".join(f"{statuses[name]} {name}" for name in (FINISHED, STOPPED, FAILED))
    names = described_by(config)
    ranked = [
        [*map(shown, found.values.values()), str(len(found.runs)), f"{found.validation:.4f}"]
        for found in configurations
    ]
    tested = [[ranking, *(f"{metrics[name]:.4f}" for name in METRICS)] for ranking, metrics in test.items()]
    failed = [[trial.run, trial.error] for trial in trials if trial.status == FAILED]
    parts = [
        f"# {len(trials)} trials: {counted}",
        "Configurations by their mean validation NDCG@10 over seeds. A configuration is left out if one of its seeds "
        "failed or was stopped early:",
        markdown_rows([[*names, "runs", "validation NDCG@10"], *ranked]).rstrip(),
        "Test metrics of the first configuration, which validation has chosen; no other test metrics are read:",
        markdown_rows([["candidates", *map(metric_name, METRICS)], *tested]).rstrip(),
        "Its runs: " + ", ".join(best.runs),
    ]
    if failed:
        parts += ["Failed trials:", markdown_rows([["run", "error"], *failed]).rstrip()]
    return "\n\n".join(parts) + "\n"


def shown(value: Value) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
