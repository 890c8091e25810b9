"""Epoch lines of a run as TensorBoard scalars: loss, learning rate, seconds, validation metrics."""

import tempfile
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from raygr import files


class EventFile:
    """A file that grows with every evaluation. A resumed run starts it again from the lines of its checkpoint."""

    def __init__(self, path: str):
        # object stores cannot append: the file grows in a local folder and is copied as a whole
        self.path, self.folder, self.written = path, tempfile.TemporaryDirectory(), 0
        # not SummaryWriter, whose flush does not wait for its writing thread
        self.writer = EventsWriter(str(Path(self.folder.name, "events")))

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Adds the new ones of `lines`, which are all lines of the run so far."""
        for line in lines[self.written :]:
            scalars = {f"train/{name}": line[name] for name in ("loss", "learning_rate", "seconds")}
            scalars |= {f"validation/{name}": value for name, value in line.get("validation", {}).items()}
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            self.writer.write_event(Event(wall_time=line["time"], step=line["epoch"], summary=Summary(value=values)))
        self.written = len(lines)
        self.writer.flush()
        (file,) = Path(self.folder.name).iterdir()
        filesystem, inner = files.filesystem_of(self.path)
        with filesystem.open(inner, "wb") as target:
            target.write(file.read_bytes())

    def close(self) -> None:
        self.writer.close()
        self.folder.cleanup()
