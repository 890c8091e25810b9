"""`raygr <stage> --config FILE --set name=value`, and the same two flags for jobs/<stage>.py."""

import argparse
import logging
import os
import sys

from raygr.config import ConfigError, PipelineConfig, ScoreConfig, load_config
from raygr.pipeline import STAGES, pipeline, run_stage
from raygr.runs import RunError

# Lines of Ray's own processes that say nothing to anyone; read when Ray is imported.
SKIPPED_LINES = "|".join(
    [
        "Failed to query Ray Train Controller actor state",
        "has constructor arguments in the object store",
        "Found multiple active Ray instances",
    ]
)
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets in the processes that `ray job submit` starts
# What a user can mend: printed as one message, without a traceback.
USER_ERRORS = (ConfigError, RunError, ValueError, FileNotFoundError)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `raygr` command; the exit code is 0 only for a finished stage."""
    parser = argparse.ArgumentParser(prog="raygr", description="LLM scores inside the recommender you already run.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, config in [*STAGES.items(), ("pipeline", PipelineConfig)]:
        add_flags(stages.add_parser(name, help=first_line(config), description=config.__doc__), stage=name)
    parsed = parser.parse_args(arguments)
    return run(parsed.stage, parsed)


def run_job(stage: str) -> int:
    """Entry point of jobs/<stage>.py."""
    parser = argparse.ArgumentParser(description=f"raygr {stage}, for `ray job submit`")
    add_flags(parser, stage=stage)
    return run(stage, parser.parse_args())


def add_flags(parser: argparse.ArgumentParser, *, stage: str) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML, local or any fsspec URI")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="wins over the file; repeatable"
    )
    if stage == "pipeline":
        parser.add_argument("--dry-run", action="store_true", help="print what would run, and what it would ask an LLM")
    if stage == "score":
        exchange = parser.add_mutually_exclusive_group()
        exchange.add_argument("--export-prompts", metavar="FILE", help="write chat requests (batch JSONL) and stop")
        exchange.add_argument("--import-answers", metavar="FILE", help="answers to them, before the rest is scored")


def run(stage: str, parsed: argparse.Namespace) -> int:
    """Runs the stage that the parsed command line asks for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", SKIPPED_LINES)
    try:
        if stage == "pipeline":
            stages = load_config(PipelineConfig, parsed.config, parsed.set)
            check_outputs([entry.get("output") for one in stages.stages for entry in one.values()])
            pipeline(stages, dry_run=parsed.dry_run)
        else:
            config = load_config(STAGES[stage], parsed.config, parsed.set)
            check_outputs([config.output])
            print(exchange(config, parsed) if isinstance(config, ScoreConfig) else run_stage(config).path)
    except USER_ERRORS as error:
        print(f"raygr {stage}: {error}", file=sys.stderr)
        return 2
    return 0


def check_outputs(outputs: list[str | None]) -> None:
    """ConfigError where a job of a cluster would write into its own folder, which nobody keeps."""
    lost = [path for path in outputs if path and "://" not in path and not os.path.isabs(path)]
    if lost and IN_JOB in os.environ:
        raise ConfigError(
            f"output: {', '.join(lost)} would lie in the job's own folder, which Ray throws away: "
            "name a folder that every node sees, by its whole path or as a URI"
        )


def exchange(config: ScoreConfig, parsed: argparse.Namespace) -> str:
    """Scoring, or its exchange of prompts and answers with another LLM; the path that was written."""
    from raygr.aspects.scoring import export_prompts, score

    if parsed.export_prompts:
        return export_prompts(config, parsed.export_prompts)
    return score(config, answers=parsed.import_answers).path


def first_line(config: type) -> str:
    return (config.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
