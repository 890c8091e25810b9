"""Completions -> ratings or a named reason, by rules (4.2.1); digit probabilities -> P(1..10).

The rules: a rating is the first number behind "name:" on the same line, whatever words stand between;
lines may come in any order, with bullets or bold marks, in any case, with "_" or "-" for the spaces of a name.
"8/10" and "8 out of 10" are 8, "8.5" is 9 (halves go up). The number itself must lie in 1..10: "0.6" and "10.4"
are out of range. Of two ratings for one aspect the first counts, even where it is out of range.
An aspect without a rating behind a colon may have it where the number stands by itself: "name - 8", "name 8, ...",
alone on the next line, or as the only number among the cells behind the name in a table's row. If an aspect has
several of these and they differ, none counts.
No ratings: numbers in brackets (models repeat "(e.g., 1 for ...)"), "4/5", "1,000", "1e3", words, digits of
other scripts, and ranges ("7-8", "7 to 8": most are the scale repeated, "1-10", and their mean says nothing).
A model's reasoning before its answer is left out, and so is reasoning that never ends.
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
# what may stand around a number that stands by itself; taken whole (*+), so that long runs of spaces take no longer
MARKS, COLON, DASH = r"[ \t*`\"']*+", r"[:=\uff1a]", r"[-\u2013\u2014]"
ALONE = re.compile(rf"{MARKS}{NUMBER.pattern}\.?{MARKS}")
CELL = re.compile(r"\|([^|\n]*)")
LINE = re.compile(r"[^\n]*")
NEXT_LINE = re.compile(rf"{MARKS}{COLON}?{MARKS}\n\s*(?:{MARKS}(?:rating|score){MARKS}{COLON})?", re.IGNORECASE)
BESIDE = re.compile(rf"{MARKS}(?:{DASH}[ \t]++{MARKS})?{NUMBER.pattern}")
ENDS_THERE = re.compile(rf"\.?{MARKS}(?=\n|$)|{MARKS}[,;|](?![ \t]*[0-9])|{MARKS}(?<=[ \t])(?:{DASH}|\()")
# tags around a model's reasoning, in several families
REASONING = re.compile(
    r"[<\[\u25c1](?P<end>/?)(?:think(?:ing)?|thought|reasoning|seed:think)[>\]\u25b7]", re.IGNORECASE
)


@dataclass(frozen=True)
class ParsedRatings:
    """Ratings of A aspects in 1..10, None where not read, with the reason and the place of each."""

    ratings: tuple[int | None, ...]
    starts: tuple[int | None, ...]  # character of the completion at which the rating's first digit stands
    ends: tuple[int | None, ...]  # character behind its last digit
    reason: str


class Mention(NamedTuple):
    """A number that is an aspect's rating, in or out of range."""

    aspect: int
    number: float
    start: int  # place of its first digit, leading zeros left out
    end: int


def parse_ratings(completion: str, names: tuple[str, ...]) -> ParsedRatings:
    """The ratings that the rules read from `completion`, in the order of `names`."""
    answer = without_reasoning(completion)
    first: dict[int, Mention] = {}
    for mention in mentions_behind_colons(answer, names):
        first.setdefault(mention.aspect, mention)
    if len(first) < len(names):
        first = agreeing(mentions_by_themselves(answer, names)) | first
    kept = {aspect: mention for aspect, mention in first.items() if LOWEST <= mention.number <= HIGHEST}
    read = [kept.get(aspect) for aspect in range(len(names))]
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


def without_reasoning(completion: str) -> str:
    """The completion with all that is no answer blanked: places must stay those of the completion."""
    tags = list(REASONING.finditer(completion))
    start = max((tag.end() for tag in tags if tag["end"]), default=0)
    end = min((tag.start() for tag in tags if tag.start() >= start), default=len(completion))
    return "\n" * start + completion[start:end]


