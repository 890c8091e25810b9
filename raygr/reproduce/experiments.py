"""What an experiment of the paper consists of: its arms, with one train run per seed, and the points of its curves.

Runs are named by their settings, so that experiments which share a folder share the runs that they have in common.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from raygr import files
from raygr.config import ConfigError, check_config, read_yaml
from raygr.data.vector_tables import read_vectors
from raygr.reproduce.config import ReproduceConfig
from raygr.train.config import TrainConfig

TABLES = ("table-2", "table-3", "table-4", "table-5")
BASE, REFINED = "base", "refined"  # the arms of the paper's tables, beside which a configuration may name others


class Sources(NamedTuple):
    """Where data and scores are, or will be."""

    data: str
    item_scores: str
    user_scores: str
    classification_scores: str | None
    """Of table-5 alone."""


class Arm(NamedTuple):
    name: str
    recommender: str
    label: str
    """The arm in the paper's numbers, such as `refined`; the base has ``."""
    base: str | None
    """The name of the arm that it is compared with."""
    runs: tuple[TrainConfig, ...]
    """One per seed."""


class Point(NamedTuple):
    """An arm's place on a curve."""

    recommender: str
    curve: str
    value: float
    arm: str


class Plan(NamedTuple):
    arms: list[Arm]
    points: list[Point]
    """Empty for tables."""


def experiment_plan(config: ReproduceConfig, sources: Sources) -> Plan:
    """The arms of every recommender in turn; figure-3 reads the scores' names, so the scores must be there."""
    plans = [recommender_plan(config, sources, name) for name in config.recommenders]
    return Plan([arm for plan in plans for arm in plan.arms], [point for plan in plans for point in plan.points])


def recommender_plan(config: ReproduceConfig, sources: Sources, recommender: str) -> Plan:
    match config.experiment:
        case "table-5":
            return task_plan(config, sources, recommender)
        case "figure-3":
            return guided_width_plan(config, sources, recommender)
        case "figure-4":
            return base_width_plan(config, sources, recommender)
        case "figure-6":
            return guided_weight_plan(config, sources, recommender)
    return table_plan(config, sources, recommender)


def compared_arms(plan: Plan, recommender: str) -> list[Arm]:
    """The recommender's arms that have a base."""
    return [arm for arm in plan.arms if arm.recommender == recommender and arm.base]


def points_of(plan: Plan, recommender: str) -> list[Point]:
    return [point for point in plan.points if point.recommender == recommender]


def twins_of(config: ReproduceConfig, plan: Plan) -> dict[str, str]:
    """Names of arms of every recommender, each with its twin's."""
    found = {(arm.recommender, arm.label): arm.name for arm in plan.arms}
    return {found[name, arm]: found[name, twin] for name in config.recommenders for arm, twin in config.twins.items()}


def trainings_of(plan: Plan, recommender: str | None = None) -> list[TrainConfig]:
    """Each run once, of one recommender or of all."""
    chosen = [arm for arm in plan.arms if recommender in (None, arm.recommender)]
    return list({train.output: train for arm in chosen for train in arm.runs}.values())


# --- the experiments ----------------------------------------------------------------------------


def table_plan(config: ReproduceConfig, sources: Sources, recommender: str) -> Plan:
    """Tables 2 to 4: base and refined, and the configuration's further arms."""
    arms = [base_arm(config, sources, recommender), refined_arm(config, sources, recommender)]
    return Plan(arms + further_arms(config, sources, recommender), [])


def task_plan(config: ReproduceConfig, sources: Sources, recommender: str) -> Plan:
    """Table 5: user scores of two adapters, one tuned on the base task and one on classification, and further arms."""
    arms = [base_arm(config, sources, recommender)]
    scores_of_tasks = (sources.user_scores, sources.classification_scores)
    for label, scores in zip(refined_labels(config), scores_of_tasks, strict=True):
        arm = refined_arm(config, sources._replace(user_scores=scores), recommender)
        arms.append(arm._replace(name=f"{recommender} {label}", label=label))
    return Plan(arms + further_arms(config, sources, recommender), [])


def guided_width_plan(config: ReproduceConfig, sources: Sources, recommender: str) -> Plan:
    """Figure 3: the first k scores beside a base embedding that shrinks as k grows, or one that stays at 48."""
    names = aspect_names(config, sources)
    if max(config.guided_widths) > len(names):
        raise ConfigError(f"guided_widths: {max(config.guided_widths)} of {len(names)} scores ({', '.join(names)})")
    base = base_arm(config, sources, recommender)
    total = base.runs[0].base_width
    reduced = refined_arm(config, sources, recommender).runs[0].base_width
    arms, points = {base.name: base}, []
    for count in config.guided_widths:
        # all of them are the refined arm of the tables, whose runs name no subset
        chosen = {"aspect_names": names[:count]} if count < len(names) else {}
        for curve, width in ((f"total width {total}", total - count), (f"base width {reduced}", reduced)):
            arm = refined_arm(config, sources, recommender, chosen | {"base_width": width})
            arm = arm._replace(name=f"{recommender} {width} + {count}")
            arms[arm.name] = arm
            points.append(Point(recommender, curve, count, arm.name))
    return Plan(list(arms.values()), points)


