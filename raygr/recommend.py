"""The recommend stage: a train run -> the best items of all users, of some, or after given histories, on Ray Data.

SUBJECT rows in: {row, subject_id, user_index (the number of users for a given history), items (item_index, oldest
first)}; RECOMMENDATION rows out, one Parquet part per batch. An actor loads the model once and writes its own parts,
so that a batch run again replaces what it wrote before, and actors may hold every CPU.
"""

import dataclasses
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import ray.data
import torch

from raygr import runs
from raygr.cluster import connect
from raygr.config import ConfigError, TrainConfig
from raygr.config_results import RecommendConfig
from raygr.data.prepared import read_ids, read_interactions
from raygr.recommenders.serving import Histories, Recommender, check_known, open_recommender, read_train_config
from raygr.schema import ITEMS, RECOMMENDATION_SCHEMA, RECOMMENDATIONS, USERS
from raygr.workers import wants_gpu

logger = logging.getLogger(__name__)


def recommend(config: RecommendConfig) -> runs.Run:
    """Top-N lists as RECOMMENDATION rows; what is wrong with users or histories is said before any work."""
    train_config = read_train_config(config.train)
    subjects = read_subjects(config, train_config)
    run = runs.start_run(config.output, job="recommend", config=config)
    runs.remove_parts(run, RECOMMENDATIONS)
    connect()
    use_gpu = wants_gpu(config.workers, config.use_gpu, threads=config.threads)
    settings = actor_settings(config, train_config, device="cuda" if use_gpu else "cpu")
    blocks = [subjects.slice(first, config.batch_size) for first in range(0, len(subjects), config.batch_size)]
    counted = ray.data.from_arrow(blocks).map_batches(
        RecommendingActor,
        fn_constructor_kwargs=settings,
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=config.threads,
        num_gpus=int(use_gpu),
    )
    items = sum(int(batch["recommended"].sum()) for batch in counted.iter_batches(batch_format="numpy"))
    inputs = [config.train, config.histories, config.mmr_scores]
    counts = {"subjects": len(subjects), "recommendations": items}
    runs.finish_run(run, inputs=[path for path in inputs if path], counts=counts)
    logger.info("recommended %d items to %d", items, len(subjects))
    return run


def actor_settings(config: RecommendConfig, train_config: TrainConfig, *, device: str) -> dict[str, Any]:
    """Arguments of RecommendingActor; paths are absolute, because an actor runs in a folder of its own."""
    named = {"output": config.output, "train": config.train, "mmr_scores": config.mmr_scores}
    absolute = {name: runs.absolute(path) for name, path in named.items() if path}
    return {"config": dataclasses.replace(config, **absolute), "train_config": train_config, "device": device}


def read_subjects(config: RecommendConfig, train_config: TrainConfig) -> pa.Table:
    """SUBJECT rows; ConfigError or ValueError names unknown users and items."""
    if config.users is not None and config.histories is not None:
        raise ConfigError("users and histories are two ways to say for whom: set one of them")
    if config.histories is not None:
        subjects = subjects_of_histories(config.histories, train_config.data)
    else:
        subjects = subjects_of_users(config.users, train_config.data)
    if not len(subjects):
        raise ConfigError(f"{config.histories or 'users'}: nobody is in it to recommend to")
    return subjects


def subjects_of_users(users: tuple[str, ...] | str | None, data: str) -> pa.Table:
    """All users, those named, or those in a file of one id per line, after their whole histories."""
    ids_U, found = read_ids(data, USERS, "user"), read_interactions(data)
    offsets = np.searchsorted(found.user_N, np.arange(found.users + 1))
    items = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(found.item_N, pa.int32()))
    rows = pa.table({"subject_id": ids_U, "user_index": np.arange(found.users), "items": items})
    if users is not None:
        wanted = read_lines(users) if isinstance(users, str) else list(users)
        index_of = {one: place for place, one in enumerate(ids_U.tolist())}
        check_known(wanted, index_of, "user", data)
        rows = rows.take(pa.array([index_of[one] for one in dict.fromkeys(wanted)], pa.int64()))
    return rows.append_column("row", pa.array(np.arange(len(rows))))


