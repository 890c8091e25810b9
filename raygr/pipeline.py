"""Runs one stage, or the stages of a pipeline file in their order.

Every configuration is checked before the first stage starts. A stage whose folder is finished with
the same configuration and unchanged inputs is skipped; one that is finished otherwise is refused by name.
"""

import logging
import time

from pydantic_core import to_jsonable_python

from raygr import runs
from raygr.config import (
    ConfigError,
    FinetuneConfig,
    PipelineConfig,
    PrepareConfig,
    ScoreConfig,
    SimulateConfig,
    TrainConfig,
    check_config,
)
from raygr.config_reproduce import ReproduceConfig
from raygr.config_results import CompareConfig, ExportConfig, RecommendConfig, ReportConfig, VectorsConfig

logger = logging.getLogger(__name__)

StageConfig = (
    SimulateConfig
    | PrepareConfig
    | ScoreConfig
    | VectorsConfig
    | FinetuneConfig
    | TrainConfig
    | CompareConfig
    | RecommendConfig
    | ExportConfig
    | ReportConfig
    | ReproduceConfig
)
STAGES: dict[str, type[StageConfig]] = {
    "simulate": SimulateConfig,
    "prepare": PrepareConfig,
    "score": ScoreConfig,
    "vectors": VectorsConfig,
    "finetune": FinetuneConfig,
    "train": TrainConfig,
    "compare": CompareConfig,
    "recommend": RecommendConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "reproduce": ReproduceConfig,
}


def run_stage(config: StageConfig) -> runs.Run:
    """The finished run of one stage. Imports only what the stage needs: vLLM and Ray are heavy."""
    match config:
        case SimulateConfig():
            from raygr.data.shoppers import simulate as stage
        case PrepareConfig():
            from raygr.data.prepare import prepare as stage
        case ScoreConfig():
            from raygr.aspects.scoring import score as stage
        case VectorsConfig():
            from raygr.aspects.text_vectors import vectors as stage
        case FinetuneConfig():
            from raygr.finetuning.train import finetune as stage
        case TrainConfig():
            from raygr.recommenders.train import train as stage
        case CompareConfig():
            from raygr.compare import compare as stage
        case RecommendConfig():
            from raygr.recommend import recommend as stage
        case ExportConfig():
            from raygr.export import export as stage
        case ReportConfig():
            from raygr.report import report as stage
        case ReproduceConfig():
            from raygr.reproduce import reproduce as stage
    return stage(config)


def pipeline(config: PipelineConfig) -> None:
    """Runs what is not finished yet, in order."""
    started = time.time()
    stages = [checked_stage(number, entry) for number, entry in enumerate(config.stages, start=1)]
    run_stages(stages)
    logger.info("pipeline done in %.0f s, last output: %s", time.time() - started, stages[-1][1].output)


def run_stages(stages: list[tuple[str, StageConfig]]) -> None:
    """Runs (job, configuration) by (job, configuration) what is not finished yet."""
    skipped = [is_done(job, stage) for job, stage in stages]
    for (job, stage), done in zip(stages, skipped, strict=True):
        logger.info("%-9s %s%s", job, stage.output, " (finished, skipped)" if done else "")
        if not done:
            begun = time.time()
            run_stage(stage)
            logger.info("%-9s %s done in %.0f s", job, stage.output, time.time() - begun)


def checked_stage(number: int, entry: dict) -> tuple[str, StageConfig]:
    """Name and configuration of one entry such as `- prepare: {output: ...}`."""
    if len(entry) != 1 or next(iter(entry)) not in STAGES:
        raise ConfigError(f"stage {number}: expected one of {', '.join(STAGES)}, found {', '.join(map(str, entry))}")
    [(job, settings)] = entry.items()
    return job, check_config(STAGES[job], settings, source=f"stage {number} ({job})")


def is_done(job: str, config: StageConfig) -> bool:
    """Whether the output is a finished run of just this configuration on the inputs as they are now."""
    if not runs.is_finished(config.output):
        return False
    record = runs.read_run(config.output, job=job)
    if record["config"] != to_jsonable_python(config):
        changes = runs.changed_fields(
            {"job": job, "config": record["config"]}, {"job": job, "config": to_jsonable_python(config)}
        )
        raise runs.RunError(
            f"{config.output} is finished with another configuration ({changes}): delete it or rename the output"
        )
    stale = [path for path, digest in record["inputs"].items() if not is_unchanged(path, digest)]
    if stale:
        raise runs.RunError(f"{config.output} was made from other content of {', '.join(stale)}: delete it to redo it")
    return True


def is_unchanged(path: str, digest: str) -> bool:
    return runs.exists(path) and runs.fingerprint(path) == digest
