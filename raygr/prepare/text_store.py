"""The texts of all rows of raw files, until it is known which rows are kept: compressed Arrow streams in a folder."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from raygr.files import filesystem_of, join
from raygr.prepare.scanned_rows import Scanned

GROUP_ROWS = 1 << 20  # of a raw file, in one stream
LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


def stream_path(folder: str, file: int, group: int) -> str:
    """The path of the texts of rows GROUP_ROWS * group and on of the raw file with this index."""
    return join(folder, f"texts-{file:05d}-{group:05d}.arrow")


def store_texts(scanned: Iterator[Scanned], folder: str, file: int) -> Iterator[pa.Table]:
    """Writes the texts of one raw file, and yields its rows of SCAN_SCHEMA."""
    filesystem, inner = filesystem_of(folder)
    filesystem.makedirs(inner, exist_ok=True)
    group, sink, writer = -1, None, None
    try:
        for rows, texts in scanned:
            for number, some in groups_of(texts):
                if number != group:
                    close(writer, sink)
                    group, sink = number, filesystem.open(filesystem_of(stream_path(folder, file, number))[1], "wb")
                    writer = pa.ipc.new_stream(sink, texts.schema, options=LZ4)
                assert writer is not None
                writer.write_table(some)
            yield rows
    finally:
        close(writer, sink)


def groups_of(texts: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The texts, whose rows are in order, by the number of their group."""
    if len(texts):
        groups = texts["row"].to_numpy() // GROUP_ROWS
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(groups)], strict=True):
            yield int(groups[start]), texts.slice(start, end - start)


def close(writer: Any, sink: Any) -> None:
    if writer is not None:
        writer.close()
        sink.close()


def stored_texts(folder: str, file: int, group: int, size: int) -> Iterator[pa.Table]:
    """The stored texts of a group in tables of at least `size` bytes, except the last."""
    filesystem, path = filesystem_of(stream_path(folder, file, group))
    waiting: list[pa.RecordBatch] = []
    with filesystem.open(path, "rb") as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            waiting.append(batch)
            if sum(one.nbytes for one in waiting) >= size:
                yield pa.Table.from_batches(waiting)
                waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)
