"""Messages and exit codes of errors on the command line."""

import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from ray.train import ControllerError, WorkerGroupError

import raygr
from raygr import cli
from raygr.config import ConfigError
from raygr.runs import RunError
from raygr.train import stage


def wrapped(cause: Exception) -> Exception:
    """The error as Ray raises it in the driver: of both classes, with the traceback of another process as text."""
    text = "ray::Map()\n" + "  File engine.py, line 1\n" * 200
    return RayTaskError("map", text, cause, proctitle="ray::Map", pid=1, ip="127.0.0.1").as_instanceof_cause()


FRAME = '  File "engine.py", line 1, in score\n    raise it\n    ^^^^^^^^\n'
CAUSED = "\n\nThe above exception was the direct cause of the following exception:\n\n"


def of_user_code(*errors: str) -> Exception:
    """The error that Ray Data raises for an error of our function: it carries only the text of that error."""
    place, last = (
        "\x1b[36mray::Map()\x1b[39m (pid=7)\n",
        "ray.exceptions.UserCodeException: UDF failed.\nTo change retries",
    )
    text = CAUSED.join([*(f"{place}{FRAME * 50}{one}" for one in errors), place + last])
    return RayTaskError("map", text, UserCodeException("UDF failed"), pid=1, ip="127.0.0.1").as_instanceof_cause()


def of_an_actor(error: str) -> Exception:
    """The error of an actor that failed to start."""
    return ActorDiedError(RayTaskError("init", f"ray::Engine.__init__()\n{FRAME * 50}{error}", KeyError("rope")))


REFUSED = ConfigError("model: gone is not there")
PYDANTIC = (
    "pydantic_core.ValidationError: 1 error for ModelConfig\n  dtype is none\n    See https://errors.pydantic.dev"
)


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ConfigError("two\nlines, both of use"), "two\nlines, both of use", 2),
        (RunError("out is finished"), "out is finished", 2),
        (OSError(30, "Read-only file system", "/ro"), "[Errno 30] Read-only file system: '/ro'", 2),
        (KeyError("rope"), "KeyError: 'rope' (--debug shows the traceback)", 1),
        (wrapped(REFUSED), "model: gone is not there", 2),
        (of_user_code("raygr.prepare.bad_rows.InputError: a.csv: no rows"), "a.csv: no rows", 2),
        (of_user_code("KeyError: 1", "raygr.config.ConfigError: a.csv: no rows"), "a.csv: no rows", 2),
        (of_user_code("FileNotFoundError: [Errno 2] m.csv"), "[Errno 2] m.csv", 2),
        (of_user_code("TypeError: bad call"), "TypeError: bad call (--debug", 1),
        (WorkerGroupError("text\n" * 99, {0: wrapped(REFUSED)}), "model: gone is not there", 2),
        (ControllerError(REFUSED), "model: gone is not there", 2),
        (of_an_actor("KeyError: 'rope'"), "KeyError: 'rope' (--debug", 1),
        (of_an_actor("ValueError: max_model_len is too large"), "max_model_len is too large", 2),
        (of_an_actor(PYDANTIC), "ValidationError: 1 error for ModelConfig dtype is none See https", 1),
        (TypeError("a\n" * 2000), "TypeError: a a", 1),
    ],
)
def test_an_error_is_one_message_whatever_ray_wraps_around_it(monkeypatch, capsys, tmp_path, error, message, code):
    def fail(config):
        raise error

    monkeypatch.setattr(stage, "train", fail)
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

    monkeypatch.setattr(stage, "train", interrupt)
    assert cli.main(["train", "--set", f"output={tmp_path}/o", "--set", f"data={tmp_path}/d"]) == 130
    assert capsys.readouterr().err == "raygr train: interrupted; the same command goes on from here\n"


def test_warnings_that_have_scrolled_away_are_printed_again_at_the_end(monkeypatch, capsys, tmp_path):
    logger = logging.getLogger("raygr.train.stage")

    def train(config):
        logger.warning("7 items have no scores")
        logger.warning("7 items have no scores")
        for epoch in range(config.epochs):
            logger.info("epoch %d", epoch)
        logger.warning("users' share is below %d%%", 1)
        raise RunError("full disk")

    monkeypatch.setattr(stage, "train", train)
    monkeypatch.setenv("LINES", "24")
    command = ["train", "--output", f"{tmp_path}/o", "--data", f"{tmp_path}/d"]
    assert cli.main([*command, "--epochs", "40"]) == 2
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "warnings of this run, once more:",
        "  7 items have no scores",
        "raygr train: full disk",
        f"log: {tmp_path}/o.log",
    ]
    assert cli.main([*command, "--epochs", "4"]) == 2
    assert "once more" not in capsys.readouterr().err
    assert not logging.getLogger("raygr").handlers
    monkeypatch.setattr(cli, "A_MINUTE", 0)
    assert cli.main([*command, "--epochs", "1"]) == 2
    assert "once more:\n  7 items have no scores\n  users' share is below 1%\n" in capsys.readouterr().err


def test_an_error_before_ray_does_not_load_it():
    code = (
        "import sys; from raygr import cli\n"
        "print(cli.main(['train', '--set', 'output=o', '--set', 'data=nowhere']), 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[0] == "2" and "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_the_package_runs_as_a_module_and_offers_its_functions():
    command = [sys.executable, "-m", "raygr", "train", "--help"]
    assert "--set NAME=VALUE" in subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert [one.__name__ for one in (raygr.explain_item, raygr.load_recommender)] == [
        "explain_item",
        "load_recommender",
    ]
    with pytest.raises(AttributeError, match="no attribute 'recommender'"):
        _ = raygr.recommender
    assert importlib.metadata.version("raygr") == raygr.__version__
    pytest.importorskip("peft", reason="needs the extra llm")
    assert raygr.finetune_llm.__name__ == "finetune"


def test_the_help_loads_no_library_that_computes():
    """`raygr --help` answers in less than half a second, of which these would take seconds."""
    code = "import sys; from raygr.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "print([name for name in ('numpy', 'pyarrow', 'pandas', 'torch', 'ray') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "recommend" in shown and shown.splitlines()[-1] == "[]"


def test_bash_completes_stages_flags_values_and_paths(tmp_path: Path, capsys):
    pytest.importorskip("shtab", reason="needs shtab to write the script")
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "raygr.bash").write_text(capsys.readouterr().out)
    (tmp_path / "train.yaml").touch()
    completed = {
        "tr": "train",
        "train --epo": "--epochs",
        "train --model ''": "gru4rec sasrec bert4rec",
        "train --config tr": "train.yaml",
        "schema pre": "prepare",
        "init tr": "train.yaml",
    }
    ask = "COMP_WORDS=(raygr {}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_raygr; echo ${{COMPREPLY[@]}}"
    script = "\n".join([". ./raygr.bash", *map(ask.format, completed)])
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert found.stdout.splitlines() == list(completed.values())
