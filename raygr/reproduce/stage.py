"""The reproduce stage: an experiment of the paper, from its stages and train runs to its table or figure.

Stages and train runs lie in the folder `runs`, the comparison and what is drawn from it in `output`. What is finished
is skipped, so an interrupted experiment goes on where it stopped.
"""

import logging
from collections.abc import Mapping

from raygr import files, runs
from raygr.compare.comparison import Comparison, read_comparison
from raygr.compare.config import CompareConfig
from raygr.config import ConfigError, check_config, read_yaml
from raygr.pipeline import SideBySide, run_stages
from raygr.report.charts import save_figure
from raygr.reproduce.config import ReproduceConfig
from raygr.reproduce.costs import scoring_costs
from raygr.reproduce.experiments import (
    BASE,
    REFINED,
    TABLES,
    Plan,
    Sources,
    base_arm,
    experiment_plan,
    refined_arm,
    refined_labels,
    short_name,
    trainings_of,
    twins_of,
)
from raygr.reproduce.paper_figures import draw_experiment
from raygr.reproduce.paper_tables import (
    Experiment,
    csv_text,
    figure_file,
    latex_text,
    markdown_text,
    protocols,
    read_paper,
)
from raygr.stages import STAGES, StageConfig
from raygr.train.inputs import check_settings, load_inputs

logger = logging.getLogger(__name__)

STAGE_JOBS = {"prepare": "prepare", "item_scores": "score", "teacher": "score", "finetune": "finetune"}
STAGE_JOBS |= {"user_scores": "score"}


def reproduce(config: ReproduceConfig) -> runs.Run:
    """Runs what is not finished yet, then writes the experiment's table or figure."""
    sources = sources_of(config)
    check_recommenders(config, sources)
    paper = read_paper(config.paper)
    stages = source_stages(config, sources)
    run = runs.start_run(config.output, job="reproduce", config=config)
    run_stages(stages)
    plan = experiment_plan(config, sources)
    is_by_width = config.experiment == "figure-3"
    costs = scoring_costs(sources.item_scores, config.guided_widths) if is_by_width else []
    for arm in plan.arms:
        load_inputs(arm.runs[0])  # refuses any arm's data, scores and widths before the first is trained
    trainings = trainings_of(plan)
    logger.info("%s: %d train runs", config.experiment, len(trainings))
    run_stages([("train", train) for train in trainings], SideBySide(config.at_once, config.gpu_share))
    bases = {arm.name: arm.base for arm in plan.arms if arm.base}
    compared = comparison(run, "comparison", plan, bases)
    twins = twins_of(config, plan)
    of_twins = comparison(run, "twins", plan, twins) if twins else None
    write_experiment(run, Experiment(config, sources, plan, compared, twins, of_twins, paper, costs))
    counts = {"arms": len(plan.arms), "train_runs": len(trainings)}
    runs.finish_run(run, inputs=[sources.data, config.paper, *(train.output for train in trainings)], counts=counts)
    return run


def write_experiment(run: runs.Run, experiment: Experiment) -> None:
    """Markdown and CSV; figures as PNG and SVG, tables as LaTeX."""
    name = experiment.config.experiment
    files.write_text(markdown_text(experiment), run.file(f"{name}.md"))
    files.write_text(csv_text(experiment), run.file(f"{name}.csv"))
    if not experiment.plan.points:
        files.write_text(latex_text(experiment), run.file(f"{name}.tex"))
        return
    for protocol in protocols(experiment.config):
        save_figure(draw_experiment(experiment, protocol), run.file(figure_file(experiment.config, protocol)))


def comparison(run: runs.Run, name: str, plan: Plan, bases: Mapping[str, str]) -> Comparison:
    """comparison.json of the plan's arms, each beside its base, in a folder of this name."""
    wanted = bases.keys() | bases.values()
    arms = {arm.name: tuple(train.output for train in arm.runs) for arm in plan.arms if arm.name in wanted}
    config = CompareConfig(output=run.file(name), arms=arms, bases=bases)
    run_stages([("compare", config)])
    return read_comparison(config.output)


def check_recommenders(config: ReproduceConfig, sources: Sources) -> None:
    """Refuses settings of any run before the first stage starts."""
    unknown = [name for name in config.recommenders if name not in config.protocol]
    if unknown:
        raise ConfigError(f"protocol names no candidates for {', '.join(unknown)}")
    check_arms(config)
    for name in config.recommenders:
        base, refined = base_arm(config, sources, name).runs[0], refined_arm(config, sources, name).runs[0]
        if base.item_scores is not None:
            raise ConfigError(f"{config.recommenders[name]}: item_scores belong to reproduce, not to the base run")
        if "last" not in base.targets or "last" not in refined.targets:
            raise ConfigError(f"{config.recommenders[name]}: targets: last must be among those of every run")
        check_settings(base)
        check_settings(refined)


