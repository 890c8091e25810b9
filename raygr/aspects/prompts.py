"""Items and users as prompts of token ids: the templates of Tables 9 and 10, the layouts of Tables 11 to 13.

The chat template around them is chat.py's.
Left out: everything that asks a model; the engine appends a tail of answers.py or a completion to `Prompt.prefix_ids`.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from raygr.aspects.aspects import AspectSet
from raygr.aspects.chat import PromptError, chat_parts, encode_control, encode_opening, encode_plain

DAY_MS = 86_400_000
MIN_SUBJECT_TOKENS = 96  # rating, date and labels take about 60 and are never cut
CUT_FROM_ITEM = ("details", "description", "categories", "title")
CUT_FROM_REVIEW = ("reviewText", "summary", "categories", "product: title", "title")


@dataclass(frozen=True)
class Item:
    """What the prompt tells of an item; "" and None leave their line out."""

    title: str = ""
    description: str = ""
    categories: str = ""
    details: str = ""
    rating: float | None = None  # mean on the scale that ends at the encoder's `best_rating`
    rating_count: int = 0


@dataclass(frozen=True)
class Review:
    """One interaction of a user with the item that it is about."""

    item: Item
    rating: float | None  # None for implicit data
    timestamp: int  # ms since 1970, or a position where the data has no clock
    position: int  # among the user's interactions, from 0
    title: str = ""
    text: str = ""


@dataclass(frozen=True)
class Prompt:
    """A whole prompt, up to where the model's answer starts."""

    prefix_ids: tuple[int, ...]
    shared_length: int  # leading tokens that are the same for every subject of the encoder
    reviews_used: int | None  # None for items
    newest_position: int | None  # position of the newest review in the prompt; None for items


class Line(NamedTuple):
    label: str
    value: str


def item_from_row(row: Mapping[str, Any], item_rating: Literal["train", "none", "all"]) -> Item:
    """The item of a row of `schema.ITEM_SCHEMA`, with its rating from the chosen interactions."""
    rating = None if item_rating == "none" else row[f"{item_rating}_rating"]
    known = rating is not None and not math.isnan(rating)  # Arrow's null is NaN in a NumPy batch
    return Item(
        title=row["title"],
        description=row["description"],
        categories=row["categories"],
        details=row["details"],
        rating=float(rating) if known else None,
        rating_count=int(row[f"{item_rating}_rating_count"]) if known else 0,
    )


def item_lines(item: Item, best_rating: float) -> list[Line]:
    """Table 11, line by line, without those that have no value."""
    rating = "" if item.rating is None else f"{item.rating:.1f}/{best_rating:.1f} ({item.rating_count} users)"
    return filled(
        [
            Line("title", item.title),
            Line("description", item.description),
            Line("rating", rating),
            Line("categories", item.categories),
            Line("details", item.details),
        ]
    )


def review_lines(review: Review, best_rating: float) -> list[Line]:
    """Table 12 with the item's lines nested in it; title, categories, rating where there is no review text."""
    rating = "" if review.rating is None else f"{review.rating:.1f}"
    if not (review.title.strip() or review.text.strip()):
        item = review.item
        return filled([Line("title", item.title), Line("categories", item.categories), Line("rating", rating)])
    own = filled(
        [
            Line("rating", rating),
            Line("reviewTime", review_date(review.timestamp)),
            Line("summary", review.title),
            Line("reviewText", review.text),
        ]
    )
    nested = item_lines(review.item, best_rating)
    if nested and nested[0].label == "title":
        return [*own, Line("product: title", nested[0].value), *nested[1:]]
    return [*own, Line("product", ""), *nested]


def review_date(timestamp: int) -> str:
    """The day in UTC, or "" where the timestamp is a position and no time."""
    return "" if timestamp < DAY_MS else datetime.fromtimestamp(timestamp / 1000, UTC).strftime("%Y-%m-%d")


def filled(lines: Sequence[Line]) -> list[Line]:
    # values are put on one line, so that no text can pass for another field
    flat = [Line(line.label, " ".join(line.value.split())) for line in lines]
    return [line for line in flat if line.value]


