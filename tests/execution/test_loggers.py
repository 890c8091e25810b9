"""The loggers get every number once, at its step, also after a resume."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from raygr.config import ConfigError
from raygr.execution.loggers import Loggers, Point, check_loggers
from raygr.finetune.stage import log_curves
from raygr.train.stage import curve_point


def line(epoch: int) -> dict:
    metrics = {"validation": {"ndcg_at_10": epoch / 10}} if epoch % 2 == 0 else {}
    return {"epoch": epoch, "loss": 1 / epoch, "seconds": 0.5, "learning_rate": 0.25, "time": 1e9 + epoch} | metrics


def read(folder: Path) -> list[tuple[str, int, float, float]]:
    """(tag, step, value, time) of the records: length, its checksum, the event, its checksum."""
    content, found = (folder / "events.out.tfevents.raygr").read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value, event.wall_time) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_the_event_file_has_every_line_once_and_a_resumed_run_starts_it_over(tmp_path: Path):
    points = [curve_point(line(epoch)) for epoch in (1, 2, 3)]
    loggers = Loggers(["tensorboard"], str(tmp_path), {}, logged={})
    loggers.write("epochs", points[:2])
    loggers.write("epochs", points)
    loggers.close()
    whole = read(tmp_path)
    assert [(tag, epoch) for tag, epoch, *_ in whole if tag == "train/loss"] == [("train/loss", n) for n in (1, 2, 3)]
    assert [found[1:] for found in whole if found[0] == "validation/ndcg_at_10"] == [(2, 0.20000000298023224, 1e9 + 2)]
    assert len(whole) == 3 * 3 + 1
    resumed = Loggers(["tensorboard"], str(tmp_path), {}, logged={"epochs": 2})
    resumed.write("epochs", points)
    resumed.close()
    assert read(tmp_path) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"events.out.tfevents.raygr"}


def test_steps_and_evaluations_of_a_fine_tune(tmp_path: Path):
    lines = [
        {"stage": "warm_start", "step": 1, "loss": 3.0},
        {"stage": "reinforcement", "step": 1, "reward": 0.5, "kl": None, "losses": {"value": -0.25}},
    ]
    evaluations = [{"stage": "reinforcement", "step": 1, "metrics": {"reward": 0.75, "auc": None}, "users": {}}]
    loggers = Loggers(["tensorboard"], str(tmp_path), {}, logged={})
    log_curves(loggers, SimpleNamespace(progress=SimpleNamespace(lines=lines, evaluations=evaluations)))
    loggers.close()
    assert [found[:3] for found in read(tmp_path)] == [
        ("warm_start/loss", 1, 3.0),
        ("reinforcement/reward", 1, 0.5),
        ("reinforcement/loss_value", 1, -0.25),
        ("held_out/reward", 1, 0.75),
    ]


@pytest.fixture
def servers(monkeypatch) -> dict[str, Any]:
    """Stand-ins for mlflow and wandb, which take the calls of their installed versions and keep what they get."""
    kept: dict[str, Any] = {"runs": [], "metrics": [], "params": [], "ended": [], "wandb": [], "rows": []}

    class Client:
        def create_run(self, experiment_id, run_name):
            kept["runs"].append((experiment_id, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{len(kept['runs'])}"))

        def log_batch(self, run_id, metrics=(), params=()):
            kept["metrics"] += [(run_id, *one) for one in metrics]
            kept["params"] += params

        def set_terminated(self, run_id):
            kept["ended"].append(run_id)

    class Run:
        id = "w1"

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, row):
            kept["rows"].append(row)

        def finish(self):
            kept["ended"].append(self.id)

    def init(**given: Any) -> Run:
        kept["wandb"].append(given)
        return Run()

    mlflow, entities, wandb = ModuleType("mlflow"), ModuleType("mlflow.entities"), ModuleType("wandb")
    vars(mlflow).update(MlflowClient=Client, set_experiment=lambda name: SimpleNamespace(experiment_id=name))
    vars(entities).update(Metric=lambda *values: values, Param=lambda *values: values)
    vars(wandb).update(init=init)
    for module in (mlflow, entities, wandb):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return kept


def test_servers_get_new_points_only_and_a_resumed_run_goes_on_there(tmp_path: Path, servers):
    output, points = str(tmp_path / "arms" / "base"), [Point(n, {"train/loss": n / 2}, 1e9 + n) for n in (1, 2, 3)]
    loggers = Loggers(["mlflow", "wandb"], output, {"epochs": 3}, logged={"epochs": 0})
    loggers.write("epochs", points[:1])
    loggers.write("epochs", points[:2])  # and then it is killed
    resumed = Loggers(["mlflow", "wandb"], output, {"epochs": 3}, logged={"epochs": 2})
    resumed.write("epochs", points)
    resumed.close()
    assert servers["runs"] == [(str(tmp_path / "arms"), "base")] and servers["params"] == [("epochs", "3")]
    times = [int(1000 * point.time) for point in points]
    assert servers["metrics"] == [("run-1", "train/loss", n / 2, times[n - 1], n) for n in (1, 2, 3)]
    assert servers["rows"] == [{"train/loss": n / 2, "step": n} for n in (1, 2, 3)]
    assert [one["id"] for one in servers["wandb"]] == [None, "w1"] and servers["ended"] == ["run-1", "w1"]
    assert (servers["wandb"][0]["name"], servers["wandb"][0]["config"]) == ("base", {"epochs": 3})


def test_a_logger_that_is_not_installed_names_its_extra(monkeypatch):
    check_loggers(["tensorboard"])
    monkeypatch.setattr("raygr.execution.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"loggers: wandb is not installed: pip install 'raygr\[wandb\]'"):
        check_loggers(["tensorboard", "wandb"])
