"""Curves of a training in TensorBoard, MLflow and Weights & Biases, by the setting `loggers` of `train` and `finetune`.

A resumed run goes on in the runs that its first attempt opened: loggers.json holds their ids.
"""

import posixpath
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from raygr import files
from raygr.config import ConfigError, Logger
from raygr.schema import EVENTS, LOGGER_IDS


class Point(NamedTuple):
    """Figures by name at a step, which is an epoch of `train`, with the seconds since 1970."""

    step: int
    figures: Mapping[str, float]
    time: float


def check_loggers(names: Sequence[Logger]) -> None:
    """ConfigError where the library of a logger is not installed."""
    for name in names:
        if name != "tensorboard" and find_spec(name) is None:
            raise ConfigError(f"loggers: {name} is not installed: pip install 'raygr[{name}]'")


class Loggers:
    """The open loggers of one run. Writes are of new points only, so a caller passes all that it has.

    `logged` counts the points of each series that an earlier attempt of the run has logged.
    """

    def __init__(self, names: Sequence[Logger], output: str, settings: Mapping[str, Any], *, logged: Mapping[str, int]):
        path = files.join(output, LOGGER_IDS)
        ids = files.read_json(path) if files.exists(path) else {}
        self.event_file = EventFile(files.join(output, EVENTS)) if "tensorboard" in names else None
        self.mlflow = MlflowRun(output, settings, ids.get("mlflow")) if "mlflow" in names else None
        self.wandb = WandbRun(output, settings, ids.get("wandb")) if "wandb" in names else None
        self.servers = [one for one in (self.mlflow, self.wandb) if one]
        ids = {name: one.id for name, one in (("mlflow", self.mlflow), ("wandb", self.wandb)) if one}
        if ids:
            files.write_json(ids, path)
        self.in_file, self.on_servers = Counter[str](), Counter(logged)

    def write(self, series: str, points: Sequence[Point]) -> None:
        """Adds the new ones of all points of a series so far."""
        if self.event_file:  # begun again by every attempt
            self.event_file.write(points[self.in_file[series] :])
        for one in self.servers:
            one.write(points[self.on_servers[series] :])
        self.in_file[series] = self.on_servers[series] = len(points)

    def close(self) -> None:
        for one in (self.event_file, *self.servers):
            if one:
                one.close()


class EventFile:
    """TensorBoard's file."""

    def __init__(self, path: str):
        from tensorboardX.event_file_writer import EventsWriter

        # object stores cannot append: the file grows in a local folder and is copied as a whole
        self.path, self.folder = path, tempfile.TemporaryDirectory()
        # not SummaryWriter, whose flush does not wait for its writing thread
        self.writer = EventsWriter(str(Path(self.folder.name, "events")))

    def write(self, points: Sequence[Point]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.figures.items()]
            self.writer.write_event(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        self.writer.flush()
        (file,) = Path(self.folder.name).iterdir()
        filesystem, inner = files.filesystem_of(self.path)
        with filesystem.open(inner, "wb") as target:
            target.write(file.read_bytes())

    def close(self) -> None:
        self.writer.close()
        self.folder.cleanup()


class MlflowRun:
    """A run of MLflow in an experiment named after the folder of the output; MLFLOW_TRACKING_URI says where."""

    def __init__(self, output: str, settings: Mapping[str, Any], run_id: str | None):
        import mlflow
        from mlflow.entities import Param

        self.client = mlflow.MlflowClient()
        if run_id is None:
            folder, name = posixpath.split(output.rstrip("/"))
            experiment = mlflow.set_experiment(folder).experiment_id
            run_id = self.client.create_run(experiment, run_name=name).info.run_id
            self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in settings.items()])
        self.id = run_id

    def write(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for point in points:
            milliseconds = int(1000 * point.time)
            metrics = [Metric(name, value, milliseconds, point.step) for name, value in point.figures.items()]
            self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class WandbRun:
    """A run of Weights & Biases in a group named after the folder of the output; WANDB_PROJECT and its like hold."""

    def __init__(self, output: str, settings: Mapping[str, Any], run_id: str | None):
        import wandb

        folder, name = posixpath.split(output.rstrip("/"))
        group = folder[-128:]  # more is refused
        self.run = wandb.init(id=run_id, resume="allow", name=name, group=group, config=dict(settings))
        # wandb's own step may never fall, and the series of a run have steps of their own
        self.run.define_metric("*", step_metric="step")
        self.id: str = self.run.id

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self.run.log({**point.figures, "step": point.step})

    def close(self) -> None:
        self.run.finish()
