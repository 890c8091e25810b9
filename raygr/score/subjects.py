"""Items and users of a prepare run as prompts: rows of the data in, PROMPT rows (PROMPT_SCHEMA) out.

On Ray, scoring hands `item_prompts` and `user_prompt` to Ray Data. `chosen_prompts` makes the same prompts in the
calling process: for few subjects, estimates, `raygr score --show-prompts` and error messages.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raygr import files, runs
from raygr.data.row_counts import log_rows
from raygr.data.user_profiles import prompt_lengths
from raygr.schema import ITEMS, REVIEWS, TRAIN, USERS
from raygr.score.aspects import AspectSet, load_aspects
from raygr.score.config import ScoreConfig
from raygr.score.default_model import ModelError, model_folder
from raygr.score.prompts import (
    Item,
    Prompt,
    PromptEncoder,
    Review,
    item_from_row,
    item_lines,
    lines_text,
    prompt_sha256,
    review_lines,
    reviews_text,
)

PROMPTS, PROMPTS_DONE = "prompts", "prompts.json"  # in a score run: the PROMPT rows, and their counts
PROMPT_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("shared_tokens", pa.int32()),
        ("prompt_sha256", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("told_sha256", pa.string()),  # hash of the subject's text before the budget cut it
        ("has_text", pa.bool_()),
        ("cut_tokens", pa.int32()),  # tokens that the budget cut; for users from the reviews that are shown
        ("cut_from", pa.string()),  # the fields that they were cut from: "details 210, description 12"
        ("reviews_used", pa.int32()),  # null for items
        ("reviews_left_out", pa.int32()),  # a user's oldest reviews, which did not fit into the budget
        ("cutoff", pa.int64()),
        ("cutoff_position", pa.int32()),
    ]
)


# --- settings ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """Everything besides the subject that a prompt depends on."""

    model: str
    aspects: AspectSet
    subjects: Literal["items", "users"]
    max_prompt_tokens: int
    item_rating: Literal["train", "none", "all"]
    best_rating: float
    cutoff_fraction: float = 1.0
    """Users only: the share of a user's train interactions, from the first on, that the prompt may show."""


class PromptConfig(Protocol):
    """The fields that prompts depend on, which the configurations of score, finetune and vectors share."""

    @property
    def data(self) -> str: ...
    @property
    def llm(self) -> str: ...
    @property
    def aspects(self) -> str: ...
    @property
    def max_prompt_tokens(self) -> int: ...
    @property
    def item_rating(self) -> Literal["train", "none", "all"]: ...


def prompt_settings(
    config: PromptConfig, subjects: Literal["items", "users"], *, cutoff_fraction: float = 1.0
) -> PromptSettings:
    """Read the aspects and the rating scale that `config` names; RunError where `data` is no finished prepare run."""
    prepared = runs.read_run(config.data, job="prepare")
    return PromptSettings(
        model=model_folder(config.llm),
        aspects=load_aspects(config.aspects),
        subjects=subjects,
        max_prompt_tokens=config.max_prompt_tokens,
        item_rating=config.item_rating,
        best_rating=prepared.config["rating_range"][1],
        cutoff_fraction=cutoff_fraction,
    )


@functools.lru_cache(maxsize=2)
def encoder_of(settings: PromptSettings) -> PromptEncoder:
    """The encoder of these settings, cached per process; ModelError where the model has no tokenizer to load."""
    return PromptEncoder(
        load_tokenizer(settings.model),
        settings.aspects,
        settings.subjects,
        max_prompt_tokens=settings.max_prompt_tokens,
        best_rating=settings.best_rating,
    )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:  # not all of their messages name the model
        raise ModelError(f"model: {model} has no tokenizer that can be loaded: {error}") from error


# --- rows to prompts ---------------------------------------------------------------------------


