"""Prompts of items and users as token ids: the templates of Tables 9 and 10, the layouts of Tables 11 to 13.

chat_template.py puts the model's chat template around them. The engine appends an aspect's tail (answer_format.py) or
generates a completion behind `Prompt.prefix_ids`.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from raygr.score.aspects import AspectSet
from raygr.score.chat_template import PromptError, chat_parts, encode_control, encode_opening, encode_plain

DAY_MS = 86_400_000
MIN_SUBJECT_TOKENS = 96  # rating, date and labels take about 60 tokens and are never cut
MIN_REVIEW_TOKENS = 128  # a review up to this length is not cut to show an older one
CUT_FROM_ITEM = ("details", "description", "categories", "title")
CUT_FROM_REVIEW = ("reviewText", "summary", "categories", "product: title", "title")
TEXT_LABELS = frozenset(CUT_FROM_ITEM + CUT_FROM_REVIEW)  # the only fields with text, which the token budget may cut


@dataclass(frozen=True)
class Item:
    """The facts of an item that the prompt shows; "" and None leave their line out."""

    title: str = ""
    description: str = ""
    categories: str = ""
    details: str = ""
    rating: float | None = None  # mean rating, on the scale that ends at the encoder's `best_rating`
    rating_count: int = 0


@dataclass(frozen=True)
class Review:
    """One interaction of a user, with its item."""

    item: Item
    rating: float | None  # None for implicit data
    timestamp: int  # milliseconds since 1970, or a position where the data has no times
    position: int  # index among the user's interactions, from 0
    title: str = ""
    text: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt up to the start of the model's answer, with what the token budget cut from its subject."""

    prefix_ids: tuple[int, ...]
    shared_length: int  # number of leading tokens that all subjects of the encoder share
    told_sha256: str  # hash of the subject's text before any cut; for users of the reviews that are shown
    has_text: bool  # whether it shows more of the subject than ratings and dates
    cut: Mapping[str, int]  # field -> number of its tokens that were cut
    reviews_used: int | None = None  # None for items
    reviews_left_out: int | None = None  # the oldest reviews; None for items
    newest_position: int | None = None  # position of the newest review shown; None for items


class Line(NamedTuple):
    label: str
    value: str


def item_from_row(row: Mapping[str, Any], item_rating: Literal["train", "none", "all"]) -> Item:
    """The item of an ITEM row, with the mean rating of train, all or no interactions."""
    rating = None if item_rating == "none" else row[f"{item_rating}_rating"]
    if rating is not None and math.isnan(rating):
        rating = None  # Arrow's null is NaN in a NumPy batch
    return Item(
        title=row["title"],
        description=row["description"],
        categories=row["categories"],
        details=row["details"],
        rating=None if rating is None else float(rating),
        rating_count=0 if rating is None else int(row[f"{item_rating}_rating_count"]),
    )


def item_lines(item: Item, best_rating: float) -> list[Line]:
    """Table 11, line by line, without the lines that have no value."""
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
    """Table 12 with the item's lines nested in it; title, categories and rating where the review has no text."""
    rating = "" if review.rating is None else f"{review.rating:.1f}"
    if not (review.title.strip() or review.text.strip()):
        item = review.item
        return filled([Line("title", item.title), Line("categories", item.categories), Line("rating", rating)])
    is_time = review.timestamp >= DAY_MS  # otherwise it is a position
    day = datetime.fromtimestamp(review.timestamp / 1000, UTC).strftime("%Y-%m-%d") if is_time else ""
    own = filled(
        [
            Line("rating", rating),
            Line("reviewTime", day),
            Line("summary", review.title),
            Line("reviewText", review.text),
        ]
    )
    nested = item_lines(review.item, best_rating)
    if nested and nested[0].label == "title":
        return [*own, Line("product: title", nested[0].value), *nested[1:]]
    return [*own, Line("product", ""), *nested]


