"""Forward passes of completions that share one prefill of their prompts.

A batch of prompts is prefilled once: their common beginning (the system prompt) as one row, the rest as one row per
prompt. The R completions of a prompt then lie side by side in one row after it, and no completion sees another. So
nothing is copied per completion, and gradients flow through the prefill. The last prompt token is fed again with every
completion: its logits predict the first completion token, and the prompts themselves need no logits.

A place is an index in a padded row. A position is a token's position id, which counts only the tokens that are seen.
Shape letters: `B` prompts, `R` completions, `T` tokens of a completion, `P` places in the KV cache: of a prompt first,
`V` vocabulary. `X` is all places that are fed at once: R * T for completions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped"  # the name of `grouped_attention` in transformers
FULL, WINDOW = "full_attention", "sliding_attention"  # kinds of layers in a model's configuration
LayerMasks = Tensor | dict[str, Tensor]  # one mask for all layers, or one for each kind


class TokenRows(NamedTuple):
    """Token ids of completions; a token that is not kept (a probe or padding) is seen by itself alone."""

    ids_BRT: Tensor
    kept_BRT: Tensor


class PromptCache(NamedTuple):
    """KV cache of the prompts without their last token."""

    keys_values: list[tuple[Tensor, Tensor]]  # per layer, (B, heads, P, width)
    visible_BP: Tensor  # False at padding
    length_B: Tensor
    last_B: Tensor  # the last token of each prompt


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


def prefill(model: PeftModel, prompts: Sequence[tuple[int, ...]]) -> PromptCache:
    """KV cache of prompts of at least two tokens each, with its gradient where gradients are enabled."""
    device = model.device
    known = [prompt[:-1] for prompt in prompts]
    shared = common_beginning(known)
    cache = DynamicCache()
    if shared:
        forward(model, torch.tensor([shared], device=device), cache)
    rest_BX, real_BX = padded([ids[len(shared) :] for ids in known], device)
    visible_BP = torch.cat([torch.ones(len(prompts), len(shared), dtype=torch.bool, device=device), real_BX], dim=1)
    whole = (len(prompts), -1, -1, -1)
    keys_values = [(keys.expand(whole), values.expand(whole)) for keys, values in cached_states(cache)]
    if rest_BX.shape[1]:
        cache = continued(keys_values)
        position_BP = positions(visible_BP)
        position_BX = position_BP[:, len(shared) :]
        mask = layer_masks(model, causal_mask(visible_BP, rest_BX.shape[1]), position_BX, position_BP)
        forward(model, rest_BX, cache, mask, position_BX)
        keys_values = cached_states(cache)
    last_B = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    return PromptCache(keys_values, visible_BP, visible_BP.sum(1), last_B)


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


def forward(
    model: PeftModel, ids_BX: Tensor, cache: Cache, mask: LayerMasks | None = None, position_BX: Tensor | None = None
) -> None:
    """Extends the KV cache; logits are computed for one place, the fewest that a model allows."""
    model.get_base_model()(
        input_ids=ids_BX,
        attention_mask=mask,
        position_ids=position_BX,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, padded at the end with 0, and a mask of the real tokens."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], dtype=torch.long, device=device)
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def causal_mask(visible_BP: Tensor, queries: int) -> Tensor:
    """What the last places of P see, (B, queries, P); padding sees itself, so that no row is empty."""
    places = torch.arange(visible_BP.shape[1], device=visible_BP.device)
    earlier_XP = places <= places[-queries:, None]
    return (earlier_XP & visible_BP[:, None]) | (places == places[-queries:, None])


def positions(visible_BP: Tensor) -> Tensor:
    """Positions of the places of a prompt, (B, P)."""
    return torch.arange(visible_BP.shape[1], device=visible_BP.device).expand_as(visible_BP)


def layer_kinds(model: PeftModel) -> set[str]:
    """Kinds of the model's layers; empty where all are alike and the configuration does not list them."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def layer_masks(model: PeftModel, mask_BXP: Tensor, position_BX: Tensor, position_BP: Tensor) -> LayerMasks:
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


