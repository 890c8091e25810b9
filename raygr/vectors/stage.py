"""The vectors stage: item texts in, vectors without any aspect out, for the control arm `text PCA`.

Each item has the prompt that scoring uses (Table 9). The system prompt, which all items share, is computed once. The
last hidden states of the item's own tokens are averaged, and the means of all items are reduced to their principal
components. `vectors.parquet` {item_id, pc1 .. pcK} can be used as `item_scores`. Items without any text have no row.
Shape letters: `P` tokens of the prefix, `T` tokens of a text, `D` width, `A` components in place of aspects.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import AutoModel, DynamicCache, PreTrainedModel

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.row_counts import log_rows
from raygr.schema import ITEMS
from raygr.score.prompts import PromptEncoder, item_from_row
from raygr.score.subjects import encoder_of, prompt_settings, stored_table
from raygr.vectors.config import VectorsConfig

logger = logging.getLogger(__name__)

VECTORS = "vectors.parquet"
ITEMS_READ = 2048  # items held in memory at a time, and sorted by length so that batches need little padding


class Text(NamedTuple):
    """An item's own tokens, without the parts that all prompts share."""

    item_id: str
    token_ids: Sequence[int]


class Components(NamedTuple):
    """Principal components of the rows of a matrix."""

    scores_IA: np.ndarray
    explained_A: np.ndarray
    """Share of the variance per component, largest first."""


def vectors(config: VectorsConfig) -> runs.Run:
    """Compute vectors of all items with a text; ConfigError where `width` is larger than the data allow."""
    settings = prompt_settings(config, "items")
    encoder = encoder_of(settings)
    on_gpu = torch.cuda.is_available()
    model = AutoModel.from_pretrained(settings.model, dtype="auto" if on_gpu else torch.float32).eval()
    model = model.to("cuda" if on_gpu else "cpu")
    items, hidden = stored_table(config.data, ITEMS).count_rows(), model.config.hidden_size
    if config.width > (most := min(items - 1, hidden)):
        raise ConfigError(f"width: {config.width} components of {items} items and hidden size {hidden}: at most {most}")
    used = [config.data, config.aspects, config.llm]
    run = runs.start_run(config.output, job="vectors", config=config, inputs=used)
    ids, means_ID, empty = item_means(model, encoder, config)
    found = principal_components(means_ID, config.width)
    columns = {f"pc{place}": column for place, column in enumerate(found.scores_IA.T, start=1)}
    files.write_table(pa.table({"item_id": ids, **columns}), run.file(VECTORS))
    log_rows("items", read=len(ids) + empty, kept=len(ids), dropped={"without_text": empty})
    counts = {"items": len(ids), "without_text": empty, "explained": found.explained_A.tolist()}
    runs.finish_run(run, inputs=used, counts=counts)
    logger.info(
        "%d items as %d components, %.0f%% of the variance", len(ids), config.width, 100 * sum(found.explained_A)
    )
    return run


def item_means(
    model: PreTrainedModel, encoder: PromptEncoder, config: VectorsConfig
) -> tuple[list[str], np.ndarray, int]:
    """Ids and mean hidden states of the items with a text, in any order, and the number of items without."""
    prefix = prefilled(model, encoder.shared)
    ids: list[str] = []
    means: list[np.ndarray] = []
    empty = 0
    for texts in item_texts(encoder, config):
        written = sorted((text for text in texts if text.token_ids), key=lambda text: len(text.token_ids))
        empty += len(texts) - len(written)
        for first in range(0, len(written), config.batch_size):
            batch = written[first : first + config.batch_size]
            ids += [text.item_id for text in batch]
            means.append(mean_states(model, prefix, [text.token_ids for text in batch]))
        logger.info("vectors: %d items", len(ids) + empty)
    if not ids:
        raise ValueError(f"{config.data}: no item has any text")
    return ids, np.concatenate(means), empty


def item_texts(encoder: PromptEncoder, config: VectorsConfig) -> Iterator[list[Text]]:
    """The texts of all items, at most ITEMS_READ at a time."""
    for rows in stored_table(config.data, ITEMS).to_batches(batch_size=ITEMS_READ):
        prompts = [encoder.item_prompt(item_from_row(row, config.item_rating)) for row in rows.to_pylist()]
        ids = [encoder.subject_ids(prompt.prefix_ids) for prompt in prompts]
        yield [Text(item, own) for item, own in zip(rows["item_id"].to_pylist(), ids, strict=True)]


@torch.inference_mode()
def prefilled(model: PreTrainedModel, prefix: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """KV cache of the prefix: keys and values of each layer, (1, heads, P, head size)."""
    ids_1P = torch.tensor([list(prefix)], device=model.device)
    cache = model(input_ids=ids_1P, past_key_values=DynamicCache(), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.inference_mode()
def mean_states(
    model: PreTrainedModel, prefix: list[tuple[Tensor, Tensor]], token_ids: Sequence[Sequence[int]]
) -> np.ndarray:
    """Mean last hidden state of each text's tokens behind the prefix, (B, D).

    Texts are padded at their end, which the tokens of a causal model do not attend to.
    """
    longest, known = max(map(len, token_ids)), prefix[0][0].shape[2]
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in token_ids], device=model.device)
    length_B1 = torch.tensor([[len(ids)] for ids in token_ids], device=model.device)
    is_real_BT = torch.arange(longest, device=model.device) < length_B1
    cache = DynamicCache()
    for number, (keys, values) in enumerate(prefix):
        size = (len(token_ids), -1, -1, -1)
        cache.update(keys.expand(size), values.expand(size), number)
    states_BTD = model(
        input_ids=ids_BT,
        attention_mask=torch.cat([is_real_BT.new_ones(len(token_ids), known), is_real_BT], dim=1).long(),
        position_ids=(known + torch.arange(longest, device=model.device)).expand_as(ids_BT),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    total_BD = (states_BTD.float() * is_real_BT[:, :, None]).sum(1)
    return (total_BD / length_B1).cpu().numpy()


def principal_components(rows_ID: np.ndarray, width: int) -> Components:
    """The first `width` components; signs make each largest loading positive, so that runs agree."""
    centred_ID = rows_ID.astype(np.float64) - rows_ID.mean(axis=0, dtype=np.float64)
    variances, axes_DD = np.linalg.eigh(centred_ID.T @ centred_ID)
    axes_DA = axes_DD[:, ::-1][:, :width]
    largest_A = np.abs(axes_DA).argmax(axis=0)
    axes_DA = axes_DA * np.sign(axes_DA[largest_A, np.arange(width)])
    return Components(centred_ID @ axes_DA, variances[::-1][:width] / variances.sum())
