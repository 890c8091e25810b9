"""Completions -> ratings or a named reason, by rules (4.2.1); digit probabilities -> P(1..10).

The rules: a rating is the first number behind "name:" on the same line, whatever words stand between;
lines may come in any order, with bullets or bold marks, in any case. "8/10" is 8, "8.5" is 9 (halves
go up). Numbers in brackets are no ratings (models repeat "(e.g., 1 for ...)"), nor are "4/5" and words.
Of two ratings for one aspect the first counts.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

OK, NOTHING_READ, SOME_MISSING, OUT_OF_RANGE = "ok", "no_aspect_read", "some_aspects_missing", "out_of_range"

LOWEST, HIGHEST = 1, 10
# not part of a word or a longer number, so that "v8" and "1990s" are no ratings
NUMBER = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)(?![\w%])(?:\s*/\s*(\d+))?")
BRACKETS = re.compile(r"\([^)\n]*\)")


@dataclass(frozen=True)
class ParsedRatings:
    """Ratings of A aspects in 1..10, None where not read, with the reason and the place of each."""

    ratings: tuple[int | None, ...]
    starts: tuple[int | None, ...]  # character of the completion at which the rating begins
    reason: str


def parse_ratings(completion: str, names: tuple[str, ...]) -> ParsedRatings:
    """The ratings that the rules read from `completion`, in the order of `names`."""
    ratings: dict[str, tuple[int, int]] = {}
    out_of_range = False
    for name, rating, start in mentions(completion, names):
        if LOWEST <= rating <= HIGHEST:
            ratings.setdefault(name, (rating, start))
        else:
            out_of_range = True
    read = [ratings.get(name.casefold(), (None, None)) for name in names]
    return ParsedRatings(
        ratings=tuple(rating for rating, _ in read),
        starts=tuple(start for _, start in read),
        reason=reason_of(len(ratings), len(names), out_of_range=out_of_range),
    )


def reason_of(read: int, wanted: int, *, out_of_range: bool) -> str:
    if read == wanted:
        return OK
    if out_of_range:
        return OUT_OF_RANGE
    return SOME_MISSING if read else NOTHING_READ


def mentions(completion: str, names: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """(casefolded name, rating, its place) of every "name: ... number", ratings not checked for range."""
    labels = list(label_pattern(names).finditer(completion))
    ends = [*(label.start() for label in labels), len(completion)][1:]
    for label, end in zip(labels, ends, strict=True):
        segment = completion[label.end() : end].split("\n", 1)[0]
        # blanked, not removed: places must stay those of the completion
        visible = BRACKETS.sub(lambda match: " " * len(match[0]), segment)
        number = NUMBER.search(visible)
        if number and number[2] in (None, "10"):
            yield label[1].casefold(), math.floor(float(number[1]) + 0.5), label.end() + number.start()


def label_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    # longest first: "dialogue complexity" is not a mention of "complexity"
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<!\w)({alternatives})(?!\w)[*_\"'\s]*?(?:\([^)\n]*\))?[*_\"' ]*[:=]", re.IGNORECASE)


def rating_probabilities(logprobs_NR: np.ndarray, zero_after_one_N: np.ndarray | None) -> np.ndarray:
    """P(1..10), shape (N, 10), from the log-probabilities of ten rating tokens.

    Where `10` is one token, the columns are 1..10. Where it is split, the tenth column is not used and
    P(1) = P('1') (1 - P('0' | '1')), P(10) = P('1') P('0' | '1'), with log P('0' | '1') in `zero_after_one_N`.
    Normalised over the ten ratings; NaN where the logarithms are.
    """
    logprobs = np.array(logprobs_NR, dtype=np.float64)
    if zero_after_one_N is not None:
        zero = np.minimum(np.asarray(zero_after_one_N, dtype=np.float64), 0.0)
        logprobs[:, 9] = logprobs[:, 0] + zero
        with np.errstate(divide="ignore"):  # P('0' | '1') = 1 leaves nothing for the rating 1
            logprobs[:, 0] += np.log(-np.expm1(zero))
    largest = logprobs.max(axis=1, keepdims=True)
    shares = np.exp(logprobs - largest)
    return shares / shares.sum(axis=1, keepdims=True)
