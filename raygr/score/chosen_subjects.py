"""Prompts and texts of some subjects of a prepare run, made as scoring makes them, but without Ray.

Estimates draw such subjects, `raygr score --show-prompts` prints the first, and a refusal shows those that it is about.
"""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from raygr import files
from raygr.schema import ITEMS, REVIEWS, TRAIN, USERS
from raygr.score.config import ScoreConfig
from raygr.score.prompts import item_from_row, item_lines, lines_text, review_lines, reviews_text
from raygr.score.subjects import (
    PromptSettings,
    encoder_of,
    history_of,
    item_prompts,
    prompt_settings,
    user_prompt,
)


def subjects_of(data: str, subjects: str, limit: int | None) -> np.ndarray:
    """item_index of all items, or user_index of the users with a train part; at most the first `limit`."""
    if subjects == "items":
        return np.arange(1, 1 + min(limit or math.inf, count_rows(data, ITEMS)), dtype=np.int64)
    users = files.read_table(files.join(data, USERS), ["user_index", "cutoff_position"])
    index, cutoff = users["user_index"].to_numpy(), users["cutoff_position"].to_numpy()
    return np.sort(index[(cutoff >= 0) & (index < (limit or math.inf))]).astype(np.int64)


def chosen_prompts(data: str, settings: PromptSettings, chosen: np.ndarray) -> pa.Table:
    """PROMPT rows of these items or users, given by item_index or user_index."""
    if settings.subjects == "items":
        return item_prompts(rows_where(data, ITEMS, "item_index", chosen), settings=settings)
    histories, items = user_rows(data, chosen)
    user_ids = files.read_table(files.join(data, USERS)).sort_by("user_index")["user_id"].combine_chunks()
    return pa.concat_tables(
        user_prompt(reviews, settings=settings, items=items, user_ids=user_ids) for reviews in histories
    )


def whole_texts(data: str, settings: PromptSettings, subject_ids: Sequence[str]) -> list[str]:
    """What the prompts of these subjects would tell if nothing were cut."""
    if settings.subjects == "items":
        rows = {row["item_id"]: row for row in rows_where(data, ITEMS, "item_id", subject_ids).to_pylist()}
        items = [item_from_row(rows[subject], settings.item_rating) for subject in subject_ids]
        return [lines_text(item_lines(item, settings.best_rating)) for item in items]
    users = rows_where(data, USERS, "user_id", subject_ids)
    index = dict(zip(users["user_id"].to_pylist(), users["user_index"].to_pylist(), strict=True))
    histories, items = user_rows(data, np.array([index[subject] for subject in subject_ids]))
    return [
        reviews_text([review_lines(review, settings.best_rating) for review in history_of(reviews, items, settings)])
        for reviews in histories
    ]


def show_prompts(config: ScoreConfig, count: int) -> str:
    """The first prompts, whole, each with what the budget cut."""
    settings = prompt_settings(config, config.subjects, cutoff_fraction=config.cutoff_fraction)
    tokenizer = encoder_of(settings).tokenizer
    prompts = chosen_prompts(config.data, settings, subjects_of(config.data, config.subjects, count))
    return "\n\n".join(
        f"=== {row['subject_id']}: {row['prompt_tokens']} tokens, {lost(row)}\n"
        + tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False)
        for row in prompts.to_pylist()
    )


def lost(row: dict) -> str:
    cut = f"cut by max_prompt_tokens: {row['cut_from']} tokens" if row["cut_tokens"] else "no field cut"
    return f"{cut}, {row['reviews_left_out']} older reviews left out" if row["reviews_left_out"] else cut


def user_rows(data: str, users: np.ndarray) -> tuple[list[pa.Table], pa.Table]:
    """Train REVIEW rows of each of these users, and ITEM rows of their items alone, which the reviews count from 1."""
    reviews = rows_where(data, REVIEWS, "user_index", users)
    reviews = reviews.filter(pc.equal(reviews["split"], TRAIN))
    items = rows_where(data, ITEMS, "item_index", np.unique(reviews["item_index"].to_numpy())).sort_by("item_index")
    places = 1 + np.searchsorted(items["item_index"].to_numpy(), reviews["item_index"].to_numpy())
    column = reviews.column_names.index("item_index")
    reviews = reviews.set_column(column, "item_index", pa.array(places)).sort_by("user_index")
    start, end = (np.searchsorted(reviews["user_index"].to_numpy(), users, side=side) for side in ("left", "right"))
    histories = [reviews.slice(first, last - first) for first, last in zip(start.tolist(), end.tolist(), strict=True)]
    return histories, items


def rows_where(data: str, table: str, column: str, values: np.ndarray | Sequence[str]) -> pa.Table:
    filesystem, inner = files.filesystem_of(files.join(data, table))
    rows = pyarrow.dataset.dataset(inner, filesystem=filesystem)
    wanted = pc.is_in(pc.field(column), value_set=pa.array(values, rows.schema.field(column).type))
    return rows.to_table(filter=wanted)


def count_rows(data: str, table: str) -> int:
    filesystem, inner = files.filesystem_of(files.join(data, table))
    return pyarrow.dataset.dataset(inner, filesystem=filesystem).count_rows()
