"""Sampled completions agree with plain forward passes; layouts and readings with examples worked by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from tiny_policy import (
    JOINED,
    NAMES,
    PROMPTS,
    SPLIT,
    aspect_set,
    naive_rating_log_probs,
    template,
    tiny_policy,
    tokenizer,
)

from raygr.finetune.prefix_cache import prefill
from raygr.finetune.sampling import (
    FORMAT,
    PADDING,
    AnswerTemplate,
    answer_ids,
    answer_template,
    choose,
    free_rollouts,
    read_completion,
    sample_free,
    sample_slots,
    slots_rollouts,
    slots_rows,
)
from raygr.score.chat_template import PromptError
from raygr.score.engine import rating_probabilities
from raygr.score.shared_prefix import rating_log_probs


def read_back(answer: AnswerTemplate, ratings: list[int]) -> list[int]:
    rows = slots_rows(answer, torch.tensor([[ratings]]))
    return rows.ids_BRT[0, 0][rows.kept_BRT[0, 0]].tolist()


@pytest.mark.parametrize(
    ("ratings", "ids"),
    [
        ([5, 1], [50, 51, 5, 60, 1, 99]),
        ([10, 9], [50, 51, 1, 10, 60, 9, 99]),
        ([1, 10], [50, 51, 1, 60, 1, 10, 99]),
    ],
)
def test_a_slots_row_reads_as_the_answer_where_ten_is_split(ratings, ids):
    assert read_back(SPLIT, ratings) == ids
    assert answer_ids(SPLIT, ratings) == ids[:-1]


def test_a_slots_row_has_one_place_per_rating_where_ten_is_one_token():
    assert read_back(JOINED, [10, 1]) == [50, 51, 11, 60, 1, 99]
    assert slots_rows(JOINED, torch.tensor([[[10, 1]]])).kept_BRT.all()


def test_the_probe_stands_before_every_rating_and_is_dropped_unless_the_rating_begins_with_it():
    rows = slots_rows(SPLIT, torch.tensor([[[5, 10]]]))
    assert rows.ids_BRT[0, 0].tolist() == [50, 51, 1, 5, 60, 1, 10, 99]
    assert rows.kept_BRT[0, 0].tolist() == [True, True, False, True, True, True, True, True]
    rollouts = slots_rollouts(SPLIT, torch.tensor([[[5, 10]]]))
    assert rollouts.aspect_BGT[0, 0].tolist() == [FORMAT, FORMAT, PADDING, 0, FORMAT, 1, 1, FORMAT]


def test_the_template_is_what_the_tokenizer_makes_of_the_answer():
    answer = template()
    text = tokenizer().decode(answer_ids(answer, [10, 3]))
    assert text == "tension level: 10\nhumor: 3"
    assert tokenizer().decode(answer.ending) == "<|im_end|>"
    assert answer.ratings.ten_is_split


def test_a_tokenizer_that_joins_the_rating_with_what_follows_is_refused():
    class Joining:
        """Joins a rating of 7 and the line break after it into one token."""

        def __init__(self):
            self.inner = tokenizer()

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, texts, **settings):
            ids = self.inner(texts, **settings)["input_ids"]
            seven, line = self.inner.encode("7")[0], self.inner.encode("\n")[0]
            joined = []
            for row in ids:
                pairs = zip(row, [*row[1:], None], strict=True)
                joined.append([49_000 if pair == (seven, line) else pair[0] for pair in pairs])
            return {"input_ids": joined}

    with pytest.raises(PromptError, match="oddly"):
        answer_template(Joining(), aspect_set())


@pytest.mark.parametrize("answer", [SPLIT, JOINED], ids=["split ten", "one token"])
def test_slots_are_sampled_from_the_probabilities_of_whole_forward_passes(answer):
    model = tiny_policy()
    uniform_BGA = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slots = sample_slots(model, prefill(model, PROMPTS), answer, uniform_BGA)
    for b, prompt in enumerate(PROMPTS):
        for g in range(4):
            for a in range(2):
                before = tuple(slots.ratings_BGA[b, g, :a].tolist())
                log_probs = naive_rating_log_probs(model, prompt, answer, before)
                expected = np.exp(log_probs) / np.exp(log_probs).sum()
                np.testing.assert_allclose(slots.probabilities_BGAQ[b, g, a].numpy(), expected, rtol=1e-4, atol=1e-7)
                drawn = np.searchsorted(expected.cumsum(), uniform_BGA[b, g, a].item()) + 1
                assert slots.ratings_BGA[b, g, a] == drawn


def test_ratings_come_as_often_as_their_probability_at_the_temperature():
    log_probs = torch.log(torch.tensor([0.1, 0.2, 0.7]))
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = choose(log_probs.expand(20_000, 3), uniform, 0.5)
    expected = np.array([0.01, 0.04, 0.49]) / 0.54
    assert np.bincount(drawn, minlength=3) / 20_000 == pytest.approx(expected, abs=0.015)
    assert choose(log_probs, None, 1.0) == 2


def test_a_split_ten_is_exact_where_zero_is_nearly_certain():
    logits = torch.zeros(1, 12)
    behind = torch.zeros(1, 12)
    behind[0, 10] = 40.0  # P('0' | '1') = 1 - 5e-17: 1 - P is 0 in fp32
    log_probs = rating_log_probs(logits, behind, SPLIT.ratings)
    assert log_probs[0, 0].item() == pytest.approx(-np.log(12) + np.log(11) - 40, rel=1e-5)
    behind[0, 10] = 2.0
    log_probs = rating_log_probs(logits, behind, SPLIT.ratings)
    zero = behind.log_softmax(-1)[:, 10].numpy()
    ten = logits.log_softmax(-1)[:, 1:11].numpy()
    assert log_probs.softmax(-1).numpy() == pytest.approx(rating_probabilities(ten, zero), rel=1e-5)


def test_free_completions_are_those_of_whole_forward_passes():
    model, answer = tiny_policy(), template()
    uniform_BGT = torch.rand(3, 2, 60, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        completions = sample_free(model, prefill(model, PROMPTS), answer, uniform_BGT)
    for (b, prompt), g in product(enumerate(PROMPTS), range(2)):
        ids = list(prompt)
        for place, token in enumerate(completions[b][g][:8]):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            drawn = torch.searchsorted(logits.softmax(-1).cumsum(-1), uniform_BGT[b, g, place], right=True)
            # rounding may move a boundary between two tokens by one
            assert abs(int(drawn) - token) <= 1
            ids.append(token)


def test_a_free_completion_stops_at_its_end_of_turn():
    model, answer = tiny_policy(), template()
    with torch.no_grad():
        (((first, *_),), *_) = sample_free(model, prefill(model, PROMPTS), answer)
        stopped = sample_free(model, prefill(model, PROMPTS), answer._replace(ending=(first,)))
    assert stopped[0][0] == [first]


def reading(text: str):
    ids = tokenizer().encode(text)
    return ids, read_completion(tokenizer(), ids, NAMES, template().ending)


def test_the_tokens_of_a_rating_are_its_aspects_and_the_others_are_format():
    ids, read = reading("tension level: 10\nhumor: 3<|im_end|>")
    assert read.ratings == (10, 3)
    pieces = [tokenizer().decode([token]) for token in ids]
    assert [piece for piece, aspect in zip(pieces, read.aspect_T, strict=True) if aspect == 0] == ["1", "0"]
    assert [piece for piece, aspect in zip(pieces, read.aspect_T, strict=True) if aspect == 1] == ["3"]
    assert all(read.correct_T)


def test_a_broken_line_is_out_of_format_and_so_is_an_early_end():
    ids, read = reading("Sure! tension level: 7\nhumor: 3<|im_end|>")
    assert read.ratings == (7, 3)
    pieces = [tokenizer().decode([token]) for token in ids]
    wrong = "".join(piece for piece, right in zip(pieces, read.correct_T, strict=True) if not right)
    assert wrong == "Sure! tension level: 7\n<|im_end|>"


@pytest.mark.parametrize(
    ("written", "rating", "aspects"),
    [("07", 7, [FORMAT, 0]), ("010", 10, [FORMAT, 0, 0]), ("0010.0", 10, [FORMAT, FORMAT, 0, 0, 0, 0])],
)
def test_zeros_before_a_rating_are_out_of_format_and_no_part_of_it(written: str, rating: int, aspects: list[int]):
    ids, read = reading(f"tension level: {written}\nhumor: 3<|im_end|>")
    assert read.ratings == (rating, 3)
    first = ids.index(tokenizer().encode("0")[0])
    behind = first + len(written)
    assert read.aspect_T[first:behind] == aspects
    assert not any(read.correct_T[:behind])
    assert read.aspect_T[:first] == [FORMAT] * first and read.aspect_T.count(1) == 1


def test_free_rollouts_fill_up_to_the_longest_and_mark_what_was_not_read():
    texts = ["tension level: 7\nhumor: 3<|im_end|>", "no idea"]
    completions = [[tokenizer().encode(text) for text in texts]]
    rollouts = free_rollouts(tokenizer(), completions, NAMES, template(), torch.device("cpu"))
    assert rollouts.ratings_BGA[0, 0].tolist() == [7, 3]
    assert rollouts.ratings_BGA[0, 1].isnan().all()
    assert (rollouts.aspect_BGT[0, 1] == PADDING).sum() == len(completions[0][0]) - len(completions[0][1])
    assert not rollouts.correct_BGT[0, 1].any()
