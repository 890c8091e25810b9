"""The compare stage: train runs -> comparison.json, table.md, table.csv.

Arms are compared on the test part with a paired bootstrap over users and runs; improvements are computed from
unrounded means. Runs under unlike protocols are refused. Shape suffixes: `R` runs of an arm, `U` users.
"""

import csv
import io
import logging
from typing import Any, NamedTuple

import numpy as np

from raygr import runs
from raygr.config import CompareConfig, ConfigError
from raygr.evaluation import METRICS as METRIC_NAMES
from raygr.evaluation import paired_bootstrap
from raygr.rankings import Ranking, read_rankings, user_values
from raygr.schema import METRICS, RANKS, TEST

logger = logging.getLogger(__name__)

COMPARISON, MARKDOWN, CSV = "comparison.json", "table.md", "table.csv"
SETTINGS = ("model", "fusion", "control", "user_scores", "base_width", "loss")
SHOWN_METRICS = ("ndcg_at_10", "recall_at_10", "mrr")


class TrainRun(NamedTuple):
    """What one finished train run brings to a comparison."""

    path: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    rankings: dict[str, Ranking]
    """Of the test part, by name."""


def compare(config: CompareConfig) -> runs.Run:
    """Metrics of every arm, and every other arm's gain over the base arm with its interval."""
    arms = {name: [read_train_run(path) for path in paths] for name, paths in config.arms.items()}
    check_arms(config, arms)
    run = runs.start_run(config.output, job="compare", config=config)
    base = arms[config.base]
    comparison = {
        "protocol": base[0].metrics["protocol"],
        "base": config.base,
        "arms": {name: arm_record(arm, None if name == config.base else base, config) for name, arm in arms.items()},
    }
    runs.write_json(comparison, run.file(COMPARISON))
    runs.write_text(markdown_table(comparison), run.file(MARKDOWN))
    runs.write_text(csv_table(comparison), run.file(CSV))
    paths = [path for arm in config.arms.values() for path in arm]
    users = {name: len(np.unique(ranking.user_E)) for name, ranking in base[0].rankings.items()}
    runs.finish_run(run, inputs=paths, counts={"arms": len(arms), "runs": len(paths), "users": users})
    return run


def read_train_run(path: str) -> TrainRun:
    record, metrics = runs.read_run(path, job="train"), runs.read_json(runs.join(path, METRICS))
    ranks = runs.read_table(runs.join(path, RANKS))
    rankings = read_rankings(ranks, part=TEST, targets=tuple(record["config"]["targets"]))
    return TrainRun(path, record["config"], metrics, rankings)


def check_arms(config: CompareConfig, arms: dict[str, list[TrainRun]]) -> None:
    if config.base not in arms:
        raise ConfigError(f"base: no arm is called {config.base!r}; the arms are {', '.join(arms)}")
    empty = [name for name, arm in arms.items() if not arm]
    if empty:
        raise ConfigError(f"arm {', '.join(empty)} has no runs")
    first = arms[config.base][0]
    for arm in arms.values():
        for run in arm:
            check_protocol(run, first)
            check_targets(run, first)
        check_settings(arm)


def check_protocol(run: TrainRun, first: TrainRun) -> None:
    stamp, other = run.metrics["protocol"], first.metrics["protocol"]
    unlike = [f"{name} ({other.get(name)} / {stamp.get(name)})" for name in other if stamp.get(name) != other[name]]
    if unlike or stamp.keys() != other.keys():
        raise ConfigError(f"{first.path} and {run.path} were evaluated under unlike protocols: {', '.join(unlike)}")


def check_targets(run: TrainRun, first: TrainRun) -> None:
    """The bootstrap is paired by user."""
    for name, ranking in first.rankings.items():
        other = run.rankings[name]
        same_users = np.array_equal(ranking.user_E, other.user_E)
        if not (same_users and np.array_equal(ranking.position_E, other.position_E)):
            raise ConfigError(f"{first.path} and {run.path} ranked different targets among {name} candidates")


