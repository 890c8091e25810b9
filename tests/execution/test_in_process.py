"""Small stages run in the calling process, with the results that they have on Ray, and leave the process as it was."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import safetensors.torch
import torch
from toy_data import cycles, random_scores, write_csv, write_prepared
from toy_sweep import ITEMS
from toy_sweep import settings as sweep_settings

from raygr import files, runs
from raygr.config import ConfigError
from raygr.execution import in_process
from raygr.execution.in_process import CHECKPOINT, cpus_here, last_checkpoint, runs_here, save_checkpoint, worker_here
from raygr.finetune import stage as finetune_stage
from raygr.recommend.config import RecommendConfig
from raygr.recommend.stage import recommend
from raygr.score import stage as score_stage
from raygr.sweep.config import needs_ray
from raygr.sweep.stage import sweep
from raygr.train import stage as train_stage
from raygr.train.config import TrainConfig
from raygr.train.stage import train, train_all

ASPECTS = ["pace", "tension", "humour", "length"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 users who walk a cycle of 20 items, and item scores of four aspects; no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_prepared(tmp_path / "prepare", cycles(20, ITEMS, 12), items=ITEMS)
    scores_IA = random_scores(ITEMS, 4, seed=0)
    write_csv(tmp_path / "scores.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
    return tmp_path


def settings(folder: Path, **changes: Any) -> TrainConfig:
    small = {"base_width": 16, "batch_size": 8, "max_history": 10, "epochs": 4, "dropout": 0.2, "threads": 1}
    small |= {"output": str(folder / "train"), "data": str(folder / "prepare"), "use_gpu": False}
    return TrainConfig(**(small | changes))


def losses(output: str | Path) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(output, "epochs.jsonl").read_text().splitlines()]


# --- which way ---------------------------------------------------------------------------------


def test_auto_runs_small_work_here_unless_there_is_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert runs_here("auto", is_small=True) and not runs_here("auto", is_small=False)
    assert runs_here("never", is_small=False) and not runs_here("always", is_small=True)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not runs_here("auto", is_small=True) and runs_here("never", is_small=True)


def test_auto_takes_a_joined_ray_of_several_nodes_for_a_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    nodes = [{"Alive": True}, {"Alive": False}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert runs_here("auto", is_small=True)
    nodes.append({"Alive": True})
    assert not runs_here("auto", is_small=True)


def test_auto_leaves_threads_to_ray(monkeypatch):
    """Two trainings in one process would draw from the same random numbers."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(runs_here("auto", is_small=True)))
    thread.start()
    thread.join()
    assert found == [False]


class OnRay(Exception):
    """Raised in place of starting Ray."""


@pytest.mark.parametrize(
    ("changes", "small", "is_here"),
    [
        ({}, 240 * 4, True),
        ({}, 240 * 4 - 1, False),
        ({"epochs": 5}, 240 * 4, False),
        ({"workers": 2}, 240 * 4, False),
        ({"ray": "always"}, 240 * 4, False),
        ({"ray": "never"}, 0, True),
    ],
)
def test_a_training_is_small_by_interactions_times_epochs(toy: Path, monkeypatch, changes, small, is_here):
    def refuse(*_: object) -> None:
        raise OnRay

    monkeypatch.setattr(train_stage, "loop_on_ray", refuse)
    monkeypatch.setattr(train_stage, "SMALL", small)
    monkeypatch.setattr(train_stage, "train_and_write", lambda config, inputs, worker: None)
    config = settings(toy, **changes)
    if is_here:
        assert runs.is_finished(train(config).path)
    else:
        with pytest.raises(OnRay):
            train(config)


def test_the_documented_bounds_are_the_codes():
    text = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert f"at most {train_stage.SMALL // 1_000_000} million interactions times epochs" in text
    assert f"at most {score_stage.SMALL:,} subjects" in text
    assert f"at most {finetune_stage.SMALL:,} prompts times epochs" in text


# --- what is refused ---------------------------------------------------------------------------


