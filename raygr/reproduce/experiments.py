"""The stages, arms and train runs of an experiment of the paper.

The name of a run's folder follows from its settings, so experiments that share a folder share equal runs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from raygr.config import ConfigError, check_config, read_yaml
from raygr.data.vector_tables import read_vectors
from raygr.files import join
from raygr.reproduce.config import BASE, REFINED, ReproduceConfig, Source, folder_name, refined_labels
from raygr.stages import STAGES, StageConfig
from raygr.train.config import TrainConfig, fitting


class Arm(NamedTuple):
    """An arm of the comparison; in a figure, one point of a curve."""

    recommender: str
    label: str
    """The arm in the paper's numbers, such as `refined`."""
    base: str
    """Name of the arm that this one is compared with; "" for an arm that only others are compared with."""
    runs: tuple[TrainConfig, ...]
    """One per seed."""
    curve: str = ""
    value: float = 0.0
    """The point's place on the horizontal axis."""

    @property
    def name(self) -> str:
        return f"{self.recommender} {self.label}"


def trainings_of(arms: Sequence[Arm]) -> list[TrainConfig]:
    """Each train run once."""
    return list({train.output: train for arm in arms for train in arm.runs}.values())


def twins_of(config: ReproduceConfig) -> dict[str, str]:
    """Arm -> its twin, by the arms' names, for every recommender."""
    return {f"{name} {arm}": f"{name} {twin}" for name in config.recommenders for arm, twin in config.twins.items()}


# --- data and scores ----------------------------------------------------------------------------


def with_sources(config: ReproduceConfig) -> ReproduceConfig:
    """The configuration with the outputs of its stages as data and scores, where they are null."""
    runs = config.runs
    user_scores = config.user_score_run or join(runs, "user-scores")
    classification_scores = config.classification_scores or join(runs, "user-scores-classification")
    return dataclasses.replace(
        config,
        data=config.data or join(runs, "prepare"),
        item_scores=config.item_scores or join(runs, "item-scores"),
        user_score_run=user_scores if config.user_scores == "llm" else None,
        classification_scores=classification_scores if config.experiment == "table-5" else None,
    )


def source_stages(config: ReproduceConfig) -> list[tuple[str, StageConfig]]:
    """The stages that make the data and scores that are null, in their order; ConfigError where one has no file."""
    made = with_sources(config)
    stages = []
    if config.data is None:
        stages.append(source_stage(config, "prepare", "prepare", {"output": made.data}))
    if config.item_scores is None:
        stages.append(source_stage(config, "score", "item_scores", {"data": made.data, "output": made.item_scores}))
    if made.user_score_run and config.user_score_run is None:
        stages += user_score_stages(made, "base", output=made.user_score_run)
    if made.classification_scores and config.classification_scores is None:
        stages += user_score_stages(made, "classification", output=made.classification_scores)
    return list({stage.output: (job, stage) for job, stage in stages}.values())  # both adapters have one teacher


def user_score_stages(config: ReproduceConfig, task: str, *, output: str) -> list[tuple[str, StageConfig]]:
    """The teacher's scores (where it has a file), an adapter tuned on the task, and its user scores."""
    data, teacher = {"data": config.data}, join(config.runs, "teacher")
    adapter = join(config.runs, "finetune" if task == "base" else f"finetune-{task}")
    # the reward is the task's own, whatever task the file is for
    tuning = data | {"output": adapter, "item_scores": config.item_scores, "task": task, "reward": None}
    stages = []
    if config.stage_files.get("teacher"):
        stages.append(source_stage(config, "score", "teacher", data | {"output": teacher}))
        tuning["teacher"] = teacher
    stages.append(source_stage(config, "finetune", "finetune", tuning))
    stages.append(source_stage(config, "score", "user_scores", data | {"output": output, "adapter": adapter}))
    return stages


def source_stage(
    config: ReproduceConfig, job: str, source: Source, settings: Mapping[str, Any]
) -> tuple[str, StageConfig]:
    file = config.stage_files.get(source)
    if file is None:
        raise ConfigError(
            f"stage_files.{source}: name the YAML of this stage, or set what it makes: "
            "data, item_scores, user_score_run or classification_scores"
        )
    return job, check_config(STAGES[job], read_yaml(file) | settings, source=file)


# --- arms ---------------------------------------------------------------------------------------


def arms_of(config: ReproduceConfig) -> list[Arm]:
    """The arms of every recommender in turn; `config` is one with data and scores (`with_sources`).

    figure-3 reads the names of the item scores, which must exist.
    """
    return [arm for recommender in config.recommenders for arm in recommender_arms(config, recommender)]


