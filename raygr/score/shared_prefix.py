"""Passes of a transformers model in which prompts share their beginning and tails share their prompt.

The common beginning of the prompts (the system prompt) is computed once. Behind each prompt, the tails of all aspects
lie side by side in one row, and none sees another. So every distinct token is computed once.

A place is an index in a padded row. A position is a token's position id, which counts only the tokens that are seen.
Shape letters: `B` prompts, `A` aspects, `P` places in the KV cache: of a prefix first, `T` tokens, `V` vocabulary, `Q`
levels 1..10. `X` is all places that are fed at once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from raygr.config import ConfigError
from raygr.score.answer_format import RatingTokens

GROUPED = "grouped"  # the name of `grouped_attention` in transformers
FULL, WINDOW = "full_attention", "sliding_attention"  # kinds of layers in a model's configuration
LayerMasks = Tensor | dict[str, Tensor]  # one mask for all layers, or one for each kind
# allowed differences of a log-probability; wrong ones differ by several
FARTHEST = {torch.float32: 0.01, torch.float16: 0.3, torch.bfloat16: 1.0}


class Beginning(NamedTuple):
    """The tokens that prompts start with, and their KV cache."""

    ids: tuple[int, ...]
    keys_values: list[tuple[Tensor, Tensor]]  # per layer, (1, heads, P, width); empty without tokens


class Tails(NamedTuple):
    """Token sequences that follow one prompt in turn, in one row: none of them sees another."""

    ids_X: Tensor
    tail_X: Tensor
    """Number of the tail that a token belongs to."""
    depth_X: Tensor
    """Place of a token in its tail, from 0."""

    @classmethod
    def of(cls, tails: Sequence[Sequence[int]], device: torch.device) -> "Tails":
        places = [(token, number, depth) for number, tail in enumerate(tails) for depth, token in enumerate(tail)]
        return cls(*torch.tensor(places, device=device).T)


class ReadLayer(DynamicLayer):
    """Keys and values of one layer that a pass continues from; those of the pass are not kept behind its layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.start = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.start
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


# --- the probe ---------------------------------------------------------------------------------


def probe_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    tails: Sequence[Sequence[int]],
    tokens: RatingTokens,
    start: Beginning | None = None,
) -> Tensor:
    """log P(1..10) of every aspect behind its tail ("tension level: "), (B, A, 10), with gradients where enabled.

    Each aspect is asked for on its own: none sees the line of another. The ten probabilities add up to 1.

    `start`: as for `tail_logits`.
    """
    # behind each tail a `1` that asks for P('0' | '1'), where `10` is two tokens
    lines = [[*tail, *tokens.ten[:-1]] for tail in tails]
    end_A = torch.as_tensor(np.cumsum([len(line) for line in lines]), device=model.device)
    wanted_X = torch.cat([end_A - place for place in range(len(tokens.ten), 0, -1)])
    logits_BXV = tail_logits(model, prompts, Tails.of(lines, model.device), wanted_X, start)
    at_tail_BAV, *behind_one = logits_BXV.split(len(lines), dim=1)
    return rating_log_probs(at_tail_BAV, behind_one[0] if behind_one else None, tokens).log_softmax(-1)


def rating_log_probs(logits_TV: Tensor, behind_one_TV: Tensor | None, tokens: RatingTokens) -> Tensor:
    """log P(1..10) where a rating is expected, (..., 10), not normalised to the ten.

    `behind_one_TV`: the logits after a `1` in the rating's place; needed where `10` is two tokens.
    """
    total_T1 = logits_TV.logsumexp(-1, keepdim=True)
    if behind_one_TV is None:
        return logits_TV[..., [*tokens.digits, tokens.ten[0]]] - total_T1
    digit_T9 = logits_TV[..., list(tokens.digits)] - total_T1
    zero_T1, other_T1 = zero_or_other(behind_one_TV, tokens.ten[1])
    one_T1 = digit_T9[..., :1]
    return torch.cat([one_T1 + other_T1, digit_T9[..., 1:], one_T1 + zero_T1], dim=-1)