def test_what_cannot_run_here_is_refused_by_name(toy: Path, monkeypatch):
    with pytest.raises(ValueError, match=r"ray: never trains in the calling process.*set workers: 1"):
        settings(toy, ray="never", workers=2)
    with pytest.raises(ValueError, match=r"ray: never recommends in the calling process.*set workers: 1"):
        RecommendConfig(output="x", train_run="y", ray="never", workers=2)
    with pytest.raises(ConfigError, match=r"ray: never, but search: tpe, stop_early need Ray"):
        sweep_settings(toy, {"seed": [0, 1]}, search="tpe", trials=2, stop_early=True, ray="never")
    with pytest.raises(ConfigError, match=r"train.workers: trials train side by side, each in one worker"):
        sweep_settings(toy, {"seed": [0, 1]}, train={"workers": 2})
    with pytest.raises(ConfigError, match=r"train.ray: the sweep's own ray decides"):
        sweep_settings(toy, {"seed": [0, 1]}, train={"ray": "always"})
    with pytest.raises(ConfigError, match="at_once: 2 train runs side by side need Ray, and ray: never forbids it"):
        train_all(lambda config: None, [settings(toy, ray="never")], 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="use_gpu: this machine has no GPU that torch can use"):
        train(settings(toy, use_gpu=True))
    many = cpus_here() + 1
    with pytest.raises(ConfigError, match=f"threads: {many} need as many CPUs, this machine has {many - 1}"):
        train(settings(toy, threads=many))
    assert not (toy / "train").exists()


def test_a_worker_here_takes_the_gpu_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [worker_here(use_gpu, 1).device.type for use_gpu in (None, True, False)] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [worker_here(use_gpu, 1).device.type for use_gpu in (None, False)] == ["cpu", "cpu"]


