"""The recommend stage: a train run -> the best items for all users, some users, or given histories.

SUBJECT rows in: {row, subject_id, user_index (the number of users for a given history), items (item_index, oldest
first)}; RECOMMENDATION rows out, one Parquet part per batch. One worker runs in the calling process, several are actors
of Ray Data. Each loads the model once and writes its own parts, so the actors may hold all CPUs. The name of a part
tells whose lists it holds, so an interrupted run continues with the subjects that have no list yet.
"""

import dataclasses
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.ids import complete_ids, read_id_lines
from raygr.data.row_counts import log_rows
from raygr.data.vector_tables import is_list, named
from raygr.execution.console import log_progress
from raygr.execution.in_process import runs_here, torch_of_a_worker, worker_here
from raygr.prepare.json_lines import as_id, decode_object
from raygr.recommend.config import RecommendConfig
from raygr.recommend.recommender import Histories, Recommender, check_known, check_steer, load_recommender, unrated
from raygr.recommend.score_rows import read_score_rows
from raygr.schema import RECOMMENDATION_SCHEMA, RECOMMENDATIONS
from raygr.train.serving import Serving, read_serving

logger = logging.getLogger(__name__)

# a part holds the lists of the subjects in rows `first` to `last`
PART = re.compile(r"/part-(?P<first>\d{9,})-(?P<last>\d{9,})\.parquet(?P<half>\.part)?$")


def recommend(config: RecommendConfig) -> runs.Run:
    """Writes top-N lists as RECOMMENDATION rows. Errors in users or histories are raised before any work."""
    serving = read_serving(config.train_run)
    check_steer(config.steer, serving.aspects, serving.config)
    if config.new_item_scores is not None:
        new = read_score_rows(config.new_item_scores, serving.config, serving.aspects, set(serving.item_ids_I.tolist()))
        serving = serving._replace(item_ids_I=np.concatenate([serving.item_ids_I, new.ids_S]))
    subjects = read_subjects(config, serving)
    given = (config.train_run, config.histories or config.users_file, config.mmr_scores, config.new_item_scores)
    used = [path for path in given if path]
    run = runs.start_run(config.output, job="recommend", config=config, inputs=used)
    waiting = without_lists(subjects, run.file(RECOMMENDATIONS))
    if len(waiting) < len(subjects):
        logger.info("recommend: goes on, %d of %d have their lists", len(subjects) - len(waiting), len(subjects))
    if len(waiting):
        write_lists(config, waiting)
    counts = list_counts(len(subjects), run.file(RECOMMENDATIONS))
    runs.finish_run(run, inputs=used, counts=counts)
    logger.info("recommended %d items to %d", counts["recommendations"], counts["with_list"])
    return run


def write_lists(config: RecommendConfig, subjects: pa.Table) -> None:
    """Sends SUBJECT rows to the actors, or to one in the calling process; they write their parts."""
    blocks = [subjects.slice(first, config.batch_size) for first in range(0, len(subjects), config.batch_size)]
    # one actor takes batch after batch anywhere, so Ray saves no time however many users there are
    if runs_here(config.ray, is_small=config.workers == 1):
        worker = worker_here(config.use_gpu, config.threads)
        with torch_of_a_worker(worker, config.threads):
            actor = RecommendingActor(**actor_settings(config, device=worker.device.type))
            for number, block in enumerate(blocks, start=1):
                actor(block)
                log_progress(logger, "recommend", number, len(blocks), "batches")
        return
    import ray.data

    from raygr.execution.distributed import wants_gpu
    from raygr.ray_setup import connect

    connect()
    use_gpu = wants_gpu(config.workers, config.use_gpu, threads=config.threads)
    settings = actor_settings(config, device="cuda" if use_gpu else "cpu")
    written = ray.data.from_arrow(blocks).map_batches(
        RecommendingActor,
        fn_constructor_kwargs=settings,
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.workers),
        num_cpus=config.threads,
        num_gpus=int(use_gpu),
    )
    for number, _ in enumerate(written.iter_batches(batch_size=None, batch_format="numpy"), start=1):
        log_progress(logger, "recommend", number, len(blocks), "batches")


def without_lists(subjects: pa.Table, folder: str) -> pa.Table:
    """The SUBJECT rows whose lists are in no part in `folder`. Removes half-written parts."""
    filesystem, inner = files.filesystem_of(folder)
    is_waiting = np.ones(len(subjects), bool)
    for path in filesystem.find(inner, maxdepth=1) if filesystem.exists(inner) else []:
        part = PART.search(path)
        if part and part["half"]:
            filesystem.rm_file(path)
        elif part:
            is_waiting[int(part["first"]) : int(part["last"]) + 1] = False
    return subjects.filter(is_waiting)


