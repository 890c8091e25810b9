"""The compare stage: train runs -> comparison.json, table.md, table.csv, table.tex.

Each arm is compared with its base arm on the test part, with intervals over users and runs (gains.py); improvements are
computed from unrounded means. Beside the arms stand popularity and chance. A family of p-values is what one table (one
ranking; all targets, or the cold-start ones) shows of the primary metric: its arms', corrected by Holm's method. A pair
under unlike protocols is refused. Shape suffixes: `M` metrics, `R` runs of an arm, `U` users.
"""

import json
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from statsmodels.stats.multitest import multipletests

from raygr import files, runs
from raygr.compare.config import CompareConfig
from raygr.compare.gain_words import remarks
from raygr.compare.references import CHANCE, POPULARITY, reference_rankings, why_not
from raygr.compare.tables import csv_table, latex_table, markdown_table
from raygr.config import ConfigError
from raygr.metrics.gains import gains
from raygr.metrics.rank_tables import Ranking, cold_ranking, read_rankings, user_values
from raygr.metrics.ranking import METRICS as METRIC_NAMES
from raygr.schema import COMPARISON, METRICS, RANKS, TEST

logger = logging.getLogger(__name__)

MARKDOWN, CSV, LATEX = "table.md", "table.csv", "table.tex"
SETTINGS = ("model", "fusion", "control", "user_scores", "base_width", "loss")


class TrainRun(NamedTuple):
    """What one finished train run brings to a comparison."""

    path: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    rankings: dict[str, Ranking]
    """Of the test part, by name."""


Arms = dict[str, list[TrainRun]]


def compare(config: CompareConfig) -> runs.Run:
    """Metrics of every arm, and every other arm's gain over its base arm with its interval and p-value."""
    arms = {name: read_arm(paths) for name, paths in config.arms.items()}
    check_arms(config, arms)
    run = runs.start_run(config.output, job="compare", config=config)
    comparison = compared_arms(config, arms)
    for text in comparison["remarks"]:
        logger.warning("%s", text)
    files.write_json(comparison, run.file(COMPARISON))
    files.write_text(markdown_table(comparison), run.file(MARKDOWN))
    files.write_text(csv_table(comparison), run.file(CSV))
    files.write_text(latex_table(comparison), run.file(LATEX))
    paths = [path for arm in config.arms.values() for path in arm]
    users = {name: len(np.unique(r.user_E)) for arm in arms.values() for name, r in arm[0].rankings.items()}
    runs.finish_run(run, inputs=paths, counts={"arms": len(arms), "runs": len(paths), "users": users})
    return run


def compared_arms(config: CompareConfig, arms: Arms) -> dict[str, Any]:
    """comparison.json."""
    records = {}
    for name, arm in arms.items():
        base = base_of(name, config)
        records[name] = arm_record(arm, base, arms[base] if base else None, config)
    correct_p_values(records, config.primary_metric)
    with_base = [name for name, record in records.items() if record["base"]]
    stamps = [record["protocol"] for record in records.values()]
    references, missing = reference_records(config, arms, records)
    comparison = {
        "protocol": stamps[0] if all(stamp == stamps[0] for stamp in stamps) else None,
        "base": records[with_base[0]]["base"] if with_base else next(iter(records)),
        "cold_below": config.cold_below,
        "primary_metric": config.primary_metric,
        "shown": with_base if config.shown is None else list(config.shown),
        "arms": records | references,
    }
    return comparison | {"remarks": missing + remarks(comparison)}


def base_of(name: str, config: CompareConfig) -> str | None:
    """The arm that `name` is compared with; None for one that only others are compared with."""
    if name in config.bases:
        return config.bases[name]
    return None if name == config.base or name in config.bases.values() else config.base


# --- reading and checking ----------------------------------------------------------------------


def read_arm(paths: tuple[str, ...]) -> list[TrainRun]:
    """By seed, so that two arms of the same seeds are paired by them."""
    return sorted((read_train_run(path) for path in paths), key=lambda run: run.config["seed"])


def read_train_run(path: str) -> TrainRun:
    record, metrics = runs.read_run(path, job="train"), files.read_json(files.join(path, METRICS))
    ranks = files.read_table(files.join(path, RANKS))
    rankings = read_rankings(ranks, part=TEST, targets=tuple(record["config"]["targets"]))
    return TrainRun(path, record["config"], metrics, rankings)


