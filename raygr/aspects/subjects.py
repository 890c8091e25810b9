"""Rows of a prepare run -> prompts as token ids: the map functions that scoring hands to Ray Data.

PROMPT rows out: PROMPT_SCHEMA. Importable and tested without Ray.
"""

import dataclasses
import functools
from typing import Literal

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raygr.aspects.aspects import AspectSet
from raygr.aspects.prompts import Item, Prompt, PromptEncoder, Review, item_from_row, prompt_sha256
from raygr.aspects.small_model import ModelError

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
    """One user's REVIEW rows, oldest first; `items` as for `user_prompt`."""
    ordered = reviews.sort_by("position").to_pylist()
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