def contiguous(batch: pa.Table) -> list[pa.Table]:
    """Cuts SUBJECT rows where row numbers are missing, because other parts hold them."""
    row = batch["row"].to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(row) != 1) + 1).tolist(), len(row)]
    return [batch.slice(first, last - first) for first, last in itertools.pairwise(edges)]


def list_counts(subjects: int, folder: str) -> dict[str, int]:
    """Row counts of all parts, also those of an earlier attempt. A subject that has every item has no list."""
    filesystem, inner = files.filesystem_of(folder)
    found = pyarrow.dataset.dataset(inner, filesystem=filesystem)
    with_list = found.count_rows(filter=pc.field("rank") == 1)
    log_rows("subjects", read=subjects, kept=with_list, dropped={"no_item_left": subjects - with_list})
    return {"subjects": subjects, "with_list": with_list, "recommendations": found.count_rows()}


def actor_settings(config: RecommendConfig, *, device: str) -> dict[str, Any]:
    """The arguments of RecommendingActor. Paths are absolute, because an actor runs in a folder of its own."""
    absolute = dataclasses.replace(
        config,
        output=files.absolute(config.output),
        train_run=files.absolute(config.train_run),
        mmr_scores=config.mmr_scores and files.absolute(config.mmr_scores),
        new_item_scores=config.new_item_scores and files.absolute(config.new_item_scores),
    )
    return {"config": absolute, "device": device}


def read_subjects(config: RecommendConfig, serving: Serving) -> pa.Table:
    """SUBJECT rows; ConfigError or ValueError names unknown users and items."""
    if config.histories is not None:
        subjects = subjects_of_histories(config.histories, serving)
    else:
        users: Sequence[str] | None = config.users
        if config.users_file is not None:
            if not files.exists(config.users_file):
                raise FileNotFoundError(f"users_file: no file {config.users_file}")
            users = [one for one in read_id_lines(config.users_file) if one]
        subjects = subjects_of_users(users, serving)
    if not len(subjects):
        raise ConfigError(f"{config.histories or config.users_file or 'users'}: nobody is in it to recommend to")
    return subjects


def subjects_of_users(users: Sequence[str] | None, serving: Serving) -> pa.Table:
    """All users, or those named, after their whole histories."""
    ids_U = serving.user_ids_U
    items = pa.LargeListArray.from_arrays(pa.array(serving.first_U, pa.int64()), pa.array(serving.items_N, pa.int32()))
    ratings = pa.LargeListArray.from_arrays(pa.array(serving.first_U, pa.int64()), pa.array(serving.rating_N))
    columns = {"subject_id": ids_U, "user_index": np.arange(len(ids_U)), "items": items, "ratings": ratings}
    rows = pa.table(columns)
    if users is not None:
        wanted = list(dict.fromkeys(users))
        log_rows(
            "users asked for", read=len(users), kept=len(wanted), dropped={"named_twice": len(users) - len(wanted)}
        )
        index_of = {one: place for place, one in enumerate(ids_U.tolist())}
        check_known(wanted, index_of, "user", serving.config.data)
        rows = rows.take(pa.array([index_of[one] for one in wanted], pa.int64()))
    return rows.append_column("row", pa.array(np.arange(len(rows))))


def subjects_of_histories(path: str, serving: Serving) -> pa.Table:
    """Reads {history_id, item_ids} rows from Parquet or JSON lines. Ids are text or integers of any type."""
    history_ids, length, item_ids = read_histories(path)
    ids_I, users = serving.item_ids_I, len(serving.user_ids_U)
    index_of = {one: place for place, one in enumerate(ids_I.tolist(), start=1)}
    check_known(item_ids.unique().to_pylist(), index_of, "item", f"{path}: {serving.config.data}")
    index = pc.add(pc.index_in(item_ids, value_set=pa.array(ids_I, pa.string())), 1).combine_chunks()
    offsets = pa.array(np.concatenate([[0], np.cumsum(length)]), pa.int64())
    columns = {
        "subject_id": history_ids,
        "user_index": np.full(len(length), users),
        "items": pa.LargeListArray.from_arrays(offsets, index),
        "ratings": pa.LargeListArray.from_arrays(offsets, pa.array(unrated(len(index)))),
    }
    return pa.table(columns).append_column("row", pa.array(np.arange(len(length))))


