"""The command line: `raygr <stage> --config FILE --name value`, and the same flags for jobs/<stage>.py."""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from raygr import __version__
from raygr.config import ConfigError, PipelineConfig, did_you_mean, load_config
from raygr.execution.console import OF_A_WORKER, own_lines
from raygr.files import IN_JOB, absolute, shipped
from raygr.flags import add_settings, completion_script, flag_overrides, json_schema, parse_flags
from raygr.pipeline import make_room, pipeline, run_alone
from raygr.reproduce.config import EXPERIMENTS, ReproduceConfig
from raygr.runs import RunError
from raygr.score.config import ScoreConfig
from raygr.stages import STAGES

# Errors that a user can fix, such as a missing file: their message is printed as it is, and the exit code is 2.
USER_ERRORS = (ConfigError, RunError, ValueError, OSError)
OF_EXTRA_LLM = ("transformers", "gguf", "peft", "openai", "huggingface_hub")
COMMANDS = {**STAGES, "reproduce": ReproduceConfig, "pipeline": PipelineConfig}
OTHERS = {
    "init": "Look at your files and write prepare.yaml, aspects.yaml and pipeline.yaml, every line explained",
    "aspects": "Check a file of aspects: weak ones by their words, by a prompt, and by the scores that they got",
}
LONGEST_MESSAGE = 600  # characters of an error that was not written for users
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
A_MINUTE = 60


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `raygr` command; return the exit code, 0 only for a finished stage."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        return run_job(words[0], words[1:], prog=f"raygr {words[0]}")
    if words and words[0] in OTHERS:
        return (run_init if words[0] == "init" else run_aspects)(words[1:])
    parser = argparse.ArgumentParser(prog="raygr", description="LLM scores inside the recommender you already run.")
    parser.add_argument("--version", action="version", version=f"raygr {__version__}")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, config in COMMANDS.items():
        stages.add_parser(name, help=(config.__doc__ or "").strip().partition("\n")[0])
    schema = stages.add_parser("schema", help="Print the JSON schema of a stage's YAML, with which editors check it")
    for name, about in OTHERS.items():
        stages.add_parser(name, help=about)
    completion = stages.add_parser("completion", help="Print a script that completes stages and flags in a shell")
    completion.add_argument("shell", choices=["bash", "zsh"])
    schema.add_argument("of", choices=[*COMMANDS], metavar="STAGE", help=", ".join(COMMANDS))
    if words and not words[0].startswith("-") and words[0] not in stages.choices:
        names = [*stages.choices]
        like = did_you_mean(words[0], names)
        parser.error(f"no stage {words[0]}{like + ' S' if like else ': s'}tages are {', '.join(names)}")
    parsed = parser.parse_args(words)
    if parsed.stage == "completion":
        for name in COMMANDS:
            add_flags(stages.choices[name], stage=name)
        for name in OTHERS:
            stages.choices[name].add_argument("files", metavar="FILE", nargs="*")
        print(completion_script(parser, stages.choices.values(), parsed.shell))
    else:
        print(json_schema(COMMANDS[parsed.of], STAGES if parsed.of == "pipeline" else None))
    return 0


def run_init(words: Sequence[str]) -> int:
    """Write the first files for one's own data; return the exit code."""
    parser = argparse.ArgumentParser(prog="raygr init", description=f"{OTHERS['init']}.", allow_abbrev=False)
    parser.add_argument("reviews", metavar="ORDERS", help="who had what and when: CSV, JSON lines or Parquet")
    parser.add_argument("metadata", metavar="PRODUCTS", nargs="?", help="titles and texts; default: they are in ORDERS")
    parser.add_argument("--folder", default="", help="where to write (default: here)")
    parser.add_argument(
        "--columns", metavar="OURS=THEIRS", nargs="+", default=[], help="columns that it cannot tell: user_id=buyer"
    )
    parsed = parse_flags(parser, words)

    def written() -> str:
        from raygr.prepare.first_files import init  # numpy and pyarrow, which the help does without

        columns = dict(one.split("=", 1) for one in parsed.columns)
        return init(parsed.reviews, parsed.metadata, folder=parsed.folder, columns=columns)

    return print_or_fail("init", written)


def run_aspects(words: Sequence[str]) -> int:
    """Check a file of aspects; return the exit code."""
    parser = argparse.ArgumentParser(prog="raygr aspects", description=f"{OTHERS['aspects']}.", allow_abbrev=False)
    parser.add_argument("what", choices=["check"], metavar="check")
    parser.add_argument("file", metavar="FILE", help="the YAML file of the aspects")
    parser.add_argument("--data", metavar="PREPARE_RUN", help="show a prompt of its items, with token counts")
    parser.add_argument("--scores", metavar="SCORE_RUN", help="find dead aspects and those that say the same")
    parser.add_argument("--llm", default="smollm2", help="whose tokens are counted (default: smollm2)")
    parsed = parse_flags(parser, words)

    def checked() -> str:
        from raygr.score.aspect_checks import check_aspects

        return check_aspects(parsed.file, data=parsed.data, scores=parsed.scores, llm=parsed.llm)

    return print_or_fail("aspects", checked)


