"""The command line: `raygr <stage> --config FILE --set name=value`, and the same flags for jobs/<stage>.py."""

import argparse
import logging
import os
import sys
import traceback

from raygr.config import ConfigError, PipelineConfig, load_config, override
from raygr.files import exists, shipped
from raygr.pipeline import make_room, pipeline, run_alone
from raygr.reproduce.config import EXPERIMENTS, ReproduceConfig
from raygr.runs import RunError
from raygr.score.config import ScoreConfig
from raygr.stages import STAGES

# Log lines of Ray's own processes that tell a user nothing. Ray reads this setting when it is imported.
SKIPPED_LINES = "|".join(
    [
        "Failed to query Ray Train Controller actor state",
        "has constructor arguments in the object store",
        "Found multiple active Ray instances",
    ]
)
# Tracebacks of Ray's processes. The command ends with their last line as its message; --debug shows them whole.
TRACEBACKS = "|".join(
    [
        "^Exception raised in creation task",
        r"^Traceback \(most recent call last\)",
        "^  ",
        r"^[A-Za-z_.]+(Error|Exception)\b",
        "There are infinite retries remaining",
    ]
)
# Errors that a user can fix, such as a missing file: their message is printed as it is, and the exit code is 2.
USER_ERRORS = (ConfigError, RunError, ValueError, OSError)
COMMANDS = {**STAGES, "reproduce": ReproduceConfig, "pipeline": PipelineConfig}
LONGEST_MESSAGE = 600  # characters of an error that was not written for users
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `raygr` command; return the exit code, 0 only for a finished stage."""
    parser = argparse.ArgumentParser(prog="raygr", description="LLM scores inside the recommender you already run.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, config in COMMANDS.items():
        text = (config.__doc__ or "").strip()
        add_flags(stages.add_parser(name, help=text.partition("\n")[0], description=text), stage=name)
    parsed = parser.parse_args(arguments)
    return run(parsed.stage, parsed)


def run_job(stage: str) -> int:
    """Entry point of jobs/<stage>.py."""
    parser = argparse.ArgumentParser(description=f"raygr {stage}, for `ray job submit`")
    add_flags(parser, stage=stage)
    return run(stage, parser.parse_args())


def add_flags(parser: argparse.ArgumentParser, *, stage: str) -> None:
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and all that Ray prints")
    parser.add_argument("--config", metavar="FILE", help="YAML, local or any fsspec URI")
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="wins over the file; repeatable"
    )
    if stage != "pipeline":
        parser.add_argument(
            "--force", action="store_true", help="rename what is in the output, such as a finished run, and run anew"
        )
    if stage == "pipeline":
        parser.add_argument("--dry-run", action="store_true", help="print what would run, and what it would ask an LLM")
    if stage == "reproduce":
        parser.add_argument("experiment", choices=EXPERIMENTS, help="without --config: configs/paper/EXPERIMENT.yaml")
    if stage == "recommend":
        steer = "move what users look for, as in 'pace=+1'; repeatable"
        parser.add_argument("--steer", metavar="ASPECT=AMOUNT", action="append", default=[], help=steer)
        parser.add_argument("--new-items", metavar="FILE", help="items nobody has bought yet: ids and scores by aspect")
    if stage == "score":
        exchange = parser.add_mutually_exclusive_group()
        exchange.add_argument("--export-prompts", metavar="FILE", help="write chat requests (JSON lines) and stop")
        exchange.add_argument("--show-prompts", metavar="N", type=int, help="print the first N prompts whole and stop")
        exchange.add_argument(
            "--import-answers", metavar="FILE", nargs="+", help="answers to them, before the rest is scored"
        )


def run(stage: str, parsed: argparse.Namespace) -> int:
    """Run the stage that the command line names; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if parsed.debug:
        logging.getLogger("raygr").setLevel(logging.DEBUG)  # ray_setup.py leaves Ray's logs as they are then
    else:
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", f"{SKIPPED_LINES}|{TRACEBACKS}")
    try:
        if stage == "pipeline":
            pipeline(load_config(PipelineConfig, parsed.config, parsed.set), dry_run=parsed.dry_run)
        elif stage == "reproduce":
            from raygr.reproduce.stage import reproduce  # torch, which other commands do without

            experiment = load_config(ReproduceConfig, *config_source(stage, parsed))
            print(run_alone(stage, experiment, reproduce, force=parsed.force))
        else:
            config = load_config(STAGES[stage], *config_source(stage, parsed))
            flags = ("show_prompts", "export_prompts", "import_answers")  # of score alone
            is_exchange = any(vars(parsed).get(flag) for flag in flags)
            if isinstance(config, ScoreConfig) and is_exchange:
                print(exchange(config, parsed))
            else:
                print(run_alone(stage, config, force=parsed.force))
    except KeyboardInterrupt:
        return failed(stage, "interrupted; the same command goes on from here", INTERRUPTED, debug=parsed.debug)
    except Exception as error:
        message, code = in_words(error)
        return failed(stage, message, code, debug=parsed.debug)
    return 0


def failed(stage: str, message: str, code: int, *, debug: bool) -> int:
    """Print why the stage ended and return `code`; `debug` prints the traceback of the current error first."""
    if debug:
        traceback.print_exc()
    print(f"raygr {stage}: {message}", file=sys.stderr)
    return code


def in_words(error: Exception) -> tuple[str, int]:
    """Return a message and the exit code: 2 for an error that a user can fix, 1 for any other."""
    if "ray" in sys.modules:
        from raygr.ray_setup import cause_of

        error = cause_of(error)
    if isinstance(error, USER_ERRORS):
        return str(error), 2
    text = " ".join(str(error).split())
    shown = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."
    return f"{type(error).__name__}: {shown} (--debug shows the traceback)", 1


def config_source(stage: str, parsed: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Return file and overrides of the stage; each experiment of the paper has a default file."""
    if stage == "recommend":
        moved = dict(one.rpartition("=")[::2] for one in parsed.steer)  # a name may hold the dots of omegaconf's paths
        settings = {"steer": moved, "new_item_scores": parsed.new_items}
        return parsed.config, [*parsed.set, *(override(name, value) for name, value in settings.items() if value)]
    if stage != "reproduce":
        return parsed.config, parsed.set
    file = parsed.config or shipped(f"configs/paper/{parsed.experiment}.yaml")
    if not parsed.config and not exists(file):
        raise ConfigError(f"{file}: not there; it is part of raygr's checkout: run in it, or give --config FILE")
    return file, [f"experiment={parsed.experiment}", *parsed.set]


def exchange(config: ScoreConfig, parsed: argparse.Namespace) -> str:
    """Print or write prompts, or read answers of another LLM; return the prompts or the paths that were written."""
    if parsed.show_prompts:
        from raygr.score.subjects import show_prompts

        return show_prompts(config, parsed.show_prompts)
    from raygr.score.stage import export_prompts, score

    if parsed.force:
        make_room("score", config)
    if parsed.export_prompts:
        return "\n".join(export_prompts(config, parsed.export_prompts))
    return score(config, answers=parsed.import_answers or ()).path


if __name__ == "__main__":
    sys.exit(main())