@pytest.mark.parametrize(("limit", "cpus"), [("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1)])
def test_a_containers_limit_bounds_the_cpus(tmp_path: Path, monkeypatch, limit: str, cpus: int):
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(in_process, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert cpus_here() == cpus


def test_where_there_is_no_affinity_every_cpu_counts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(in_process, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert cpus_here() == 10


# --- the calling process -----------------------------------------------------------------------


def test_the_calling_process_stays_as_it_was(toy: Path):
    """Threads, random numbers and log levels, also where training fails or is interrupted."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    levels = [logging.getLogger(name).level for name in (None, "raygr", "ray")]
    train(settings(toy, threads=cpus_here()))
    with pytest.raises(ValueError, match="lower the learning rate"):
        train(settings(toy, learning_rate=1e30, epochs=1, output=str(toy / "diverged")))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert [logging.getLogger(name).level for name in (None, "raygr", "ray")] == levels


def test_an_interrupted_training_goes_on_where_it_was(toy: Path, monkeypatch, caplog):
    """Ctrl-C passes through, and the same call resumes from the last evaluation."""
    config = settings(toy, item_scores=str(toy / "scores.csv"))
    saved: list[int] = []

    def save_and_interrupt(state: dict[str, Any], output: str) -> None:
        save_checkpoint(state, output)
        saved.append(state["progress"]["epoch"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_stage, "save_checkpoint", save_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert saved == [1, 2] and Path(config.output, CHECKPOINT).exists()
    caplog.set_level(logging.INFO, logger="raygr")
    run = train(config)
    assert "resumed after epoch 2" in caplog.text
    assert not Path(run.path, CHECKPOINT).exists()
    straight = train(settings(toy, item_scores=str(toy / "scores.csv"), output=str(toy / "straight")))
    assert_equal_runs(run.path, straight.path)


KILLED = """
import os, signal, sys
from raygr.train import stage
from raygr.train.config import TrainConfig

def save_and_die(state, output):
    stage.in_process_save(state, output)
    if state["progress"]["epoch"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)

stage.in_process_save, stage.save_checkpoint = stage.save_checkpoint, save_and_die
stage.train(TrainConfig(**CONFIG))
"""


def test_a_killed_process_loses_nothing_and_needs_no_ray(toy: Path):
    changes = {"epochs": 6, "patience": 6}
    given = {name: value for name, value in vars(settings(toy, **changes)).items() if not name.startswith("__")}
    killed = run_python(f"CONFIG = {given!r}\n{KILLED}")
    assert killed.returncode == -9, killed.stderr
    assert len(losses(toy / "train")) == 3
    resumed = run_python(
        "import sys\nfrom raygr.train.stage import train\nfrom raygr.train.config import TrainConfig\n"
        "from raygr.recommend.stage import recommend\nfrom raygr.recommend.config import RecommendConfig\n"
        f"run = train(TrainConfig(**{given!r}))\n"
        f"recommend(RecommendConfig(output={str(toy / 'lists')!r}, train_run=run.path, use_gpu=False))\n"
        "print([name for name in sys.modules if name == 'ray'])"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.strip() == "[]"
    assert runs.is_finished(str(toy / "lists"))
    straight = train(settings(toy, **changes, output=str(toy / "straight")))
    assert_equal_runs(str(toy / "train"), straight.path)


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)


def test_the_checkpoint_of_a_uri_is_read_back(tmp_path: Path):
    output, cpu = f"file://{tmp_path}", torch.device("cpu")
    assert last_checkpoint(output, cpu) is None
    for epoch in (1, 2):
        save_checkpoint({"epoch": epoch, "weights": torch.full((2,), float(epoch))}, output)
    state = last_checkpoint(output, cpu)
    assert state["epoch"] == 2 and state["weights"].tolist() == [2.0, 2.0]
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


# --- sweeps ------------------------------------------------------------------------------------


def test_a_small_sweep_trains_its_trials_here_and_tries_a_failed_one_again(toy: Path, monkeypatch):
    """The order, the folders and the errors are those of a sweep on Ray Tune."""
    from raygr.sweep import stage

    tried: list[str] = []

    def counted(config: TrainConfig) -> runs.Run:
        assert config.ray == "never"
        tried.append(Path(config.output).name)
        return train(config)

    monkeypatch.setattr(stage, "train", counted)
    monkeypatch.setattr(stage, "connect", lambda: pytest.fail("Ray was started"))
    config = sweep_settings(toy, {"learning_rate": [0.01, 1e30, 0.02]}, max_failures=2)
    run = sweep(config)
    first, failed, last = "0000_learning_rate=0.01", "0001_learning_rate=1e+30", "0002_learning_rate=0.02"
    assert tried == [first, failed, failed, failed, last]
    table = pd.read_parquet(run.file("results.parquet"))
    assert table["status"].tolist() == ["finished", "failed", "finished"]
    assert [Path(one).name for one in table["run"]] == [first, failed, last]
    assert "lower the learning rate" in table["error"][1]
    assert runs.read_run(run.path, job="sweep").counts["trials"]["finished"] == 2


def test_an_interrupted_sweep_keeps_its_finished_trials(toy: Path, monkeypatch):
    from raygr.sweep import stage

    tried: list[str] = []

    def second_is_interrupted(config: TrainConfig) -> runs.Run:
        tried.append(Path(config.output).name)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return train(config)

    monkeypatch.setattr(stage, "train", second_is_interrupted)
    config = sweep_settings(toy, {"seed": [0, 1]})
    with pytest.raises(KeyboardInterrupt):
        sweep(config)
    run = sweep(config)
    assert tried == ["0000_seed=0", "0001_seed=1", "0001_seed=1"]
    assert pd.read_parquet(run.file("results.parquet"))["status"].tolist() == ["finished"] * 2


def test_settings_of_a_sweep_that_need_ray(toy: Path):
    assert needs_ray(sweep_settings(toy, {"seed": [0, 1]})) == []
    assert needs_ray(sweep_settings(toy, {"seed": [0, 1]}, stop_early=True)) == ["stop_early"]


# --- both ways ---------------------------------------------------------------------------------


def assert_equal_runs(first: str, second: str) -> None:
    """Weights, ranks, losses and metrics, bit by bit; seconds apart."""
    weights = [safetensors.torch.load_file(f"{run}/model.safetensors") for run in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(values, weights[1][name]) for name, values in weights[0].items())
    assert files.read_table(f"{first}/ranks.parquet").equals(files.read_table(f"{second}/ranks.parquet"))
    assert losses(first) == losses(second)
    metrics = [files.read_json(f"{run}/metrics.json") for run in (first, second)]
    assert [one.pop("seconds_per_epoch") > 0 for one in metrics] == [True, True]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_a_training_here_equals_one_on_ray(toy: Path, local_ray: Any):
    ways = {}
    for way in ("never", "always"):
        changes = {"item_scores": str(toy / "scores.csv"), "user_scores": "profile", "ray": way}
        ways[way] = train(settings(toy, **changes, output=str(toy / way))).path
    assert Path(ways["always"], "ray").exists() and not Path(ways["never"], "ray").exists()
    assert_equal_runs(*ways.values())


@pytest.mark.slow
def test_lists_made_here_equal_those_of_ray(toy: Path, local_ray: Any):
    trained = train(settings(toy)).path
    tables = []
    for way in ("never", "always"):
        config = RecommendConfig(output=str(toy / way), train_run=trained, n=3, batch_size=7, ray=way, use_gpu=False)
        tables.append(files.read_table(recommend(config).file("recommendations")))
    assert len(tables[0]) == 20 * 3 and tables[0].equals(tables[1])


@pytest.mark.slow
def test_a_sweep_here_equals_one_on_ray_tune(toy: Path, local_ray: Any):
    tables = []
    for way in ("never", "always"):
        config = sweep_settings(toy, {"guided_dimension": [0, 4], "seed": [1]}, output=str(toy / way), ray=way)
        run = sweep(config)
        table = pd.read_parquet(run.file("results.parquet"))
        tables.append(table.assign(run=table["run"].str.removeprefix(run.path)).drop(columns="seconds"))
    assert tables[0]["status"].tolist() == ["finished"] * 2
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
