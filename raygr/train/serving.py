"""What a train run keeps for serving, beside its weights: settings, ids and histories.

`serving.json`, `served_items.parquet` and `served_users.parquet`. The weights hold the guided scores and the users'
vectors, so the run folder alone serves: from any place, and after its prepare run and score files are gone.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import safetensors.torch
import torch
from pydantic_core import to_jsonable_python
from torch import Tensor

from raygr import files, runs
from raygr.config import check_config
from raygr.data.interactions import read_ids
from raygr.data.list_columns import list_column
from raygr.models.inference import SequenceModel
from raygr.schema import (
    ITEMS,
    MODEL,
    SERVED_ITEM_SCHEMA,
    SERVED_ITEMS,
    SERVED_USER_SCHEMA,
    SERVED_USERS,
    SERVING,
    USERS,
)
from raygr.train.config import TrainConfig
from raygr.train.inputs import Inputs, with_absolute_paths
from raygr.train.state import build_model


class Serving(NamedTuple):
    """The settings of a train run, with absolute paths, and the ids and histories of its data."""

    config: TrainConfig
    repeats: bool
    """Items of a history may be recommended again."""
    item_ids_I: np.ndarray
    user_ids_U: np.ndarray
    items_N: np.ndarray
    """item_index of every interaction, sorted by (user, position)."""
    rating_N: np.ndarray
    """NaN where an interaction has no rating."""
    first_U: np.ndarray
    """The first interaction of each user in `items_N`, and as one more entry the end of the last user."""
    aspects: tuple[str, ...]
    """The names of the item scores; empty for a base model."""
    scores_IA: np.ndarray | None
    """The item scores of the training, NaN where one is missing; they are the scale of new items' scores. None in base
    models."""
    new_items: int
    """Number of items, the last ones, that training did not know."""
    new_item_offset: float
    """What makes scores of items without a learned part comparable with the others: see new_items.py. 0 in base models
    without new items."""


def write_serving(config: TrainConfig, inputs: Inputs, weights: dict[str, Tensor], new_item_offset: float) -> None:
    """Writes the weights and the three files into `config.output`."""
    filesystem, inner = files.filesystem_of(files.join(config.output, MODEL))
    with filesystem.open(inner, "wb") as file:
        file.write(safetensors.torch.save({name: values.contiguous() for name, values in weights.items()}))
    item_ids, user_ids = read_ids(config.data, ITEMS, "item"), read_ids(config.data, USERS, "user")
    type_of_scores = SERVED_ITEM_SCHEMA.field("scores").type
    scores = list_column(inputs.scores.scores_IA) if inputs.scores else pa.nulls(len(item_ids), type_of_scores)
    files.write_table(pa.table([item_ids, scores], schema=SERVED_ITEM_SCHEMA), files.join(config.output, SERVED_ITEMS))
    first_U = pa.array(inputs.first_U, pa.int64())
    columns = (pa.array(inputs.items_N.numpy(), pa.int32()), pa.array(inputs.rating_N.numpy(), pa.float32()))
    histories = [pa.LargeListArray.from_arrays(first_U, column) for column in columns]
    files.write_table(
        pa.table([user_ids, *histories], schema=SERVED_USER_SCHEMA), files.join(config.output, SERVED_USERS)
    )
    record = {
        "config": to_jsonable_python(with_absolute_paths(config)),
        "repeats": inputs.repeats,
        "aspects": inputs.scores.aspects if inputs.scores else [],
        "new_items": inputs.new_items,
        "new_item_offset": new_item_offset,
    }
    files.write_json(record, files.join(config.output, SERVING))


def read_serving(run: str) -> Serving:
    """Reads a finished train run. RunError where it is unfinished, of another job, or without files for serving."""
    runs.read_run(run, job="train")
    if not files.exists(files.join(run, SERVING)):
        raise runs.RunError(f"{run} holds no {SERVING}: an older version of raygr trained it; train it again")
    record = files.read_json(files.join(run, SERVING))
    if "new_item_offset" not in record:
        raise runs.RunError(f"{run}: an older version of raygr trained it, and kept no item scores; train it again")
    items, users = (files.read_table(files.join(run, name)) for name in (SERVED_ITEMS, SERVED_USERS))
    aspects = tuple(record["aspects"])
    length_U = pc.list_value_length(users["items"]).to_numpy()
    return Serving(
        config=check_config(TrainConfig, record["config"], source=files.join(run, SERVING)),
        repeats=record["repeats"],
        item_ids_I=items["item_id"].to_numpy().astype(str),
        user_ids_U=users["user_id"].to_numpy().astype(str),
        items_N=pc.list_flatten(users["items"]).to_numpy().astype(np.int64),
        rating_N=pc.list_flatten(users["ratings"]).to_numpy().astype(np.float32),
        first_U=np.concatenate([[0], np.cumsum(length_U)]),
        aspects=aspects,
        scores_IA=pc.list_flatten(items["scores"]).to_numpy().reshape(len(items), -1) if aspects else None,
        new_items=record["new_items"],
        new_item_offset=record["new_item_offset"],
    )


def read_model(run: str, serving: Serving) -> SequenceModel:
    """The trained model in eval mode, on the CPU; `serving` is that of the run."""
    filesystem, inner = files.filesystem_of(files.join(run, MODEL))
    weights = safetensors.torch.load(filesystem.cat_file(inner))
    users = weights.get("embedding.users_UA")
    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
        model = build_model(
            serving.config,
            items=len(weights["embedding.base_ID"]),
            scores_IA=serving.scores_IA,
            users_UA=None if users is None else np.zeros(users.shape),
        )
    model.load_state_dict(weights)
    return model.eval()


def check_sources(run: str, config: TrainConfig) -> None:
    """RunError where the data or scores that the run was trained on are gone, or have changed since.

    For readers of more than `Serving`, such as explanations.
    """
    record = runs.read_run(run, job="train")
    given = record.config
    for name, place in (
        (given["data"], config.data),
        (given["item_scores"], config.item_scores),
        (given["user_score_run"], config.user_score_run),
        (given.get("user_table"), config.user_table),
    ):
        if name is None or place is None or name not in record.inputs:
            continue
        if not files.exists(place):
            raise runs.RunError(f"{run} was trained on {place}, which is not there: put it back, or train again")
        if files.fingerprint(place) != record.inputs[name]:
            raise runs.RunError(f"{run} was trained on other content of {place}: train it again")
