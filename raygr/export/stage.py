"""The export stage: a train run -> refined item vectors and user vectors with their ids.

Writes `item_vectors` and `user_vectors`, each as VECTOR rows in Parquet, as `.npy` (float32, one row per vector) and as
`.ids.txt` (one id per row of the `.npy`). The product of a user vector and an item vector is the model's score, so any
vector index ranks like the model. User vectors are the states after whole histories. Where training did not know some
items, the last column is their offset, and 1 in user vectors. Shape letters: `D` width.
"""

import logging

import numpy as np
import pyarrow as pa

from raygr import files, runs
from raygr.data.ids import check_lines, write_id_lines
from raygr.data.list_columns import list_column
from raygr.export.config import ExportConfig
from raygr.recommend.recommender import Recommender, load_recommender
from raygr.schema import ITEM_VECTORS, USER_VECTORS, VECTOR_SCHEMA

logger = logging.getLogger(__name__)

USERS_AT_ONCE = 1024


def export(config: ExportConfig) -> runs.Run:
    """Exports all items and users. ValueError before anything is written where an id holds a line break."""
    recommender = load_recommender(config.train_run, new_item_offset=config.new_item_offset)
    if config.new_item_scores is not None:
        recommender = recommender.with_new_items(config.new_item_scores)
    used = [path for path in (config.train_run, config.new_item_scores) if path]
    for ids in (recommender.item_ids_I, recommender.user_ids_U):
        check_lines(ids.tolist())
    run = runs.start_run(config.output, job="export", config=config, inputs=used)
    write_vectors(run, ITEM_VECTORS, recommender.item_ids_I, recommender.rows_ID.numpy())
    write_vectors(run, USER_VECTORS, recommender.user_ids_U, user_vectors(recommender))
    counts = {"items": len(recommender.item_ids_I), "users": len(recommender.user_ids_U)}
    runs.finish_run(run, inputs=used, counts=counts | {"width": recommender.rows_ID.shape[1]})
    logger.info("exported %s", counts)
    return run


def user_vectors(recommender: Recommender) -> np.ndarray:
    """The users' vectors, (U, D), in the order of user_index."""
    ids = recommender.user_ids_U.tolist()
    batches = [ids[first : first + USERS_AT_ONCE] for first in range(0, len(ids), USERS_AT_ONCE)]
    return np.concatenate([recommender.states(recommender.of_users(batch)).numpy() for batch in batches])


def write_vectors(run: runs.Run, name: str, ids: np.ndarray, vectors: np.ndarray) -> None:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    files.write_table(
        pa.table([pa.array(ids), list_column(vectors)], schema=VECTOR_SCHEMA), run.file(f"{name}.parquet")
    )
    write_id_lines(ids.tolist(), run.file(f"{name}.ids.txt"))
    filesystem, inner = files.filesystem_of(run.file(f"{name}.npy"))
    with filesystem.open(inner, "wb") as file:
        np.save(file, vectors)