def filled(lines: Sequence[Line]) -> list[Line]:
    # values are joined into one line, so that no text can pass for another field
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
    """Makes prompts of at most `max_prompt_tokens` tokens for the items or users of one category.

    Nothing but this token budget cuts text. A subject's text is encoded as a whole, because tokenizers join the end of
    a line with the line break. Raises PromptError where the budget leaves too little for a subject.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        aspects: AspectSet,
        subjects: Literal["items", "users"],
        *,
        max_prompt_tokens: int,
        best_rating: float = 5.0,
    ):
        self.tokenizer = tokenizer
        self.best_rating = best_rating
        parts = chat_parts(tokenizer)
        system, lead_in = system_text(aspects, subjects), user_lead_in(aspects, subjects) + "\n"
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

    def subject_ids(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The tokens of the subject's own text, between what all prompts share and the start of the answer."""
        return prompt_ids[len(self.shared) : len(prompt_ids) - len(self.closing)]

    def item_prompt(self, item: Item) -> Prompt:
        """The prompt of Table 9; details are cut first, then description, categories and title."""
        lines = item_lines(item, self.best_rating)
        shown, ids = self.fit("", lines, CUT_FROM_ITEM, self.room)
        return self.prompt(ids, told=lines_text(lines), whole=[lines], shown=[shown])

    def user_prompt(self, reviews: Sequence[Review]) -> Prompt:
        """The prompt of Table 10 from at least one review, oldest first.

        Where the reviews do not fit, all products lose their description, then their details; then `share_out` cuts
        long reviews and drops the oldest.
        """
        recent = reviews[-max(1, self.room // 4) :]  # a review takes at least four tokens
        whole = [review_lines(review, self.best_rating) for review in recent]
        shown, ids = self.fit_reviews(whole, may_fit=len(recent) == len(reviews))
        used = whole[-len(shown) :]
        prompt = self.prompt(ids, told=reviews_text(used), whole=used, shown=shown)
        return replace(
            prompt,
            reviews_used=len(shown),
            reviews_left_out=len(reviews) - len(shown),
            newest_position=reviews[-1].position,
        )

    def fit_reviews(self, whole: list[list[Line]], *, may_fit: bool) -> tuple[list[list[Line]], list[int]]:
        """The lines of the newest reviews that fit, and their token ids. `may_fit`: `whole` has all of the user's."""
        sizes = self.line_sizes(whole)
        for dropped in ((), ("description",), ("description", "details")):
            pairs = [
                [(line, size) for line, size in zip(lines, counts, strict=True) if line.label not in dropped]
                for lines, counts in zip(whole, sizes, strict=True)
            ]
            shown = [[line for line, _ in review] for review in pairs]
            totals = [sum(size for _, size in review) for review in pairs]
            # encoded line by line, a text may take more tokens than as a whole, but never twice as many
            if may_fit and sum(totals) <= 2 * self.room:
                ids = self.encode(reviews_text(shown))
                if len(ids) <= self.room:
                    return shown, ids
        room = self.room + 1  # the line break before the first review is the template's
        while True:
            kept = self.share_out(shown, totals, room)
            ids = self.encode(reviews_text(kept))
            if len(ids) <= self.room:
                return kept, ids
            room -= len(ids) - self.room

    def share_out(self, reviews: list[list[Line]], sizes: list[int], room: int) -> list[list[Line]]:
        """Keep the newest reviews that fit into `room` tokens, and cut the long ones.

        While older reviews are added, a review counts at most a quarter of the room, or `MIN_REVIEW_TOKENS` if that is
        more. Room that short reviews leave goes to the long ones, which are cut to the same length.
        """
        share = max(room // 4, MIN_REVIEW_TOKENS)
        taken = accumulate(min(size, share) for size in reversed(sizes))
        used = max(1, sum(total <= room for total in taken))
        most = equal_share(sizes[-used:], room)
        return [
            lines if size <= most else self.fit(f"review {number}: ", lines, CUT_FROM_REVIEW, most - 1)[0]
            for number, (lines, size) in enumerate(zip(reviews[-used:], sizes[-used:], strict=True), start=1)
        ]

    def prompt(self, ids: list[int], *, told: str, whole: list[list[Line]], shown: list[list[Line]]) -> Prompt:
        return Prompt(
            prefix_ids=(*self.shared, *ids, *self.closing),
            shared_length=len(self.shared),
            told_sha256=hashlib.sha256(told.encode()).hexdigest(),
            has_text=any(line.label in TEXT_LABELS for lines in whole for line in lines),
            cut=self.cut(whole, shown),
        )

    def cut(self, whole: list[list[Line]], shown: list[list[Line]]) -> dict[str, int]:
        """Count the tokens that each field lost, over all reviews; fields that lost none are left out."""
        left = [{line.label: line.value for line in lines} for lines in shown]
        pairs = [
            (line.label, line.value, kept.get(line.label, ""))
            for lines, kept in zip(whole, left, strict=True)
            for line in lines
            if line.label in TEXT_LABELS and kept.get(line.label) != line.value
        ]
        encoded = encode_plain(self.tokenizer, [value for _, before, after in pairs for value in (before, after)])
        lost: Counter[str] = Counter()
        for (label, _, _), before, after in zip(pairs, encoded[::2], encoded[1::2], strict=True):
            lost[label] += max(1, len(before) - len(after))
        return dict(lost)

    def encode(self, text: str) -> list[int]:
        (ids,) = encode_plain(self.tokenizer, [text])
        return ids

    def line_sizes(self, reviews: list[list[Line]]) -> list[list[int]]:
        """Count the tokens of each review's lines, encoded separately; the first line includes the review's header.

        Headers are numbered from the newest review on, so that the n newest have the headers of n reviews.
        """
        texts = [
            ("\n" if place else f"\nreview {number}: ") + lines_text([line])
            for number, lines in zip(range(len(reviews), 0, -1), reviews, strict=True)
            for place, line in enumerate(lines)
        ]
        sizes = iter(map(len, encode_plain(self.tokenizer, texts)))
        return [[next(sizes) for _ in lines] for lines in reviews]

    def fit(
        self, header: str, lines: list[Line], cut_order: tuple[str, ...], room: int
    ) -> tuple[list[Line], list[int]]:
        """Cut values at their end, in `cut_order`, until header and lines fit into `room` tokens; lines and ids."""
        ids = self.encode(header + lines_text(lines))
        for label in cut_order:
            while len(ids) > room and label in [line.label for line in lines]:
                lines = [self.shorten(line, len(ids) - room) if line.label == label else line for line in lines]
                lines = [line for line in lines if line.value or line.label != label]
                ids = self.encode(header + lines_text(lines))
        if len(ids) > room:
            raise PromptError(
                f"max_prompt_tokens leaves {room} tokens, but ratings, date and labels alone take {len(ids)}: raise it"
            )
        return lines, ids

    def shorten(self, line: Line, tokens: int) -> Line:
        """The line without the last `tokens` tokens of its value."""
        encoding = self.tokenizer(
            line.value, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        starts = [start for start, _ in encoding["offset_mapping"]]
        # cut where a token starts and, of a character of several tokens, before its first: never half a character
        return Line(line.label, line.value[: starts[-tokens]].rstrip() if tokens < len(starts) else "")


def reviews_text(reviews: list[list[Line]]) -> str:
    return "\n".join(f"review {number}: {lines_text(lines)}".rstrip() for number, lines in enumerate(reviews, start=1))


def equal_share(sizes: Sequence[int], room: int) -> int:
    """The largest number of tokens each may take so that all together take at most `room`."""
    for place, size in enumerate(sorted(sizes)):
        each = room // (len(sizes) - place)
        if size > each:
            return each
        room -= size
    return max(sizes)


def prompt_sha256(token_ids: Sequence[int]) -> str:
    """SHA-256 of the ids as little-endian 32-bit integers, which is the same on every machine."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<u4").tobytes()).hexdigest()
