"""`raygr reproduce`: one experiment of the paper, from its stages and train runs to its table or figure.

Like a pipeline, it only composes stages. Their runs lie in the folder `runs`, comparisons and results in `output`.
Finished runs are skipped, so an interrupted experiment continues where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence

from raygr import files, runs
from raygr.compare.config import CompareConfig
from raygr.compare.tables import read_comparison
from raygr.config import ConfigError
from raygr.pipeline import SideBySide, run_stages
from raygr.report.charts import save_figure
from raygr.reproduce.config import TABLES, ReproduceConfig
from raygr.reproduce.experiments import (
    Arm,
    arms_of,
    source_stages,
    table_arms,
    trainings_of,
    twins_of,
    with_sources,
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
from raygr.train.inputs import check_settings, load_inputs

logger = logging.getLogger(__name__)


def reproduce(config: ReproduceConfig) -> runs.Run:
    """Runs what is not finished, then writes the experiment's table or figure."""
    stages, paper = source_stages(config), read_paper(config.paper)
    check_arms(with_sources(config))
    run = runs.start_run(config.output, job="reproduce", config=config)
    run_stages(stages)
    config = with_sources(config)
    arms = arms_of(config)
    for arm in {arm.name: arm for arm in arms}.values():
        load_inputs(arm.runs[0])  # refuses the data, scores and widths of any arm before the first one is trained
    trainings = trainings_of(arms)
    logger.info("%s: %d train runs", config.experiment, len(trainings))
    bases = {arm.name: arm.base for arm in arms if arm.base}
    twins = twins_of(config)
    compared = [compare_config(run.file("comparison"), arms, bases)]
    compared += [compare_config(run.file("twins"), arms, twins)] if twins else []
    jobs = [*(("train", train) for train in trainings), *(("compare", compare) for compare in compared)]
    run_stages(jobs, SideBySide(config.at_once, config.gpu_share))
    comparison, *of_twins = [read_comparison(compare.output) for compare in compared]
    write_experiment(run, Experiment(config, arms, paper, comparison, of_twins[0] if twins else None))
    counts = {"arms": len({*bases, *bases.values()}), "train_runs": len(trainings)}
    runs.finish_run(run, inputs=[config.data, config.paper, *(train.output for train in trainings)], counts=counts)
    return run


def check_arms(config: ReproduceConfig) -> None:
    """ConfigError for wrong settings of any train run, before the first stage starts."""
    for recommender, file in config.recommenders.items():
        for arm in table_arms(config, recommender):
            train = arm.runs[0]
            if arm.base is None and train.item_scores is not None:
                raise ConfigError(f"{file}: item_scores belong to reproduce, not to the base run")
            if "last" not in train.targets:
                raise ConfigError(f"{file}: targets: last must be among those of every run")
            check_settings(train)


def compare_config(output: str, arms: Sequence[Arm], bases: Mapping[str, str]) -> CompareConfig:
    """Of each arm beside its base."""
    wanted = bases.keys() | bases.values()
    runs_of = {arm.name: tuple(train.output for train in arm.runs) for arm in arms if arm.name in wanted}
    return CompareConfig(output=output, arms=runs_of, bases=bases)


def write_experiment(run: runs.Run, experiment: Experiment) -> None:
    """Markdown and CSV; a table also as LaTeX, a figure as PNG and SVG."""
    name = experiment.config.experiment
    files.write_text(markdown_text(experiment), run.file(f"{name}.md"))
    files.write_text(csv_text(experiment), run.file(f"{name}.csv"))
    if name in TABLES:
        files.write_text(latex_text(experiment), run.file(f"{name}.tex"))
        return
    for protocol, ranking_of in protocols(experiment.config).items():
        save_figure(draw_experiment(experiment, protocol, ranking_of), run.file(figure_file(name, protocol)))
