"""The arms of a comparison: train runs, read and checked for being comparable."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from raygr import files, runs
from raygr.compare.classic import check_implicit
from raygr.compare.config import CompareConfig
from raygr.compare.references import CHANCE, POPULARITY, TASTELESS, TRUTH
from raygr.config import ConfigError
from raygr.metrics.rank_tables import Ranking, read_rankings
from raygr.schema import NEW, RANKS, TEST
from raygr.train.config import TrainConfig
from raygr.train.run_metrics import RunMetrics, read_metrics


class ComparedRun(NamedTuple):
    """The parts of a finished train run that are compared."""

    path: str
    config: Mapping[str, Any]
    """Empty for references."""
    metrics: RunMetrics
    rankings: dict[str, Ranking]
    """Of the test part, by name."""


Arms = dict[str, list[ComparedRun]]
"""Each arm's runs in the order of their seeds."""


def base_of(name: str, config: CompareConfig) -> str | None:
    """The arm that `name` is compared with; None for an arm that only serves as a base."""
    if name in config.bases:
        return config.bases[name]
    return None if name == config.base or name in config.bases.values() else config.base


def read_train_run(path: str) -> ComparedRun:
    config = runs.read_run(path, job="train").config
    ranks = files.read_table(files.join(path, RANKS))
    rankings = read_rankings(ranks, part=TEST, targets=tuple(config["targets"]))
    rankings |= read_rankings(ranks, part=NEW, targets=("new",))
    return ComparedRun(path, config, read_metrics(path), rankings)


def check_arms(config: CompareConfig, arms: Arms) -> None:
    """ConfigError where arms cannot be compared, or a library for `classic` is missing."""
    check_implicit(config.classic)
    names = {"arm": [*config.bases, *(config.shown or ())], "base": [*config.bases.values()]}
    unknown = [f"{kind} {name!r}" for kind, found in names.items() for name in found if name not in arms]
    if unknown:
        raise ConfigError(f"there is no {', no '.join(unknown)}; the arms are {', '.join(arms)}")
    empty = [name for name, arm in arms.items() if not arm]
    if empty:
        raise ConfigError(f"arm {', '.join(empty)} has no runs")
    added = (POPULARITY, CHANCE, *config.classic, *((TRUTH, TASTELESS) if config.truth else ()))
    taken = [name for name in added if name in arms]
    if taken:
        raise ConfigError(f"an arm is called {', '.join(taken)}: the comparison adds one of that name, rename yours")
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


def check_protocol(run: ComparedRun, first: ComparedRun) -> None:
    stamp, other = run.metrics.protocol, first.metrics.protocol
    names = dict.fromkeys([*other, *stamp])
    unlike = [f"{name} ({other.get(name)} / {stamp.get(name)})" for name in names if stamp.get(name) != other.get(name)]
    if unlike:
        raise ConfigError(
            f"{first.path} and {run.path} were evaluated under different protocols: {', '.join(unlike)}; "
            "train one of them again with the other's data, candidates and targets, or give it its own base in `bases`"
        )


def check_targets(run: ComparedRun, first: ComparedRun) -> None:
    """Refuses runs that ranked different targets, because gains are paired by user."""
    for name, ranking in first.rankings.items():
        other = run.rankings[name]
        same_users = np.array_equal(ranking.user_E, other.user_E)
        if not (same_users and np.array_equal(ranking.position_E, other.position_E)):
            raise ConfigError(f"{first.path} and {run.path} ranked different targets among {name} candidates")


def check_settings(arm: list[ComparedRun]) -> None:
    """Refuses an arm whose runs differ in anything but the seed and what only affects speed."""
    first = arm[0]
    for run in arm[1:]:
        changed = [name for name in first.config if run.config.get(name) != first.config[name]]
        unlike = [name for name in changed if name not in ("output", "seed", "workers", "use_gpu", *TrainConfig.SPEED)]
        if unlike:
            raise ConfigError(
                f"{first.path} and {run.path} are in one arm but differ in {', '.join(unlike)}: make them two arms"
            )
        if run.config["seed"] == first.config["seed"]:
            raise ConfigError(f"{first.path} and {run.path} are in one arm and have the same seed: remove one")
