"""Completions sampled from the policy, and the ratings read from them.

slots  The answer's template is fixed and only the ratings are sampled, among 1..10. Every answer is valid and costs one
       pass of the model per aspect. Where `10` is two tokens, a `1` follows every "name: " as a probe: the logits after
       it give P('0' | '1'). It stays if the rating begins with 1. The next place holds the other digits, or the `0`.
free   Text is sampled token by token up to the end-of-turn token; answer_format.py reads the ratings from it.

The caller draws the uniform random numbers per user, so a sample does not depend on the other users of the batch.
Shape letters: `B` prompts, `G` completions, `R` completions or target answers, `A` aspects, `T` tokens, `V` vocabulary,
`Q` levels 1..10. Ratings are 1..10, NaN where none was read.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raygr.finetune.prefix_cache import Decoding, PromptCache, TokenRows
from raygr.finetune.rewards import FORMAT, PADDING, correct_characters
from raygr.score.answer_format import ParsedRatings, RatingTokens, decoded, parse_ratings, rating_tokens, token_ends
from raygr.score.aspects import AspectSet
from raygr.score.chat_template import PromptError, chat_parts, encode_answers, encode_control
from raygr.score.shared_prefix import rating_log_probs

FREE_ROOM = 1.25  # a free completion has at most this many times the template's places, and two more per aspect


class AnswerTemplate(NamedTuple):
    """The answer as token ids: piece, rating, piece, rating, ..., ending."""

    pieces: tuple[tuple[int, ...], ...]  # A of them: "story complexity: ", "\ndialogue complexity: ", ...
    ending: tuple[int, ...]  # the end-of-turn token
    ratings: RatingTokens

    @property
    def width(self) -> int:
        """Places of a rating: two where `10` is two tokens."""
        return len(self.ratings.ten)

    @property
    def first_A(self) -> np.ndarray:
        """First place of each rating."""
        return np.cumsum([len(piece) + self.width for piece in self.pieces]) - self.width

    @property
    def places(self) -> int:
        """T of an answer."""
        return int(self.first_A[-1]) + self.width + len(self.ending)

    def is_template(self) -> np.ndarray:
        """Which of the T places hold no rating."""
        is_template_T = np.ones(self.places, dtype=bool)
        for offset in range(self.width):
            is_template_T[self.first_A + offset] = False
        return is_template_T


class Rollouts(NamedTuple):
    """Sampled completions and the ratings read from them."""

    rows: TokenRows
    ratings_BGA: Tensor  # float64
    aspect_BGT: Tensor
    """The aspect whose rating a token belongs to, FORMAT or PADDING."""
    correct_BGT: Tensor
    """Whether the token is in format."""
    logits_BGTV: Tensor | None = None
    """Logits of the rows where they were sampled with gradients; the loss then needs no further pass."""
    prompts: PromptCache | None = None
    """KV cache of the prompts where it has gradients; the loss's pass continues from it."""


