"""The answer that prompts ask for: its format, the tokens of its ratings, and the rules that read ratings from text.

The format is one line `name: <rating>` per aspect. Probe mode asks for each rating behind the tokens of its line, the
tail; generate mode lets the LLM write the whole answer, which `parse_ratings` reads by these rules (Section 4.2.1):

- A rating is the first number behind "name:" on the same line, whatever words stand between them. Lines may come in
  any order, with bullets or bold marks, in any case, with "_" or "-" for the spaces of a name.
- "8/10" and "8 out of 10" are 8; "8.5" is 9 (halves are rounded up). The number itself must lie in 1..10: "0.6" and
  "10.4" are out of range. Of two ratings for one aspect the first counts, even where it is out of range.
- An aspect without a rating behind a colon may have one where the number stands by itself: "name - 8", "name 8, ...",
  alone on the next line, or as the only number in the cells behind the name in a table's row. Where an aspect has
  several such numbers and they differ, none counts.
- Not ratings: numbers in brackets (models repeat "(e.g., 1 for ...)"), "4/5", "1,000", "1e3", words, digits of other
  scripts, and ranges ("7-8", "7 to 8": most repeat the scale, "1-10", whose mean says nothing).
- A model's reasoning before its answer is ignored, and so is reasoning that never ends.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeGuard

from transformers import PreTrainedTokenizerBase

from raygr.score.aspects import AspectSet
from raygr.score.chat_template import REASONING, PromptError, encode_answers

OK, NOTHING_READ, SOME_MISSING, OUT_OF_RANGE = "ok", "no_aspect_read", "some_aspects_missing", "out_of_range"
LENGTH = "length"  # the completion reached the token limit before every rating was read

LOWEST, HIGHEST = 1, 10
# not part of a word or a longer number, so that "v8", "1990s", "1,000" and "1.2.3" are no ratings
NUMBER = re.compile(
    r"(?<![\w.])(?<![0-9],)(?P<minus>[-\u2212])?\+?0*(?P<size>[0-9]+(?:\.[0-9]+)?)(?![\w%])(?![.,][0-9])"
    r"(?:[\s*]*(?:/|out of)[\s*]*(?P<best>[0-9]+))?"
    r"(?P<range>[\s*]*(?:[-\u2010-\u2013\u2212]|to\b)[\s*]*[0-9])?"  # any hyphen, en dash or minus
)
BRACKETS = re.compile(r"\([^)\n]*\)")
# what may stand around a number that stands by itself; possessive (*+), so that long runs of spaces stay fast
MARKS, COLON, DASH = r"[ \t*`\"']*+", r"[:=\uff1a]", r"[-\u2013\u2014]"
ALONE = re.compile(rf"{MARKS}{NUMBER.pattern}\.?{MARKS}")
CELL = re.compile(r"\|([^|\n]*)")
NEXT_LINE = re.compile(rf"{MARKS}{COLON}?{MARKS}\n\s*(?:{MARKS}(?:rating|score){MARKS}{COLON})?", re.IGNORECASE)
BESIDE = re.compile(rf"{MARKS}(?:{DASH}[ \t]++{MARKS})?{NUMBER.pattern}")
ENDS_THERE = re.compile(rf"\.?{MARKS}(?=\n|$)|{MARKS}[,;|](?![ \t]*[0-9])|{MARKS}(?<=[ \t])(?:{DASH}|\()")

COMPLETION_SLACK = 2  # a completion may take this many times the tokens of the bare answer lines


# --- format and tokens -------------------------------------------------------------------------


@dataclass(frozen=True)
class RatingTokens:
    """Token ids of the ratings 1..10 behind an aspect's tail."""

    digits: tuple[int, ...]  # one id for each of 1..9
    ten: tuple[int, ...]  # ("10",), or ("1", "0") where the tokenizer splits digits

    @property
    def ten_is_split(self) -> bool:
        return len(self.ten) == 2


