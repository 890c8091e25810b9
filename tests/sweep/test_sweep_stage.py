"""Trials fit their cluster, run, stop early, fail, and resume after a kill."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
from toy_data import cycles, write_prepared
from toy_sweep import ITEMS, SMALL, settings, trained, write_toy

from raygr import files, runs
from raygr.config import ConfigError
from raygr.execution import loggers
from raygr.sweep import stage
from raygr.sweep.space import train_config


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def test_tpe_and_mlflow_say_what_to_install(toy: Path, monkeypatch):
    monkeypatch.setattr(stage, "connect", lambda: pytest.fail("Ray was started"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'raygr\[optuna\]'"):
        stage.sweep(settings(toy, {"seed": [0, 1]}, search="tpe", trials=2))
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"loggers: mlflow .* pip install 'raygr\[mlflow\]'"):
        stage.sweep(settings(toy, {"seed": [0, 1]}, train={"loggers": ["tensorboard", "mlflow"]}))


# --- placement ---------------------------------------------------------------------------------


def has_resources(monkeypatch, resources: dict) -> None:
    """The resources of a Ray with one node."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])


@pytest.mark.parametrize(
    ("resources", "train", "changes", "room"),
    [
        ({"CPU": 2}, {}, {}, (2, {"CPU": 1})),
        ({"CPU": 9}, {"threads": 2}, {}, (4, {"CPU": 2})),
        ({"CPU": 9}, {"threads": None}, {"max_concurrent_trials": 3}, (3, {"CPU": 3})),
        ({"CPU": 2}, {}, {"max_concurrent_trials": 3}, (2, {"CPU": 1})),
        ({"CPU": 16, "GPU": 1}, {}, {}, (1, {"CPU": 1, "GPU": 1})),
        ({"CPU": 16, "GPU": 1}, {}, {"gpu_share": 0.25}, (4, {"CPU": 1, "GPU": 0.25})),
        ({"CPU": 2, "GPU": 1}, {}, {"gpu_share": 0.25}, (2, {"CPU": 1, "GPU": 0.25})),
        ({"CPU": 16, "GPU": 2}, {}, {"gpu_share": 0.6}, (2, {"CPU": 1, "GPU": 0.6})),  # 0.6 leaves no room on a GPU
        ({"CPU": 16, "GPU": 2}, {"use_gpu": False}, {}, (16, {"CPU": 1})),
    ],
)
def test_as_many_trials_run_at_once_as_fit(toy, monkeypatch, resources, train, changes, room):
    has_resources(monkeypatch, resources)
    config = settings(toy, {"seed": [0, 1]}, train=train, **changes)
    assert stage.trial_room(config, trained(config)[0]) == room


@pytest.mark.parametrize(
    ("resources", "train", "words"),
    [
        ({"CPU": 2}, {"threads": 4}, "1 of 4 threads each need 4 CPUs, Ray has 2"),
        ({"CPU": 4}, {"use_gpu": True}, "1 workers need 0.5 of a GPU each, Ray has 0"),
    ],
)
def test_a_trial_that_can_never_be_placed_is_refused(toy, monkeypatch, resources, train, words):
    has_resources(monkeypatch, resources)
    config = settings(toy, {"seed": [0, 1]}, train=train, gpu_share=0.5)
    with pytest.raises(ConfigError, match=words):
        stage.trial_room(config, trained(config)[0])


# --- on Ray ------------------------------------------------------------------------------------


def test_tpe_suggests_points_of_the_space(toy: Path):
    """Two aspects and a rate of 1e-3 are best, so later suggestions lie near them."""
    pytest.importorskip("optuna")
    space = {"guided_dimension": [2, 4, ["pace", "length"]], "learning_rate": {"low": 1e-5, "high": 1.0, "log": True}}
    config = settings(toy, space, search="tpe", trials=40)
    searcher = stage.search_algorithm(config, [], 1).searcher
    searcher.set_search_properties(stage.BEST, "max", stage.tune_space(config))
    points = []
    for number in range(40):
        point = searcher.suggest(str(number))
        assert point["guided_dimension"] in (2, 4, "pace, length") and 1e-5 <= point["learning_rate"] <= 1
        off = abs(math.log10(point["learning_rate"]) + 3) + (point["guided_dimension"] != 2)
        searcher.on_trial_complete(str(number), result={stage.BEST: -off, "training_iteration": 1})
        points.append(off)
        train_config(config, point, name="")
    assert sum(points[20:]) < sum(points[:20])


