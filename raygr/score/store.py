"""The score store: answers of LLMs, shared by score runs so that no prompt is asked twice.

The store holds Parquet files under `<store>/<key>/`. The key covers everything besides the prompt that changes an
answer: model, adapter, mode, sampling and engine settings. Rows are keyed by the prompt's hash. Engine actors write one
file per finished batch; `compact` merges these into few large files, sorted by hash. Where a prompt was asked more than
once, the answer with the most ratings counts, and of equals the last one written.

Questions about many prompts scan the store once in batches, against the sorted hashes of these prompts as 32 bytes
each. So memory grows with the prompts that are looked up, by 80 bytes each, and not with the store.
"""

import binascii
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
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
# no answers of the model: such a prompt is always asked again
NO_ANSWERS = pa.array([NOT_FINITE, REFUSED_BY_ENGINE], pa.string())
IS_NO_ANSWER = pc.is_in(pc.field("reason"), NO_ANSWERS)
LARGE_BYTES = 16 << 20  # `compact` leaves files of this size alone
MERGED_BYTES = 64 << 20  # of files that `compact` merges at once: about a million answers
GROUP_ROWS = 1 << 14  # of a compacted file: a reader of a range of hashes skips the others
BATCHES_AHEAD, FILES_AHEAD = 4, 2  # that a scan reads while the last one is looked at
READERS = 16  # threads
LISTINGS = 5  # attempts to read a folder that another run is compacting

Found = TypeVar("Found")

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

    def read(self, low: str = "", high: str = "~") -> pa.Table:
        """The best answer to each prompt whose hash lies in low <= hash < high, one row per hash."""
        in_range = (pc.field("prompt_sha256") >= low) & (pc.field("prompt_sha256") < high)
        rows = self.scanned(lambda dataset: dataset.to_table(filter=in_range))
        return best_of_each_hash(rows.combine_chunks())  # sorting thousands of chunks takes longer than reading

    def has_answers(self) -> bool:
        """Whether the model has answered any prompt."""
        return len(self.scanned(lambda dataset: dataset.head(1, columns=["reason"], filter=~IS_NO_ANSWER))) > 0

    def answered(self, digests_N: np.ndarray, *, retry_failed: bool = False, unread: bool = True) -> np.ndarray:
        """Whether each of these prompts need not be asked again, (N,); hashes as `binary_hashes` returns them.

        `retry_failed` leaves out answers with a missing rating; `unread=False` leaves out answers without any rating.
        """

        def is_answer(rows: pa.RecordBatch) -> np.ndarray:
            counts = pc.equal(rows["reason"], OK) if retry_failed else pc.invert(pc.is_in(rows["reason"], NO_ANSWERS))
            return counts.to_numpy(zero_copy_only=False) & (unread | (ratings_read(rows["ratings"]) > 0))

        return self.greatest(digests_N, ["reason", "ratings"], is_answer) > 0

    def ratings_known(self, digests_N: np.ndarray) -> np.ndarray:
        """The number of ratings in the best answer to each of these prompts, (N,); -1 where there is no answer."""
        return self.greatest(digests_N, ["ratings"], lambda rows: ratings_read(rows["ratings"]))

    def greatest(
        self, digests_N: np.ndarray, columns: list[str], value_of: Callable[[pa.RecordBatch], np.ndarray]
    ) -> np.ndarray:
        """The greatest value among the answers to each prompt, (N,); -1 where there is none."""
        order_N = np.argsort(digests_N)
        sorted_N = digests_N[order_N]

        def scan(dataset: pyarrow.dataset.Dataset) -> np.ndarray:
            value_N = np.full(len(sorted_N), -1, np.int16)
            for rows in dataset.to_batches(
                columns=["prompt_sha256", *columns], batch_readahead=BATCHES_AHEAD, fragment_readahead=FILES_AHEAD
            ):
                digests_R = binary_hashes(rows["prompt_sha256"], self.path)
                place_R = np.searchsorted(sorted_N, digests_R)
                is_asked_R = place_R < len(sorted_N)
                is_asked_R[is_asked_R] = sorted_N[place_R[is_asked_R]] == digests_R[is_asked_R]
                np.maximum.at(value_N, place_R[is_asked_R], value_of(rows)[is_asked_R].astype(np.int16))
            return value_N

        value_N = self.scanned(scan) if len(sorted_N) else np.zeros(0, np.int16)
        found_N = np.empty_like(value_N)
        found_N[order_N] = value_N[np.searchsorted(sorted_N, sorted_N)]  # equal prompts share the first one's value
        return found_N

    def scanned(self, scan: Callable[[pyarrow.dataset.Dataset], Found]) -> Found:
        """What `scan` finds in all files, in the order of their names."""
        for _ in range(LISTINGS - 1):
            with suppress(FileNotFoundError):  # another run compacted it: the next listing has the new file
                return scan(self.dataset())
        return scan(self.dataset())

    def dataset(self) -> pyarrow.dataset.Dataset:
        paths = sorted(self.sizes())
        filesystem = files.arrow_filesystem(self.path)[0]
        return pyarrow.dataset.dataset(paths, schema=STORE_SCHEMA, format="parquet", filesystem=filesystem)

    def compact(self) -> None:
        """Merge small files into few large ones; after a crash, a second call leaves every answer once.

        A new file is complete before the old ones are removed. Files that other runs write meanwhile stay.
        """
        sizes = {path: size for path, size in sorted(self.sizes().items()) if size < LARGE_BYTES}
        with suppress(FileNotFoundError):  # another run is compacting, too
            for merged in groups_of(sizes):
                self.merge(merged)

    def merge(self, paths: list[str]) -> None:
        table = best_of_each_hash(self.read_files(paths)).sort_by("prompt_sha256")
        content = f"{table['prompt_sha256'].to_pylist()} {table['written'].to_pylist()}"
        name = f"compacted-{hashlib.sha256(content.encode()).hexdigest()[:32]}.parquet"
        groups = (table.slice(first, GROUP_ROWS) for first in range(0, len(table), GROUP_ROWS))
        files.write_tables(groups, files.join(self.path, name), compression="zstd")  # which halves hexadecimal digits
        for path in paths:
            if path.rpartition("/")[2] != name:
                with suppress(FileNotFoundError):
                    self.filesystem().rm_file(path)

    def read_files(self, paths: list[str]) -> pa.Table:
        with ThreadPoolExecutor(READERS) as pool:
            # threads fetch, because they wait on S3; one thread parses, because several would contend for the GIL
            fetched = map(pa.BufferReader, pool.map(self.filesystem().cat_file, paths))
            tables = [pq.ParquetFile(whole).read(use_threads=False) for whole in fetched]
        return pa.concat_tables(tables).combine_chunks()

    def sizes(self) -> dict[str, int]:
        """Map each file to its size in bytes."""
        filesystem, inner = files.filesystem_of(self.path)
        filesystem.invalidate_cache()
        found = filesystem.glob(f"{inner}/*.parquet", detail=True)
        return {path: about["size"] for path, about in found.items()}

    def filesystem(self) -> fsspec.AbstractFileSystem:
        return files.filesystem_of(self.path)[0]


