"""The score store: answers of the LLM, kept by what was asked and shared by runs.

Parquet files under `<store>/<key>/`, where the key stands for everything that changes an answer (asking.py), rows
keyed by the prompt's hash. Actors write one file per finished batch; `compact` turns these into few large ones.
A prompt may have been asked more than once: the best answer counts, and of equally good ones the last.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raygr import files

STORE_SCHEMA = pa.schema(
    [
        ("prompt_sha256", pa.string()),
        ("ratings", pa.list_(pa.int8())),
        ("expected", pa.list_(pa.float32())),
        ("reason", pa.string()),
        ("completion", pa.string()),
        ("written", pa.int64()),  # nanoseconds since 1970
    ]
)
OK, NOT_FINITE, REFUSED_BY_ENGINE = "ok", "not_finite", "refused_by_engine"
# Reasons that are no answers of the model, so that the prompt is always asked again.
NOT_ANSWERED = (NOT_FINITE, REFUSED_BY_ENGINE)
LARGE_BYTES = 16 << 20  # a file of this size is left alone by `compact`
COMPACTED_ROWS = 500_000  # of one compacted file
READERS = 16
LISTINGS = 5  # tries to read a folder that another run compacts meanwhile


@dataclasses.dataclass(frozen=True)
class StoredScore:
    """One subject's answer: A ratings in 1..10 or None, A expected ratings or None, and why."""

    ratings: tuple[int | None, ...]
    expected: tuple[float | None, ...]
    reason: str
    completion: str

    @classmethod
    def from_probabilities(cls, probabilities_AR: np.ndarray) -> "StoredScore":
        """Most probable and expected rating of each aspect from P(1..10), shape (A, 10)."""
        finite_A = np.isfinite(probabilities_AR).all(axis=1)
        expected_A = probabilities_AR @ np.arange(1, 11)
        return cls(
            ratings=tuple(
                int(p.argmax()) + 1 if ok else None for p, ok in zip(probabilities_AR, finite_A, strict=True)
            ),
            expected=tuple(float(e) if ok else None for e, ok in zip(expected_A, finite_A, strict=True)),
            reason=OK if finite_A.all() else NOT_FINITE,
            completion="",
        )

    @classmethod
    def without_answer(cls, aspects: int, *, reason: str, why: str = "") -> "StoredScore":
        return cls(ratings=(None,) * aspects, expected=(None,) * aspects, reason=reason, completion=why)