@pytest.mark.slow
def test_trials_finish_stop_early_and_fail_beside_each_other(toy: Path, local_ray: Any):
    """There are two CPUs, and each trial takes both: the last one needs those of the stopped one."""
    space = {"learning_rate": [0.01, 1e-12, 1e30]}
    early = {"stop_early": True, "grace_epochs": 3, "max_failures": 1}
    config = settings(toy, space, train={"epochs": 30, "patience": 30, "threads": 2}, **early)
    on_interrupt = signal.getsignal(signal.SIGINT)
    run = stage.sweep(config)
    assert signal.getsignal(signal.SIGINT) is on_interrupt
    record = runs.read_run(run.path, job="sweep")
    assert record.counts["trials"] == {"all": 3, "finished": 1, "stopped_early": 1, "failed": 1}
    table = pd.read_parquet(run.file("results.parquet")).set_index("learning_rate")
    assert table["status"].to_dict() == {0.01: "finished", 1e-12: "stopped early", 1e30: "failed"}
    assert "the loss of epoch 1 is" in table["error"][1e30]
    assert 3 <= table["epochs"][1e-12] < 30 and table["epochs"][0.01] == 30
    assert not runs.is_finished(table["run"][1e-12])
    # the stage itself made them
    metrics = files.read_json(files.join(table["run"][0.01], "metrics.json"))
    assert metrics["validation"]["full"]["ndcg_at_10"] == pytest.approx(table["validation_ndcg@10"][0.01])
    assert runs.read_run(table["run"][0.01], job="train").config["learning_rate"] == 0.01
    [errors] = Path(run.path, "tune").glob("*learning_rate=1e+30/error.txt")
    assert "Failure # 2" in errors.read_text()  # tried again, once
    given_back = time.monotonic() + 30
    while local_ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < given_back:
        time.sleep(0.5)
    assert local_ray.available_resources()["CPU"] == 2
    with pytest.raises(runs.RunError, match="finished run"):
        stage.sweep(config)


def sweeping(folder: Path, log: Path) -> subprocess.Popen:
    """`raygr sweep` in a Ray of its own with two CPUs."""
    command = [sys.executable, "-m", "raygr.cli", "sweep", "--config", f"{folder}/sweep.yaml"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment |= {"RAY_TMPDIR": str(folder), "HOME": str(folder), "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_trials_that_had_not_ended():
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:  # Ray's sockets need it short
        folder = Path(name)
        write_prepared(folder / "prepare", cycles(20, ITEMS, 12), items=ITEMS)
        train = {"data": f"{folder}/prepare", "epochs": 60, "patience": 60} | SMALL | {"epochs": 60}
        written = {"output": f"{folder}/sweep", "train": train, "space": {"seed": [0, 1]}, "ray": "always"}
        written["max_concurrent_trials"] = 1  # so that the first has ended when the sweep is killed
        (folder / "sweep.yaml").write_text(json.dumps(written))
        killed = sweeping(folder, folder / "killed.log")
        second = folder / "sweep/trials/0001_seed=1/epochs.jsonl"
        latest = time.monotonic() + 480
        while not (second.exists() and len(second.read_text().splitlines()) >= 5):
            assert killed.poll() is None and time.monotonic() < latest, (folder / "killed.log").read_text()
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        first = folder / "sweep/trials/0000_seed=0/run.json"
        before = first.stat().st_mtime_ns
        of_the_killed = len((folder / "sweep.log").read_text())
        resumed = sweeping(folder, folder / "resumed.log")
        assert resumed.wait(timeout=480) == 0, (folder / "resumed.log").read_text()
        log = (folder / "sweep.log").read_text()[of_the_killed:]
        assert first.stat().st_mtime_ns == before
        assert "goes on with the trials" in log
        assert int(re.search(r"resumed after epoch (\d+)", log)[1]) >= 4
        # one trial was trained now, from where it was
        assert log.count(": 60 of 60 epochs") == 1 and log.count(": 1 of 60 epochs") == 0
        table = pd.read_parquet(folder / "sweep/results.parquet")
        assert table["status"].tolist() == ["finished"] * 2 and table["epochs"].tolist() == [60] * 2
