"""The command line: `raygr <stage> --config FILE --name value`, and the same flags for jobs/<stage>.py."""

import argparse
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from raygr import __version__
from raygr.config import ConfigError, PipelineConfig, did_you_mean, load_config
from raygr.files import exists, shipped
from raygr.flags import add_settings, flag_overrides, json_schema, parse_flags
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
A_MINUTE = 60


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `raygr` command; return the exit code, 0 only for a finished stage."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        return run_job(words[0], words[1:], prog=f"raygr {words[0]}")
    parser = argparse.ArgumentParser(prog="raygr", description="LLM scores inside the recommender you already run.")
    parser.add_argument("--version", action="version", version=f"raygr {__version__}")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, config in COMMANDS.items():
        stages.add_parser(name, help=(config.__doc__ or "").strip().partition("\n")[0])
    schema = stages.add_parser("schema", help="Print the JSON schema of a stage's YAML, with which editors check it")
    schema.add_argument("of", choices=COMMANDS, metavar="STAGE", help=", ".join(COMMANDS))
    if words and not words[0].startswith("-") and words[0] not in stages.choices:
        names = [*stages.choices]
        like = did_you_mean(words[0], names)
        parser.error(f"no stage {words[0]}{like + ' S' if like else ': s'}tages are {', '.join(names)}")
    of = parser.parse_args(words).of
    print(json_schema(COMMANDS[of], STAGES if of == "pipeline" else None))
    return 0


def run_job(stage: str, words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one stage with flags, by default those of jobs/<stage>.py; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS[stage].__doc__, allow_abbrev=False)
    if stage != "pipeline":  # the usage that argparse writes names every flag
        parser.usage = f"%(prog)s {'EXPERIMENT ' if stage == 'reproduce' else ''}[--config FILE] [--NAME VALUE ...]"
    add_flags(parser, stage=stage)
    return run(stage, parse_flags(parser, sys.argv[1:] if words is None else words))


def add_flags(parser: argparse.ArgumentParser, *, stage: str) -> None:
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and all that Ray prints")
    parser.add_argument("--config", metavar="FILE", help="YAML, local or any fsspec URI")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting as in YAML, also inside another one: engine_kwargs.max_num_seqs=4; repeatable",
    )
    if stage == "reproduce":
        parser.add_argument("experiment", choices=EXPERIMENTS, help="without --config: configs/paper/EXPERIMENT.yaml")
    if stage == "pipeline":
        parser.add_argument("--dry-run", action="store_true", help="print what would run, and what it would ask an LLM")
        return
    parser.add_argument(
        "--force", action="store_true", help="rename what is in the output, such as a finished run, and run anew"
    )
    if stage == "score":
        exchange = parser.add_mutually_exclusive_group()
        exchange.add_argument("--export-prompts", metavar="FILE", help="write chat requests (JSON lines) and stop")
        exchange.add_argument("--show-prompts", metavar="N", type=int, help="print the first N prompts whole and stop")
        exchange.add_argument(
            "--import-answers", metavar="FILE", nargs="+", help="answers to them, before the rest is scored"
        )
    add_settings(parser, COMMANDS[stage])


def run(stage: str, parsed: argparse.Namespace) -> int:
    """Run the stage that the command line names; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if parsed.debug:
        logging.getLogger("raygr").setLevel(logging.DEBUG)  # ray_setup.py leaves Ray's logs as they are then
    else:
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", f"{SKIPPED_LINES}|{TRACEBACKS}")
    try:
        with warnings_again():
            run_named(stage, parsed)
    except KeyboardInterrupt:
        return failed(stage, "interrupted; the same command goes on from here", INTERRUPTED, debug=parsed.debug)
    except Exception as error:
        message, code = in_words(error)
        return failed(stage, message, code, debug=parsed.debug)
    return 0


def run_named(stage: str, parsed: argparse.Namespace) -> None:
    """Run the stage, and print the path of its run or what else it was asked for."""
    if stage == "pipeline":
        pipeline(load_config(PipelineConfig, *config_source(stage, parsed)), dry_run=parsed.dry_run)
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


@contextmanager
def warnings_again() -> Iterator[None]:
    """Print the warnings of raygr's loggers once more at the end, except those that a terminal still shows.

    A warning has scrolled away after a screen of further log lines, or a minute.
    """
    said: dict[str, tuple[int, float]] = {}
    lines = 0

    def note(record: logging.LogRecord) -> bool:
        nonlocal lines
        lines += 1
        if record.levelno >= logging.WARNING:
            said[record.getMessage()] = (lines, record.created)
        return False  # the handler writes nothing

    notes = logging.Handler()
    notes.addFilter(note)
    logging.getLogger("raygr").addHandler(notes)
    try:
        yield
    finally:
        logging.getLogger("raygr").removeHandler(notes)
        screen, now = shutil.get_terminal_size().lines, time.time()
        gone = [text for text, (line, at) in said.items() if lines - line > screen or now - at > A_MINUTE]
        if gone:
            print("\n  ".join(["warnings of this run, once more:", *gone]), file=sys.stderr)


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


def config_source(stage: str, parsed: argparse.Namespace) -> tuple[str | None, list[str], list[str]]:
    """Return the file of the stage's settings, those of --set and those of flags."""
    file = parsed.config
    if stage == "reproduce" and not file:
        file = shipped(f"configs/paper/{parsed.experiment}.yaml")
        if not exists(file):
            raise ConfigError(f"{file}: not there; it is part of raygr's checkout: run in it, or give --config FILE")
    return file, parsed.set, flag_overrides(COMMANDS[stage], parsed)


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
