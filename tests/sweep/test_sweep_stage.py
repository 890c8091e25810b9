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
    monkeypatch.setattr(stage.ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(stage.ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])


@pytest.mark.parametrize(
    ("resources", "workers", "changes", "trials"),
    [
        ({"CPU": 2}, 1, {}, 1),
        ({"CPU": 9}, 1, {}, 4),
        ({"CPU": 9}, 2, {}, 3),
        ({"CPU": 9}, 1, {"max_concurrent_trials": 3}, 3),
        ({"CPU": 2}, 1, {"max_concurrent_trials": 3}, 1),
        ({"CPU": 16, "GPU": 1}, 1, {}, 1),
        ({"CPU": 16, "GPU": 1}, 1, {"gpu_share": 0.25}, 4),
        ({"CPU": 4, "GPU": 1}, 1, {"gpu_share": 0.25}, 2),
        ({"CPU": 16, "GPU": 2}, 1, {"gpu_share": 0.6}, 2),  # 0.6 of a GPU leaves no room on it
        ({"CPU": 16, "GPU": 2}, 2, {"gpu_share": 0.6}, 1),
    ],
)
def test_as_many_trials_run_at_once_as_fit_with_their_workers(toy, monkeypatch, resources, workers, changes, trials):
    has_resources(monkeypatch, resources)
    config = settings(toy, {"seed": [0, 1]}, train={"workers": workers}, **changes)
    assert stage.trials_at_once(config, trained(config)[0]) == trials


@pytest.mark.parametrize(
    ("resources", "train", "words"),
    [
        ({"CPU": 1}, {}, "a trial needs 2 CPUs.* Ray has 1"),
        ({"CPU": 4}, {"workers": 4}, "a trial needs 5 CPUs.* Ray has 4"),
        ({"CPU": 4, "GPU": 1}, {"workers": 3, "use_gpu": True}, "3 workers need 0.5 of a GPU each, Ray has 1"),
        ({"CPU": 4}, {"threads": 4}, "a trial needs 5 CPUs.* Ray has 4"),
        ({"CPU": 4, "GPU": 1}, {"workers": 2}, "gpu_share: 0.5 may put two of a run's 2 workers on one GPU"),
    ],
)
def test_a_trial_that_can_never_be_placed_is_refused(toy, monkeypatch, resources, train, words):
    has_resources(monkeypatch, resources)
    config = settings(toy, {"seed": [0, 1]}, train=train, gpu_share=0.5)
    with pytest.raises(ConfigError, match=words):
        stage.trials_at_once(config, trained(config)[0])


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
    """There are two CPUs, so the last trial needs the CPU of the stopped one."""
    space = {"learning_rate": [0.01, 1e-12, 1e30]}
    early = {"stop_early": True, "grace_epochs": 3, "max_failures": 1}
    config = settings(toy, space, train={"epochs": 30, "patience": 30}, **early)
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
        (folder / "sweep.yaml").write_text(json.dumps(written))
        killed = sweeping(folder, folder / "killed.log")
        second = folder / "sweep/trials/0001_seed=1/epochs.jsonl"
        latest = time.monotonic() + 240
        while not (second.exists() and len(second.read_text().splitlines()) >= 5):
            assert killed.poll() is None and time.monotonic() < latest, (folder / "killed.log").read_text()
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        first = folder / "sweep/trials/0000_seed=0/run.json"
        before = first.stat().st_mtime_ns
        of_the_killed = len((folder / "sweep.log").read_text())
        resumed = sweeping(folder, folder / "resumed.log")
        assert resumed.wait(timeout=240) == 0, (folder / "resumed.log").read_text()
        log = (folder / "sweep.log").read_text()[of_the_killed:]
        assert first.stat().st_mtime_ns == before
        assert "goes on with the trials" in log
        assert int(re.search(r"resumed after epoch (\d+)", log)[1]) >= 4
        # one trial was trained now, from where it was
        assert log.count(": 60 of 60 epochs") == 1 and log.count(": 1 of 60 epochs") == 0
        table = pd.read_parquet(folder / "sweep/results.parquet")
        assert table["status"].tolist() == ["finished"] * 2 and table["epochs"].tolist() == [60] * 2


GPU_TRIALS = """
import json, sys, time
from pathlib import Path
import ray, ray.train
from ray import tune
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from raygr.execution.distributed import placement, workers_on_gpus

folder = sys.argv[1]  # as a name it reaches the workers; their sys.argv is Ray's

def loop(settings):
    name = ray.train.get_context().get_experiment_name()
    Path(folder, f"begun-{name}").touch()
    latest = time.monotonic() + 120
    while len(list(Path(folder).glob("begun-*"))) < 2 and time.monotonic() < latest:
        time.sleep(0.02)
    print("worker", json.dumps([ray.get_gpu_ids(), len(list(Path(folder).glob("begun-*")))]), flush=True)

def trial(point):
    run = ray.train.RunConfig(name=str(point["n"]), storage_path=folder)
    placed = placement(1, use_gpu=True, gpu_share=0.5)
    DataParallelTrainer(loop, train_loop_config={}, run_config=run, scaling_config=placed).fit()

if __name__ == "__main__":
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False)
    settings = tune.TuneConfig(max_concurrent_trials=workers_on_gpus(1, 0.5))
    tune.Tuner(trial, param_space={"n": tune.grid_search([0, 1])}, tune_config=settings,
               run_config=tune.RunConfig(storage_path=folder, name="gpus")).fit()
"""


@pytest.mark.slow
def test_two_trials_share_a_gpu_at_the_same_time(tmp_path: Path):
    """This tests placement alone, in a Ray with a declared GPU, because torch would need a real one."""
    (tmp_path / "trials.py").write_text(GPU_TRIALS)
    command = [sys.executable, str(tmp_path / "trials.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    workers = [json.loads(found) for found in re.findall(r"worker (\[.*\])", done.stdout)]
    assert len(workers) == 2, done.stdout
    (first_ids, first_begun), (second_ids, second_begun) = workers
    assert first_ids == second_ids and len(first_ids) == 1
    assert first_begun == second_begun == 2  # each waited for the other to begin
