"""Mean hidden states of item texts: each layer's states of an item's own tokens, behind a prefix that all texts share.

Shape letters: `B` prompts of a batch, `P` tokens of the prefix, `T` tokens of a text, `D` width. `X` is layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel

from raygr.schema import ITEMS
from raygr.score.prompts import PromptEncoder, item_from_row
from raygr.score.shared_prefix import cached_states, padded
from raygr.score.subjects import stored_table
from raygr.vectors.config import VectorsConfig

ITEMS_READ = 2048  # items held in memory at a time, and sorted by length so that batches need little padding


class Text(NamedTuple):
    """An item's own tokens, without the parts that all prompts share."""

    item_id: str
    token_ids: Sequence[int]


def language_model(path: str, *, half: bool) -> PreTrainedModel:
    """The LLM in evaluation mode, on the GPU if there is one; `half` keeps the first half of its layers only."""
    on_gpu = torch.cuda.is_available()
    model = AutoModel.from_pretrained(path, dtype="auto" if on_gpu else torch.float32).eval()
    if half:
        depth = model.config.num_hidden_layers
        layers = next(one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == depth)
        del layers[(depth + 1) // 2 :]
    return model.to("cuda" if on_gpu else "cpu")


def item_texts(encoder: PromptEncoder, config: VectorsConfig, ids: Sequence[str] | None = None) -> Iterator[list[Text]]:
    """The texts of all items, or of those with `ids`, at most ITEMS_READ at a time."""
    wanted = None if ids is None else pc.is_in(pc.field("item_id"), value_set=pa.array(ids, pa.string()))
    for rows in stored_table(config.data, ITEMS).to_batches(batch_size=ITEMS_READ, filter=wanted):
        prompts = [encoder.item_prompt(item_from_row(row, config.item_rating)) for row in rows.to_pylist()]
        tokens = [encoder.subject_ids(prompt.prefix_ids) for prompt in prompts]
        yield [Text(item, own) for item, own in zip(rows["item_id"].to_pylist(), tokens, strict=True)]


def batches_of_states(
    model: PreTrainedModel, prefix_ids: Sequence[int], texts: Iterable[Text], batch_size: int
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Ids and mean states, (B, X, D), of texts that are not empty; batches have texts of similar length."""
    prefix = prefilled(model, prefix_ids)
    ordered = sorted(texts, key=lambda text: len(text.token_ids))
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        yield [text.item_id for text in batch], mean_states(model, prefix, [text.token_ids for text in batch])


@torch.inference_mode()
def prefilled(model: PreTrainedModel, prefix: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """KV cache of the prefix: keys and values of each layer, (1, heads, P, head size)."""
    ids_1P = torch.tensor([list(prefix)], device=model.device)
    cache = model(input_ids=ids_1P, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return cached_states(cache)


@torch.inference_mode()
def mean_states(
    model: PreTrainedModel, prefix: list[tuple[Tensor, Tensor]], token_ids: Sequence[Sequence[int]]
) -> np.ndarray:
    """Mean states of each text's tokens behind the prefix, (B, X, D): one per layer, the last after the final norm.

    Texts are padded at their end, which the tokens of a causal model do not attend to.
    """
    known = prefix[0][0].shape[2]
    ids_BT, is_real_BT = padded(token_ids, model.device)
    cache = DynamicCache()
    for number, (keys, values) in enumerate(prefix):
        size = (len(token_ids), -1, -1, -1)
        cache.update(keys.expand(size), values.expand(size), number)
    states = model(
        input_ids=ids_BT,
        attention_mask=torch.cat([is_real_BT.new_ones(len(token_ids), known), is_real_BT], dim=1).long(),
        position_ids=(known + torch.arange(ids_BT.shape[1], device=model.device)).expand_as(ids_BT),
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    ).hidden_states
    totals = [(states_BTD.float() * is_real_BT[:, :, None]).sum(1) for states_BTD in states[1:]]
    return (torch.stack(totals, dim=1) / is_real_BT.sum(1)[:, None, None]).cpu().numpy()