def continued(keys_values: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A KV cache that starts with these keys and values and never writes into them."""
    cache = DynamicCache()
    for keys, values in keys_values:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def model_inputs(rows: TokenRows, last_B: Tensor) -> TokenRows:
    """The tokens that predict the places of `rows`: the last prompt token, then all places but the last."""
    first_BR1 = last_B[:, None, None].expand(-1, rows.ids_BRT.shape[1], 1)
    kept_BR1 = torch.ones_like(first_BR1, dtype=torch.bool)
    return TokenRows(
        torch.cat([first_BR1, rows.ids_BRT[..., :-1]], dim=2), torch.cat([kept_BR1, rows.kept_BRT[..., :-1]], dim=2)
    )


def own_mask(inputs: TokenRows) -> Tensor:
    """Which places of the R rows see which, (B, R * T, R * T)."""
    b, r, t = inputs.ids_BRT.shape
    place = torch.arange(t, device=inputs.ids_BRT.device)
    own_BRTT = (inputs.kept_BRT[:, :, None] & (place < place[:, None])) | (place == place[:, None])
    row = torch.arange(r, device=place.device)
    same_RR = row == row[:, None]
    return (own_BRTT[:, :, :, None, :] & same_RR[None, :, None, :, None]).reshape(b, r * t, r * t)


def places_before(kept: Tensor) -> Tensor:
    """How many kept places come before each place of a row."""
    return kept.cumsum(-1) - kept.long()


def completion_logits(model: PeftModel, prompts: PromptCache, rows: TokenRows) -> Tensor:
    """Logits in fp32, (B, R, T, V): place t holds the prediction of the token at place t of the row."""
    inputs = model_inputs(rows, prompts.last_B)
    return Decoding(model, prompts, rows.ids_BRT.shape[1]).feed(*inputs, wanted=rows.ids_BRT.shape[2])


def packed_logits(model: PeftModel, prompts: Sequence[tuple[int, ...]], rows: TokenRows) -> Tensor:
    """`completion_logits` in one pass without a KV cache, which gradient checkpointing does not allow."""
    ids_BP, visible_BP = padded([prompt[:-1] for prompt in prompts], rows.ids_BRT.device)
    inputs = model_inputs(rows, torch.tensor([prompt[-1] for prompt in prompts], device=ids_BP.device))
    b, r, t = inputs.ids_BRT.shape
    p = ids_BP.shape[1]
    mask = torch.zeros(b, p + r * t, p + r * t, dtype=torch.bool, device=ids_BP.device)
    mask[:, :p, :p] = causal_mask(visible_BP, p)
    mask[:, p:, :p] = visible_BP[:, None]
    mask[:, p:, p:] = own_mask(inputs)
    position_BRT = visible_BP.sum(1)[:, None, None] + places_before(inputs.kept_BRT)
    position_BX = torch.cat([positions(visible_BP), position_BRT.flatten(1)], dim=1)
    output = model.get_base_model()(
        input_ids=torch.cat([ids_BP, inputs.ids_BRT.flatten(1)], dim=1),
        attention_mask=layer_masks(model, mask, position_BX, position_BX),
        position_ids=position_BX,
        use_cache=False,
        logits_to_keep=torch.arange(p, p + r * t, device=ids_BP.device),
    )
    return output.logits.view(b, r, t, -1).float()


class Tails(NamedTuple):
    """Token sequences that follow one prompt in turn, in one row: none of them sees another."""

    ids_X: Tensor
    tail_X: Tensor
    """Number of the tail that a token belongs to."""
    depth_X: Tensor
    """Place of a token in its tail, from 0."""


def tail_logits(
    model: PeftModel, prompts: Sequence[tuple[int, ...]], tails: Tails, wanted_X: Tensor, *, cached: bool
) -> Tensor:
    """Logits in fp32 after the tail tokens at the places `wanted_X`, behind every prompt: (B, places, V).

    `cached`: the prompts' common beginning is computed once. Without it all prompts pass in full, without a KV cache,
    which gradient checkpointing does not allow.
    """
    device, new = model.device, len(tails.ids_X) + 1  # the last prompt token comes first, and all tails see it
    if cached:
        known, start = prefill(model, prompts), 0
        visible_BP, cache = known.visible_BP, continued(known.keys_values)
    else:
        before_BP, visible_BP = padded([prompt[:-1] for prompt in prompts], device)
        start, cache = before_BP.shape[1], None
    last_B1 = torch.tensor([prompt[-1:] for prompt in prompts], device=device)
    ids_BX = torch.cat([last_B1, tails.ids_X.expand(len(prompts), -1)], dim=1)
    tail_X, depth_X = pad(tails.tail_X, (1, 0), value=-1), pad(tails.depth_X + 1, (1, 0))
    own_XX = (tail_X == tail_X[:, None]) & (depth_X <= depth_X[:, None])
    own_XX[:, 0] = True
    mask_BXP = torch.cat([visible_BP[:, None].expand(-1, new, -1), own_XX.expand(len(prompts), -1, -1)], dim=2)
    position_BX = visible_BP.sum(1)[:, None] + depth_X
    position_BP = torch.cat([positions(visible_BP), position_BX], dim=1)
    if not cached:
        before_BXP = pad(causal_mask(visible_BP, start), (0, new))
        mask_BXP, ids_BX = torch.cat([before_BXP, mask_BXP], dim=1), torch.cat([before_BP, ids_BX], dim=1)
        position_BX = position_BP
    output = model.get_base_model()(
        input_ids=ids_BX,
        attention_mask=layer_masks(model, mask_BXP, position_BX, position_BP),
        position_ids=position_BX,
        past_key_values=cache,
        use_cache=cached,
        logits_to_keep=start + 1 + wanted_X,
    )
    return output.logits.float()


class DecodingLayer(DynamicLayer):
    """Keys and values of one layer with room for whole completions: a step writes its own and copies nothing."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.all_keys, self.all_values = with_room(keys, room), with_room(values, room)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


def with_room(values: Tensor, room: int) -> Tensor:
    b, heads, _, width = values.shape
    return torch.cat([values.detach(), values.new_empty(b, heads, room, width)], dim=2)


class Decoding:
    """R growing completions of each prompt; their logits have gradients where these are enabled."""

    def __init__(self, model: PeftModel, prompts: PromptCache, rows: int, room: int = 0) -> None:
        """`room`: the most places that a row will be fed, including the last prompt token; 0 for a single call.

        With gradients enabled no room is made: the backward pass needs the keys and values as they are.
        """
        self.model = model
        if torch.is_grad_enabled() or not room:
            self.cache: Cache = continued(prompts.keys_values)
        else:
            layers: list[Any] = [DecodingLayer(keys, values, rows * room) for keys, values in prompts.keys_values]
            self.cache = Cache(layers=layers)
        self.length_BR = prompts.length_B[:, None].repeat(1, rows)
        self.seen_BRP = prompts.visible_BP[:, None].expand(-1, rows, -1)  # which places in the cache each row sees
        self.position_BP = positions(prompts.visible_BP)

    def feed(self, ids_BRT: Tensor, kept_BRT: Tensor, wanted: int) -> Tensor:
        """Logits after the last `wanted` of the T new places of every row, (B, R, wanted, V) in fp32."""
        b, r, s = ids_BRT.shape
        own_BXX = own_mask(TokenRows(ids_BRT, kept_BRT))
        mask = torch.cat([self.seen_BRP.repeat_interleave(s, dim=1), own_BXX], dim=2)
        place_RT = torch.arange(r * s, device=ids_BRT.device).view(r, s)
        position_BX = (self.length_BR[:, :, None] + places_before(kept_BRT)).flatten(1)
        self.position_BP = torch.cat([self.position_BP, position_BX], dim=1)
        output = self.model.get_base_model()(
            input_ids=ids_BRT.flatten(1),
            attention_mask=layer_masks(self.model, mask, position_BX, self.position_BP),
            position_ids=position_BX,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=place_RT[:, s - wanted :].flatten(),
        )
        same_RR = torch.eye(r, dtype=torch.bool, device=ids_BRT.device)
        new_BRX = (kept_BRT[:, None] & same_RR[None, :, :, None]).flatten(2)
        self.seen_BRP = torch.cat([self.seen_BRP, new_BRX], dim=2)
        self.length_BR = self.length_BR + kept_BRT.sum(2)
        return output.logits.view(b, r, wanted, -1).float()

    def drop_last(self, dropped_BR: Tensor, fed_places: int) -> None:
        """Hides the last of the places just fed in these rows, where it was only a probe."""
        r = dropped_BR.shape[1]
        last_R = self.seen_BRP.shape[2] - (r - 1 - torch.arange(r, device=dropped_BR.device)) * fed_places - 1
        row_R = torch.arange(r, device=dropped_BR.device)
        self.seen_BRP[:, row_R, last_R] &= ~dropped_BR
        self.length_BR = self.length_BR - dropped_BR.long()
