"""Rows of a prepare run -> prompts as token ids: the map functions that scoring hands to Ray Data.

PROMPT rows out: PROMPT_SCHEMA. Importable and tested without Ray.
"""

import dataclasses
import functools
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raygr import files, runs
from raygr.data.row_counts import log_rows
from raygr.data.user_profiles import prompt_lengths
from raygr.schema import ITEMS, USERS
from raygr.score.aspects import AspectSet, load_aspects
from raygr.score.config import ScoreConfig
from raygr.score.default_model import ModelError, model_folder
from raygr.score.prompts import Item, Prompt, PromptEncoder, Review, item_from_row, prompt_sha256

PROMPT_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("shared_tokens", pa.int32()),
        ("prompt_sha256", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("told_sha256", pa.string()),  # of the text that the prompt tells, before the budget cut it
        ("has_text", pa.bool_()),
        ("cut_tokens", pa.int32()),  # lost to the budget; for users in the reviews that are shown
        ("cut_from", pa.string()),  # the fields that lost them, "details 210, description 12"
        ("reviews_used", pa.int32()),  # null for items
        ("reviews_left_out", pa.int32()),  # the user's oldest, for which the budget had no room
        ("cutoff", pa.int64()),
        ("cutoff_position", pa.int32()),
    ]
)


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """What a prompt depends on besides the subject."""

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
        best_rating=prepared["config"]["rating_range"][1],
        cutoff_fraction=cutoff_fraction,
    )


@functools.lru_cache(maxsize=2)
def encoder_of(settings: PromptSettings) -> PromptEncoder:
    """One tokenizer for all batches of a worker process; ModelError where the model has none to load."""
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
    except (OSError, ValueError) as error:  # their texts do not all name the model
        raise ModelError(f"model: {model} has no tokenizer that can be loaded: {error}") from error


def item_prompts(items: pa.Table, *, settings: PromptSettings) -> pa.Table:
    """A batch of ITEM rows -> PROMPT rows."""
    encoder = encoder_of(settings)
    rows = [
        prompt_row(row["item_id"], encoder.item_prompt(item_from_row(row, settings.item_rating)), cutoff=None)
        for row in items.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA)


def user_prompt(reviews: pa.Table, *, settings: PromptSettings, items: pa.Table, user_ids: pa.Array) -> pa.Table:
    """The train REVIEW rows of one user -> one PROMPT row.

    `items` holds ITEM rows, where row n has item_index n + 1; `user_ids` the id of each user_index.
    """
    history = history_of(reviews, items, settings)
    user_id = user_ids[reviews["user_index"][0].as_py()].as_py()
    row = prompt_row(user_id, encoder_of(settings).user_prompt(history), cutoff=history[-1].timestamp)
    return pa.Table.from_pylist([row], schema=PROMPT_SCHEMA)


def history_of(reviews: pa.Table, items: pa.Table, settings: PromptSettings) -> list[Review]:
    """What the prompt knows of one user's REVIEW rows, oldest first; `items` as for `user_prompt`."""
    known = prompt_lengths(np.array([len(reviews)]), settings.cutoff_fraction)[0]
    ordered = reviews.sort_by("position").slice(0, known).to_pylist()
    rows = items.take(pa.array([review["item_index"] - 1 for review in ordered])).to_pylist()
    return [
        review_of(review, item_from_row(row, settings.item_rating)) for review, row in zip(ordered, rows, strict=True)
    ]


def review_of(row: dict, item: Item) -> Review:
    rating = row["rating"]
    return Review(
        item=item,
        rating=None if rating is None or np.isnan(rating) else rating,
        timestamp=row["timestamp"],
        position=row["position"],
        title=row["review_title"],
        text=row["review_text"],
    )


def subjects_left_out(config: ScoreConfig, *, asked: int) -> dict[str, int]:
    """Of the data's items or users: how many are not asked about, by reason."""
    if config.subjects == "items":
        read, silent = files.read_table(files.join(config.data, ITEMS), ["item_index"]).num_rows, 0
    else:
        users = files.read_table(files.join(config.data, USERS), ["user_index", "cutoff_position"])
        is_silent = (users["cutoff_position"].to_numpy() < 0) & (
            users["user_index"].to_numpy() < (config.max_subjects or len(users))
        )
        read, silent = len(users), int(is_silent.sum())
    beyond = max(0, read - config.max_subjects) if config.max_subjects else 0
    dropped = {"beyond_max_subjects": beyond, "without_train_interaction": silent}
    log_rows(config.subjects, read=read, kept=asked, dropped=dropped)
    return dropped


def prompt_row(subject_id: str, prompt: Prompt, *, cutoff: int | None) -> dict:
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
