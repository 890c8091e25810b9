"""The score store: answers of LLMs, shared by score runs so that no prompt is asked twice.

The store holds Parquet files under `<store>/<key>/`. The key covers everything besides the prompt that changes an
answer: model, adapter, mode, sampling and engine settings. Rows are keyed by the prompt's hash. Engine actors write one
file per finished batch; `compact` merges these into few large files. Where a prompt was asked more than once, the
answer with the most ratings counts, and of equals the last one written.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import try_to_load_from_cache

from raygr import files
from raygr.score.adapters import adapter_folder, answer_mode
from raygr.score.answer_format import OK
from raygr.score.config import ANSWER_SETTINGS, SAME_ANSWERS, ScoreConfig
from raygr.score.default_model import model_folder

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
NOT_FINITE, REFUSED_BY_ENGINE = "not_finite", "refused_by_engine"
NOT_ANSWERED = (NOT_FINITE, REFUSED_BY_ENGINE)  # not answers of the model: such a prompt is always asked again
LARGE_BYTES = 16 << 20  # `compact` leaves files of this size alone
COMPACTED_ROWS = 500_000  # rows of one compacted file
READERS = 16  # threads
LISTINGS = 5  # attempts to read a folder that another run is compacting

# Choices of the engine that change an answer.
LOGPROBS_MODE = "raw_logprobs"  # before the masks that force an answer's format
CPU_DTYPE = "float32"  # faster than bfloat16 on processors without AMX


@dataclasses.dataclass(frozen=True)
class StoredScore:
    """The answer to one prompt: A ratings in 1..10 or None, A expected ratings or None, and the reason."""

    ratings: tuple[int | None, ...]
    expected: tuple[float | None, ...]
    reason: str
    completion: str

    @classmethod
    def from_probabilities(cls, probabilities_AQ: np.ndarray) -> "StoredScore":
        """Most probable and expected rating of each aspect from P(1..10), shape (A, 10)."""
        finite_A = np.isfinite(probabilities_AQ).all(axis=1)
        expected_A = probabilities_AQ @ np.arange(1, 11)
        return cls(
            ratings=tuple(
                int(p.argmax()) + 1 if ok else None for p, ok in zip(probabilities_AQ, finite_A, strict=True)
            ),
            expected=tuple(float(e) if ok else None for e, ok in zip(expected_A, finite_A, strict=True)),
            reason=OK if finite_A.all() else NOT_FINITE,
            completion="",
        )


@dataclasses.dataclass(frozen=True)
class ScoreStore:
    """The folder of the store that belongs to one key."""

    path: str

    def write(self, hashes: Sequence[str], scores: Sequence[StoredScore]) -> None:
        now = time.time_ns()
        rows = [
            {"prompt_sha256": h, **dataclasses.asdict(s), "written": now} for h, s in zip(hashes, scores, strict=True)
        ]
        # an actor that was killed after writing writes the same file again; other answers get another file
        name = hashlib.sha256("".join([*hashes, *(repr(s) for s in scores)]).encode()).hexdigest()[:32]
        files.write_table(pa.Table.from_pylist(rows, schema=STORE_SCHEMA), files.join(self.path, f"{name}.parquet"))

    def read(self) -> pa.Table:
        """The best answer to each prompt, one row per hash."""
        return best_of_each_hash(self.rows())

    def known(self, *, retry_failed: bool = False, unread: bool = True) -> set[str]:
        """Hashes of the prompts that need not be asked again.

        `retry_failed` leaves out answers with a missing rating; `unread=False` leaves out answers without any rating.
        """
        rows = self.rows(["prompt_sha256", "ratings", "reason"])
        not_answered = pc.is_in(rows["reason"], value_set=pa.array(NOT_ANSWERED, pa.string()))
        answered = pc.equal(rows["reason"], OK) if retry_failed else pc.invert(not_answered)
        if not unread:
            answered = pc.and_(answered, pa.array(ratings_read(rows) > 0))
        return set(rows["prompt_sha256"].filter(answered).to_pylist())

    def ratings_known(self) -> dict[str, int]:
        """Map each hash to the number of ratings that were read from its best answer."""
        rows = best_of_each_hash(self.rows(["prompt_sha256", "ratings", "written"]))
        return dict(zip(rows["prompt_sha256"].to_pylist(), ratings_read(rows).tolist(), strict=True))

    def rows(self, columns: list[str] | None = None) -> pa.Table:
        """All answers of all files, in the order of file names."""
        for _ in range(LISTINGS - 1):
            try:
                return self.read_files(sorted(self.sizes()), columns)
            except FileNotFoundError:  # another run compacted it: the next listing has the new file
                continue
        return self.read_files(sorted(self.sizes()), columns)

    def read_files(self, paths: list[str], columns: list[str] | None = None) -> pa.Table:
        if not paths:
            return pa.schema([STORE_SCHEMA.field(name) for name in columns or STORE_SCHEMA.names]).empty_table()
        with ThreadPoolExecutor(READERS) as pool:
            # threads fetch, because they wait on S3; one thread parses, because several would contend for the GIL
            fetched = map(pa.BufferReader, pool.map(self.filesystem().cat_file, paths))
            tables = [pq.ParquetFile(whole).read(columns=columns, use_threads=False) for whole in fetched]
        return pa.concat_tables(tables).combine_chunks()  # sorting thousands of chunks takes longer than reading

    def compact(self) -> None:
        """Merge small files into few large ones; after a crash, a second call leaves every answer once.

        The new file is complete before the old ones are removed. Files that other runs write meanwhile stay.
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
                with suppress(FileNotFoundError):  # another run is compacting, too
                    self.filesystem().rm_file(path)

    def sizes(self) -> dict[str, int]:
        """Map each file to its size in bytes."""
        filesystem, inner = files.filesystem_of(self.path)
        filesystem.invalidate_cache()
        found = filesystem.glob(f"{inner}/*.parquet", detail=True)
        return {path: about["size"] for path, about in found.items()}

    def filesystem(self) -> fsspec.AbstractFileSystem:
        return files.filesystem_of(self.path)[0]


