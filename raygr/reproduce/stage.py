"""`raygr reproduce`: one experiment of the paper, from its stages and train runs to its table or figure.

Like a pipeline, it only composes stages. Their runs lie in the folder `runs`, comparisons and results in `output`.
Finished runs are skipped, so an interrupted experiment continues where it stopped.
"""

import logging
from collections.abc import Mapping, Sequence

from raygr import files, runs
from raygr.compare.comparison import read_comparison
from raygr.compare.config import CompareConfig
from raygr.pipeline import check_plan, plan_stages, run_stages
from raygr.report.charts import save_figure
from raygr.reproduce.config import TABLES, ReproduceConfig
from raygr.reproduce.experiments import Arm, arms_of, source_stages, table_arms, trainings_of, twins_of, with_sources
from raygr.reproduce.paper_figures import draw_experiment
from raygr.reproduce.paper_tables import Experiment, csv_text, figure_file, latex_text, markdown_text, read_paper
from raygr.stages import StageConfig
from raygr.train.inputs import load_inputs

logger = logging.getLogger(__name__)


def reproduce(config: ReproduceConfig) -> runs.Run:
    """Runs what is not finished, then writes the experiment's table or figure."""
    stages, paper = source_stages(config), read_paper(config.paper)
    made = with_sources(config)
    # without scores, the arms of Figure 3 are not known yet, but their settings are
    are_known = config.experiment != "figure-3" or config.item_scores is not None
    arms = arms_of(made) if are_known else [arm for name in made.recommenders for arm in table_arms(made, name)]
    check_plan(plan_stages([*stages, *(("train", train) for train in trainings_of(arms))]))
    run = runs.start_run(config.output, job="reproduce", config=config)
    run_stages(stages)
    arms = arms_of(made)
    for arm in {arm.name: arm for arm in arms}.values():
        load_inputs(arm.runs[0])  # refuses data, scores and widths of any arm before the first one is trained
    trainings = trainings_of(arms)
    logger.info("%s: %d train runs", config.experiment, len(trainings))
    bases = {arm.name: arm.base for arm in arms if arm.base}
    twins = twins_of(config)
    compared = [compare_config(run.file("comparison"), arms, bases)]
    compared += [compare_config(run.file("twins"), arms, twins)] if twins else []
    jobs: list[tuple[str, StageConfig]] = [
        *(("train", train) for train in trainings),
        *(("compare", compare) for compare in compared),
    ]
    run_stages(jobs, at_once=config.at_once, gpu_share=config.gpu_share)
    comparison, *of_twins = [read_comparison(compare.output) for compare in compared]
    write_experiment(run, Experiment(made, arms, paper, comparison, of_twins[0] if twins else None))
    counts = {"arms": len({arm.name for arm in arms}), "train_runs": len(trainings)}
    runs.finish_run(
        run, inputs=[trainings[0].data, config.paper, *(train.output for train in trainings)], counts=counts
    )
    return run


def compare_config(output: str, arms: Sequence[Arm], bases: Mapping[str, str]) -> CompareConfig:
    """A comparison of each arm in `bases` with its base."""
    wanted = bases.keys() | bases.values()
    runs_of = {arm.name: tuple(train.output for train in arm.runs) for arm in arms if arm.name in wanted}
    return CompareConfig(output=output, arms=runs_of, bases=bases)


def write_experiment(run: runs.Run, experiment: Experiment) -> None:
    """Writes Markdown and CSV; of a table also LaTeX, of a figure PNG and SVG for each protocol."""
    name = experiment.config.experiment
    files.write_text(markdown_text(experiment), run.file(f"{name}.md"))
    files.write_text(csv_text(experiment), run.file(f"{name}.csv"))
    if name in TABLES:
        files.write_text(latex_text(experiment), run.file(f"{name}.tex"))
        return
    for protocol, ranking_of in experiment.protocols.items():
        save_figure(draw_experiment(experiment, protocol, ranking_of), run.file(figure_file(name, protocol)))