@dataclasses.dataclass(frozen=True)
class ScoreStore:
    """The part of a store that belongs to one way of asking."""

    path: str

    def write(self, hashes: Sequence[str], scores: Sequence[StoredScore]) -> None:
        now = time.time_ns()
        rows = [
            {"prompt_sha256": h, **dataclasses.asdict(s), "written": now} for h, s in zip(hashes, scores, strict=True)
        ]
        # an actor that was killed after it wrote writes the same file again; another attempt's answers are another file
        name = hashlib.sha256("".join([*hashes, *(repr(s) for s in scores)]).encode()).hexdigest()[:32]
        files.write_table(pa.Table.from_pylist(rows, schema=STORE_SCHEMA), files.join(self.path, f"{name}.parquet"))

    def read(self) -> pa.Table:
        """The best answer to each prompt, one row per hash."""
        return best_of_each_hash(self.rows())

    def known(self, *, retry_failed: bool = False, unread: bool = True) -> set[str]:
        """Hashes that need not be asked.

        `retry_failed` leaves out those of which not every rating was read; `unread=False` those of which none was.
        """
        rows = self.rows(["prompt_sha256", "ratings", "reason"])
        answered = pc.equal(rows["reason"], OK) if retry_failed else pc.invert(is_in(rows["reason"], NOT_ANSWERED))
        if not unread:
            answered = pc.and_(answered, pa.array(ratings_read(rows) > 0))
        return set(rows["prompt_sha256"].filter(answered).to_pylist())

    def ratings_known(self) -> dict[str, int]:
        """Hash -> how many ratings of its best answer were read."""
        rows = best_of_each_hash(self.rows(["prompt_sha256", "ratings", "written"]))
        return dict(zip(rows["prompt_sha256"].to_pylist(), ratings_read(rows).tolist(), strict=True))

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """Every answer of every file, in the order of the files' names."""
        for _ in range(LISTINGS - 1):
            try:
                return self.read_files(sorted(self.sizes()), columns)
            except FileNotFoundError:  # compacted by another run: its rows are in a file of the next listing
                continue
        return self.read_files(sorted(self.sizes()), columns)

    def read_files(self, files: list[str], columns: list[str] | None = None) -> pa.Table:
        if not files:
            return pa.schema([STORE_SCHEMA.field(name) for name in columns or STORE_SCHEMA.names]).empty_table()
        with ThreadPoolExecutor(READERS) as pool:
            # fetched by threads, which wait on S3, and parsed by one, since more only fight for Python's lock
            fetched = map(pa.BufferReader, pool.map(self.filesystem().cat_file, files))
            tables = [pq.ParquetFile(whole).read(columns=columns, use_threads=False) for whole in fetched]
        return pa.concat_tables(tables).combine_chunks()  # thousands of chunks take longer to sort than to read

    def compact(self) -> None:
        """Turns small files into few large ones; run again after a crash, it leaves every answer once.

        Files that others write meanwhile stay as they are. The new file is whole before the old ones go.
        """
        small = sorted(path for path, size in self.sizes().items() if size < LARGE_BYTES)
        if len(small) < 2:
            return
        table = best_of_each_hash(self.read_files(small)).sort_by("prompt_sha256")
        written = set()
        for first in range(0, len(table), COMPACTED_ROWS):
            part = table.slice(first, COMPACTED_ROWS)
            content = f"{part['prompt_sha256'].to_pylist()} {part['written'].to_pylist()}"
            name = f"compacted-{hashlib.sha256(content.encode()).hexdigest()[:32]}.parquet"
            files.write_table(part, files.join(self.path, name))
            written.add(name)
        for path in small:
            if path.rpartition("/")[2] not in written:
                with suppress(FileNotFoundError):  # another run compacts, too
                    self.filesystem().rm_file(path)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        filesystem, inner = files.filesystem_of(self.path)
        filesystem.invalidate_cache()
        found = filesystem.glob(f"{inner}/*.parquet", detail=True)
        return {path: about["size"] for path, about in found.items()}

    def filesystem(self) -> fsspec.AbstractFileSystem:
        return files.filesystem_of(self.path)[0]


def is_in(column: pa.ChunkedArray, values: Sequence[str]) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(values, pa.string()))


def ratings_read(rows: pa.Table) -> np.ndarray:
    """How many ratings of each row are not null, shape (rows,)."""
    ratings = rows["ratings"].combine_chunks()
    is_read = pc.list_flatten(ratings).is_valid().to_numpy(zero_copy_only=False)
    owner = pc.list_parent_indices(ratings).to_numpy(zero_copy_only=False)
    return np.bincount(owner[is_read], minlength=len(rows))


def best_of_each_hash(rows: pa.Table) -> pa.Table:
    """The row of each hash with the most ratings, the last written of equals."""
    ranked = pa.table({
        "prompt_sha256": rows["prompt_sha256"], "read": ratings_read(rows), "written": rows["written"]
    }).append_column("row", pa.array(np.arange(len(rows))))  # fmt: skip
    ranked = ranked.sort_by([("read", "ascending"), ("written", "ascending")])
    best = ranked.group_by("prompt_sha256", use_threads=False).aggregate([("row", "last")])["row_last"]
    return rows.take(best)


def store_key(mode: str, asked: Mapping[str, Any]) -> str:
    """Folder name of one way of asking; `asked` is all that changes an answer, as JSON values."""
    text = json.dumps({"mode": mode, **asked}, sort_keys=True, default=str)
    return f"{mode}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
