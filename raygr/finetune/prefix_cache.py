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
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from raygr.score.shared_prefix import (
    beginning,
    cached_states,
    causal_mask,
    common_beginning,
    layer_masks,
    padded,
    positions,
)


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


def prefill(model: PeftModel, prompts: Sequence[tuple[int, ...]]) -> PromptCache:
    """KV cache of prompts of at least two tokens each, with its gradient where gradients are enabled."""
    base: Any = model.get_base_model()
    device = model.device
    known = [prompt[:-1] for prompt in prompts]
    start = beginning(base, common_beginning(known))
    rest_BX, real_BX = padded([ids[len(start.ids) :] for ids in known], device)
    visible_BP = torch.cat([torch.ones(len(prompts), len(start.ids), dtype=torch.bool, device=device), real_BX], dim=1)
    whole = (len(prompts), -1, -1, -1)
    keys_values = [(keys.expand(whole), values.expand(whole)) for keys, values in start.keys_values]
    if rest_BX.shape[1]:
        cache = continued(keys_values)
        position_BP = positions(visible_BP)
        position_BX = position_BP[:, len(start.ids) :]
        mask = layer_masks(base, causal_mask(visible_BP, rest_BX.shape[1]), position_BX, position_BP)
        base(
            input_ids=rest_BX,
            attention_mask=mask,
            position_ids=position_BX,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # the fewest that a model allows
        )
        keys_values = cached_states(cache)
    last_B = torch.tensor([prompt[-1] for prompt in prompts], device=device)
    return PromptCache(keys_values, visible_BP, visible_BP.sum(1), last_B)


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
    base: Any = model.get_base_model()
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
    output = base(
        input_ids=torch.cat([ids_BP, inputs.ids_BRT.flatten(1)], dim=1),
        attention_mask=layer_masks(base, mask, position_BX, position_BX),
        position_ids=position_BX,
        use_cache=False,
        logits_to_keep=torch.arange(p, p + r * t, device=ids_BP.device),
    )
    return output.logits.view(b, r, t, -1).float()


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
        base: Any = self.model.get_base_model()
        b, r, s = ids_BRT.shape
        own_BXX = own_mask(TokenRows(ids_BRT, kept_BRT))
        mask = torch.cat([self.seen_BRP.repeat_interleave(s, dim=1), own_BXX], dim=2)
        place_RT = torch.arange(r * s, device=ids_BRT.device).view(r, s)
        position_BX = (self.length_BR[:, :, None] + places_before(kept_BRT)).flatten(1)
        self.position_BP = torch.cat([self.position_BP, position_BX], dim=1)
        output = base(
            input_ids=ids_BRT.flatten(1),
            attention_mask=layer_masks(base, mask, position_BX, self.position_BP),
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