def binary_hashes(hashes: pa.Array | pa.ChunkedArray, source: str) -> np.ndarray:
    """The hashes as 32 bytes each, which numpy sorts and compares, (N,); ValueError names a source of other strings."""
    found = []
    try:
        for part in hashes.chunks if isinstance(hashes, pa.ChunkedArray) else [hashes]:
            if part.null_count or pc.any(pc.not_equal(pc.binary_length(part), 64)).as_py():
                raise ValueError("not 64 digits")
            digits = memoryview(part.buffers()[2] or b"")[64 * part.offset :][: 64 * len(part)]
            found.append(np.frombuffer(binascii.unhexlify(digits), "S32"))
    except ValueError as error:  # also where a string is no hexadecimal number
        raise ValueError(
            f"{source}: prompt_sha256 holds other values than 64 hexadecimal digits: raygr did not write these files, "
            "or they are damaged"
        ) from error
    return np.concatenate(found) if found else np.zeros(0, "S32")


def hash_ranges(count: int) -> Iterator[tuple[str, str]]:
    """Cut the hashes into `count` ranges of equal width, each `low` and the `high` that it does not hold."""
    edges = ["", *(f"{(part << 32) // count:08x}" for part in range(1, count)), "~"]
    return itertools.pairwise(edges)


def groups_of(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Groups of two files or more with MERGED_BYTES in all, or a little more."""
    group: list[str] = []
    group_bytes = 0
    for path, size in sizes.items():
        group.append(path)
        group_bytes += size
        if len(group) > 1 and group_bytes >= MERGED_BYTES:
            yield group
            group, group_bytes = [], 0
    if len(group) > 1:
        yield group


def ratings_read(ratings: pa.ListArray) -> np.ndarray:
    """Count the ratings of each row that are not null, shape (rows,)."""
    is_read = pc.list_flatten(ratings).is_valid().to_numpy(zero_copy_only=False)
    owner = pc.list_parent_indices(ratings).to_numpy(zero_copy_only=False)
    return np.bincount(owner[is_read], minlength=len(ratings))


def best_of_each_hash(rows: pa.Table) -> pa.Table:
    """Keep the row of each hash with the most ratings, then one that is an answer, and of equals the last one written.

    So a prompt that was answered without ratings stays answered, whatever an engine did with it later.
    """
    read = ratings_read(rows["ratings"].combine_chunks())
    is_answer = pc.invert(pc.is_in(rows["reason"], NO_ANSWERS)).combine_chunks().cast(pa.int8())
    columns = {"prompt_sha256": rows["prompt_sha256"], "read": read, "is_answer": is_answer, "written": rows["written"]}
    ranked = pa.table(columns | {"row": np.arange(len(rows))})
    ranked = ranked.sort_by([(name, "ascending") for name in ("read", "is_answer", "written")])
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
