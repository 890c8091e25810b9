"""Completions sampled from the policy, and what is read from them.

slots  The answer's template is given and only the ratings are sampled, among 1..10: always valid, and one pass of the
       model per aspect. Where `10` is two tokens, a `1` stands behind every "name: " as a probe: it shows
       P('0' | '1') and stays if the rating begins with it; the place behind it takes the other digits, or the `0`.
free   Text, token by token, until the end-of-turn token; ratings are read from it by the rules of answer_format.py.

Sampling is by uniform numbers that the caller draws per user, so it does not depend on who shares the batch.
B prompts, G completions of each, A aspects, T places, V vocabulary; ratings are 1..10, NaN where not read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raygr.finetune.prefix_cache import Decoding, Prefilled, Rows
from raygr.finetune.rewards import correct_characters
from raygr.score.answer_format import ParsedRatings, RatingTokens, decoded, parse_ratings, rating_tokens, token_ends
from raygr.score.aspects import AspectSet
from raygr.score.chat_template import PromptError, chat_parts, encode_answers, encode_control

FORMAT, PADDING = -1, -2  # in `aspect_BGT`: a token of no rating, and no token
FREE_ROOM = 1.25  # a free completion may be so much longer than the template, and two tokens an aspect


class AnswerTemplate(NamedTuple):
    """The answer as token ids: piece, rating, piece, rating, ..., ending."""

    pieces: tuple[tuple[int, ...], ...]  # A of them: "story complexity: ", "\ndialogue complexity: ", ...
    ending: tuple[int, ...]  # the end-of-turn token
    ratings: RatingTokens

    @property
    def width(self) -> int:
        """Places of a rating: two where `10` is split."""
        return len(self.ratings.ten)

    @property
    def first_A(self) -> np.ndarray:
        """Each rating's first place."""
        return np.cumsum([len(piece) + self.width for piece in self.pieces]) - self.width

    @property
    def places(self) -> int:
        return int(self.first_A[-1]) + self.width + len(self.ending)

    def is_template(self) -> np.ndarray:
        """Which of the T places hold no rating."""
        is_template_T = np.ones(self.places, dtype=bool)
        for offset in range(self.width):
            is_template_T[self.first_A + offset] = False
        return is_template_T


class Rollouts(NamedTuple):
    """Completions with what was read from them."""

    rows: Rows
    ratings_BGA: Tensor
    aspect_BGT: Tensor
    """The aspect whose rating a token belongs to, FORMAT or PADDING."""
    correct_BGT: Tensor
    """Whether the token is as the expected format wants it."""
    logits_BGTV: Tensor | None = None
    """Of the rows, where they were sampled with their gradient."""


def answer_template(tokenizer: PreTrainedTokenizerBase, aspects: AspectSet) -> AnswerTemplate:
    """The pieces that the tokenizer makes of the whole answer.

    PromptError where they depend on the ratings beside them, or ratings are split oddly.
    """
    tokens = rating_tokens(tokenizer, aspects)
    pairs = [(first, second) for first in range(1, 11) for second in range(1, 11)]
    answers = [[pair[place % 2] for place in range(len(aspects.names))] for pair in pairs]
    lines = ["\n".join(f"{n}: {r}" for n, r in zip(aspects.names, answer, strict=True)) for answer in answers]
    encoded = encode_answers(tokenizer, lines)
    twos, threes = encoded[pairs.index((2, 2))], encoded[pairs.index((3, 3))]
    slots = [place for place, (two, three) in enumerate(zip(twos, threes, strict=False)) if two != three]
    starts = [0, *(place + 1 for place in slots)]
    pieces = tuple(tuple(twos[start:end]) for start, end in zip(starts, slots, strict=False))
    template = AnswerTemplate(pieces, end_of_turn(tokenizer), tokens)
    for answer, ids in zip(answers, encoded, strict=True):
        if len(pieces) != len(answer) or answer_ids(template, answer) != ids:
            text = ", ".join(map(str, answer[:2]))
            raise PromptError(f"the tokenizer splits the answer's template oddly where ratings are {text}, ...")
    return template


