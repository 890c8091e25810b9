"""What the command line says of errors, and the exit code of each."""

import subprocess
import sys

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from ray.train import ControllerError, WorkerGroupError

from raygr import cli
from raygr.config import ConfigError
from raygr.recommenders import train
from raygr.runs import RunError


def wrapped(cause: Exception) -> Exception:
    """As Ray raises it in the driver: a kind of both, whose text is a traceback of another process."""
    text = "ray::Map()\n" + "  File engine.py, line 1\n" * 200
    return RayTaskError("map", text, cause, proctitle="ray::Map", pid=1, ip="127.0.0.1").as_instanceof_cause()


def of_user_code(cause: Exception) -> Exception:
    error = UserCodeException("text of a traceback\n" * 100)
    error.__cause__ = cause
    return error


REFUSED = ConfigError("model: gone is not there")
TRACEBACK = "ray::Engine.__init__()\n  File engine.py, line 1\n    raise\nKeyError: 'rope'\n"


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ConfigError("two\nlines, both of use"), "two\nlines, both of use", 2),
        (RunError("out is finished"), "out is finished", 2),
        (OSError(30, "Read-only file system", "/ro"), "[Errno 30] Read-only file system: '/ro'", 2),
        (KeyError("rope"), "KeyError: 'rope' (--debug shows the traceback)", 1),
        (wrapped(REFUSED), "model: gone is not there", 2),
        (wrapped(of_user_code(REFUSED)), "model: gone is not there", 2),
        (of_user_code(wrapped(REFUSED)), "model: gone is not there", 2),
        (WorkerGroupError("text\n" * 99, {0: wrapped(REFUSED)}), "model: gone is not there", 2),
        (ControllerError(REFUSED), "model: gone is not there", 2),
        (ActorDiedError(RayTaskError("init", TRACEBACK, KeyError("rope"))), "KeyError: 'rope'", 1),
        (TypeError("a\n" * 2000), "TypeError: a a", 1),
    ],
)
def test_an_error_is_one_message_whatever_ray_wraps_around_it(monkeypatch, capsys, tmp_path, error, message, code):
    def fail(config):
        raise error

    monkeypatch.setattr(train, "train", fail)
    command = ["train", "--set", f"output={tmp_path}/o", "--set", f"data={tmp_path}/d"]
    assert cli.main(command) == code
    said = capsys.readouterr().err
    assert said.startswith(f"raygr train: {message}") and "Traceback" not in said
    assert len(said) < 800 and said.count("\n") == message.count("\n") + 1
    assert cli.main([*command, "--debug"]) == code
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and shown.endswith(said)


def test_an_interrupted_stage_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupt)
    assert cli.main(["train", "--set", f"output={tmp_path}/o", "--set", f"data={tmp_path}/d"]) == 130
    assert capsys.readouterr().err == "raygr train: interrupted; the same command goes on from here\n"


def test_an_error_before_ray_does_not_load_it():
    code = (
        "import sys; from raygr import cli\n"
        "print(cli.main(['train', '--set', 'output=o', '--set', 'data=nowhere']), 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[0] == "2" and "nowhere" in done.stderr and "Traceback" not in done.stderr
