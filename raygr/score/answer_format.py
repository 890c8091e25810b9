"""The answer that the prompts ask for: its format, the tail of tokens before each rating, the ratings' tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from raygr.score.aspects import AspectSet
from raygr.score.chat_template import PromptError, encode_answers


@dataclass(frozen=True)
class RatingTokens:
    """How the ratings are tokenised behind an aspect tail."""

    digits: tuple[int, ...]  # one id for each of 1..9
    ten: tuple[int, ...]  # ("10",), or ("1", "0") where digits stand alone

    @property
    def ten_is_split(self) -> bool:
        return len(self.ten) == 2


def format_regex(aspects: AspectSet) -> str:
    r"""Regular expression of the answer: one "name: <1..10>" line per aspect, in order, no line break at the end.

    Only metacharacters are escaped: grammar engines refuse some of `re.escape`'s, such as "\ ".
    """
    names = [re.sub(r"([.^$*+?{}\[\]\\|()])", r"\\\1", name) for name in aspects.names]
    return r"\n".join(f"{name}: (10|[1-9])" for name in names)


def aspect_tails(tokenizer: PreTrainedTokenizerBase, aspects: AspectSet) -> tuple[tuple[int, ...], ...]:
    """Per aspect the ids of its answer line up to where the ten ratings part: "tension level: ".

    Cut from the tokenised full line, so a tokenizer that joins space and digit has no space in its tails.
    PromptError names the aspect after which ratings are not told apart by one token.
    """
    return tuple(split_answer_line(tokenizer, name)[0] for name in aspects.names)


def rating_tokens(tokenizer: PreTrainedTokenizerBase, aspects: AspectSet) -> RatingTokens:
    """The ratings' ids behind every tail; PromptError names an aspect behind which they are others."""
    expected = split_answer_line(tokenizer, aspects.names[0])[1]
    for name in aspects.names:
        if split_answer_line(tokenizer, name)[1] != expected:
            raise PromptError(f"the tokenizer splits the ratings of {name!r} unlike those of {aspects.names[0]!r}")
    return expected


def split_answer_line(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[tuple[int, ...], RatingTokens]:
    lines = encode_answers(tokenizer, [f"{name}: {rating}" for rating in range(1, 11)])
    shared = 0
    while all(len(line) > shared for line in lines) and len({line[shared] for line in lines}) == 1:
        shared += 1
    rests = [tuple(line[shared:]) for line in lines]
    digits, ten = rests[:9], rests[9]
    single = all(len(rest) == 1 for rest in digits) and len(set(digits)) == 9
    if not single or not (len(ten) == 1 or (len(ten) == 2 and ten[0] == digits[0][0])):
        raise PromptError(f"the tokenizer splits the ratings of aspect {name!r} oddly: {rests}")
    return tuple(lines[0][:shared]), RatingTokens(tuple(rest[0] for rest in digits), ten)


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[int]:
    """Per token of a completion, the place in its `text` up to which the tokens so far reach.

    Special tokens are no part of the text.
    """
    # prefixes, because a token alone may be half a character or lose its space
    prefixes = decoded(tokenizer, [ids[: end + 1] for end in range(len(ids))])
    if not prefixes:
        return []
    # an engine that decodes behind the prompt keeps a first space that is lost without it
    moved = leading_space(text) - leading_space(prefixes[-1])
    # an unfinished character may be shown as several, which the finished one takes back
    reached = reversed(list(accumulate(map(len, reversed(prefixes)), min)))
    return [min(max(end + moved, 0), len(text)) for end in reached]


def decoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Texts without special tokens, as the model wrote them: Llama 3's tokenizer takes out the space of "so ."."""
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.batch_decode([list(ids) for ids in rows], **plain)


def leading_space(text: str) -> int:
    return len(text) - len(text.lstrip())
