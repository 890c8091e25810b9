"""Forward passes of completions that share one prefill of their prompts.

A batch of prompts is prefilled once: what all begin with (the system prompt) as one row, the rest as one row per
prompt. The R completions of a prompt then lie side by side in one row behind it, each blind to the others, so that
nothing is copied per completion and gradients flow through the prefill. The last prompt token is fed again with every
completion: its logits are those of the first completion token, and prompts need no logits at all.
B prompts, R completions of each, T places of a completion, P places of a prompt, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "grouped"  # `grouped_attention` as transformers knows it
FULL, WINDOW = "full_attention", "sliding_attention"  # kinds of layers in a model's configuration
LayerMasks = Tensor | dict[str, Tensor]  # for all layers, or by their kind


class Rows(NamedTuple):
    """Completions in T places; a token that is not kept (a probe, a pad) is read by nobody but itself."""

    ids_BRT: Tensor
    kept_BRT: Tensor


class Prefilled(NamedTuple):
    """The prompts but for their last token, as keys and values."""

    keys_values: list[tuple[Tensor, Tensor]]  # per layer, (B, heads, P, width)
    visible_BP: Tensor  # False at padding
    length_B: Tensor
    last_B: Tensor  # the last token of each prompt


def register_attention() -> str:
    """Makes `grouped_attention` known to transformers; the name that models ask for it by."""
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    return GROUPED


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    """transformers' sdpa, but the query heads of one key head lie in a row and the keys are not copied for each.

    For few queries behind a long prompt, copying is most of the work.
    """
    b, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    in_a_row = query.reshape(b, heads // groups, groups * queries, width)
    mask = attention_mask.repeat(1, 1, groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(
        in_a_row, key, value, attn_mask=mask, dropout_p=options["dropout"], scale=options["scaling"]
    )
    # reshape, because CUDA kernels lay the heads of a place side by side
    return output.reshape(b, heads, queries, -1).transpose(1, 2).contiguous(), None


def prefill(model: PeftModel, prompts: Sequence[tuple[int, ...]]) -> Prefilled:
    """Keys and values of prompts of at least two tokens, with their gradient where it is enabled."""
    device = model.device
    known = [prompt[:-1] for prompt in prompts]
    shared = common_beginning(known)
    cache = DynamicCache()
    if shared:
        forward(model, torch.tensor([shared], device=device), cache)
    rest_BL, real_BL = padded([ids[len(shared) :] for ids in known], device)
    visible_BP = torch.cat([torch.ones(len(prompts), len(shared), dtype=torch.bool, device=device), real_BL], dim=1)
    keys_values = [expanded(layer, len(prompts)) for layer in cache.layers]
    if rest_BL.shape[1]:
        cache = continued(keys_values)
        position_BP = positions(visible_BP)
        position_BL = position_BP[:, len(shared) :]
        mask = layer_masks(model, causal_mask(visible_BP, rest_BL.shape[1]), position_BL, position_BP)
        forward(model, rest_BL, cache, mask, position_BL)
        keys_values = [(layer.keys, layer.values) for layer in cache.layers]
    return Prefilled(keys_values, visible_BP, visible_BP.sum(1), torch.tensor([p[-1] for p in prompts], device=device))


def common_beginning(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    first, last = min(sequences), max(sequences)  # what the outer two in order share, all share
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]


def expanded(layer: DynamicLayer, rows: int) -> tuple[Tensor, Tensor]:
    return layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)


def forward(
    model: PeftModel, ids_BN: Tensor, cache: Cache, mask: LayerMasks | None = None, position_BN: Tensor | None = None
) -> None:
    """Fills the cache; one place's logits are the fewest that a model computes."""
    model.get_base_model()(
        input_ids=ids_BN,
        attention_mask=mask,
        position_ids=position_BN,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids filled up at their end, and where they are real."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences], dtype=torch.long, device=device)
    lengths = torch.tensor([len(ids) for ids in sequences], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def causal_mask(visible_BP: Tensor, queries: int) -> Tensor:
    """What the last places of P see, (B, queries, P); padding sees itself, so that no row is empty."""
    places = torch.arange(visible_BP.shape[1], device=visible_BP.device)
    earlier_NP = places <= places[-queries:, None]
    return (earlier_NP & visible_BP[:, None]) | (places == places[-queries:, None])


def positions(visible_BP: Tensor) -> Tensor:
    """Positions of the places of a prompt, (B, P)."""
    return torch.arange(visible_BP.shape[1], device=visible_BP.device).expand_as(visible_BP)


def layer_kinds(model: PeftModel) -> set[str]:
    """Kinds of the model's layers; none where all are alike and the configuration does not list them."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def layer_masks(model: PeftModel, mask_BNK: Tensor, position_BN: Tensor, position_BK: Tensor) -> LayerMasks:
    """The mask as transformers' models take it; layers with a window see only the last positions of what they may.

    `position_BN` are those of the places that look, `position_BK` those of the places that are seen.
    """
    # not every configuration has the name
    kinds, window = layer_kinds(model), getattr(model.config.get_text_config(), "sliding_window", None)
    if window is None or kinds == {FULL}:
        return mask_BNK[:, None]
    near_BNK = position_BN[:, :, None] - position_BK[:, None] < window
    windowed = (mask_BNK & near_BNK)[:, None]
    return {FULL: mask_BNK[:, None], WINDOW: windowed} if kinds else windowed


def continued(keys_values: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that goes on from these, which stay as they are."""
    cache = DynamicCache()
    for keys, values in keys_values:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def fed(rows: Rows, last_B: Tensor) -> Rows:
    """What goes into the model, and predicts the places of `rows`: the last prompt token, then all but the last."""
    first_BR1 = last_B[:, None, None].expand(-1, rows.ids_BRT.shape[1], 1)
    kept_BR1 = torch.ones_like(first_BR1, dtype=torch.bool)
    return Rows(
        torch.cat([first_BR1, rows.ids_BRT[..., :-1]], dim=2), torch.cat([kept_BR1, rows.kept_BRT[..., :-1]], dim=2)
    )


def own_mask(inputs: Rows) -> Tensor:
    """Which places of the R rows see which, (B, R * T, R * T)."""
    b, r, t = inputs.ids_BRT.shape
    place = torch.arange(t, device=inputs.ids_BRT.device)
    own_BRTT = (inputs.kept_BRT[:, :, None] & (place < place[:, None])) | (place == place[:, None])
    row = torch.arange(r, device=place.device)
    same_RR = row == row[:, None]
    return (own_BRTT[:, :, :, None, :] & same_RR[None, :, None, :, None]).reshape(b, r * t, r * t)


def places_before(kept: Tensor) -> Tensor:
    """How many kept places stand before each."""
    return kept.cumsum(-1) - kept.long()


def completion_logits(model: PeftModel, prefilled: Prefilled, rows: Rows) -> Tensor:
    """Logits in fp32, (B, R, T, V): place t of a row holds what the model expects behind place t - 1."""
    inputs = fed(rows, prefilled.last_B)
    b, r, t = inputs.ids_BRT.shape
    prompt_BNP = prefilled.visible_BP[:, None].expand(-1, r * t, -1)
    mask = torch.cat([prompt_BNP, own_mask(inputs)], dim=2)
    position_BN = (prefilled.length_B[:, None, None] + places_before(inputs.kept_BRT)).flatten(1)
    position_BK = torch.cat([positions(prefilled.visible_BP), position_BN], dim=1)
    output = model.get_base_model()(
        input_ids=inputs.ids_BRT.flatten(1),
        attention_mask=layer_masks(model, mask, position_BN, position_BK),
        position_ids=position_BN,
        past_key_values=continued(prefilled.keys_values),
        use_cache=True,
    )
    return output.logits.view(b, r, t, -1).float()


def packed_logits(model: PeftModel, prompts: Sequence[tuple[int, ...]], rows: Rows) -> Tensor:
    """`completion_logits` in one pass without a cache, for gradient checkpointing, which forbids one."""
    ids_BP, visible_BP = padded([prompt[:-1] for prompt in prompts], rows.ids_BRT.device)
    inputs = fed(rows, torch.tensor([prompt[-1] for prompt in prompts], device=ids_BP.device))
    b, r, t = inputs.ids_BRT.shape
    p = ids_BP.shape[1]
    mask = torch.zeros(b, p + r * t, p + r * t, dtype=torch.bool, device=ids_BP.device)
    mask[:, :p, :p] = causal_mask(visible_BP, p)
    mask[:, p:, :p] = visible_BP[:, None]
    mask[:, p:, p:] = own_mask(inputs)
    position_BRT = visible_BP.sum(1)[:, None, None] + places_before(inputs.kept_BRT)
    position_BK = torch.cat([positions(visible_BP), position_BRT.flatten(1)], dim=1)
    output = model.get_base_model()(
        input_ids=torch.cat([ids_BP, inputs.ids_BRT.flatten(1)], dim=1),
        attention_mask=layer_masks(model, mask, position_BK, position_BK),
        position_ids=position_BK,
        use_cache=False,
        logits_to_keep=torch.arange(p, p + r * t, device=ids_BP.device),
    )
    return output.logits.view(b, r, t, -1).float()


class DecodingLayer(DynamicLayer):
    """Keys and values with room for a whole completion: a step writes its own and copies nothing."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.all_keys, self.all_values = with_room(keys, room), with_room(values, room)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


def with_room(values: Tensor, room: int) -> Tensor:
    b, heads, _, width = values.shape
    return torch.cat([values.detach(), values.new_empty(b, heads, room, width)], dim=2)


class Decoding:
    """R growing completions of each prompt, with the gradient of their logits where it is enabled."""

    def __init__(self, model: PeftModel, prefilled: Prefilled, rows: int, room: int) -> None:
        """`room`: the most places that a row will be fed, the last prompt token among them."""
        self.model, self.prefilled = model, prefilled
        if torch.is_grad_enabled():
            self.cache = continued(prefilled.keys_values)  # what is learned from must not be written over
        else:
            layers = [DecodingLayer(keys, values, rows * room) for keys, values in prefilled.keys_values]
            self.cache = Cache(layers=layers)
        self.length_BR = prefilled.length_B[:, None].repeat(1, rows)
        visible_BRP = prefilled.visible_BP[:, None].expand(-1, rows, -1)
        self.seen_BRK = visible_BRP  # which of the K places in the cache each row reads
        self.position_BK = positions(prefilled.visible_BP)

    def feed(self, ids_BRS: Tensor, kept_BRS: Tensor, wanted: int) -> Tensor:
        """Logits behind the last `wanted` of the S new places of every row, (B, R, wanted, V) in fp32."""
        b, r, s = ids_BRS.shape
        own_BNN = own_mask(Rows(ids_BRS, kept_BRS))
        mask = torch.cat([self.seen_BRK.repeat_interleave(s, dim=1), own_BNN], dim=2)
        place_RS = torch.arange(r * s, device=ids_BRS.device).view(r, s)
        position_BN = (self.length_BR[:, :, None] + places_before(kept_BRS)).flatten(1)
        self.position_BK = torch.cat([self.position_BK, position_BN], dim=1)
        output = self.model.get_base_model()(
            input_ids=ids_BRS.flatten(1),
            attention_mask=layer_masks(self.model, mask, position_BN, self.position_BK),
            position_ids=position_BN,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=place_RS[:, s - wanted :].flatten(),
        )
        same_RR = torch.eye(r, dtype=torch.bool, device=ids_BRS.device)
        new_BRN = (kept_BRS[:, None] & same_RR[None, :, :, None]).flatten(2)
        self.seen_BRK = torch.cat([self.seen_BRK, new_BRN], dim=2)
        self.length_BR = self.length_BR + kept_BRS.sum(2)
        return output.logits.view(b, r, wanted, -1).float()

    def drop_last(self, dropped_BR: Tensor, fed_places: int) -> None:
        """The last of the places just fed was only a probe in these rows: nothing reads it any more."""
        r = dropped_BR.shape[1]
        last_R = self.seen_BRK.shape[2] - (r - 1 - torch.arange(r, device=dropped_BR.device)) * fed_places - 1
        row_R = torch.arange(r, device=dropped_BR.device)
        self.seen_BRK[:, row_R, last_R] &= ~dropped_BR
        self.length_BR = self.length_BR - dropped_BR.long()