def lines_text(lines: Sequence[Line]) -> str:
    return "\n".join(f"{line.label}: {line.value}" if line.value else f"{line.label}:" for line in lines)


def system_text(aspects: AspectSet, subjects: Literal["items", "users"]) -> str:
    """The system prompt of Table 9 (items) or 10 (users)."""
    if subjects == "items":
        task = (
            f"You are {aspects.a_critic}. You have been asked to review {aspects.a_subject}. You should rate the "
            f"{aspects.subject} on a scale of 1 to 10 (1 is the most negative and 10 is the most positive) "
        )
    else:
        task = (
            f"You are {aspects.a_recommender}. You will be given some previous {aspects.reviews} of a user. You have "
            f"been asked to recommend {aspects.a_subject} to the user. You should rate the {aspects.subject} which "
            "you think the user will like on a scale of 1 to 10 (1 is the least likely and 10 is the most likely) "
        )
    return "\n".join(
        [
            task + "on the following dimensions:",
            *(f"{aspect.name}: {aspect.description}" for aspect in aspects.aspects),
            "Your response should be in the following format, where <rating> is a number between 1 and 10:",
            *(f"{name}: <rating>" for name in aspects.names),
            "Do NOT include any other information in your response.",
        ]
    )


def user_lead_in(aspects: AspectSet, subjects: Literal["items", "users"]) -> str:
    """The first line of the user prompt of Table 9 (items) or 10 (users)."""
    if subjects == "items":
        return f"Here is some information about {aspects.a_subject}:"
    return f"Here are some previous {aspects.reviews} of the user:"