def check_arms(config: ReproduceConfig) -> None:
    if config.extra_arms and config.experiment not in TABLES:
        raise ConfigError(f"extra_arms are for {', '.join(TABLES)}, not for {config.experiment}")
    taken = [name for name in config.extra_arms if short_name(name).split("-")[0] in (BASE, REFINED)]
    if taken:
        raise ConfigError(
            f"extra_arms: {', '.join(taken)}: names that begin with {BASE} or {REFINED} are the paper's arms'"
        )
    names = [short_name(name) for name in config.extra_arms]
    alike = [name for name in config.extra_arms if names.count(short_name(name)) > 1]
    if alike:
        raise ConfigError(f"extra_arms: {', '.join(alike)}: their runs would share a folder, name them more unlike")
    for arm, twin in config.twins.items():
        if arm not in {*refined_labels(config), *config.extra_arms} or twin not in config.extra_arms or arm == twin:
            names = ", ".join([*refined_labels(config), *config.extra_arms])
            raise ConfigError(f"twins: {arm} and {twin} must be two of {names}")


# --- data and scores ----------------------------------------------------------------------------


def sources_of(config: ReproduceConfig) -> Sources:
    """Paths as they are set, or where the stages will write."""
    if config.experiment == "table-5" and config.user_scores != "llm":
        raise ConfigError(
            "table-5 compares the user scores of two adapters: "
            "set user_score_run and classification_scores to score runs"
        )
    classification = config.classification_scores or files.join(config.runs, "user-scores-classification")
    llm_scores = config.user_score_run or files.join(config.runs, "user-scores")
    return Sources(
        data=config.data or files.join(config.runs, "prepare"),
        item_scores=config.item_scores or files.join(config.runs, "item-scores"),
        user_scores=llm_scores if config.user_scores == "llm" else config.user_scores,
        classification_scores=classification if config.experiment == "table-5" else None,
    )


def source_stages(config: ReproduceConfig, sources: Sources) -> list[tuple[str, StageConfig]]:
    """The stages that make what the configuration leaves open, in their order."""
    data = {"data": sources.data}
    stages = []
    if config.data is None:
        stages.append(source_stage(config, "prepare", {"output": sources.data}))
    if config.item_scores is None:
        stages.append(source_stage(config, "item_scores", data | {"output": sources.item_scores}))
    if config.user_scores == "llm" and config.user_score_run is None:
        stages += user_score_stages(config, sources, output=sources.user_scores, task="base")
    if sources.classification_scores and config.classification_scores is None:
        stages += user_score_stages(config, sources, output=sources.classification_scores, task="classification")
    # the two adapters have one teacher
    return list({stage.output: (job, stage) for job, stage in stages}.values())


def user_score_stages(
    config: ReproduceConfig, sources: Sources, *, output: str, task: str
) -> list[tuple[str, StageConfig]]:
    """Teacher (where the stages have one), adapter, user scores."""
    data, teacher = {"data": sources.data}, files.join(config.runs, "teacher")
    adapter = files.join(config.runs, "finetune" if task == "base" else f"finetune-{task}")
    # reward: that of the task, whichever the file's task has
    tuning = data | {"output": adapter, "item_scores": sources.item_scores, "task": task, "reward": None}
    stages = []
    if config.stage_files.get("teacher"):
        stages.append(source_stage(config, "teacher", data | {"output": teacher}))
        tuning["teacher"] = teacher
    stages.append(source_stage(config, "finetune", tuning))
    stages.append(source_stage(config, "user_scores", data | {"output": output, "adapter": adapter}))
    return stages


def source_stage(config: ReproduceConfig, name: str, places: dict[str, str]) -> tuple[str, StageConfig]:
    if not config.stage_files.get(name):
        wanted = {"prepare": "data", "finetune": "user_score_run", "user_scores": "user_score_run"}.get(name, name)
        raise ConfigError(
            f"set {wanted} to a finished run, or stage_files.{name} to the YAML of the stage that makes it"
        )
    file, job = config.stage_files[name], STAGE_JOBS[name]
    return job, check_config(STAGES[job], read_yaml(file) | places, source=file)
