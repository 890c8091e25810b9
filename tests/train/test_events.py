"""TensorBoard's file: every number of the lines once, at its epoch, also after a resume."""

from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from raygr.train.events import EventFile


def line(epoch: int) -> dict:
    metrics = {"validation": {"ndcg_at_10": epoch / 10}} if epoch % 2 == 0 else {}
    return {"epoch": epoch, "loss": 1 / epoch, "seconds": 0.5, "learning_rate": 0.25, "time": 1e9 + epoch} | metrics


def read(path: str) -> list[tuple[str, int, float, float]]:
    """(tag, epoch, value, time) of the records: length, its checksum, the event, its checksum."""
    content, found = Path(path).read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value, event.wall_time) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_every_line_is_written_once_and_a_resumed_run_starts_over(tmp_path: Path):
    path = str(tmp_path / "events")
    file = EventFile(path)
    file.write([line(1), line(2)])
    file.write([line(1), line(2), line(3)])
    file.close()
    whole = read(path)
    assert [(tag, epoch) for tag, epoch, *_ in whole if tag == "train/loss"] == [("train/loss", n) for n in (1, 2, 3)]
    assert [found[1:] for found in whole if found[0] == "validation/ndcg_at_10"] == [(2, 0.20000000298023224, 1e9 + 2)]
    assert len(whole) == 3 * 3 + 1
    resumed = EventFile(path)
    resumed.write([line(1), line(2), line(3)])
    resumed.close()
    assert read(path) == whole