def recommender_arms(config: ReproduceConfig, recommender: str) -> list[Arm]:
    """A table's arms; Figure 6: values of lambda beside the base; Figure 4: base widths beside the refined arm."""
    base, refined, *_ = arms = table_arms(config, recommender)
    match config.experiment:
        case "figure-3":
            return [base, *guided_width_arms(config, base, refined)]
        case "figure-4":
            bases = [(width, train_runs(config, recommender, {"base_width": width})) for width in config.base_widths]
            points = [Arm(recommender, f"{BASE} {width}", refined.name, found, BASE, width) for width, found in bases]
            return [refined._replace(base=""), *points]
        case "figure-6":
            changes = [(weight, {"guided_weight": weight}) for weight in config.guided_weights]
            points = [refined_arm(config, recommender, f"lambda {one:g}", some, REFINED, one) for one, some in changes]
            return [base, *points]
    return arms


def table_arms(config: ReproduceConfig, recommender: str) -> list[Arm]:
    """The base, the paper's refined arms, and the extra arms."""
    base = Arm(recommender, BASE, "", train_runs(config, recommender, {}))
    user_scores = (config.user_score_run, config.classification_scores)  # the second for table-5 alone
    labels = zip(refined_labels(config), user_scores, strict=False)
    refined = [refined_arm(config, recommender, label, {"user_score_run": run}) for label, run in labels]
    extra = [refined_arm(config, recommender, name, settings) for name, settings in config.extra_arms.items()]
    return [base, *refined, *extra]


def guided_width_arms(config: ReproduceConfig, base: Arm, refined: Arm) -> list[Arm]:
    """Figure 3: the first k scores beside a base embedding that shrinks as k grows, or that keeps one width."""
    chosen, column = config.refined.get("aspect_names"), config.refined.get("score_column", "expected")
    selected = tuple(chosen) if chosen else None
    assert config.item_scores, "with_sources sets it"
    names = read_vectors(config.item_scores, subjects="items", column=column, aspects=selected).aspects
    if max(config.guided_widths) > len(names):
        raise ConfigError(f"guided_widths: {max(config.guided_widths)} of {len(names)} scores ({', '.join(names)})")
    total, reduced = base.runs[0].base_width, refined.runs[0].base_width
    arms = []
    for count in config.guided_widths:
        # with all scores it is the refined arm of the tables, whose run names no aspects
        first = {"aspect_names": names[:count]} if count < len(names) else {}
        for curve, width in ((f"total width {total}", total - count), (f"base width {reduced}", reduced)):
            changes = first | {"base_width": width}
            arms.append(refined_arm(config, base.recommender, f"{width} + {count}", changes, curve, count))
    return arms


def refined_arm(
    config: ReproduceConfig,
    recommender: str,
    label: str,
    changes: Mapping[str, Any],
    curve: str = "",
    value: float = 0.0,
) -> Arm:
    """An arm with scores, compared with the base; `changes` override `config.refined`."""
    scores = {"item_scores": config.item_scores, "user_scores": config.user_scores}
    settings = {**scores, "user_score_run": config.user_score_run, **config.refined, **changes}
    return Arm(
        recommender, label, f"{recommender} {BASE}", train_runs(config, recommender, settings, label), curve, value
    )


def train_runs(
    config: ReproduceConfig, recommender: str, settings: Mapping[str, Any], label: str = BASE
) -> tuple[TrainConfig, ...]:
    """One run per seed; ConfigError for wrong settings.

    The folder is named by the settings that tell the paper's arms apart, or by the label of an extra arm.
    """
    file = config.recommenders[recommender]
    # sorted, so that runs are the same whichever recommenders an experiment has
    own = {"data": config.data, "output": config.runs, "candidates": sorted(set(config.protocol.values()))}
    values = fitting(read_yaml(file) | config.train | settings) | own
    first = check_config(TrainConfig, values, source=f"{file} with train, refined and {dict(settings)}")
    if first.item_scores is not None and "item_scores" not in settings:
        raise ConfigError(f"{file}: item_scores belong to reproduce, not to the base run")
    if "last" not in first.targets:
        raise ConfigError(f"{file}: targets: last must be among those of every run")
    name = folder_name(label) if label in config.extra_arms else settings_name(first)
    folder = join(config.runs, f"train/{folder_name(recommender)}-{name}")
    return tuple(dataclasses.replace(first, seed=seed, output=f"{folder}-seed-{seed}") for seed in config.seeds)


def settings_name(train: TrainConfig) -> str:
    """Such as `base-60` or `refined-48-first-3-weight-1-users-profile`."""
    if train.item_scores is None:
        return f"{BASE}-{train.base_width}"
    aspects = f"-first-{len(train.aspect_names)}" if train.aspect_names else ""
    users = train.user_score_run.rstrip("/").rpartition("/")[2] if train.user_score_run else train.user_scores
    return f"{REFINED}-{train.base_width}{aspects}-weight-{train.guided_weight:g}-users-{users}"
