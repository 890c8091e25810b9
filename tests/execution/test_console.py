"""What a command's console shows, and what goes to its log file."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raygr.execution import console
from raygr.execution.console import WorkerFormatter, log_progress, own_lines

logger = logging.getLogger("raygr.train.loop")


class Screen(io.StringIO):
    """A terminal of 80 columns."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The console's time, in seconds."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def lines_of(text: str) -> list[str]:
    return [line[9:] for line in text.splitlines()]


def test_the_console_has_raygrs_lines_and_the_log_file_has_all(tmp_path: Path, capfd):
    log = tmp_path / "new" / "base.log"
    with own_lines(str(log)):
        logger.info("7 items")
        os.system("echo from a child process")
        os.write(2, b"core_worker.cc:2465: from C++\n")
        print("from a library")
        print("and its warning", file=sys.stderr)
        logging.getLogger("vllm").warning("from its logger")
        logger.warning("dead aspect")
    print("after it", file=sys.stderr)
    shown = capfd.readouterr()
    assert lines_of(shown.err) == [f"what Ray and vLLM print: {log}", "7 items", "dead aspect", ""]
    assert shown.err.endswith("\nafter it\n") and shown.out == ""
    for text in ("INFO 7 items", "child", "from C++", "a library", "its warning", "its logger", "WARNING dead aspect"):
        assert log.read_text().count(text) == 1, text
    assert not logging.getLogger("raygr").handlers


def test_lines_of_workers_are_the_consoles_own(tmp_path: Path, capsys):
    written = [
        logger.makeRecord("raygr.train.loop", logging.WARNING, "", 1, "%d dead\naspects", (7,), None),
        logger.makeRecord("raygr.train.loop", logging.INFO, "", 1, "test", (), None),
    ]
    lines = [WorkerFormatter().format(record) for record in written]
    with own_lines(str(tmp_path / "run.log")):
        for line in lines:
            print(f"\x1b[36m(RayTrainWorker pid=7)\x1b[0m {line}")
            print(f"\x1b[36m(RayTrainWorker pid=7) {line}\x1b[0m", file=sys.stderr)
        print("(RayTrainWorker pid=7) loading weights")
    assert lines_of(capsys.readouterr().err)[1:] == ["7 dead aspects", "7 dead aspects", "test", "test"]
    assert "(RayTrainWorker pid=7) loading weights\n" in (tmp_path / "run.log").read_text()
    assert (tmp_path / "run.log").read_text().count("\n") == 5


def test_without_a_terminal_progress_is_a_line_after_silence(tmp_path: Path, capsys, clock):
    with own_lines(str(tmp_path / "run.log")):
        logger.info("begin")
        log_progress(logger, "base", 0, 60, "epochs")
        for epoch in range(1, 61):
            clock[0] += 4
            log_progress(logger, "base", epoch, 60, "epochs", f"loss {epoch}.5")
    shown = lines_of(capsys.readouterr().err)
    assert shown[2] == "base: 3 of 60 epochs, loss 3.5, 4 s each, 03:48 left"
    assert len(shown) == 2 + 60 // 3  # 4 seconds each, and ten of silence
    assert shown[-1] == "base: 60 of 60 epochs, loss 60.5, 4 s each"
    assert "base: 59 of 60 epochs, loss 59.5" in (tmp_path / "run.log").read_text()


def test_long_work_says_less_and_less_often(tmp_path: Path, capsys, clock):
    with own_lines(str(tmp_path / "run.log")):
        for done in range(3600):
            log_progress(logger, "score items", done, 3600, "items")
            clock[0] += 10
    assert 100 < len(capsys.readouterr().err.splitlines()) < 160


def test_progress_of_workers_has_the_clock_that_they_give(tmp_path: Path, capsys, clock):
    with own_lines(str(tmp_path / "run.log")):
        clock[0] += 60
        log_progress(logger, "score items", 32, 320, "items", seconds=16.0)  # and 44 to start the engine
        print("(MapWorker pid=1) raygr INFO: [sft|1/2|steps] loss 3")
        clock[0] += 30
        print("(MapWorker pid=1) raygr INFO: [sft|2/2|steps] loss 2")
    shown = lines_of(capsys.readouterr().err)
    assert shown[1:] == [
        "score items: 32 of 320 items, 2 per second, 02:24 left",
        "sft: 2 of 2 steps, loss 2, 30 s each",
    ]


def test_a_terminal_shows_one_bar_and_lines_above_it(tmp_path: Path, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with own_lines(str(tmp_path / "run.log")):
        for epoch in range(4):
            log_progress(logger, "base", epoch, 4, "epochs", f"loss {epoch}.5")
        logger.warning("dead aspect")
        log_progress(logger, "base", 4, 4, "epochs", "loss 4.5")
    text = screen.getvalue()
    assert "dead aspect\n" in text
    assert text.rstrip("\n").rpartition("\r")[2].startswith("base: 100%") and "4/4" in text and "loss 4.5]" in text


def test_an_error_names_the_log_file_which_has_its_traceback(tmp_path: Path, capsys):
    log = tmp_path / "run.log"
    with pytest.raises(KeyError) as failed, own_lines(str(log)):
        logger.info("begin")
        raise KeyError("rope")
    assert failed.value.__notes__ == [f"log: {log}"]
    assert "Traceback (most recent call last)" in log.read_text()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_command_that_says_nothing_leaves_no_log_file(tmp_path: Path):
    with pytest.raises(KeyError) as failed, own_lines(str(tmp_path / "run.log")):
        raise KeyError("no such run")
    assert not list(tmp_path.iterdir()) and "__notes__" not in vars(failed.value)
    (tmp_path / "run.log").write_text("of an earlier attempt\n")
    with own_lines(str(tmp_path / "run.log")):
        pass
    assert (tmp_path / "run.log").read_text() == "of an earlier attempt\n"


def test_a_worker_writes_lines_that_the_driver_knows():
    code = (
        "import logging; from raygr.execution.console import log_progress, log_to_driver\n"
        "log_to_driver(); logger = logging.getLogger('raygr.x')\n"
        "logger.info('a'); logger.debug('b'); log_progress(logger, 'sft', 3, None, 'steps', 'loss 2')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.splitlines() == ["raygr INFO: a", "raygr INFO: [sft|3/?|steps] loss 2"]