def mentions_behind_colons(answer: str, names: tuple[str, ...]) -> Iterator[Mention]:
    pattern = rf"{label_pattern(names)}[*_\"'\s]*+(?:\([^)\n]*\)|\[[^\]\n]*\])?+[*_\"' ]*+{COLON}"
    labels = list(re.finditer(pattern, answer, re.IGNORECASE))
    limits = [*(label.start() for label in labels), len(answer)][1:]
    for label, limit in zip(labels, limits, strict=True):
        segment = LINE.match(answer, label.end(), limit)[0]
        # blanked, not removed, for the same reason
        visible = BRACKETS.sub(lambda match: " " * len(match[0]), segment)
        number = NUMBER.search(visible)
        if is_rating(number):
            yield mention_of(label, number, offset=label.end())


def mentions_by_themselves(answer: str, names: tuple[str, ...]) -> Iterator[Mention]:
    pattern = rf"{label_pattern(names)}(?:{MARKS}(?:\([^)\n]*\)|\[[^\]\n]*\]))?"
    labels = list(re.finditer(pattern, answer, re.IGNORECASE))
    # a number above the first name may mean that every number belongs to the name below it
    above = answer[: labels[0].start()].rpartition("\n")[0].strip().rpartition("\n")[2] if labels else ""
    for label in labels:
        number = number_in_row(answer, label.end()) or number_beside(answer, label.end())
        if number is None and not ALONE.fullmatch(above):
            number = number_below(answer, label.end())
        if is_rating(number) and not number["minus"]:
            yield mention_of(label, number, offset=0)


def number_in_row(answer: str, place: int) -> re.Match[str] | None:
    """The only number that fills a cell behind this place of a table's row."""
    if not re.compile(rf"{MARKS}\|").match(answer, place):
        return None
    cells = CELL.finditer(answer, place, LINE.match(answer, place).end())
    numbers = [number for cell in cells if is_rating(number := ALONE.fullmatch(answer, *cell.span(1)))]
    return numbers[0] if len(numbers) == 1 else None


def number_beside(answer: str, place: int) -> re.Match[str] | None:
    """The number at this place, if nothing follows that could make it a number of something else."""
    number = BESIDE.match(answer, place)
    return number if number and (number["best"] or ENDS_THERE.match(answer, number.end())) else None


def number_below(answer: str, place: int) -> re.Match[str] | None:
    """The number that is alone on the next line that is not empty, if nothing else follows on this one."""
    line = NEXT_LINE.match(answer, place)
    return line and ALONE.fullmatch(answer, line.end(), LINE.match(answer, line.end()).end())


def is_rating(number: re.Match[str] | None) -> bool:
    return number is not None and number["best"] in (None, "10") and not number["range"]


def mention_of(label: re.Match[str], number: re.Match[str], *, offset: int) -> Mention:
    size = float(number["size"]) * (-1 if number["minus"] else 1)
    start, end = number.span("size")
    return Mention(int(label.lastgroup.removeprefix("aspect")), size, offset + start, offset + end)


def agreeing(mentions: Iterator[Mention]) -> dict[int, Mention]:
    """The first mention of each aspect whose mentions all have the same number."""
    found: dict[int, list[Mention]] = {}
    for mention in mentions:
        found.setdefault(mention.aspect, []).append(mention)
    return {aspect: group[0] for aspect, group in found.items() if len({one.number for one in group}) == 1}


def label_pattern(names: tuple[str, ...]) -> str:
    """Matches the aspects' names, each as a group of its own."""
    # longest first: "dialogue complexity" is not a mention of "complexity"
    order = sorted(range(len(names)), key=lambda aspect: len(names[aspect]), reverse=True)
    words = [re.sub(r"(?:\\?[ _-])+", r"[ _-]+", re.escape(name)) for name in names]
    groups = "|".join(f"(?P<aspect{aspect}>{words[aspect]})" for aspect in order)
    return rf"(?<!\w)_{{0,2}}(?:{groups})_{{0,2}}(?!\w)"


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