def check_arms(config: CompareConfig, arms: Arms) -> None:
    names = {"arm": [*config.bases, *(config.shown or ())], "base": [*config.bases.values()]}
    unknown = [f"{kind} {name!r}" for kind, found in names.items() for name in found if name not in arms]
    if unknown:
        raise ConfigError(f"there is no {', no '.join(unknown)}; the arms are {', '.join(arms)}")
    empty = [name for name, arm in arms.items() if not arm]
    if empty:
        raise ConfigError(f"arm {', '.join(empty)} has no runs")
    taken = [name for name in (POPULARITY, CHANCE) if name in arms]
    if taken:
        raise ConfigError(f"an arm is called {', '.join(taken)}: every comparison adds one of that name, rename yours")
    for name, arm in arms.items():
        base = base_of(name, config)
        if base == name or (base and base not in arms):
            wrong = "is its own base" if base == name else f"needs a base: no arm is called {base!r}"
            raise ConfigError(f"arm {name!r} {wrong}; the arms are {', '.join(arms)}; set base or bases")
        if name in (config.shown or ()) and base is None:
            raise ConfigError(f"shown: arm {name!r} has no base to be shown with")
        first = arms[base or name][0]
        for run in arm:
            check_protocol(run, first)
            check_targets(run, first)
        check_settings(arm)


def check_protocol(run: TrainRun, first: TrainRun) -> None:
    stamp, other = run.metrics["protocol"], first.metrics["protocol"]
    names = dict.fromkeys([*other, *stamp])
    unlike = [f"{name} ({other.get(name)} / {stamp.get(name)})" for name in names if stamp.get(name) != other.get(name)]
    if unlike:
        raise ConfigError(
            f"{first.path} and {run.path} were evaluated under unlike protocols: {', '.join(unlike)}; "
            "train one anew with the other's data, candidates and targets, or name it a base of its own in bases"
        )


def check_targets(run: TrainRun, first: TrainRun) -> None:
    """Gains are paired by user."""
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
            raise ConfigError(
                f"{first.path} and {run.path} are in one arm but differ in {', '.join(unlike)}: make them two"
            )
        if run.config["seed"] == first.config["seed"]:
            raise ConfigError(f"{first.path} and {run.path} are in one arm with the same seed: leave one out")


# --- records ------------------------------------------------------------------------------------


def arm_record(
    arm: list[TrainRun], base_name: str | None, base: list[TrainRun] | None, config: CompareConfig
) -> dict[str, Any]:
    return ranking_records(arm, base, config) | {
        "runs": [run.path for run in arm],
        "base": base_name,
        "is_reference": False,
        "against_references": {},
        "protocol": arm[0].metrics["protocol"],
        "settings": arm_settings(arm[0].config),
        "lists": mean_lists(arm),
        "shares": mean_shares(arm),
        "base_moved": mean_base_moved(arm),
        "parameters": arm[0].metrics["parameters"],
    }


def ranking_records(arm: list[TrainRun], base: list[TrainRun] | None, config: CompareConfig) -> dict[str, Any]:
    """By ranking: metrics and gains of all targets, and of the cold-start ones."""
    names = arm[0].rankings
    found = {name: ranking_record(arm, base, name) for name in names}
    return {
        "metrics": {name: record["metrics"] for name, record in found.items()},
        "against_base": None if base is None else {name: record["against_base"] for name, record in found.items()},
        "cold": {name: ranking_record(arm, base, name, cold_below=config.cold_below) for name in names},
    }


def ranking_record(
    arm: list[TrainRun], base: list[TrainRun] | None, name: str, cold_below: int | None = None
) -> dict[str, Any]:
    """Counts, metrics and gains of one ranking; the last two None without targets. `cold_below`: of those alone."""
    found = [[run.rankings[name] for run in some] for some in (arm, base or [])]
    if cold_below is not None:
        found = [[cold_ranking(ranking, cold_below) for ranking in some] for some in found]
    user_E = found[0][0].user_E
    counts = {"targets": len(user_E), "users": len(np.unique(user_E))}
    if not len(user_E):
        return counts | {"metrics": None, "against_base": None}
    arm_MRU = metric_array(found[0], METRIC_NAMES)
    metrics = {
        metric: {"mean": float(values_R.mean()), "per_run": values_R.tolist()}
        for metric, values_R in zip(METRIC_NAMES, arm_MRU.mean(axis=2), strict=True)
    }
    if not base:
        return counts | {"metrics": metrics, "against_base": None}
    base_MRU = metric_array(found[1], METRIC_NAMES)
    return counts | {"metrics": metrics, "against_base": gain_records(arm_MRU, base_MRU, paired=same_seeds(arm, base))}


def metric_array(rankings: list[Ranking], metrics: Iterable[str]) -> np.ndarray:
    """(M, R, U) of the runs' rankings."""
    return np.stack([np.stack([user_values(ranking, metric) for ranking in rankings]) for metric in metrics])


def same_seeds(arm: list[TrainRun], base: list[TrainRun]) -> bool:
    """Whether each run has one beside it in the base; popularity and chance, which have no seed, fit any."""
    return not arm[0].config or [run.config["seed"] for run in arm] == [run.config["seed"] for run in base]