class PromptEncoder:
    """Prompts of at most `max_prompt_tokens` tokens for all items or all users of one category.

    Raises PromptError where the budget leaves too little for a subject.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        aspects: AspectSet,
        subjects: Literal["items", "users"],
        *,
        max_prompt_tokens: int,
        best_rating: float = 5.0,
        block_size: int = 1,
    ):
        """`block_size`: prompts lose up to so many tokens less one, to fill whole blocks of the engine's cache."""
        self.tokenizer = tokenizer
        self.best_rating = best_rating
        self.block_size = block_size
        parts = chat_parts(tokenizer)
        system, lead_in = system_text(aspects, subjects), user_lead_in(aspects, subjects)
        self.shared = encode_opening(tokenizer, [(parts.opening, system), (parts.between, lead_in)])
        self.closing = encode_control(tokenizer, parts.closing)
        template_tokens = len(self.shared) + len(self.closing)
        self.room = max_prompt_tokens - template_tokens
        if self.room < MIN_SUBJECT_TOKENS:
            needed = template_tokens + MIN_SUBJECT_TOKENS
            raise PromptError(
                f"max_prompt_tokens={max_prompt_tokens} is too small: the template with its "
                f"{len(aspects.aspects)} aspects takes {template_tokens}, so set at least {needed}"
            )

    def item_prompt(self, item: Item) -> Prompt:
        """Table 9's prompt; details are cut to fit first, then the description, categories and title."""
        lines = self.fit("\n", item_lines(item, self.best_rating), CUT_FROM_ITEM)
        bodies = encode_plain(self.tokenizer, ["\n" + lines_text([line]) for line in lines])
        labels = [line.label for line in lines]
        self.trim([bodies[labels.index(label)] for label in CUT_FROM_ITEM if label in labels], bodies)
        return self.prompt(flat(bodies), reviews_used=None, newest_position=None)

    def user_prompt(self, reviews: Sequence[Review]) -> Prompt:
        """Table 10's prompt from at least one review, oldest first.

        Where they overflow, all products lose their description, then their details, then the oldest
        reviews are dropped; the newest review stays and is cut where it is too long by itself.
        """
        recent = reviews[-max(1, self.room // 4) :]  # a review takes four tokens at the very least
        headers = encode_plain(self.tokenizer, [f"\nreview {number}:" for number in range(1, len(recent) + 1)])
        lines = [review_lines(review, self.best_rating) for review in recent]
        bodies = self.encode_lines(lines)
        for dropped in ((), ("description",), ("description", "details")):
            kept = [join_kept(review, body, dropped) for review, body in zip(lines, bodies, strict=True)]
            used = newest_that_fit(headers, kept, self.room)
            if used == len(reviews):
                break
        if not used:
            shortest = self.fit("\nreview 1: ", [ln for ln in lines[-1] if ln.label not in dropped], CUT_FROM_REVIEW)
            kept, used = [flat(self.encode_lines([shortest])[0])], 1
        parts = [part for pair in zip(headers, kept[-used:], strict=False) for part in pair]
        self.trim(parts[1::2], parts)  # the oldest reviews lose their end
        return self.prompt(flat(parts), reviews_used=used, newest_position=reviews[-1].position)

    def trim(self, cut_order: list[list[int]], parts: list[list[int]]) -> None:
        """Cuts the ends of these parts, in this order, until all parts fit the budget in whole blocks."""
        length = sum(map(len, parts))
        template = len(self.shared) + len(self.closing)
        budget = min(length, self.room) + template
        surplus = length + template - budget // self.block_size * self.block_size
        for part in cut_order:
            cut = min(surplus, len(part))
            del part[len(part) - cut :]
            surplus -= cut

    def prompt(self, subject_ids: list[int], *, reviews_used: int | None, newest_position: int | None) -> Prompt:
        return Prompt(
            prefix_ids=(*self.shared, *subject_ids, *self.closing),
            shared_length=len(self.shared),
            reviews_used=reviews_used,
            newest_position=newest_position,
        )

    def encode_lines(self, reviews: list[list[Line]]) -> list[list[list[int]]]:
        """Token ids per review and line; one tokenizer call for all, since each review is encoded once."""
        texts = [
            ("\n" if number else " ") + lines_text([line]) for lines in reviews for number, line in enumerate(lines)
        ]
        encoded = iter(encode_plain(self.tokenizer, texts))
        return [[next(encoded) for _ in lines] for lines in reviews]

    def fit(self, header: str, lines: list[Line], cut_order: tuple[str, ...]) -> list[Line]:
        """The lines, with values cut at their end in this order until there is room for them and the header."""
        (ids,) = encode_plain(self.tokenizer, [header + lines_text(lines)])
        for label in cut_order:
            while len(ids) > self.room and label in [line.label for line in lines]:
                lines = [self.shorten(line, len(ids) - self.room) if line.label == label else line for line in lines]
                lines = [line for line in lines if line.value or line.label != label]
                (ids,) = encode_plain(self.tokenizer, [header + lines_text(lines)])
        return lines

    def shorten(self, line: Line, tokens: int) -> Line:
        """The line without the last so many tokens of its value."""
        encoding = self.tokenizer(
            line.value, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        starts = [start for start, _ in encoding["offset_mapping"]]
        # at the start of a token, where a character of several tokens begins: never half a character
        return Line(line.label, line.value[: starts[-tokens]].rstrip() if tokens < len(starts) else "")


def join_kept(lines: list[Line], bodies: list[list[int]], dropped: tuple[str, ...]) -> list[int]:
    return flat([ids for line, ids in zip(lines, bodies, strict=True) if line.label not in dropped])


def flat(parts: list[list[int]]) -> list[int]:
    return [token for part in parts for token in part]


def newest_that_fit(headers: list[list[int]], bodies: list[list[int]], room: int) -> int:
    """How many of the newest reviews take at most `room` tokens, when numbered from 1."""
    header_totals = accumulate(len(ids) for ids in headers)
    body_totals = accumulate(len(ids) for ids in reversed(bodies))
    return sum(header + body <= room for header, body in zip(header_totals, body_totals, strict=True))


def prompt_sha256(token_ids: Sequence[int]) -> str:
    """Hash of the ids as little-endian 32-bit integers: the same on every machine."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<u4").tobytes()).hexdigest()
