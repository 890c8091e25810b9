"""Read a reply of OpenAI's chat API: ratings, and expected ratings from the probabilities of tokens.

The expected rating is read at the token where a rating starts: the mean of the ratings 1..10 among the alternatives
that the server gives (`top_logprobs`), weighted by their probabilities. A rating outside the alternatives counts as
impossible. Where a tokenizer splits `10`, the probability of the token `1` belongs to 1 and 10 together. The next
token's alternatives divide it where the answer itself says 1 or 10; elsewhere nothing divides it, and it is left out of
the mean. (With vLLM in actors, engine.py asks for the missing probability.) Where the server forces a format, its
probabilities are those that the format leaves: `15` is impossible then, so 10 is more probable than to engine.py.
Without alternatives, or where one token joins the rating with other text, the expected rating is the rating itself.
"""

import bisect
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from openai.types.chat import ChatCompletionTokenLogprob
from pydantic import TypeAdapter

from raygr.score.answer_format import OK, ParsedRatings, parse_ratings
from raygr.score.external_llm import CUT, text_of
from raygr.score.store import StoredScore

Number = TypeVar("Number", int, float)
TOKENS = TypeAdapter(list[ChatCompletionTokenLogprob])


class Reply(NamedTuple):
    """What was read of a reply; without choices and usage where it has another format."""

    choices: list[dict[str, Any]]
    """Those with a message."""
    usage: Any = None

    def texts(self) -> list[str]:
        return [text_of(choice["message"].get("content")) for choice in self.choices]


class Sample(NamedTuple):
    """One answer to a prompt."""

    parsed: ParsedRatings
    expected: list[float | None]
    text: str


def read_reply(text: str) -> Reply:
    try:
        body: Any = json.loads(text)
    except ValueError:
        return Reply([])
    match body:
        case {"choices": [*choices]}:
            usable = [one for one in choices if isinstance(one, dict) and isinstance(one.get("message"), dict)]
            return Reply(usable, body.get("usage"))
    return Reply([])


def sample_of(choice: Mapping[str, Any], names: tuple[str, ...]) -> Sample:
    """Ratings and expected ratings of one choice. A refusal is an answer without text."""
    text = text_of(choice["message"].get("content"))
    parsed = parse_ratings(text, names, is_cut=choice.get("finish_reason") in CUT)
    return Sample(parsed, expected_ratings(choice, text, parsed), text)


def joined(samples: Sequence[Sample]) -> StoredScore:
    """Join samples to one answer: the most frequent rating and the mean expected rating of each aspect.

    Of equally frequent ratings the first counts. An aspect has ratings where one of the samples has.
    """
    ratings = [read_of(column) for column in zip(*(sample.parsed.ratings for sample in samples), strict=True)]
    expected = [read_of(column) for column in zip(*(sample.expected for sample in samples), strict=True)]
    reasons = [sample.parsed.reason for sample in samples]
    return StoredScore(
        ratings=tuple(statistics.mode(read) if read else None for read in ratings),
        expected=tuple(statistics.fmean(read) if read else None for read in expected),
        reason=OK if all(ratings) else next(one for one in reasons if one != OK),
        completion="\n\n".join(sample.text for sample in samples),
    )


def read_of(column: Sequence[Number | None]) -> list[Number]:
    return [one for one in column if one is not None]


def expected_ratings(choice: Mapping[str, Any], text: str, parsed: ParsedRatings) -> list[float | None]:
    """The expected rating of each aspect; the rating itself where the reply has no probabilities of it."""
    expected = [None if rating is None else float(rating) for rating in parsed.ratings]
    match choice:
        case {"logprobs": {"content": [*content]}}:
            try:
                tokens = TOKENS.validate_python(content)
                pieces = [bytes(token.bytes) if token.bytes else token.token.encode() for token in tokens]
            except ValueError:  # not the format of OpenAI
                return expected
        case _:
            return expected
    begin = b"".join(pieces).rfind(text.encode())  # behind tokens of reasoning, which have no place in the text
    if begin < 0:
        return expected
    ends = [sum(map(len, pieces[: number + 1])) for number in range(len(pieces))]
    starts = {a: begin + len(text[:start].encode()) for a, start in enumerate(parsed.starts) if start is not None}
    places = {aspect: bisect.bisect_right(ends, start) for aspect, start in starts.items()}
    probabilities = [alternatives(token) for token in tokens]
    splits_ten = not any("10" in probabilities[place] for place in places.values())
    for aspect, place in places.items():
        after = probabilities[place + 1] if place + 1 < len(tokens) else {}
        said = tokens[place].token.strip()
        mean = mean_rating(said, probabilities[place], after, splits_ten=splits_ten)
        expected[aspect] = expected[aspect] if mean is None else mean
    return expected


def alternatives(token: ChatCompletionTokenLogprob) -> dict[str, float]:
    """Map texts without white space around them to their probabilities at this token."""
    found: dict[str, float] = {}
    for text, logprob in {token.token: token.logprob, **{one.token: one.logprob for one in token.top_logprobs}}.items():
        if math.isfinite(logprob):
            found[text.strip()] = found.get(text.strip(), 0.0) + math.exp(min(logprob, 0.0))
    return found


def mean_rating(said: str, here: dict[str, float], after: dict[str, float], *, splits_ten: bool) -> float | None:
    """Mean of 1..10 by the probabilities `here`; None where the token `said` is more than a rating.

    `after` are the probabilities of the next token. `splits_ten`: the tokenizer writes 10 as `1` and `0`.
    """
    shares = {rating: here.get(str(rating), 0.0) for rating in range(1, 11)}
    if said not in map(str, shares) or len(here) == 1:
        return None
    if said == "1":
        zero = min(1.0, sum(share for text, share in after.items() if text.startswith("0")))
        shares |= {1: shares[1] * (1 - zero), 10: shares[10] + shares[1] * zero}
    elif splits_ten:
        shares[1] = 0.0
    total = sum(shares.values())  # 0 where a forced format left only what the model finds impossible
    return sum(rating * share for rating, share in shares.items()) / total if total else None
