"""Runs one stage, or the stages of a pipeline file in their order.

Every configuration is checked and the plan (plan.py) printed before the first stage starts. A stage whose folder is
finished with the same configuration and unchanged inputs is skipped; one that is finished otherwise is refused by name.
"""

import itertools
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from pydantic_core import to_jsonable_python

from raygr import runs
from raygr.config import ConfigError, PipelineConfig, check_config
from raygr.plan import FINISHED, check_plan, is_done, is_in_the_way, plan_lines, plan_stages
from raygr.stages import STAGES, StageConfig, run_stage
from raygr.train.config import TrainConfig

logger = logging.getLogger(__name__)


class SideBySide(NamedTuple):
    """How many train runs at a time, each on its share of a GPU where there is one."""

    at_once: int = 1
    gpu_share: float = 1.0


ALONE = SideBySide()


def run_alone(job: str, config: Any, run: Callable[[Any], runs.Run] = run_stage, *, force: bool = False) -> str:
    """Path of the run that `run` makes of `config`; a finished one stays as it is.

    `force` runs it in any case: what is finished there, or was started otherwise, is set aside under another name.
    """
    if not force and is_done(job, config):
        logger.info("already finished: %s", config.output)
        return config.output
    if force:
        make_room(job, config)
    return run(config).path


def make_room(job: str, config: Any) -> None:
    """Renames the output's folder where a run is in the way there; RunError while another process works in it."""
    if not is_in_the_way(job, config):
        return
    runs.check_inputs(config.output, to_jsonable_python(config))
    logger.info("set aside: %s is now %s", config.output, runs.set_aside(config.output, job))


def pipeline(config: PipelineConfig, *, dry_run: bool = False) -> None:
    """Runs what is not finished yet, in order; `dry_run` prints the plan and stops there."""
    started = time.time()
    stages = [checked_stage(number, entry) for number, entry in enumerate(config.stages, start=1)]
    if dry_run:
        plans = plan_stages(stages)
        print("\n".join(plan_lines(plans)))
        check_plan(plans)
        return
    run_stages(stages)
    logger.info("pipeline done in %.0f s, last output: %s", time.time() - started, stages[-1][1].output)


def run_stages(stages: list[tuple[str, StageConfig]], side_by_side: SideBySide = ALONE) -> None:
    """Runs (job, configuration) by (job, configuration) what is not finished yet; train runs in a row may go at once.

    RunError before anything starts where a stage is refused.
    """
    plans = plan_stages(stages)
    for line in plan_lines(plans):
        logger.info("plan: %s", line)
    check_plan(plans)
    unfinished = [plan for plan in plans if plan.state != FINISHED]
    for job, group in itertools.groupby(unfinished, key=lambda plan: plan.job):
        configs = [plan.config for plan in group]
        if job == "train":
            train_side_by_side(configs, side_by_side)
            continue
        for config in configs:
            run_logged(job, config, run_stage)


def train_side_by_side(configs: list[TrainConfig], side_by_side: SideBySide) -> None:
    from raygr.train.stage import train, train_all

    placed = partial(train, at_once=side_by_side.at_once, gpu_share=side_by_side.gpu_share)
    train_all(lambda config: run_logged("train", config, placed), configs, side_by_side.at_once)


def run_logged(job: str, config: StageConfig, run: Callable[[StageConfig], runs.Run]) -> None:
    begun = time.time()
    logger.info("%-9s %s", job, config.output)
    run(config)
    logger.info("%-9s %s done in %.0f s", job, config.output, time.time() - begun)


def checked_stage(number: int, entry: dict) -> tuple[str, StageConfig]:
    """Name and configuration of one entry such as `- prepare: {output: ...}`."""
    if len(entry) != 1 or next(iter(entry)) not in STAGES:
        found = ", ".join(map(str, entry))
        raise ConfigError(
            f"stage {number}: expected one of {', '.join(STAGES)}, found {found}; "
            'a stage is "- train: {output: ...}", its settings indented below the name'
        )
    [(job, settings)] = entry.items()
    return job, check_config(STAGES[job], settings, source=f"stage {number} ({job})")