def check_settings(arm: list[TrainRun]) -> None:
    """The runs of an arm differ in their seed only."""
    first = arm[0]
    for run in arm[1:]:
        changed = [name for name in first.config if run.config.get(name) != first.config[name]]
        unlike = [name for name in changed if name not in ("output", "seed", "workers", "threads", "use_gpu")]
        if unlike:
            raise ConfigError(f"{first.path} and {run.path} are in one arm but differ in {', '.join(unlike)}")
        if run.config["seed"] == first.config["seed"]:
            raise ConfigError(f"{first.path} and {run.path} are in one arm with the same seed")


def arm_record(arm: list[TrainRun], base: list[TrainRun] | None, config: CompareConfig) -> dict[str, Any]:
    names = list(arm[0].rankings)
    return {
        "runs": [run.path for run in arm],
        "settings": arm_settings(arm[0].config),
        "metrics": {name: arm_metrics(arm, name) for name in names},
        "against_base": None if base is None else {name: arm_gains(arm, base, name, config) for name in names},
        "shares": mean_shares(arm),
        "parameters": arm[0].metrics["parameters"],
    }


def arm_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that tell arms apart; fusion and what follows it say nothing of a base model."""
    settings = {name: config[name] for name in SETTINGS}
    return settings if config["item_scores"] else settings | {"fusion": None}


def arm_metrics(arm: list[TrainRun], candidates: str) -> dict[str, dict[str, Any]]:
    per_run = {metric: run_values(arm, candidates, metric).mean(axis=1) for metric in METRIC_NAMES}
    return {
        metric: {"mean": float(values_R.mean()), "per_run": values_R.tolist()} for metric, values_R in per_run.items()
    }


def run_values(arm: list[TrainRun], ranking: str, metric: str) -> np.ndarray:
    """(R, U)."""
    return np.stack([user_values(run.rankings[ranking], metric) for run in arm])


def arm_gains(
    arm: list[TrainRun], base: list[TrainRun], candidates: str, config: CompareConfig
) -> dict[str, dict[str, float]]:
    gains = {}
    for metric in METRIC_NAMES:
        values = [run_values(runs_of_arm, candidates, metric) for runs_of_arm in (arm, base)]
        gains[metric] = paired_bootstrap(*values, samples=config.bootstrap_samples, seed=config.seed)._asdict()
    return gains


def mean_shares(arm: list[TrainRun]) -> dict[str, float] | None:
    shares = [run.metrics["shares"] for run in arm]
    if shares[0] is None:
        return None
    return {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}


def markdown_table(comparison: dict[str, Any]) -> str:
    """One table per candidate set: means over runs, and the gain in percent with its 95% interval."""
    base = comparison["base"]
    parts = []
    for candidates in comparison["arms"][base]["metrics"]:
        head = ["arm", "runs", "parameters", *SHOWN_METRICS]
        rows = [head, ["---"] * len(head)]
        for name, arm in comparison["arms"].items():
            cells = [metric_cell(arm, candidates, metric) for metric in SHOWN_METRICS]
            rows.append([name, str(len(arm["runs"])), str(arm["parameters"]), *cells])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(f"Candidates: {candidates}; gain over {base} with its 95% interval\n\n" + "\n".join(lines) + "\n")
    stamp = ", ".join(f"{name}: {value}" for name, value in comparison["protocol"].items())
    return "\n".join(parts) + f"\nProtocol: {stamp}\n"


def metric_cell(arm: dict[str, Any], candidates: str, metric: str) -> str:
    text = f"{arm['metrics'][candidates][metric]['mean']:.4f}"
    if arm["against_base"] is None:
        return text
    gain = arm["against_base"][candidates][metric]
    return f"{text} {gain['relative']:+.1f}% [{gain['relative_low']:+.1f}, {gain['relative_high']:+.1f}]"


def csv_table(comparison: dict[str, Any]) -> str:
    """One line per arm, candidate set and metric, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    gain_names = ["difference", "low", "high", "relative", "relative_low", "relative_high"]
    writer.writerow(["arm", "candidates", "metric", "mean", *gain_names])
    for name, arm in comparison["arms"].items():
        for candidates, metrics in arm["metrics"].items():
            for metric, values in metrics.items():
                gain = arm["against_base"][candidates][metric] if arm["against_base"] else {}
                writer.writerow([name, candidates, metric, values["mean"], *(gain.get(one, "") for one in gain_names)])
    return file.getvalue()
