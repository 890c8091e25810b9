"""Completions -> ratings or a named reason, by rules (4.2.1); digit probabilities -> P(1..10).

The rules: a rating is the first number behind "name:" on the same line, whatever words stand between;
lines may come in any order, with bullets or bold marks, in any case. "8/10" and "8 out of 10" are 8,
"8.5" is 9 (halves go up). The number itself must lie in 1..10: "0.6" and "10.4" are out of range.
No ratings: numbers in brackets (models repeat "(e.g., 1 for ...)"), "4/5", "1,000", "1e3", words, digits of
other scripts, and ranges ("7-8", "7 to 8": most are the scale repeated, "1-10", and their mean says nothing).
Of two ratings for one aspect the first counts, even where it is out of range.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

OK, NOTHING_READ, SOME_MISSING, OUT_OF_RANGE = "ok", "no_aspect_read", "some_aspects_missing", "out_of_range"
LENGTH = "length"  # the completion was cut off at the token limit before every rating was read

LOWEST, HIGHEST = 1, 10
# not part of a word or a longer number, so that "v8", "1990s", "1,000" and "1.2.3" are no ratings
NUMBER = re.compile(
    r"(?<![\w.])(?<![0-9],)(?P<minus>[-\u2212])?\+?0*(?P<size>[0-9]+(?:\.[0-9]+)?)(?![\w%])(?![.,][0-9])"
    r"(?:[\s*]*(?:/|out of)[\s*]*(?P<best>[0-9]+))?"
    r"(?P<range>[\s*]*(?:[-\u2010-\u2013\u2212]|to\b)[\s*]*[0-9])?"  # any hyphen, en dash or minus
)
BRACKETS = re.compile(r"\([^)\n]*\)")


@dataclass(frozen=True)
class ParsedRatings:
    """Ratings of A aspects in 1..10, None where not read, with the reason and the place of each."""

    ratings: tuple[int | None, ...]
    starts: tuple[int | None, ...]  # character of the completion at which the rating's first digit stands
    ends: tuple[int | None, ...]  # character behind its last digit
    reason: str


class Mention(NamedTuple):
    """A number behind "name:"."""

    name: str  # casefolded
    number: float  # in or out of range
    start: int  # place of its first digit, leading zeros left out
    end: int


def parse_ratings(completion: str, names: tuple[str, ...]) -> ParsedRatings:
    """The ratings that the rules read from `completion`, in the order of `names`."""
    first: dict[str, Mention] = {}
    for mention in mentions(completion, names):
        first.setdefault(mention.name, mention)
    kept = {name: mention for name, mention in first.items() if LOWEST <= mention.number <= HIGHEST}
    read = [kept.get(name.casefold()) for name in names]
    return ParsedRatings(
        ratings=tuple(mention and math.floor(mention.number + 0.5) for mention in read),
        starts=tuple(mention and mention.start for mention in read),
        ends=tuple(mention and mention.end for mention in read),
        reason=reason_of(len(kept), len(names), out_of_range=len(kept) < len(first)),
    )


def reason_of(read: int, wanted: int, *, out_of_range: bool) -> str:
    if read == wanted:
        return OK
    if out_of_range:
        return OUT_OF_RANGE
    return SOME_MISSING if read else NOTHING_READ


def mentions(completion: str, names: tuple[str, ...]) -> Iterator[Mention]:
    labels = list(label_pattern(names).finditer(completion))
    limits = [*(label.start() for label in labels), len(completion)][1:]
    for label, limit in zip(labels, limits, strict=True):
        segment = completion[label.end() : limit].split("\n", 1)[0]
        # blanked, not removed: places must stay those of the completion
        visible = BRACKETS.sub(lambda match: " " * len(match[0]), segment)
        number = NUMBER.search(visible)
        if number and number["best"] in (None, "10") and not number["range"]:
            size = float(number["size"]) * (-1 if number["minus"] else 1)
            start, end = (label.end() + place for place in number.span("size"))
            yield Mention(label[1].casefold(), size, start, end)


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


def read_completion(completion: str, names: tuple[str, ...], *, is_cut: bool) -> ParsedRatings:
    """`parse_ratings` of a completion that may have been cut off at the token limit.

    A number at the end of what was cut is no rating, since more digits may have been to come.
    """
    parsed = parse_ratings(completion, names)
    if not is_cut:
        return parsed
    whole = [end is not None and completion[end:].strip(" .,/*_-") != "" for end in parsed.ends]
    ratings, starts, ends = (
        tuple(value if kept else None for value, kept in zip(values, whole, strict=True))
        for values in (parsed.ratings, parsed.starts, parsed.ends)
    )
    return ParsedRatings(ratings, starts, ends, reason=OK if all(whole) else LENGTH)