def read_histories(path: str) -> tuple[pa.ChunkedArray, np.ndarray, pa.ChunkedArray]:
    """The history ids, the number of items of each, and all items, ids as strings. ValueError names errors."""
    table = files.read_table(path) if path.endswith(".parquet") else read_json_histories(path)
    absent = [name for name in ("history_id", "item_ids") if name not in table.column_names]
    if absent:
        raise ValueError(f"{path}: no column {', '.join(absent)}; it has {', '.join(table.column_names)}")
    lists = table["item_ids"]
    if not is_list(lists.type):
        raise ValueError(f"{path}: item_ids is {lists.type}, not a list of item ids")
    history_ids = complete_ids(table["history_id"], f"{path}: history_id")
    repeated = [entry["values"] for entry in history_ids.value_counts().to_pylist() if entry["counts"] > 1]
    if repeated:
        raise ValueError(f"{path}: history_id {named(np.array(repeated))} is there more than once")
    length = pc.list_value_length(lists).fill_null(0).to_numpy()
    if not length.all():
        raise ValueError(f"{path}: the history in row {np.argmin(length) + 1} is empty; leave the row out")
    values = pa.chunked_array([chunk.flatten() for chunk in lists.chunks], lists.type.value_type)
    return history_ids, length, complete_ids(values, f"{path}: item_ids", length=length)


def read_json_histories(path: str) -> pa.Table:
    """Reads the two columns of JSON lines; null where a value is not an id."""
    filesystem, inner = files.filesystem_of(path)
    rows = []
    with filesystem.open(inner, "rb", compression="infer") as file:
        for number, line in enumerate(file, start=1):
            values = decode_object(line)
            if isinstance(values, str):
                raise ValueError(f"{path}:{number}: {values}; expected an object of history_id and item_ids")
            rows += [values] if values else []
    histories = [as_id(values.get("history_id")) for values in rows]
    lists = [values.get("item_ids") for values in rows]
    items = [[as_id(one) for one in (found if isinstance(found, list) else [found])] for found in lists]
    columns = {
        "history_id": pa.array(histories, pa.string()),
        "item_ids": pa.array(items, pa.large_list(pa.string())),
    }
    present = dict.fromkeys(name for values in rows for name in values)
    return pa.table({name: columns.get(name, pa.nulls(len(rows))) for name in present})


class RecommendingActor:
    """Writes the recommendations of each batch of SUBJECT rows as one Parquet part."""

    def __init__(self, *, config: RecommendConfig, device: str):
        torch.set_num_threads(config.threads)
        self.config = config
        self.recommender = load_recommender(
            config.train_run, list_scores=config.mmr_scores, new_item_offset=config.new_item_offset, device=device
        )
        if config.new_item_scores is not None:
            self.recommender = self.recommender.with_new_items(config.new_item_scores)

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        folder = files.join(self.config.output, RECOMMENDATIONS)
        for part in contiguous(batch):
            found = recommendations(self.recommender, part, self.config)
            first, last = part["row"][0].as_py(), part["row"][-1].as_py()
            files.write_table(found, files.join(folder, f"part-{first:09d}-{last:09d}.parquet"))
        return {"subjects": np.array([len(batch)])}


def recommendations(recommender: Recommender, batch: pa.Table, config: RecommendConfig) -> pa.Table:
    """The RECOMMENDATION rows of a batch of SUBJECT rows."""
    items = batch["items"].combine_chunks()
    length_B = items.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    items_N, rating_N = items.flatten().to_numpy().astype(np.int64), batch["ratings"].combine_chunks().flatten()
    histories = Histories(items_N, length_B, batch["user_index"].to_numpy(), rating_N.to_numpy())
    return list_rows(
        recommender, batch["subject_id"], histories, config.n, mmr_weight=config.mmr_weight, steer=config.steer
    )


def list_rows(
    recommender: Recommender,
    subject_ids: pa.ChunkedArray | pa.Array,
    histories: Histories,
    n: int,
    *,
    mmr_weight: float | None,
    steer: Mapping[str, float],
) -> pa.Table:
    """The RECOMMENDATION rows of histories and their ids."""
    lists, score_BY = recommender.lists(histories, n, mmr_weight=mmr_weight, steer=steer)
    is_there_BY = (lists.relevance_BY > -torch.inf).cpu().numpy()
    row_X, rank_X = np.nonzero(is_there_BY)
    columns: dict[str, Any] = {
        "subject_id": subject_ids.take(pa.array(row_X)),
        "rank": rank_X + 1,
        "item_id": recommender.item_ids_I[lists.place_BY.cpu().numpy()[is_there_BY]],
        "score": score_BY.cpu().numpy()[is_there_BY],
    }
    return pa.table(columns).cast(RECOMMENDATION_SCHEMA)