def gain_records(arm_MRU: np.ndarray, base_MRU: np.ndarray, *, paired: bool) -> dict[str, dict[str, Any]]:
    """Each metric's gain, and each run's in percent: of the base's run beside it, or its mean if there is no such."""
    if paired:
        arm_MRU = np.broadcast_to(arm_MRU, base_MRU.shape)
    arm_MR, base_MR = arm_MRU.mean(axis=2), base_MRU.mean(axis=2)
    beside_MR = base_MR if paired else np.broadcast_to(base_MR.mean(axis=1)[:, None], arm_MR.shape)
    found = gains(arm_MRU, base_MRU, paired=paired)
    return {
        metric: gain._asdict()
        | {"p_holm": None}
        | {"per_run": [100 * (one / base - 1) if base else None for one, base in zip(arm_R, base_R, strict=True)]}
        for metric, gain, arm_R, base_R in zip(METRIC_NAMES, found, arm_MR.tolist(), beside_MR.tolist(), strict=True)
    }


def correct_p_values(arms: dict[str, dict[str, Any]], primary: str) -> None:
    """Fills `p_holm` of the primary metric; a family is the arms of one table. Gains of one run have no p-value."""
    families: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for arm in arms.values():
        for name, found in (arm["against_base"] or {}).items():
            families.setdefault((name, False), []).append(found[primary])
        for name, record in arm["cold"].items():
            if record["against_base"]:
                families.setdefault((name, True), []).append(record["against_base"][primary])
    for family in families.values():
        tested = [gain for gain in family if gain["p"] is not None]
        corrected = multipletests([gain["p"] for gain in tested], method="holm")[1] if tested else []
        for gain, p in zip(tested, corrected, strict=True):
            gain["p_holm"] = float(p)


# --- popularity and chance ----------------------------------------------------------------------


def arms_by_protocol(config: CompareConfig, arms: Arms) -> dict[str, list[str]]:
    """First base arm under each protocol -> all arms under it."""
    bases = [name for name in arms if base_of(name, config) is None or name in config.bases.values()]
    found: dict[str, list[str]] = {}
    first_of: dict[str, str] = {}
    for name in [*bases, *arms]:
        stamp = json.dumps(arms[name][0].metrics["protocol"], sort_keys=True)
        members = found.setdefault(first_of.setdefault(stamp, name), [])
        members += [] if name in members else [name]
    return found


def reference_records(
    config: CompareConfig, arms: Arms, records: dict[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Records of popularity and chance under each protocol, and what is missing of them, in words.

    Adds to each arm's record, in `against_references`, its gains over them.
    """
    by_protocol = arms_by_protocol(config, arms)
    found, missing = {}, []
    for base, members in by_protocol.items():
        first = arms[base][0]
        reason = why_not(first.config["data"], first.metrics["protocol"])
        if reason:
            missing.append(f"Popularity and chance are left out beside “{base}”: {reason}.")
            continue
        for name, rankings in reference_rankings(first.path, first.config["data"], first.rankings).items():
            reference = [TrainRun("", {}, first.metrics, rankings)]
            shown_name = name if len(by_protocol) == 1 else f"{name} ({base})"
            found[shown_name] = reference_record(reference, base, arms[base], config)
            for member in members:
                gain = reference_gains(arms[member], reference, config.primary_metric)
                records[member]["against_references"][name] = gain
    return found, missing


def reference_record(
    reference: list[TrainRun], base_name: str, base: list[TrainRun], config: CompareConfig
) -> dict[str, Any]:
    return ranking_records(reference, base, config) | {
        "runs": [],
        "base": base_name,
        "is_reference": True,
        "against_references": {},
        "protocol": base[0].metrics["protocol"],
        "settings": {},
        "lists": None,
        "shares": None,
        "base_moved": None,
        "parameters": 0,
    }


def reference_gains(arm: list[TrainRun], reference: list[TrainRun], primary: str) -> dict[str, Any]:
    """By ranking: the arm's gain over the reference in the primary metric."""
    found = {}
    for name, ranking in reference[0].rankings.items():
        arm_MRU = metric_array([run.rankings[name] for run in arm], [primary])
        beside_MRU = np.broadcast_to(metric_array([ranking], [primary]), arm_MRU.shape)
        found[name] = gains(arm_MRU, beside_MRU, paired=True)[0]._asdict()
    return found


# --- what the runs say of themselves ------------------------------------------------------------


def arm_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that tell arms apart; fusion and what follows it say nothing of a base model."""
    settings = {name: config[name] for name in SETTINGS}
    return settings if config["item_scores"] else settings | {"fusion": None}


def mean_lists(arm: list[TrainRun]) -> dict[str, Any]:
    """The lists' figures, means over runs, with what they were measured by."""
    lists = [run.metrics["lists"] for run in arm]
    means = {
        order: {name: sum(one[order][name] for one in lists) / len(lists) for name in lists[0][order]}
        for order in ("ranked", "reranked")
    }
    return lists[0] | means


def mean_shares(arm: list[TrainRun]) -> dict[str, float] | None:
    shares = [run.metrics["shares"] for run in arm]
    if shares[0] is None:
        return None
    return {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}


def mean_base_moved(arm: list[TrainRun]) -> float | None:
    """None for base models, and for runs of earlier versions, which did not measure it."""
    moved = [run.metrics.get("base_moved") for run in arm]
    return None if None in moved else sum(moved) / len(moved)