def answer_template(tokenizer: PreTrainedTokenizerBase, aspects: AspectSet) -> AnswerTemplate:
    """Cuts the tokens of whole answers at their ratings.

    PromptError where the tokens of the template depend on the ratings beside them.
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
    """The token after an answer in the chat template, or the end of text where there is none."""
    behind = encode_control(tokenizer, chat_parts(tokenizer).ending.lstrip())
    # Phi's <|end|> is an added token without a special role such as end of text
    if behind and behind[0] in tokenizer.added_tokens_decoder:
        return (behind[0],)
    if tokenizer.eos_token_id is None:
        raise PromptError(f"{tokenizer.name_or_path} has no end-of-text token to close an answer with")
    return (tokenizer.eos_token_id,)


def slots_rows(template: AnswerTemplate, ratings_BRA: Tensor) -> TokenRows:
    """Token rows, in the layout of `slots`, of answers with these whole ratings."""
    device = ratings_BRA.device
    flat = []
    for piece in template.pieces:
        flat += [*piece, *[template.ratings.ten[0]] * template.width]
    ids_BRT = torch.tensor([*flat, *template.ending], device=device).repeat(*ratings_BRA.shape[:2], 1)
    kept_BRT = torch.ones_like(ids_BRT, dtype=torch.bool)
    last_A = torch.as_tensor(template.first_A + template.width - 1, device=device)
    ids_BRT[..., last_A] = last_tokens(template, ratings_BRA)
    if template.ratings.ten_is_split:
        begins_with_one = (ratings_BRA == 1) | (ratings_BRA == 10)
        kept_BRT[..., last_A - 1] = begins_with_one
        kept_BRT[..., last_A] = ratings_BRA != 1
    return TokenRows(ids_BRT, kept_BRT)


def last_tokens(template: AnswerTemplate, ratings: Tensor) -> Tensor:
    """The last token of each rating: the digit, or `10`, or the `0` of a `10` that is two tokens."""
    table = torch.tensor([*template.ratings.digits, template.ratings.ten[-1]], device=ratings.device)
    return table[ratings.long() - 1]


def choose(log_probs: Tensor, uniform: Tensor | None, temperature: float) -> Tensor:
    """Draws an index from softmax(log_probs / temperature) per uniform number; the most likely one without numbers."""
    if uniform is None:
        return log_probs.argmax(-1)
    cumulative = torch.softmax(log_probs / temperature, dim=-1).cumsum(-1)
    # scaled, because rounding may leave the sum below 1
    return torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[..., 0].clamp(
        max=log_probs.shape[-1] - 1
    )


class SampledRatings(NamedTuple):
    """Ratings sampled in slots, and the probabilities of 1..10 at temperature 1."""

    ratings_BGA: Tensor
    probabilities_BGAQ: Tensor
    logits_BGTV: Tensor | None
    """The same as `completion_logits` of these answers; None where gradients are disabled."""


def sample_slots(
    model: PeftModel,
    prompts: PromptCache,
    template: AnswerTemplate,
    uniform_BGA: Tensor | None = None,
    temperature: float = 1.0,
) -> SampledRatings:
    """Samples the ratings of G completions per prompt; without uniform numbers one, the most likely at every slot."""
    b, device = len(prompts.last_B), prompts.last_B.device
    g = 1 if uniform_BGA is None else uniform_BGA.shape[1]
    decoding = Decoding(model, prompts, g, template.places + 1)
    split, width = template.ratings.ten_is_split, template.width
    logits = []
    carried_BG1, kept_BG1 = prompts.last_B[:, None, None].expand(-1, g, 1), torch.ones(b, g, 1, dtype=torch.bool)
    ratings, probabilities = [], []
    for place, piece in enumerate(template.pieces):
        tail = torch.tensor([*piece, *template.ratings.ten[:1]] if split else piece, device=device)
        ids_BGT = torch.cat([carried_BG1, tail.expand(b, g, -1)], dim=2)
        kept_BGT = torch.cat([kept_BG1.to(device), torch.ones_like(ids_BGT[..., 1:], dtype=torch.bool)], dim=2)
        logits.append(decoding.feed(ids_BGT, kept_BGT, ids_BGT.shape[2] if torch.is_grad_enabled() else width))
        slot_BGXV = logits[-1][:, :, -width:].detach()
        log_probs_BGQ = rating_log_probs(slot_BGXV[:, :, 0], slot_BGXV[:, :, 1] if split else None, template.ratings)
        uniform_BG = None if uniform_BGA is None else uniform_BGA[..., place]
        rating_BG = choose(log_probs_BGQ, uniform_BG, temperature) + 1
        carried_BG1, kept_BG1 = last_tokens(template, rating_BG)[..., None], torch.ones_like(carried_BG1) > 0
        if split:
            decoding.drop_last((rating_BG != 1) & (rating_BG != 10), ids_BGT.shape[2])
            kept_BG1 = (rating_BG != 1)[..., None]
        ratings.append(rating_BG)
        probabilities.append(log_probs_BGQ.softmax(-1))
    logits_BGTV = None
    if torch.is_grad_enabled():
        logits.append(decoding.feed(carried_BG1, kept_BG1, wanted=1))  # the logits of the ending
        logits_BGTV = torch.cat(logits, dim=2)
    return SampledRatings(torch.stack(ratings, dim=-1), torch.stack(probabilities, dim=2), logits_BGTV)


def slots_rollouts(template: AnswerTemplate, ratings_BGA: Tensor, logits_BGTV: Tensor | None = None) -> Rollouts:
    """Rollouts of whole ratings sampled in slots: all of them are read and in format."""
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
    prompts: PromptCache,
    template: AnswerTemplate,
    uniform_BGT: Tensor | None = None,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """Samples the token ids of G completions per prompt, up to and including the token that ends them.

    Without uniform numbers there is one completion, of the most likely tokens.
    """
    b, device = len(prompts.last_B), prompts.last_B.device
    ends = torch.tensor(ending_tokens(model, template), device=device)
    g, room = 1 if uniform_BGT is None else uniform_BGT.shape[1], free_places(template)
    decoding = Decoding(model, prompts, g, room)
    token_BG = prompts.last_B[:, None].expand(-1, g)
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
    """The template's end of turn and the model's own end tokens, at which the scoring engine stops too."""
    base: Any = model.get_base_model()
    others = base.generation_config.eos_token_id
    return [*template.ending, *(others if isinstance(others, list) else [] if others is None else [others])]


class Reading(NamedTuple):
    """The ratings and token marks of one completion of T tokens."""

    ratings: tuple[int | None, ...]
    aspect_T: list[int]  # the aspect whose rating a token belongs to, or FORMAT
    correct_T: list[bool]


def read_completion(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], names: tuple[str, ...], ending: tuple[int, ...]
) -> Reading:
    """Reads the ratings of a free completion, and marks its rating tokens and its tokens in format."""
    # an ending that is not marked as a special token would be decoded too
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
        if first is not None and behind is not None and first < end and start < behind:
            return aspect
    return FORMAT


def free_rollouts(
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Sequence[Sequence[int]]],
    names: tuple[str, ...],
    template: AnswerTemplate,
    device: torch.device,
) -> Rollouts:
    """Reads every completion, and pads them to the longest."""
    readings = [[read_completion(tokenizer, ids, names, template.ending) for ids in group] for group in completions]
    longest = max(len(ids) for group in completions for ids in group)

    def table(values: Sequence[Sequence[Sequence[float]]], fill: float) -> Tensor:
        filled = [[[*row, *[fill] * (longest - len(row))] for row in group] for group in values]
        return torch.tensor(filled, device=device)

    aspect_BGT = table([[reading.aspect_T for reading in group] for group in readings], PADDING)
    ratings = [[[float("nan") if r is None else r for r in reading.ratings] for reading in g] for g in readings]
    return Rollouts(
        rows=TokenRows(table(completions, template.ending[0]), aspect_BGT != PADDING),
        ratings_BGA=torch.tensor(ratings, dtype=torch.float64, device=device),
        aspect_BGT=aspect_BGT,
        correct_BGT=table([[reading.correct_T for reading in group] for group in readings], False),
    )
