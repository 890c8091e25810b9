"""List the stages once: name, configuration and function of each."""

from raygr import locks, runs
from raygr.compare.config import CompareConfig
from raygr.explain.config import ExplainConfig
from raygr.export.config import ExportConfig
from raygr.finetune.config import FinetuneConfig
from raygr.prepare.config import PrepareConfig
from raygr.recommend.config import RecommendConfig
from raygr.report.config import ReportConfig
from raygr.score.config import ScoreConfig
from raygr.simulate.config import SimulateConfig
from raygr.sweep.config import SweepConfig
from raygr.train.config import TrainConfig
from raygr.vectors.config import VectorsConfig

StageConfig = (
    SimulateConfig
    | PrepareConfig
    | ScoreConfig
    | VectorsConfig
    | FinetuneConfig
    | TrainConfig
    | SweepConfig
    | CompareConfig
    | RecommendConfig
    | ExplainConfig
    | ExportConfig
    | ReportConfig
)
STAGES: dict[str, type[StageConfig]] = {
    "simulate": SimulateConfig,
    "prepare": PrepareConfig,
    "score": ScoreConfig,
    "vectors": VectorsConfig,
    "finetune": FinetuneConfig,
    "train": TrainConfig,
    "sweep": SweepConfig,
    "compare": CompareConfig,
    "recommend": RecommendConfig,
    "explain": ExplainConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}


def run_stage(config: StageConfig) -> runs.Run:
    """Run one stage and return its finished run. Imports only what the stage needs."""
    try:
        match config:
            case SimulateConfig():
                from raygr.simulate.stage import simulate

                return simulate(config)
            case PrepareConfig():
                from raygr.prepare.stage import prepare

                return prepare(config)
            case ScoreConfig():
                from raygr.score.stage import score

                return score(config)
            case VectorsConfig():
                from raygr.vectors.stage import vectors

                return vectors(config)
            case FinetuneConfig():
                from raygr.finetune.stage import finetune

                return finetune(config)
            case TrainConfig():
                from raygr.train.stage import train

                return train(config)
            case SweepConfig():
                from raygr.sweep.stage import sweep

                return sweep(config)
            case CompareConfig():
                from raygr.compare.stage import compare

                return compare(config)
            case RecommendConfig():
                from raygr.recommend.stage import recommend

                return recommend(config)
            case ExplainConfig():
                from raygr.explain.stage import explain

                return explain(config)
            case ExportConfig():
                from raygr.export.stage import export

                return export(config)
            case ReportConfig():
                from raygr.report.stage import report

                return report(config)
    finally:
        locks.unlock(config.output)  # for a process that lives on after a failure