def item_prompts(items: pa.Table, *, settings: PromptSettings) -> pa.Table:
    """Turn a batch of ITEM rows into PROMPT rows."""
    encoder = encoder_of(settings)
    rows = [
        prompt_row(row["item_id"], encoder.item_prompt(item_from_row(row, settings.item_rating)), cutoff=None)
        for row in items.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


def user_prompt(reviews: pa.Table, *, settings: PromptSettings, items: pa.Table, user_ids: pa.Array) -> pa.Table:
    """Turn the train REVIEW rows of one user into one PROMPT row.

    `items` holds ITEM rows, where row n has item_index n + 1; `user_ids` holds the id of each user_index.
    """
    history = history_of(reviews, items, settings)
    user_id = user_ids[reviews["user_index"][0].as_py()].as_py()
    row = prompt_row(user_id, encoder_of(settings).user_prompt(history), cutoff=history[-1].timestamp)
    return pa.Table.from_pylist([row], schema=PROMPT_SCHEMA)


def history_of(reviews: pa.Table, items: pa.Table, settings: PromptSettings) -> list[Review]:
    """The reviews of one user that the prompt may show, oldest first; `items` as in `user_prompt`."""
    known = prompt_lengths(np.array([len(reviews)]), settings.cutoff_fraction)[0]
    ordered = reviews.sort_by("position").slice(0, known).to_pylist()
    rows = items.take(pa.array([review["item_index"] - 1 for review in ordered])).to_pylist()
    return [
        review_of(review, item_from_row(row, settings.item_rating)) for review, row in zip(ordered, rows, strict=True)
    ]


def review_of(row: dict[str, Any], item: Item) -> Review:
    rating = row["rating"]
    return Review(
        item=item,
        rating=None if rating is None or np.isnan(rating) else rating,
        timestamp=row["timestamp"],
        position=row["position"],
        title=row["review_title"],
        text=row["review_text"],
    )


def prompt_row(subject_id: str, prompt: Prompt, *, cutoff: int | None) -> dict[str, Any]:
    return {
        "subject_id": subject_id,
        "prompt_ids": prompt.prefix_ids,
        "shared_tokens": prompt.shared_length,
        "prompt_sha256": prompt_sha256(prompt.prefix_ids),
        "prompt_tokens": len(prompt.prefix_ids),
        "told_sha256": prompt.told_sha256,
        "has_text": prompt.has_text,
        "cut_tokens": sum(prompt.cut.values()),
        "cut_from": ", ".join(f"{field} {tokens}" for field, tokens in prompt.cut.items()),
        "reviews_used": prompt.reviews_used,
        "reviews_left_out": prompt.reviews_left_out,
        "cutoff": cutoff,
        "cutoff_position": prompt.newest_position,
    }


# --- chosen subjects, without Ray --------------------------------------------------------------


def subjects_of(data: str, subjects: str, limit: int | None) -> np.ndarray:
    """item_index of all items, or user_index of the users with a train interaction; at most the first `limit`."""
    if subjects == "items":
        return np.arange(1, 1 + min(limit or math.inf, stored_table(data, ITEMS).count_rows()), dtype=np.int64)
    users = files.read_table(files.join(data, USERS), ["user_index", "cutoff_position"])
    index, cutoff = users["user_index"].to_numpy(), users["cutoff_position"].to_numpy()
    return np.sort(index[(cutoff >= 0) & (index < (limit or math.inf))]).astype(np.int64)


def drawn(values: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Draw `count` of the values, or all of fewer; a smaller draw with the same seed is the start of a larger one."""
    return np.random.default_rng(seed).permutation(values)[:count]


def chosen_subjects(config: ScoreConfig) -> np.ndarray:
    """item_index or user_index of all subjects, the first `max_subjects`, or a draw of `sample_subjects`; sorted."""
    found = subjects_of(config.data, config.subjects, config.max_subjects)
    return np.sort(drawn(found, config.sample_subjects, seed=config.seed)) if config.sample_subjects else found


def subjects_left_out(config: ScoreConfig, *, asked: int) -> dict[str, int]:
    """Count by reason, and log, the items or users of the data that are not scored; `asked` of them are."""
    rows = stored_table(config.data, ITEMS if config.subjects == "items" else USERS).count_rows()
    possible, first = subjects_of(config.data, config.subjects, config.max_subjects), config.max_subjects or rows
    dropped = {
        "beyond_max_subjects": max(0, rows - first),
        "not_sampled": len(possible) - len(chosen_subjects(config)),
        "without_train_interaction": min(first, rows) - len(possible),
    }
    log_rows(config.subjects, read=rows, kept=asked, dropped=dropped)
    return dropped


def chosen_prompts(data: str, settings: PromptSettings, chosen: np.ndarray) -> pa.Table:
    """PROMPT rows of the items or users given by item_index or user_index."""
    if not len(chosen):
        return PROMPT_SCHEMA.empty_table()
    if settings.subjects == "items":
        return item_prompts(rows_where(data, ITEMS, "item_index", chosen), settings=settings)
    histories, items = user_rows(data, chosen)
    user_ids = files.read_table(files.join(data, USERS)).sort_by("user_index")["user_id"].combine_chunks()
    return pa.concat_tables(
        user_prompt(reviews, settings=settings, items=items, user_ids=user_ids) for reviews in histories
    )


def whole_texts(data: str, settings: PromptSettings, subject_ids: Sequence[str]) -> list[str]:
    """The text of each of these subjects before any cut."""
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
    """The first `count` prompts in full, each with what the token budget cut."""
    settings = prompt_settings(config, config.subjects, cutoff_fraction=config.cutoff_fraction)
    tokenizer = encoder_of(settings).tokenizer
    parts = []
    for row in chosen_prompts(config.data, settings, chosen_subjects(config)[:count]).to_pylist():
        cut = f"cut by max_prompt_tokens: {row['cut_from']} tokens" if row["cut_tokens"] else "no field cut"
        cut += f", {row['reviews_left_out']} older reviews left out" if row["reviews_left_out"] else ""
        text = tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False)
        parts.append(f"=== {row['subject_id']}: {row['prompt_tokens']} tokens, {cut}\n{text}")
    return "\n\n".join(parts)


def user_rows(data: str, users: np.ndarray) -> tuple[list[pa.Table], pa.Table]:
    """Train REVIEW rows of each of these users, and the ITEM rows of their items.

    The reviews' item_index is renumbered to count these items alone, from 1.
    """
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
    rows = stored_table(data, table)
    return rows.to_table(filter=pc.is_in(pc.field(column), value_set=pa.array(values, rows.schema.field(column).type)))


def stored_table(data: str, table: str) -> pyarrow.dataset.Dataset:
    """A table of the prepare run `data`, not yet read."""
    filesystem, inner = files.filesystem_of(files.join(data, table))
    return pyarrow.dataset.dataset(inner, filesystem=filesystem)