def base_width_plan(config: ReproduceConfig, sources: Sources, recommender: str) -> Plan:
    """Figure 4: base embeddings of several widths, each against the refined one."""
    refined = refined_arm(config, sources, recommender)._replace(base=None)
    arms, points = [refined], []
    for width in config.base_widths:
        arm = base_arm(config, sources, recommender, {"base_width": width})
        arms.append(arm._replace(name=f"{recommender} base {width}", base=refined.name))
        points.append(Point(recommender, "base", width, arms[-1].name))
    return Plan(arms, points)


def guided_weight_plan(config: ReproduceConfig, sources: Sources, recommender: str) -> Plan:
    """Figure 6: lambda, against the base."""
    arms, points = [base_arm(config, sources, recommender)], []
    for weight in config.guided_weights:
        arm = refined_arm(config, sources, recommender, {"guided_weight": weight})
        arms.append(arm._replace(name=f"{recommender} lambda {weight:g}"))
        points.append(Point(recommender, "refined", weight, arms[-1].name))
    return Plan(arms, points)


# --- arms ---------------------------------------------------------------------------------------


def base_arm(
    config: ReproduceConfig, sources: Sources, recommender: str, changes: Mapping[str, Any] | None = None
) -> Arm:
    name = f"{recommender} base"
    return Arm(name, recommender, "", None, train_runs(config, sources, recommender, changes or {}))


def refined_arm(
    config: ReproduceConfig,
    sources: Sources,
    recommender: str,
    changes: Mapping[str, Any] | None = None,
    named: str | None = None,
) -> Arm:
    settings = {"item_scores": sources.item_scores, **user_settings(sources.user_scores)}
    found = train_runs(config, sources, recommender, settings | config.refined | (changes or {}), named)
    return Arm(f"{recommender} {REFINED}", recommender, REFINED, f"{recommender} base", found)


def further_arms(config: ReproduceConfig, sources: Sources, recommender: str) -> list[Arm]:
    """The configuration's own, by the refined settings with the user scores of the base task."""
    found = []
    for name, settings in config.extra_arms.items():
        arm = refined_arm(config, sources, recommender, settings, named=name)
        found.append(arm._replace(name=f"{recommender} {name}", label=name))
    return found


def refined_labels(config: ReproduceConfig) -> list[str]:
    """Of the paper's own arms."""
    return [f"{REFINED} (base)", f"{REFINED} (cls)"] if config.experiment == "table-5" else [REFINED]


def user_settings(user_scores: str) -> dict[str, Any]:
    if user_scores in ("none", "profile"):
        return {"user_scores": user_scores}
    return {"user_scores": "llm", "user_score_run": user_scores}


def train_runs(
    config: ReproduceConfig,
    sources: Sources,
    recommender: str,
    changes: Mapping[str, Any],
    named: str | None = None,
) -> tuple[TrainConfig, ...]:
    """One per seed, in folders that are named by what tells them apart, or by the name of an extra arm."""
    file = config.recommenders[recommender]
    settings = read_yaml(file) | config.train | changes
    settings |= {"data": sources.data, "output": config.runs, "candidates": candidate_sets(config)}
    first = check_config(TrainConfig, settings, source=f"{file} with train, refined and {dict(changes)}")
    name = f"{short_name(recommender)}-{short_name(named)}" if named else run_name(recommender, first)
    folders = {seed: files.join(config.runs, f"train/{name}-seed-{seed}") for seed in config.seeds}
    return tuple(dataclasses.replace(first, seed=seed, output=folder) for seed, folder in folders.items())


def candidate_sets(config: ReproduceConfig) -> tuple[str, ...]:
    """Sorted, so that runs are the same whatever recommenders an experiment has."""
    return tuple(sorted(set(config.protocol.values())))


def run_name(recommender: str, train: TrainConfig) -> str:
    """Such as `sasrec-base-60` or `gru4rec-plus-refined-48-first-3-weight-1-user-scores`."""
    short = short_name(recommender)
    if train.item_scores is None:
        return f"{short}-base-{train.base_width}"
    parts = [short, "refined", str(train.base_width)]
    parts += [f"first-{len(train.aspect_names)}"] if train.aspect_names else []
    users = train.user_score_run.rstrip("/").rpartition("/")[2] if train.user_score_run else train.user_scores
    return "-".join([*parts, f"weight-{train.guided_weight:g}", f"users-{users}"])


def short_name(name: str) -> str:
    """As part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", " plus")).strip("-")


def aspect_names(config: ReproduceConfig, sources: Sources) -> tuple[str, ...]:
    """Those of `refined.aspect_names`, or else of all item scores, in their order."""
    chosen = config.refined.get("aspect_names")
    column = config.refined.get("score_column", "expected")
    names = tuple(chosen) if chosen else None
    return read_vectors(sources.item_scores, subjects="items", column=column, aspects=names).aspects
