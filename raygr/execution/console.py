"""What a command shows: raygr's own lines and the progress of long work; all else that is printed goes to a log file.

Ray's workers write their lines with `log_to_driver`. Ray prints them in the driver, where `own_lines` finds them again.
"""

import io
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

SILENCE = 10.0  # seconds without a line after which progress says one, where there is no terminal
FEWER_LINES = 20  # and at most every twentieth of the time so far: ten hours of work make some 150 lines
OWN = logging.getLogger("raygr")
OF_A_WORKER = re.compile(
    r"raygr (DEBUG|INFO|WARNING|ERROR): (?:\[(.+?)\|(\d+)/(\d+|\?)\|(.+?)\] )?(.*?)(?:\x1b\[\d*m)?$"
)


class ProgressMark(NamedTuple):
    """How far some long work is."""

    what: str
    done: int
    total: int | None
    unit: str
    """In the plural, such as `epochs`."""
    figures: str
    """Such as a loss."""
    seconds: float | None
    """Seconds that it took so far; None: as the console's clock says."""


def log_progress(
    logger: logging.Logger,
    what: str,
    done: int,
    total: int | None,
    unit: str,
    figures: str = "",
    *,
    seconds: float | None = None,
) -> None:
    """Log how far `what` is. The first call starts the clock, best with `done` = 0; `done` = `total` ends the work.

    The log file gets a line for every call, a terminal a bar, any other console a line now and then.
    """
    text = f"{what}: {done:,} {f'of {total:,} ' if total else ''}{unit}{figures and f', {figures}'}"
    logger.info("%s", text, extra={"progress": ProgressMark(what, done, total, unit, figures, seconds)})


def progress_of(record: logging.LogRecord) -> ProgressMark | None:
    return vars(record).get("progress")


# --- workers -------------------------------------------------------------------------------------


class WorkerFormatter(logging.Formatter):
    """Formats a record as one line, which `OF_A_WORKER` reads."""

    def format(self, record: logging.LogRecord) -> str:
        step = progress_of(record)
        text = " ".join((step.figures if step else record.getMessage()).split())
        place = f"[{step.what}|{step.done}/{step.total or '?'}|{step.unit}] " if step else ""
        return f"raygr {record.levelname}: {place}{text}"


def log_to_driver(level: int = logging.INFO) -> None:
    """Write raygr's lines of this process, a worker of Ray, in the form that the driver's console knows as its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(WorkerFormatter())
    OWN.handlers, OWN.propagate = [handler], False
    OWN.setLevel(level)


def log_again(line: str) -> bool:
    """Log a line that `log_to_driver` wrote in a worker; return False for a line of anybody else."""
    found = OF_A_WORKER.search(line)
    if not found:
        return False
    level, what, done, total, unit, text = found.groups()
    logger = logging.getLogger("raygr.worker")
    if what:
        log_progress(logger, what, int(done), None if total == "?" else int(total), unit, text)
    else:
        logger.log(logging.getLevelNamesMapping()[level], "%s", text)
    return True


# --- driver --------------------------------------------------------------------------------------


@contextmanager
def own_lines(log_path: str) -> Iterator[None]:
    """Show raygr's lines alone while the block runs; they and all that others print are added to the log file.

    Whatever writes to file descriptors 1 and 2 counts, C++ code and child processes too. An error gets its traceback
    there, and the file's path as a note. A file without any line of raygr is deleted again.
    """
    is_new = not Path(log_path).exists()
    Path(log_path).parent.mkdir(parents=True, exist_ok=True)
    streams, level, root = (sys.stdout, sys.stderr), OWN.level, logging.getLogger()
    for stream in streams:
        stream.flush()
    copies = os.dup(1), os.dup(2)
    screen = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") if is_standard(sys.stderr) else sys.stderr
    with open(log_path, "a", buffering=1, encoding="utf-8", errors="replace") as log:
        shown, kept = ConsoleHandler(screen, log_path), logging.StreamHandler(log)
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            sys.stdout = sys.stderr = DriverStream(log)
            OWN.addHandler(shown)
            OWN.setLevel(logging.INFO)
            root.addHandler(kept)
            yield
        except BaseException as error:
            traceback.print_exc(file=log)
            if shown.said:
                error.add_note(f"log: {log_path}")
            raise
        finally:
            root.removeHandler(kept)
            OWN.removeHandler(shown)
            OWN.setLevel(level)
            shown.close()
            for copy, descriptor in zip(copies, (1, 2), strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            sys.stdout, sys.stderr = streams
            if screen is not sys.stderr:
                screen.close()
            if is_new and not shown.said:
                Path(log_path).unlink()


def is_standard(stream: TextIO) -> bool:
    """Return whether a stream is this process's file descriptor 2, and not one that a test or a notebook put there."""
    try:
        return stream.fileno() == 2
    except (OSError, ValueError):
        return False