def answer_ids(template: AnswerTemplate, ratings: Sequence[int]) -> list[int]:
    """Token ids of an answer without its ending."""
    spelled = [(token,) for token in template.ratings.digits] + [template.ratings.ten]
    parts = zip(template.pieces, ratings, strict=True)
    return [token for piece, rating in parts for token in (*piece, *spelled[rating - 1])]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token that follows an answer in the chat template, or the end of text where there is none."""
    behind = encode_control(tokenizer, chat_parts(tokenizer).ending.lstrip())
    # Phi's <|end|> is an added token without a role of its own, such as end of text
    if behind and behind[0] in tokenizer.added_tokens_decoder:
        return (behind[0],)
    if tokenizer.eos_token_id is None:
        raise PromptError(f"{tokenizer.name_or_path} has no end-of-text token to close an answer with")
    return (tokenizer.eos_token_id,)


def slots_rows(template: AnswerTemplate, ratings_BRA: Tensor) -> Rows:
    """Answers of these whole ratings in the layout of `slots`."""
    device = ratings_BRA.device
    flat = []
    for piece in template.pieces:
        flat += [*piece, *[template.ratings.ten[0]] * template.width]
    ids_BRT = torch.tensor([*flat, *template.ending], device=device).repeat(*ratings_BRA.shape[:2], 1)
    kept_BRT = torch.ones_like(ids_BRT, dtype=torch.bool)
    second_A = torch.as_tensor(template.first_A + template.width - 1, device=device)
    ids_BRT[..., second_A] = last_tokens(template, ratings_BRA)
    if template.ratings.ten_is_split:
        begins_with_one = (ratings_BRA == 1) | (ratings_BRA == 10)
        kept_BRT[..., second_A - 1] = begins_with_one
        kept_BRT[..., second_A] = ratings_BRA != 1
    return Rows(ids_BRT, kept_BRT)


def last_tokens(template: AnswerTemplate, ratings: Tensor) -> Tensor:
    """The last token of each rating: the digit, or `10`, or the `0` of a split ten."""
    table = torch.tensor([*template.ratings.digits, template.ratings.ten[-1]], device=ratings.device)
    return table[ratings.long() - 1]


def rating_log_probs(logits_NV: Tensor, behind_one_NV: Tensor | None, tokens: RatingTokens) -> Tensor:
    """log P(1..10) where a rating is expected, (..., 10), not normalised to the ten.

    `behind_one_NV`: the logits behind a `1` in its place, where `10` is two tokens.
    """
    total_N1 = logits_NV.logsumexp(-1, keepdim=True)
    if behind_one_NV is None:
        return logits_NV[..., [*tokens.digits, tokens.ten[0]]] - total_N1
    digit_N9 = logits_NV[..., list(tokens.digits)] - total_N1
    zero_N1, other_N1 = zero_or_other(behind_one_NV, tokens.ten[1])
    one_N1 = digit_N9[..., :1]
    return torch.cat([one_N1 + other_N1, digit_N9[..., 1:], one_N1 + zero_N1], dim=-1)


def zero_or_other(logits_NV: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """log P('0') and log P(not '0'), (..., 1), exact where either is close to one."""
    zero_N1 = logits_NV[..., zero, None]
    # by slices: a copy of the logits with one of them masked would double the largest tensor
    below_N1 = logits_NV[..., :zero].logsumexp(-1, keepdim=True)
    above_N1 = logits_NV[..., zero + 1 :].logsumexp(-1, keepdim=True)
    other_N1 = torch.logaddexp(below_N1, above_N1)
    total_N1 = torch.logaddexp(zero_N1, other_N1)
    return zero_N1 - total_N1, other_N1 - total_N1


def choose(log_probs: Tensor, uniform: Tensor | None, temperature: float) -> Tensor:
    """Indices drawn from softmax(log_probs / temperature) by one uniform number each; the likeliest without them."""
    if uniform is None:
        return log_probs.argmax(-1)
    cumulative = torch.softmax(log_probs / temperature, dim=-1).cumsum(-1)
    # scaled, so that rounding of the sum leaves no gap at the end
    return torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[..., 0].clamp(
        max=log_probs.shape[-1] - 1
    )


class Slots(NamedTuple):
    """Sampled ratings and the probabilities of 1..10 that each was drawn from, at temperature 1."""

    ratings_BGA: Tensor
    probabilities_BGAR: Tensor
    logits_BGTV: Tensor | None
    """What `completion_logits` gives for these answers, so that a loss needs no pass of its own."""


def sample_slots(
    model: PeftModel,
    prefilled: Prefilled,
    template: AnswerTemplate,
    uniform_BGA: Tensor | None = None,
    temperature: float = 1.0,
) -> Slots:
    """G completions per prompt; one, with the likeliest rating at every slot, without uniform numbers.

    Where gradients are enabled, all logits come along.
    """
    b, device = len(prefilled.last_B), prefilled.last_B.device
    g = 1 if uniform_BGA is None else uniform_BGA.shape[1]
    decoding = Decoding(model, prefilled, g, template.places + 1)
    split, width = template.ratings.ten_is_split, template.width
    logits = []
    carried_BG1, kept_BG1 = prefilled.last_B[:, None, None].expand(-1, g, 1), torch.ones(b, g, 1, dtype=torch.bool)
    ratings, probabilities = [], []
    for place, piece in enumerate(template.pieces):
        tail = torch.tensor([*piece, *template.ratings.ten[:1]] if split else piece, device=device)
        ids_BGS = torch.cat([carried_BG1, tail.expand(b, g, -1)], dim=2)
        kept_BGS = torch.cat([kept_BG1.to(device), torch.ones_like(ids_BGS[..., 1:], dtype=torch.bool)], dim=2)
        logits.append(decoding.feed(ids_BGS, kept_BGS, ids_BGS.shape[2] if torch.is_grad_enabled() else width))
        slot_BGWV = logits[-1][:, :, -width:].detach()
        log_probs_BGR = rating_log_probs(slot_BGWV[:, :, 0], slot_BGWV[:, :, 1] if split else None, template.ratings)
        uniform_BG = None if uniform_BGA is None else uniform_BGA[..., place]
        rating_BG = choose(log_probs_BGR, uniform_BG, temperature) + 1
        carried_BG1, kept_BG1 = last_tokens(template, rating_BG)[..., None], torch.ones_like(carried_BG1) > 0
        if split:
            decoding.drop_last((rating_BG != 1) & (rating_BG != 10), ids_BGS.shape[2])
            kept_BG1 = (rating_BG != 1)[..., None]
        ratings.append(rating_BG)
        probabilities.append(log_probs_BGR.softmax(-1))
    logits_BGTV = None
    if torch.is_grad_enabled():
        logits.append(decoding.feed(carried_BG1, kept_BG1, wanted=1))  # the ending's
        logits_BGTV = torch.cat(logits, dim=2)
    return Slots(torch.stack(ratings, dim=-1), torch.stack(probabilities, dim=2), logits_BGTV)


def slots_rollouts(template: AnswerTemplate, ratings_BGA: Tensor, logits_BGTV: Tensor | None = None) -> Rollouts:
    rows = slots_rows(template, ratings_BGA)
    aspect_T = torch.full((template.places,), FORMAT, device=ratings_BGA.device)
    for offset in range(template.width):
        aspect_T[template.first_A + offset] = torch.arange(len(template.pieces), device=ratings_BGA.device)
    aspect_BGT = torch.where(rows.kept_BRT, aspect_T, PADDING)
    return Rollouts(rows, ratings_BGA.double(), aspect_BGT, rows.kept_BRT, logits_BGTV)


def free_places(template: AnswerTemplate) -> int:
    """The most tokens of a free completion."""
    return int(FREE_ROOM * template.places) + 2 * len(template.pieces)


@torch.no_grad()
def sample_free(
    model: PeftModel,
    prefilled: Prefilled,
    template: AnswerTemplate,
    uniform_BGT: Tensor | None = None,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """Token ids of G completions per prompt with the token that ends them; the likeliest without uniform numbers."""
    b, device = len(prefilled.last_B), prefilled.last_B.device
    ends = torch.tensor(ending_tokens(model, template), device=device)
    g, room = 1 if uniform_BGT is None else uniform_BGT.shape[1], free_places(template)
    decoding = Decoding(model, prefilled, g, room)
    token_BG = prefilled.last_B[:, None].expand(-1, g)
    open_BG = torch.ones(b, g, dtype=torch.bool, device=device)
    tokens, opens = [], []
    for place in range(room):
        logits_BGV = decoding.feed(token_BG[..., None], open_BG[..., None], wanted=1)[:, :, 0]
        uniform_BG = None if uniform_BGT is None else uniform_BGT[..., place]
        token_BG = choose(logits_BGV, uniform_BG, temperature)
        tokens.append(token_BG)
        opens.append(open_BG)
        open_BG = open_BG & ~torch.isin(token_BG, ends)
        if not open_BG.any():
            break
    ids_BGT, open_BGT = torch.stack(tokens, dim=-1).cpu(), torch.stack(opens, dim=-1).cpu()
    return [
        [ids_T[open_T].tolist() for ids_T, open_T in zip(*pair, strict=True)]
        for pair in zip(ids_BGT, open_BGT, strict=True)
    ]


def ending_tokens(model: PeftModel, template: AnswerTemplate) -> list[int]:
    """The template's end of turn, and what else the model's generation ends at, as in the engine that asks it later."""
    others = model.get_base_model().generation_config.eos_token_id
    return [*template.ending, *(others if isinstance(others, list) else [] if others is None else [others])]


class Reading(NamedTuple):
    """What is read from one completion of T tokens."""

    ratings: tuple[int | None, ...]
    aspect_T: list[int]  # the aspect whose rating a token belongs to, or FORMAT
    correct_T: list[bool]


def read_completion(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], names: tuple[str, ...], ending: tuple[int, ...]
) -> Reading:
    """The ratings of a free completion, and which of its tokens are values, and which are in format."""
    # the ending may be a token that is not marked special, and then it is decoded too
    answer = ids[:-1] if tuple(ids[-1:]) == ending else ids
    text = decoded(tokenizer, [answer])[0]
    ends = token_ends(tokenizer, ids, text)
    parsed = parse_ratings(text, names)
    correct, is_complete = correct_characters(text, names)
    aspect_T, correct_T = [], []
    for token, start, end in zip(ids, [0, *ends], ends, strict=False):
        aspect_T.append(aspect_at(parsed, start, end))
        correct_T.append(bool(correct[start:end].all()) if end > start else is_complete and (token,) == ending)
    return Reading(parsed.ratings, aspect_T, correct_T)


def aspect_at(parsed: ParsedRatings, start: int, end: int) -> int:
    """The aspect whose number overlaps these characters, or FORMAT."""
    for aspect, (first, behind) in enumerate(zip(parsed.starts, parsed.ends, strict=True)):
        if first is not None and first < end and start < behind:
            return aspect
    return FORMAT


def free_rollouts(
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Sequence[Sequence[int]]],
    names: tuple[str, ...],
    template: AnswerTemplate,
    device: torch.device,
) -> Rollouts:
    """Reads every completion; filled up to the longest one."""
    readings = [[read_completion(tokenizer, ids, names, template.ending) for ids in group] for group in completions]
    longest = max(len(ids) for group in completions for ids in group)

    def table(values: Sequence[Sequence[Sequence[float]]], fill: float) -> Tensor:
        filled = [[[*row, *[fill] * (longest - len(row))] for row in group] for group in values]
        return torch.tensor(filled, device=device)

    aspect_BGT = table([[reading.aspect_T for reading in group] for group in readings], PADDING)
    ratings = [[[float("nan") if r is None else r for r in reading.ratings] for reading in g] for g in readings]
    return Rollouts(
        rows=Rows(table(completions, template.ending[0]), aspect_BGT != PADDING),
        ratings_BGA=torch.tensor(ratings, dtype=torch.float64, device=device),
        aspect_BGT=aspect_BGT,
        correct_BGT=table([[reading.correct_T for reading in group] for group in readings], False),
    )