def format_regex(aspects: AspectSet) -> str:
    r"""Regular expression of the answer: one "name: <1..10>" line per aspect, in order, no line break at the end.

    Only metacharacters are escaped: grammar engines refuse some escapes of `re.escape`, such as "\ ".
    """
    names = [re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", name) for name in aspects.names]
    return r"\n".join(f"{name}: (10|[1-9])" for name in names)


def aspect_tails(tokenizer: PreTrainedTokenizerBase, aspects: AspectSet) -> tuple[tuple[int, ...], ...]:
    """Token ids of each aspect's answer line up to the rating: "tension level: ".

    Tails are cut from the tokenised full line. Where the tokenizer joins space and digit, the tail has no space.
    PromptError names the aspect whose ratings do not differ in their first token.
    """
    return tuple(split_answer_line(tokenizer, name)[0] for name in aspects.names)


def completion_tokens(tails: Sequence[Sequence[int]]) -> int:
    """The longest completion in tokens, from the tails of `aspect_tails`."""
    return COMPLETION_SLACK * sum(len(tail) + 3 for tail in tails)


def rating_tokens(tokenizer: PreTrainedTokenizerBase, aspects: AspectSet) -> RatingTokens:
    """Token ids of the ratings; PromptError where they differ between two aspects."""
    expected = split_answer_line(tokenizer, aspects.names[0])[1]
    for name in aspects.names:
        if split_answer_line(tokenizer, name)[1] != expected:
            raise PromptError(
                f"the tokenizer splits the ratings of {name!r} differently from those of {aspects.names[0]!r}"
            )
    return expected


def split_answer_line(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[tuple[int, ...], RatingTokens]:
    """The tail of an aspect's answer line, and the tokens of the ratings behind the tail."""
    lines = encode_answers(tokenizer, [f"{name}: {rating}" for rating in range(1, 11)])
    shared = 0
    while all(len(line) > shared for line in lines) and len({line[shared] for line in lines}) == 1:
        shared += 1
    rests = [tuple(line[shared:]) for line in lines]
    digits, ten = rests[:9], rests[9]
    single = all(len(rest) == 1 for rest in digits) and len(set(digits)) == 9
    if not single or not (len(ten) == 1 or (len(ten) == 2 and ten[0] == digits[0][0])):
        raise PromptError(f"the tokenizer splits the ratings of aspect {name!r} in an unsupported way: {rests}")
    return tuple(lines[0][:shared]), RatingTokens(tuple(rest[0] for rest in digits), ten)


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """Return, for each token of a completion, the index in `text` at which the token ends.

    Special tokens have no text.
    """
    # prefixes are decoded, because a single token may be half a character or lose its space
    prefixes = decoded(tokenizer, [ids[: end + 1] for end in range(len(ids))])
    if not prefixes:
        return []
    # an engine that decodes the completion after the prompt keeps a leading space that is lost here
    moved = leading_space(text) - leading_space(prefixes[-1])
    # an unfinished character may be decoded as several characters, which the finished one replaces
    reached = reversed(list(accumulate(map(len, reversed(prefixes)), min)))
    return [min(max(end + moved, 0), len(text)) for end in reached]


def decoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Decode token ids without special tokens and without clean-up: Llama 3's removes the space of "so ."."""
    return tokenizer.batch_decode(
        [list(ids) for ids in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def leading_space(text: str) -> int:
    return len(text) - len(text.lstrip())


# --- reading free text -------------------------------------------------------------------------


@dataclass(frozen=True)
class ParsedRatings:
    """Ratings of A aspects in 1..10 (None where none was read), their places, and the reason of what is missing."""

    ratings: tuple[int | None, ...]
    starts: tuple[int | None, ...]  # index of the rating's first digit in the completion
    ends: tuple[int | None, ...]  # index behind its last digit
    reason: str


class Mention(NamedTuple):
    """A number that is an aspect's rating, in or out of range."""

    aspect: int
    number: float
    start: int  # index of its first digit, without leading zeros
    end: int


def parse_ratings(completion: str, names: tuple[str, ...], *, is_cut: bool = False) -> ParsedRatings:
    """Read the ratings of the aspects `names` from `completion`, by the rules of this module.

    `is_cut`: the completion reached the token limit. A number at its very end is then no rating, because further
    digits may be missing.
    """
    answer = without_reasoning(completion)
    first: dict[int, Mention] = {}
    for mention in mentions_behind_colons(answer, names):
        first.setdefault(mention.aspect, mention)
    if len(first) < len(names):
        first = agreeing(mentions_by_themselves(answer, names)) | first
    kept = {aspect: mention for aspect, mention in first.items() if LOWEST <= mention.number <= HIGHEST}
    reason = reason_of(len(kept), len(names), out_of_range=len(kept) < len(first))
    if is_cut:
        kept = {a: mention for a, mention in kept.items() if completion[mention.end :].strip(" .,/*_-")}
        reason = OK if len(kept) == len(names) else LENGTH
    read = [kept.get(aspect) for aspect in range(len(names))]
    return ParsedRatings(
        ratings=tuple(mention and math.floor(mention.number + 0.5) for mention in read),
        starts=tuple(mention and mention.start for mention in read),
        ends=tuple(mention and mention.end for mention in read),
        reason=reason,
    )


def reason_of(read: int, wanted: int, *, out_of_range: bool) -> str:
    if read == wanted:
        return OK
    if out_of_range:
        return OUT_OF_RANGE
    return SOME_MISSING if read else NOTHING_READ


def without_reasoning(completion: str) -> str:
    """Blank everything that is not the answer; the answer keeps its place in the text."""
    tags = list(REASONING.finditer(completion))
    start = max((tag.end() for tag in tags if tag["end"]), default=0)
    end = min((tag.start() for tag in tags if tag.start() >= start), default=len(completion))
    return "\n" * start + completion[start:end]


def mentions_behind_colons(answer: str, names: tuple[str, ...]) -> Iterator[Mention]:
    """Find the first number behind each "name:", on the same line and before the next name."""
    pattern = rf"{label_pattern(names)}[*_\"'\s]*+(?:\([^)\n]*\)|\[[^\]\n]*\])?+[*_\"' ]*+{COLON}"
    labels = list(re.finditer(pattern, answer, re.IGNORECASE))
    limits = [*(label.start() for label in labels), len(answer)][1:]
    for label, limit in zip(labels, limits, strict=True):
        segment = answer[label.end() : min(line_end(answer, label.end()), limit)]
        # blanked, not removed, so that places in the text stay the same
        visible = BRACKETS.sub(lambda match: " " * len(match[0]), segment)
        number = NUMBER.search(visible)
        if is_rating(number):
            yield mention_of(label, number, offset=label.end())


def mentions_by_themselves(answer: str, names: tuple[str, ...]) -> Iterator[Mention]:
    """Find numbers in the cells behind a name, right behind it, or alone on the next non-empty line."""
    pattern = rf"{label_pattern(names)}(?:{MARKS}(?:\([^)\n]*\)|\[[^\]\n]*\]))?"
    labels = list(re.finditer(pattern, answer, re.IGNORECASE))
    # a number above the first name may mean that every number belongs to the name below it
    above = answer[: labels[0].start()].rpartition("\n")[0].strip().rpartition("\n")[2] if labels else ""
    for label in labels:
        end = label.end()
        number = number_in_row(answer, end)
        if number is None and (beside := BESIDE.match(answer, end)):
            # unless the text behind it may make it a number of something else
            number = beside if beside["best"] or ENDS_THERE.match(answer, beside.end()) else None
        if number is None and not ALONE.fullmatch(above) and (line := NEXT_LINE.match(answer, end)):
            number = ALONE.fullmatch(answer, line.end(), line_end(answer, line.end()))
        if is_rating(number) and not number["minus"]:
            yield mention_of(label, number, offset=0)


def number_in_row(answer: str, place: int) -> re.Match[str] | None:
    """Return the only number that fills a cell behind `place` in a table's row."""
    if not re.compile(rf"{MARKS}\|").match(answer, place):
        return None
    cells = CELL.finditer(answer, place, line_end(answer, place))
    numbers = [number for cell in cells if is_rating(number := ALONE.fullmatch(answer, *cell.span(1)))]
    return numbers[0] if len(numbers) == 1 else None


def line_end(text: str, place: int) -> int:
    """Return where the line of `place` ends."""
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def is_rating(number: re.Match[str] | None) -> TypeGuard[re.Match[str]]:
    return number is not None and number["best"] in (None, "10") and not number["range"]


def mention_of(label: re.Match[str], number: re.Match[str], *, offset: int) -> Mention:
    size = float(number["size"]) * (-1 if number["minus"] else 1)
    start, end = number.span("size")
    return Mention(int(str(label.lastgroup).removeprefix("aspect")), size, offset + start, offset + end)


def agreeing(mentions: Iterator[Mention]) -> dict[int, Mention]:
    """Return the first mention of each aspect whose mentions all have the same number."""
    found: dict[int, list[Mention]] = {}
    for mention in mentions:
        found.setdefault(mention.aspect, []).append(mention)
    return {aspect: group[0] for aspect, group in found.items() if len({one.number for one in group}) == 1}


def label_pattern(names: tuple[str, ...]) -> str:
    """Regular expression that matches any aspect's name, each as a group of its own."""
    # longest first: "dialogue complexity" is not a mention of "complexity"
    order = sorted(range(len(names)), key=lambda aspect: len(names[aspect]), reverse=True)
    words = [re.sub(r"(?:\\?[ _-])+", r"[ _-]+", re.escape(name)) for name in names]
    groups = "|".join(f"(?P<aspect{aspect}>{words[aspect]})" for aspect in order)
    return rf"(?<!\w)_{{0,2}}(?:{groups})_{{0,2}}(?!\w)"