class DriverStream(io.TextIOBase):
    """Stands for stdout and stderr: lines of raygr in workers are logged, everything else goes to the log file."""

    def __init__(self, log: TextIO) -> None:
        self.log, self.is_own = log, False

    def write(self, text: str) -> int:
        if not (self.is_own and text == "\n"):  # print writes the line's end on its own
            self.is_own = log_again(text)
            if not self.is_own:
                self.log.write(text)
        return len(text)

    def flush(self) -> None:
        self.log.flush()

    def fileno(self) -> int:
        return self.log.fileno()


class ConsoleHandler(logging.Handler):
    """Prints log lines, and progress as bars on a terminal, or else as a line after SILENCE."""

    def __init__(self, screen: TextIO, log_path: str) -> None:
        super().__init__()
        self.screen, self.log_path, self.said = screen, log_path, 0.0
        self.bars: dict[str, tqdm] = {}
        self.first: dict[str, tuple[float, int]] = {}  # time and `done` of a work's first call
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        step = progress_of(record)
        if step is None:
            self.say(self.format(record))
        elif self.screen.isatty():
            self.draw(step)
        else:
            self.say_progress(step, self.format(record))

    def say(self, line: str) -> None:
        if not self.said:
            line = f"{line[:8]} what Ray and vLLM print: {self.log_path}\n{line}"
        tqdm.write(line, file=self.screen)  # above the bars, where there are any
        self.screen.flush()
        self.said = time.monotonic()

    def draw(self, step: ProgressMark) -> None:
        bar = self.bars.get(step.what)
        if bar is None:
            bar = self.bars[step.what] = tqdm(
                desc=step.what, total=step.total, initial=0 if step.seconds else step.done, unit=f" {step.unit}",
                file=self.screen, dynamic_ncols=True, mininterval=0.2,
            )  # fmt: skip
        bar.total = step.total
        if step.seconds:
            bar.start_t = time.time() - step.seconds
        bar.set_postfix_str(step.figures, refresh=False)
        bar.update(step.done - bar.n)
        if step.done == step.total:
            self.bars.pop(step.what).close()

    def say_progress(self, step: ProgressMark, line: str) -> None:
        now = time.monotonic()
        began, before = self.first.setdefault(step.what, (now, step.done))
        is_last = step.done == step.total
        done, seconds = (step.done, step.seconds) if step.seconds else (step.done - before, now - began)
        is_due = now - self.said >= max(SILENCE, (now - began) / FEWER_LINES)
        if step.done and (is_due or (is_last and seconds >= 1)):
            self.say(line + pace(step, done, seconds))
        if is_last:
            del self.first[step.what]

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()
        super().close()


def pace(step: ProgressMark, done: int, seconds: float) -> str:
    """Return the speed and the time left, such as `, 2.5 per second, 01:20 left`; "" before there are any."""
    if not (done > 0 and seconds > 0):
        return ""
    rate = done / seconds
    speed = f", {rate:,.3g} per second" if rate >= 1 else f", {seconds / done:.3g} s each"
    left = tqdm.format_interval((step.total - step.done) / rate) if step.total and step.done < step.total else ""
    return speed + (left and f", {left} left")