def print_or_fail(command: str, text: Callable[[], str]) -> int:
    try:
        print(text(), end="")
    except Exception as error:
        message, code = in_words(error)
        return failed(command, message, code, error, debug=False)
    return 0


def run_job(stage: str, words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one stage with flags, by default those of jobs/<stage>.py; return the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description=COMMANDS[stage].__doc__, allow_abbrev=False)
    if stage != "pipeline":  # the usage that argparse writes names every flag
        parser.usage = f"%(prog)s {'EXPERIMENT ' if stage == 'reproduce' else ''}[--config FILE] [--NAME VALUE ...]"
    add_flags(parser, stage=stage)
    return run(stage, parse_flags(parser, sys.argv[1:] if words is None else words))


def add_flags(parser: argparse.ArgumentParser, *, stage: str) -> None:
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and all that Ray and vLLM print")
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
    os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", OF_A_WORKER.pattern)  # read where Ray is imported
    try:
        config = load_config(COMMANDS[stage], *config_source(stage, parsed))
        with warnings_again(), console_of(config, parsed):
            said = run_named(stage, config, parsed)
        print(said, end="")
    except KeyboardInterrupt as stop:
        return failed(stage, "interrupted; the same command goes on from here", INTERRUPTED, stop, debug=parsed.debug)
    except Exception as error:
        message, code = in_words(error)
        return failed(stage, message, code, error, debug=parsed.debug)
    return 0


def run_named(stage: str, config: Any, parsed: argparse.Namespace) -> str:
    """Run the stage; return the path of its run, or what else it was asked for, as lines of text."""
    if stage == "pipeline":
        return pipeline(config, dry_run=parsed.dry_run)
    if stage == "reproduce":
        from raygr.reproduce.stage import reproduce  # torch, which other commands do without

        return run_alone(stage, config, reproduce, force=parsed.force) + "\n"
    flags = ("show_prompts", "export_prompts", "import_answers")  # of score alone
    is_exchange = any(vars(parsed).get(flag) for flag in flags)
    return (exchange(config, parsed) if is_exchange else run_alone(stage, config, force=parsed.force)) + "\n"


def console_of(config: Any, parsed: argparse.Namespace) -> AbstractContextManager[None]:
    """Return what shows raygr's lines while a stage runs.

    With --debug the console gets all lines; so does that of a cluster job, which Ray keeps, and of a dry run.
    """
    if parsed.debug or IN_JOB in os.environ or vars(parsed).get("dry_run"):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
        logging.getLogger("raygr").setLevel(logging.DEBUG if parsed.debug else logging.INFO)
        return nullcontext()
    if isinstance(config, PipelineConfig):
        settings = [one for entry in config.stages for one in entry.values() if isinstance(one, Mapping)]
        outputs, name = [str(one["output"]) for one in settings if "output" in one], Path(parsed.config or "").stem
    else:
        outputs, name = [config.output], Path(config.output).name
    places = [os.path.dirname(absolute(one)) for one in outputs if "://" not in one]
    # beside the runs: a run's folder starts empty, and is never changed once it is finished
    return own_lines(os.path.join(os.path.commonpath(places) if places else tempfile.gettempdir(), f"{name}.log"))


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


def failed(stage: str, message: str, code: int, error: BaseException, *, debug: bool) -> int:
    """Print why the stage ended, with what the console has noted at the error; return `code`."""
    if debug:
        traceback.print_exception(error)
    print("\n".join([f"raygr {stage}: {message}", *vars(error).get("__notes__", [])]), file=sys.stderr)
    return code


def in_words(error: Exception) -> tuple[str, int]:
    """Return a message and the exit code: 2 for an error that a user can fix, 1 for any other."""
    if "ray" in sys.modules:
        from raygr.ray_setup import cause_of

        error = cause_of(error)
    if isinstance(error, USER_ERRORS):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError) and error.name in OF_EXTRA_LLM:
        return f"this needs {error.name}, which is not installed: pip install 'raygr[llm]'", 2
    text = " ".join(str(error).split())
    shown = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."
    return f"{type(error).__name__}: {shown} (--debug shows the traceback)", 1


def config_source(stage: str, parsed: argparse.Namespace) -> tuple[str | None, list[str], list[str]]:
    """Return the file of the stage's settings, those of --set and those of flags."""
    file = parsed.config
    if stage == "reproduce" and not file:
        file = shipped(f"configs/paper/{parsed.experiment}.yaml")
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
