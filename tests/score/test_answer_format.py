"""The answer's format, the tails cut from its lines, and tokenizers that split ratings in other ways."""

import dataclasses
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_data import TWO
from transformers import PreTrainedTokenizerFast

from raygr.score.answer_format import RatingTokens, aspect_tails, format_regex, rating_tokens
from raygr.score.aspects import Aspect
from raygr.score.chat_template import PromptError


def test_tails_are_cut_from_the_full_line(tokenizer):
    tails = aspect_tails(tokenizer, TWO)
    ratings = rating_tokens(tokenizer, TWO)
    assert [tokenizer.decode(tail) for tail in tails] == ["pace: ", "movie length (duration): "]
    assert ratings.ten == (ratings.digits[0], tokenizer.convert_tokens_to_ids("0")) and ratings.ten_is_split
    assert [*tails[0], ratings.digits[6]] == tokenizer.encode("pace: 7")
    assert [*tails[0], *ratings.ten] == tokenizer.encode("pace: 10")


def words_tokenizer(words: list[str], split) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["?", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def test_a_tokenizer_that_joins_space_and_rating_has_no_space_in_its_tails():
    joined = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never")
    words = ["wit:", *(f"_{rating}" for rating in range(1, 11))]
    aspects = dataclasses.replace(TWO, aspects=(Aspect(name="wit", description="D."),))
    made = words_tokenizer(words, joined)
    assert aspect_tails(made, aspects) == ((1,),)
    assert rating_tokens(made, aspects) == RatingTokens(digits=tuple(range(2, 11)), ten=(11,))
    assert not rating_tokens(made, aspects).ten_is_split


def test_a_tokenizer_that_cannot_tell_ratings_apart_is_refused_with_the_aspect():
    made = words_tokenizer(["pace", ":"], pre_tokenizers.Whitespace())  # every rating is "?"
    with pytest.raises(PromptError, match="'pace'"):
        aspect_tails(made, TWO)


def test_the_regex_accepts_the_format_and_nothing_else():
    pattern = re.compile(format_regex(TWO))
    assert pattern.fullmatch("pace: 10\nmovie length (duration): 1")
    for wrong in (
        "pace: 0\nmovie length (duration): 1",
        "pace: 11\nmovie length (duration): 1",
        "pace: 7\nmovie length duration: 1",
        "movie length (duration): 1\npace: 7",
        "pace: 7\nmovie length (duration): 1\n",
        "pace: 7",
    ):
        assert not pattern.fullmatch(wrong)