def read_lines(path: str) -> list[str]:
    filesystem, inner = runs.filesystem_of(path)
    with filesystem.open(inner, "r", encoding="utf-8", compression="infer") as file:
        return [line.strip() for line in file if line.strip()]


def subjects_of_histories(path: str, data: str) -> pa.Table:
    """Rows of {history_id, item_ids}, Parquet or JSON lines; ids are strings."""
    table = read_histories(path)
    ids_I, users = read_ids(data, ITEMS, "item"), runs.read_table(runs.join(data, USERS), ["user_index"]).num_rows
    index_of = {one: place for place, one in enumerate(ids_I.tolist(), start=1)}
    histories = table["item_ids"].to_pylist()
    empty = [row for row, history in enumerate(histories, start=1) if not history]
    if empty:
        raise ValueError(f"{path}: the history in row {empty[0]} is empty; leave the row out")
    check_known([item for history in histories for item in history], index_of, "item", f"{path}: {data}")
    items = pa.array([[index_of[item] for item in history] for history in histories], pa.list_(pa.int32()))
    columns = {"subject_id": table["history_id"], "user_index": np.full(len(table), users), "items": items}
    return pa.table(columns).append_column("row", pa.array(np.arange(len(table))))


def read_histories(path: str) -> pa.Table:
    filesystem, inner = runs.filesystem_of(path)
    if path.endswith(".parquet"):
        table = runs.read_table(path)
    else:
        with filesystem.open(inner, "rb", compression="infer") as file:
            table = pyarrow.json.read_json(file)
    absent = [name for name in ("history_id", "item_ids") if name not in table.column_names]
    if absent:
        raise ValueError(f"{path}: no column {', '.join(absent)}; it has {', '.join(table.column_names)}")
    types = {"history_id": pa.string(), "item_ids": pa.list_(pa.string())}
    wrong = [f"{name} is {table[name].type}, not {kind}" for name, kind in types.items() if table[name].type != kind]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)} (write ids in quotes)")
    return table


class RecommendingActor:
    """Batches of SUBJECT rows -> their recommendations, written as one Parquet part each."""

    def __init__(self, *, config: RecommendConfig, train_config: TrainConfig, device: str):
        torch.set_num_threads(config.threads)
        self.config = config
        self.recommender = open_recommender(train_config, config.train, list_scores=config.mmr_scores, device=device)

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        found = recommendations(self.recommender, batch, n=self.config.n, mmr_weight=self.config.mmr_weight)
        folder = runs.join(self.config.output, RECOMMENDATIONS)
        runs.write_table(found, runs.join(folder, f"part-{batch['row'][0].as_py():09d}.parquet"))
        return {"recommended": np.array([found.num_rows])}


def recommendations(recommender: Recommender, batch: pa.Table, *, n: int, mmr_weight: float | None) -> pa.Table:
    """RECOMMENDATION rows of a batch of SUBJECT rows."""
    items = batch["items"].combine_chunks()
    length_B = items.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    histories = Histories(items.flatten().to_numpy().astype(np.int64), length_B, batch["user_index"].to_numpy())
    lists, score_BN = recommender.lists(histories, n, mmr_weight=mmr_weight)
    is_there_BN = (lists.relevance_BN > -torch.inf).cpu().numpy()
    row_K, rank_K = np.nonzero(is_there_BN)
    columns: dict[str, Any] = {
        "subject_id": batch["subject_id"].take(pa.array(row_K)),
        "rank": rank_K + 1,
        "item_id": recommender.item_ids_I[lists.place_BN.cpu().numpy()[is_there_BN]],
        "score": score_BN.cpu().numpy()[is_there_BN],
    }
    return pa.table(columns).cast(RECOMMENDATION_SCHEMA)