def zero_or_other(logits_TV: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """log P('0') and log P(not '0'), (..., 1) each, exact where either probability is close to one."""
    zero_T1 = logits_TV[..., zero, None]
    # by slices: a copy of the logits with one of them masked would double the largest tensor
    below_T1 = logits_TV[..., :zero].logsumexp(-1, keepdim=True)
    above_T1 = logits_TV[..., zero + 1 :].logsumexp(-1, keepdim=True)
    other_T1 = torch.logaddexp(below_T1, above_T1)
    total_T1 = torch.logaddexp(zero_T1, other_T1)
    return zero_T1 - total_T1, other_T1 - total_T1


# --- passes ------------------------------------------------------------------------------------


def beginning(model: PreTrainedModel, ids: Sequence[int]) -> Beginning:
    """Compute what prompts start with, with its gradient where gradients are enabled."""
    cache = DynamicCache()
    if ids:
        model(input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache, logits_to_keep=1)
    return Beginning(tuple(ids), cached_states(cache))


def tail_logits(
    model: PreTrainedModel,
    prompts: Sequence[tuple[int, ...]],
    tails: Tails,
    wanted_X: Tensor,
    start: Beginning | None = None,
) -> Tensor:
    """Logits in fp32 after the tail tokens at the places `wanted_X`, behind every prompt: (B, places, V).

    `start`: what all prompts start with, which is then not computed again, and less than any of them. Without it all
    prompts pass in full, without a KV cache, which gradient checkpointing does not allow.
    """
    device, known, new = model.device, len(start.ids) if start else 0, len(tails.ids_X)
    rest_BX, visible_BX = padded([prompt[known:] for prompt in prompts], device)
    b, before = rest_BX.shape
    visible_BP = pad(visible_BX, (known, 0), value=True)
    own_XX = (tails.tail_X == tails.tail_X[:, None]) & (tails.depth_X <= tails.depth_X[:, None])
    tail_mask_BXP = torch.cat([visible_BP[:, None].expand(-1, new, -1), own_XX.expand(b, -1, -1)], dim=2)
    mask_BXP = torch.cat([pad(causal_mask(visible_BP, before), (0, new)), tail_mask_BXP], dim=1)
    position_BP = torch.cat([positions(visible_BP), visible_BP.sum(1)[:, None] + tails.depth_X], dim=1)
    position_BX = position_BP[:, known:]
    cache = None
    if start and start.ids:
        cache = Cache(layers=[ReadLayer(*(one.expand(b, -1, -1, -1) for one in pair)) for pair in start.keys_values])
    output = model(
        input_ids=torch.cat([rest_BX, tails.ids_X.expand(b, -1)], dim=1),
        attention_mask=layer_masks(model, mask_BXP, position_BX, position_BP),
        position_ids=position_BX,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=before + wanted_X,
    )
    return output.logits.float()


def cached_states(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer."""
    layers: list[Any] = list(cache.layers)  # typed as any kind of layer, also those without keys
    return [(layer.keys, layer.values) for layer in layers]


def common_beginning(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    first, last = min(sequences), max(sequences)  # all sequences share what the first and last in order share
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, padded at the end with 0, and a mask of the real tokens."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], dtype=torch.long, device=device)
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def causal_mask(visible_BP: Tensor, queries: int) -> Tensor:
    """What the last places of P see, (B, queries, P); padding sees itself, so that no row is empty."""
    places = torch.arange(visible_BP.shape[1], device=visible_BP.device)
    own_X1 = places[len(places) - queries :, None]
    return ((places <= own_X1) & visible_BP[:, None]) | (places == own_X1)


def positions(visible_BP: Tensor) -> Tensor:
    """Positions of the places of a prompt, (B, P)."""
    return torch.arange(visible_BP.shape[1], device=visible_BP.device).expand_as(visible_BP)


# --- attention ---------------------------------------------------------------------------------


def register_attention() -> str:
    """Registers `grouped_attention` in transformers, and returns its name there."""
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    return GROUPED


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of transformers' sdpa, with the query heads of one key head in one row.

    transformers copies the keys for every query head. With few queries after a long prompt, copying is most of the
    work.
    """
    b, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    in_one_row = query.reshape(b, heads // groups, groups * queries, width)
    mask = attention_mask.repeat(1, 1, groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(
        in_one_row, key, value, attn_mask=mask, dropout_p=options["dropout"], scale=options["scaling"]
    )
    # reshape and not view: CUDA kernels lay the heads of a place side by side
    return output.reshape(b, heads, queries, -1).transpose(1, 2).contiguous(), None


def layer_kinds(model: PreTrainedModel) -> set[str]:
    """Kinds of the model's layers; empty where all are alike and the configuration does not list them."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def layer_masks(model: PreTrainedModel, mask_BXP: Tensor, position_BX: Tensor, position_BP: Tensor) -> LayerMasks:
    """The mask in the form that transformers' models take; sliding windows hide positions further back.

    `position_BX` are the positions of the places that see, `position_BP` those of the places that are seen.
    """
    # not every configuration has `sliding_window`
    kinds, window = layer_kinds(model), getattr(model.config.get_text_config(), "sliding_window", None)
    if window is None or kinds == {FULL}:
        return mask_BXP[:, None]
    near_BXP = position_BX[:, :, None] - position_BP[:, None] < window
    windowed = (mask_BXP & near_BXP)[:, None]
    return {FULL: mask_BXP[:, None], WINDOW: windowed} if kinds else windowed


@torch.no_grad()
def check_passes(model: PreTrainedModel, prompt: Sequence[int], *, name: str) -> None:
    """ConfigError where passes that share a prompt do not give the log-probabilities of plain passes.

    Attention can be shared only if it depends on nothing but the mask: no recurrent layers, no learned sinks.

    `prompt`: at least six tokens; `name`: the model's, for the message.
    """
    if unknown := layer_kinds(model) - {FULL, WINDOW}:
        raise ConfigError(
            f"llm: {name} has layers of {', '.join(sorted(unknown))}, which raygr cannot share prompts in"
        )
    ids, ends = tuple(prompt), (len(prompt) - 2, len(prompt) - 3)
    tails = [ids[end : end + 2] for end in ends]
    shared_BXV = tail_logits(
        model,
        [ids[:end] for end in ends],
        Tails.of(tails, model.device),
        torch.arange(4, device=model.device),
        beginning(model, ids[: len(ids) // 2]),
    )
    model.set_attn_implementation("eager")
    plain_BXV = [
        model(torch.tensor([ids[:end] + tail], device=model.device), logits_to_keep=2, use_cache=False).logits[0]
        for end, tail in zip(ends, tails, strict=True)
    ]
    model.set_attn_implementation(register_attention())
    expected = torch.stack(plain_BXV).float().log_softmax(-1)
    found = torch.stack([shared_BXV[0, :2], shared_BXV[1, 2:]]).log_softmax(-1)
    likeliest = expected.argmax(-1, keepdim=True)
    off = (found.gather(-1, likeliest) - expected.gather(-1, likeliest)).abs().max().item()
    if not off < FARTHEST[model.dtype]:
        raise ConfigError(
            f"llm: {name}: its attention is of a kind that shared prompts do not keep (log-probabilities are off by "
            f"{off:.2g}); choose another model"
        )
