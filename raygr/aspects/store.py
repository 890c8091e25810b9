"""The score store: answers of the LLM, kept by what was asked and shared by runs.

Parquet files under `<store>/<key>/`, where the key names model, adapter, mode and sampling, one file
per finished batch, rows keyed by the prompt's hash. A run asks only for the hashes that are missing, so
the store serves resume after a kill and reuse between runs alike. A batch that runs again writes the
same file, so no score is ever there twice.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raygr import runs

STORE_SCHEMA = pa.schema(
    [
        ("prompt_sha256", pa.string()),
        ("ratings", pa.list_(pa.int8())),
        ("expected", pa.list_(pa.float32())),
        ("reason", pa.string()),
        ("completion", pa.string()),
    ]
)
OK, NOT_FINITE = "ok", "not_finite"


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


@dataclasses.dataclass(frozen=True)
class ScoreStore:
    """The part of a store that belongs to one way of asking."""

    path: str

    def write(self, hashes: Sequence[str], scores: Sequence[StoredScore]) -> None:
        rows = [{"prompt_sha256": h, **dataclasses.asdict(s)} for h, s in zip(hashes, scores, strict=True)]
        name = hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]
        runs.write_table(pa.Table.from_pylist(rows, schema=STORE_SCHEMA), runs.join(self.path, f"{name}.parquet"))

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Every finished batch; rows are unique by hash."""
        filesystem, inner = runs.filesystem_of(self.path)
        files = sorted(filesystem.glob(f"{inner}/*.parquet"))
        tables = [pq.read_table(file, columns=columns, filesystem=filesystem) for file in files]
        if not tables:
            schema = STORE_SCHEMA if columns is None else pa.schema([STORE_SCHEMA.field(c) for c in columns])
            return schema.empty_table()
        return first_of_each_hash(pa.concat_tables(tables))

    def hashes(self) -> set[str]:
        return set(self.read(["prompt_sha256"])["prompt_sha256"].to_pylist())


def first_of_each_hash(table: pa.Table) -> pa.Table:
    """Two runs that share a store may both have asked; either answer will do."""
    numbered = table.append_column("row", pa.array(np.arange(len(table))))
    first = numbered.group_by("prompt_sha256").aggregate([("row", "min")])["row_min"]
    return table.take(first)


def store_key(*, model: str, adapter: str, mode: str, temperature: float, seed: int) -> str:
    """Folder name of one way of asking; what does not change an answer is not in it."""
    sampling = f"{temperature}-{seed}" if mode != "probe" and temperature > 0 else "greedy"
    digest = hashlib.sha256("\n".join([model, adapter, mode, sampling]).encode()).hexdigest()
    return f"{mode}-{digest[:16]}"
