"""The export stage: a train run -> refined item vectors and user vectors with their ids.

Writes `item_vectors` and `user_vectors`, each as VECTOR rows in Parquet, as `.npy` (float32, one row per vector) and as
`.ids.txt` (one id per row of the `.npy`). The product of a user vector and an item vector is the model's score, so any
vector index ranks like the model. User vectors are the states after whole histories. Where training did not know some
items, the last column is their offset, and 1 in user vectors. Users are encoded in shards: a run that was interrupted
goes on with those that have no part yet. Shape letters: `D` width.
"""

import logging
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from raygr import files, runs
from raygr.data.ids import check_lines, write_id_lines
from raygr.data.list_columns import list_column
from raygr.execution.console import log_progress
from raygr.execution.in_process import worker_here
from raygr.export.config import ExportConfig
from raygr.recommend.recommender import Recommender, load_recommender
from raygr.schema import ITEM_VECTORS, USER_VECTORS, VECTOR_SCHEMA

logger = logging.getLogger(__name__)

USER_PARTS = "user_parts"  # deleted when the run is finished
SHARD_USERS = 1 << 16
USERS_AT_ONCE = 256


def export(config: ExportConfig) -> runs.Run:
    """Exports all items and users. ValueError before anything is written where an id holds a line break."""
    device = worker_here(config.use_gpu, None).device
    recommender = load_recommender(config.train_run, new_item_offset=config.new_item_offset, device=device.type)
    if config.new_item_scores is not None:
        recommender = recommender.with_new_items(config.new_item_scores)
    used = [path for path in (config.train_run, config.new_item_scores) if path]
    for ids in (recommender.item_ids_I, recommender.user_ids_U):
        check_lines(ids.tolist())
    run = runs.start_run(config.output, job="export", config=config, inputs=used)
    write_vectors(run, ITEM_VECTORS, recommender.item_ids_I, iter([recommender.rows_ID.cpu().numpy()]))
    write_vectors(run, USER_VECTORS, recommender.user_ids_U, user_shards(run, recommender))
    runs.remove_parts(run, USER_PARTS)
    counts = {"items": len(recommender.item_ids_I), "users": len(recommender.user_ids_U)}
    runs.finish_run(run, inputs=used, counts=counts | {"width": recommender.rows_ID.shape[1]})
    logger.info("exported %s", counts)
    return run


def user_shards(run: runs.Run, recommender: Recommender) -> Iterator[np.ndarray]:
    """The users' vectors in the order of user_index, (U, D) in all. All shards have a part before the first comes."""
    ids = recommender.user_ids_U.tolist()
    shards = [ids[first : first + SHARD_USERS] for first in range(0, len(ids), SHARD_USERS)]
    parts = [run.file(f"{USER_PARTS}/part-{number:06d}.parquet") for number in range(len(shards))]
    for number, (shard, part) in enumerate(zip(shards, parts, strict=True), start=1):
        if not files.exists(part):
            batches = [shard[first : first + USERS_AT_ONCE] for first in range(0, len(shard), USERS_AT_ONCE)]
            found = [recommender.states(recommender.of_users(batch)).cpu().numpy() for batch in batches]
            files.write_table(pa.table({"vector": list_column(np.concatenate(found))}), part)
        log_progress(logger, "export", number, len(shards), "shards of users")
    width = recommender.rows_ID.shape[1]
    for part in parts:
        yield files.read_table(part)["vector"].combine_chunks().flatten().to_numpy().reshape(-1, width)


def write_vectors(run: runs.Run, name: str, ids: np.ndarray, shards: Iterator[np.ndarray]) -> None:
    """Write the vectors of the shards, in the order of the ids, as Parquet, as `.npy` and their ids as text."""
    write_id_lines(ids.tolist(), run.file(f"{name}.ids.txt"))
    filesystem, inner = files.filesystem_of(run.file(f"{name}.npy"))
    with filesystem.open(inner, "wb") as file:
        files.write_tables(written_to(file, ids, shards), run.file(f"{name}.parquet"))


def written_to(file: BinaryIO, ids: np.ndarray, shards: Iterator[np.ndarray]) -> Iterator[pa.Table]:
    """VECTOR rows of each shard, which is also appended to the `.npy` file."""
    first = 0
    for shard in shards:
        vectors = np.ascontiguousarray(shard, dtype=np.float32)
        if not first:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), vectors.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(vectors.tobytes())
        yield pa.table([pa.array(ids[first : first + len(vectors)]), list_column(vectors)], schema=VECTOR_SCHEMA)
        first += len(vectors)
