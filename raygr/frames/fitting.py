"""`fit` and its recommender for notebooks: DataFrames in and out, without run folders in sight and without Ray.

    interactions = prepare_frame(orders, columns={"user_id": "customer", "item_id": "sku", "timestamp": "ordered_at"})
    recommender = fit(interactions, item_scores)  # item_scores: item_id and one column per aspect
    recommender.recommend(["C17", "C18"], n=5)
    recommender.looks_for()
    recommender.explain("B001", ["C17", "C18"])

The code of the stages does the work in the calling process, so results are theirs. Its runs lie in a temporary folder.
Frames that are given may be of pandas, polars or Arrow; those that are returned are of pandas.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from raygr import files, runs
from raygr.config import ConfigError, check_config
from raygr.data.ids import complete_ids
from raygr.data.vector_tables import numbers
from raygr.explain.explanation import explain_item
from raygr.frames.preparing import NOTHING, Frame, arrow_table, check_names, column_ids
from raygr.prepare import output_tables, splits
from raygr.prepare.selection import Kept, NewInteractions
from raygr.recommend.recommender import Histories, Recommender, load_recommender
from raygr.recommend.stage import list_rows
from raygr.schema import INTERACTIONS, ITEMS, USERS
from raygr.stages import run_stage
from raygr.train.config import TrainConfig
from raygr.train.run_metrics import read_metrics

DATA, SCORES, TRAINED = "interactions", "item_scores.parquet", "recommender"  # in the temporary folder of `fit`
# Longer paths first: the names that errors give to what lies in that folder.
NAMES = {f"{DATA}/{INTERACTIONS}": "interactions", SCORES: "item_scores", DATA: "interactions", TRAINED: "recommender"}
UNNAMED_INDEX = "__index_level_"  # how Arrow names an index of pandas that has no name
USERS_AT_ONCE = 256


def fit(
    interactions: Frame,
    item_scores: Frame | str | None = None,
    *,
    titles: Mapping[str, str] = NOTHING,
    settings: Mapping[str, Any] = NOTHING,
) -> "FrameRecommender":
    """Trains a recommender in the calling process as `raygr train` does, and evaluates it on validation and test.

    `interactions` are those of `prepare_frame`, or your own with user_id, item_id, position and split, where a user's
    train interactions come first and the test ones last. An item that a user has twice makes them repeat purchases.
    `item_scores` has item_id and one column of numbers per aspect, or names a score run; None trains a base model.
    `titles` maps item ids to titles. `settings` are those of `raygr train`, such as `{"model": "gru4rec"}`.
    ConfigError or ValueError says what is wrong.
    """
    folder = TemporaryDirectory(prefix="raygr-")
    data, scores, output = (files.join(folder.name, name) for name in (DATA, SCORES, TRAINED))
    own = {"output": output, "data": data, "item_scores": item_scores, "ray": "never"}
    taken = [name for name in settings if name in own]
    if taken:
        raise ConfigError(f"fit: {taken[0]} is no setting here: give frames; the calling process trains")
    with names_of_frames(folder.name):
        named = {str(item): str(title) for item, title in titles.items()}
        write_interactions(arrow_table(interactions, "interactions"), data, named)
        if item_scores is not None and not isinstance(item_scores, str):
            table, own["item_scores"] = arrow_table(item_scores, "item_scores"), scores
            check_names(table, ("item_id",), "item_scores")
            aspects = [name for name in table.column_names if name != "item_id" and not name.startswith(UNNAMED_INDEX)]
            files.write_table(table.select(["item_id", *aspects]), scores)
        run = run_stage(check_config(TrainConfig, {**settings, **own}, source="settings of fit"))
    return FrameRecommender(load_recommender(run.path), named, folder)


def write_interactions(table: pa.Table, data: str, titles: Mapping[str, str]) -> None:
    """Writes a prepare run of the interactions, numbered and sorted as the stage does it."""
    check_names(table, ("user_id", "item_id", "position", "split"), "interactions")
    ids = {name: column_ids(table, name, "interactions") for name in ("user_id", "item_id")}
    users, user_N = np.unique(ids["user_id"], return_inverse=True)
    items, item_N = np.unique(ids["item_id"], return_inverse=True)
    position_N = numbers(table["position"], "interactions: column 'position'")
    order, part_N = np.lexsort((position_N, user_N)), parts(table["split"])
    check_order(user_N[order], position_N[order], part_N[order], order + 1)
    rating = table["rating"] if "rating" in table.column_names else pa.chunked_array([pa.nulls(len(table))])
    kept = Kept(
        user_index=user_N[order].astype(np.int32),
        item_index=(item_N[order] + 1).astype(np.int32),
        position=position_N[order].astype(np.int32),
        rating=numbers(rating, "interactions: column 'rating'", gaps=True)[order].astype(np.float32),
        timestamp=position_N[order].astype(np.int64),
        part=part_N[order],
        file=np.zeros(len(order), np.int32),
        row=order,
        user_ids=pa.array(users),
        item_ids=pa.array(items),
        new=NewInteractions(*(np.empty(0, np.int32) for _ in NewInteractions._fields)),
        new_items=0,
    )
    has_repeats = len(np.unique(user_N * len(items) + item_N)) < len(order)
    config = {"split": "given", "keep_duplicate": "all" if has_repeats else "first"}
    run = runs.start_run(data, job="prepare", config=config)
    texts = output_tables.empty_texts(len(items))
    named = pa.array([titles.get(item, "") for item in items.tolist()], pa.string())
    texts = texts.set_column(texts.column_names.index("title"), "title", named)
    limit = max(map(len, titles.values()), default=0)
    part = output_tables.item_part(output_tables.item_rows(kept), texts, limit)
    files.write_table(part.table, run.file(f"{ITEMS}/part-00000-00000.parquet"))
    files.write_tables(output_tables.interactions(kept, len(order)), run.file(INTERACTIONS))
    files.write_table(output_tables.users(kept), run.file(USERS))
    runs.finish_run(run, inputs=[], counts={})


def parts(split: pa.ChunkedArray) -> np.ndarray:
    """Indexes into splits.PARTS, (N,); ValueError names the first row that has another word."""
    part_N = pc.index_in(split.cast(pa.string()), value_set=pa.array(splits.PARTS)).fill_null(-1).to_numpy()
    if (part_N < 0).any():
        row = int(np.argmin(part_N))
        raise ValueError(
            f"interactions: column 'split', row {row + 1} has {split[row].as_py()!r}, not {', '.join(splits.PARTS)}"
        )
    return part_N.astype(np.int8)


def check_order(user_N: np.ndarray, position_N: np.ndarray, part_N: np.ndarray, row_N: np.ndarray) -> None:
    """ValueError for equal positions of a user, and for a train interaction after a held-out one.

    The interactions are sorted by user and position; `row_N` are their rows in the frame, from 1.
    """
    same_user = np.diff(user_N) == 0
    for column, values_N, is_wrong, text in (
        ("position", position_N, np.diff(position_N) == 0, "twice for a user"),
        ("split", np.array(splits.PARTS)[part_N], np.diff(part_N) < 0, "after a later part of the same user"),
    ):
        wrong = np.flatnonzero(same_user & is_wrong) + 1
        if len(wrong):
            first = wrong[0]
            raise ValueError(f"interactions: column {column!r}, row {row_N[first]} has {values_N[first]} {text}")


@contextmanager
def names_of_frames(folder: str) -> Iterator[None]:
    """Errors inside name the frames and not the files in `folder` that stand for them."""
    try:
        yield
    except (ConfigError, runs.RunError, ValueError) as error:
        text = str(error)
        for file, name in NAMES.items():
            text = text.replace(files.join(folder, file), name)
        error.args = (text,)
        raise


# --- the recommender ----------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class FrameRecommender:
    """A trained recommender whose answers are frames; made by `fit`.

    Its methods take users of the data by their ids, None for all; or `histories` of anybody, a frame of user_id (any
    ids) and item_id, the oldest item of a history first.
    """

    recommender: Recommender
    """The same for single answers, new items (`with_new_items`) and your own code."""
    titles: Mapping[str, str]
    folder: TemporaryDirectory[str]
    """The runs; deleted with this object."""

    def metrics(self) -> pd.DataFrame:
        """Mean metrics over users: a row per part (validation, test) and candidate set."""
        found = read_metrics(self.recommender.run)
        rows = [
            {"part": part, "candidates": candidates, **values}
            for part, rankings in (("validation", found.validation), ("test", found.test))
            for candidates, values in rankings.items()
            if values is not None
        ]
        return pd.DataFrame(rows)

    def recommend(
        self,
        users: str | Sequence[str] | None = None,
        n: int = 10,
        *,
        histories: Frame | None = None,
        mmr_weight: float | None = None,
        steer: Mapping[str, float] = NOTHING,
    ) -> pd.DataFrame:
        """The best `n` items of each user: user_id, rank (1 is best), item_id, title (where titles are known), score.

        `mmr_weight` and `steer` are those of `Recommender.recommend`. ValueError names unknown ids and aspects.
        """
        with names_of_frames(self.folder.name):
            found = [
                list_rows(self.recommender, pa.array(ids), some, n, mmr_weight=mmr_weight, steer=steer)
                for ids, some in self.batches(users, histories)
            ]
        frame = pa.concat_tables(found).to_pandas().rename(columns={"subject_id": "user_id"})
        if self.titles:
            frame.insert(3, "title", frame["item_id"].map(self.titles))
        return frame

    def looks_for(self, users: str | Sequence[str] | None = None, *, histories: Frame | None = None) -> pd.DataFrame:
        """What each user looks for now: user_id as the index, and a column per aspect: see `Recommender.looks_for`."""
        with names_of_frames(self.folder.name):
            found = [(ids, self.recommender.guided(some)) for ids, some in self.batches(users, histories)]
        rows = np.concatenate([guided_BA.cpu().numpy() for _, guided_BA in found])
        index = pd.Index([one for ids, _ in found for one in ids], name="user_id")
        return pd.DataFrame(rows, index=index, columns=list(self.recommender.aspects))

    def explain(
        self, item_id: str | None = None, users: str | Sequence[str] = (), *, aspects: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """Why an item suits users or not: a row per user and aspect.

        score and rank of the item; base_part and `term`, which add up to the score over all aspects; item_value and
        user_value on 1..10; looks_for; and `lift`, the term less its average over all items. AspectTerm in
        `raygr.explain.sentences` says more. `attrs["sentences"]` has a text per user. Without an item or users, those
        whose ratings differ most are taken. `aspects` names the rows; None is all. ValueError says what is wrong.
        """
        with names_of_frames(self.folder.name):
            found = explain_item(
                self.recommender, None if item_id is None else id_list(item_id)[0], id_list(users), aspects=aspects
            )
        rows = [
            {
                "user_id": user.user_id,
                "item_id": found.item_id,
                "rank": user.rank,
                "score": user.score,
                "base_part": user.base_part,
                "aspect": term.aspect,
                "item_value": term.item_value,
                "user_value": term.user_value,
                "looks_for": term.looks_for,
                "term": term.encoder_term + term.user_term,
                "lift": term.lift(),
            }
            for user in found.users
            for term in user.terms
        ]
        frame = pd.DataFrame(rows)
        frame.attrs["sentences"] = found.sentences()
        return frame

    def save(self, folder: str) -> None:
        """Copies the train run, for `load_recommender` and the stages that serve it; explaining needs its data, too."""
        shutil.copytree(self.recommender.run, folder)

    def batches(
        self, users: str | Sequence[str] | None, histories: Frame | None
    ) -> Iterator[tuple[list[str], Histories]]:
        """The ids and histories of at most USERS_AT_ONCE users at a time."""
        if histories is None:
            ids = self.recommender.user_ids_U.tolist() if users is None else id_list(users)
            items: list[list[str]] = []
        else:
            table = arrow_table(histories, "histories")
            check_names(table, ("user_id", "item_id"), "histories")
            columns = {name: column_ids(table, name, "histories") for name in ("user_id", "item_id")}
            by_user = pd.DataFrame(columns).groupby("user_id", sort=False)["item_id"].agg(list)
            ids, items = by_user.index.tolist(), by_user.tolist()
        if not ids or (users is not None and histories is not None):
            raise ValueError("users and histories are two ways to say for whom: give one of them, and not empty")
        for first in range(0, len(ids), USERS_AT_ONCE):
            names, some = ids[first : first + USERS_AT_ONCE], items[first : first + USERS_AT_ONCE]
            yield names, self.recommender.of_items(some) if items else self.recommender.of_users(names)


def id_list(ids: str | Sequence[str]) -> list[str]:
    """One id or several as texts; whole numbers are ids, too."""
    given = [ids] if isinstance(ids, str | int) else ids
    return complete_ids(pa.chunked_array([pa.array(given)]), "ids").to_pylist()