def ratings_read(rows: pa.Table) -> np.ndarray:
    """Count the ratings of each row that are not null, shape (rows,)."""
    ratings = rows["ratings"].combine_chunks()
    is_read = pc.list_flatten(ratings).is_valid().to_numpy(zero_copy_only=False)
    owner = pc.list_parent_indices(ratings).to_numpy(zero_copy_only=False)
    return np.bincount(owner[is_read], minlength=len(rows))


def best_of_each_hash(rows: pa.Table) -> pa.Table:
    """Keep the row of each hash with the most ratings, and of equals the last one written."""
    ranked = pa.table({
        "prompt_sha256": rows["prompt_sha256"], "read": ratings_read(rows), "written": rows["written"]
    }).append_column("row", pa.array(np.arange(len(rows))))  # fmt: skip
    ranked = ranked.sort_by([("read", "ascending"), ("written", "ascending")])
    best = ranked.group_by("prompt_sha256", use_threads=False).aggregate([("row", "last")])["row_last"]
    return rows.take(best)


# --- the key -----------------------------------------------------------------------------------


def open_store(config: ScoreConfig, *, on_gpu: bool) -> ScoreStore:
    """The part of the store with the answers to this configuration. `on_gpu`: the engine runs on a GPU.

    Model, adapter and other files enter the key by their content, not by their path.
    """
    mode = answer_mode(config)
    settings: dict[str, Any] = {"mode": mode}
    if mode != "probe" and config.temperature > 0:
        settings |= {"temperature": config.temperature, "seed": config.seed}
    if config.answered_by:
        settings |= {"answered_by": config.answered_by}
        if config.engine == "http":
            settings |= {name: vars(config.http)[name] for name in ANSWER_SETTINGS}
            settings |= {"max_tokens": config.requests.max_tokens, "body": config.requests.body}
    else:
        chosen = {"dtype": "auto" if on_gpu else CPU_DTYPE, "logprobs_mode": LOGPROBS_MODE, **config.engine_kwargs}
        revision = chosen.pop("revision", None)
        settings |= {
            "model": model_content(model_folder(config.llm), revision),
            "adapter": files.fingerprint(adapter_folder(config.adapter)) if config.adapter else None,
            "engine": {name: content_of(value) for name, value in chosen.items() if name not in SAME_ANSWERS},
        }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return ScoreStore(files.join(config.store or files.join(config.output, "store"), f"{mode}-{key}"))


def model_content(model: str, revision: str | None) -> str:
    """Fingerprint of a model folder; for a hub model its name and, if it is cached here, its commit."""
    if files.exists(model):
        return files.fingerprint(model)
    cached = try_to_load_from_cache(model, "tokenizer_config.json", revision=revision)
    commit = Path(cached).parent.name if isinstance(cached, str) else revision or ""
    return f"{model} {commit}"


def content_of(value: Any) -> Any:
    """Replace the path of every file or folder that a setting names by the fingerprint of its content."""
    match value:
        case str() if value and files.exists(value):
            return files.fingerprint(value)
        case Mapping():
            return {name: content_of(one) for name, one in value.items()}
        case list() | tuple():
            return [content_of(one) for one in value]
    return value
