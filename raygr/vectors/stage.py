"""The vectors stage: item texts in, an LLM's mean hidden states of them reduced to components or to scores.

Without `readout` it makes the control arm `text PCA`: each item has the prompt that scoring uses (Table 9), and the
last hidden states of the item's own tokens are averaged and reduced to their principal components. `vectors.parquet`
{item_id, pc1 .. pcK} can be used as `item_scores`. Items without any text have no row.

With `readout`, a table with the scores of some items, a ridge regression reads the scores of all other items out of
the states of the LLM's first layers. The output is a score run: SCORE rows in scores/, whose `mode` is `readout`, or
`taught` where the score is the table's own, quality.json, and readout.json with the agreement of held-out items.
Shape letters: `I` items, `S` subjects, `A` aspects, or components of a vector in place of aspects.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from raygr import files, runs, schema
from raygr.config import ConfigError
from raygr.data.row_counts import log_rows
from raygr.data.vector_tables import check_ratings, read_vectors
from raygr.execution.console import log_progress
from raygr.metrics.agreement import AspectAgreement, mean_agreement
from raygr.score.prompts import PromptEncoder, prompt_sha256, user_lead_in
from raygr.score.quality import log_quality, score_quality
from raygr.score.subjects import PromptSettings, drawn, encoder_of, prompt_settings, stored_table
from raygr.vectors.config import LEAST_TAUGHT, VectorsConfig
from raygr.vectors.readout import fit_readout, readout_agreement
from raygr.vectors.text_states import Text, batches_of_states, item_texts, language_model

logger = logging.getLogger(__name__)

VECTORS, READOUT = "vectors.parquet", "readout.json"
WITHOUT_TEXT = "without_text"


class Components(NamedTuple):
    """Principal components of the rows of a matrix."""

    scores_IA: np.ndarray
    explained_A: np.ndarray
    """Share of the variance per component, largest first."""


class Taught(NamedTuple):
    """The items of the data that the readout learns from."""

    ids: list[str]
    scores_SA: np.ndarray
    left_out: dict[str, int]
    """Items of the table by the reason why they are not taught."""


def vectors(config: VectorsConfig) -> runs.Run:
    """Compute components or scores of all items with a text.

    ConfigError where `width` is larger than the data allow, or the data hold too few items of the readout's table.
    """
    settings = prompt_settings(config, "items")
    encoder = encoder_of(settings)
    taught = taught_items(config, settings.aspects.names) if config.readout else None
    model = language_model(settings.model, half=taught is not None)
    items, hidden = stored_table(config.data, schema.ITEMS).count_rows(), model.config.hidden_size
    if not taught and config.width > (most := min(items - 1, hidden)):
        raise ConfigError(f"width: {config.width} components of {items} items and hidden size {hidden}: at most {most}")
    used = [path for path in (config.data, config.aspects, config.llm, config.readout) if path]
    run = runs.start_run(config.output, job="vectors", config=config, inputs=used)
    if taught:
        counts = write_scores(run, config, model, settings, taught)
    else:
        counts = write_components(run, config, model, encoder)
    runs.finish_run(run, inputs=used, counts=counts)
    return run


# --- components ----------------------------------------------------------------------------------


def write_components(
    run: runs.Run, config: VectorsConfig, model: PreTrainedModel, encoder: PromptEncoder
) -> dict[str, Any]:
    """Write vectors.parquet; return the counts of the run."""
    ids: list[str] = []
    means: list[np.ndarray] = []
    empty = 0
    for texts in item_texts(encoder, config):
        written = [text for text in texts if text.token_ids]
        empty += len(texts) - len(written)
        for batch, states_BXD in batches_of_states(model, encoder.shared, written, config.batch_size):
            ids += batch
            means.append(states_BXD[:, -1])
        log_progress(logger, "vectors", len(ids) + empty, None, "items")
    if not ids:
        raise ValueError(f"{config.data}: no item has any text")
    found = principal_components(np.concatenate(means), config.width)
    columns = {f"pc{place}": column for place, column in enumerate(found.scores_IA.T, start=1)}
    files.write_table(pa.table({"item_id": ids, **columns}), run.file(VECTORS))
    log_rows("items", read=len(ids) + empty, kept=len(ids), dropped={WITHOUT_TEXT: empty})
    logger.info(
        "%d items as %d components, %.0f%% of the variance", len(ids), config.width, 100 * sum(found.explained_A)
    )
    return {"items": len(ids), WITHOUT_TEXT: empty, "explained": found.explained_A.tolist()}


def principal_components(rows_ID: np.ndarray, width: int) -> Components:
    """The first `width` components; signs make each largest loading positive, so that runs agree."""
    centred_ID = rows_ID.astype(np.float64) - rows_ID.mean(axis=0, dtype=np.float64)
    variances, axes_DD = np.linalg.eigh(centred_ID.T @ centred_ID)
    axes_DA = axes_DD[:, ::-1][:, :width]
    largest_A = np.abs(axes_DA).argmax(axis=0)
    axes_DA = axes_DA * np.sign(axes_DA[largest_A, np.arange(width)])
    return Components(centred_ID @ axes_DA, variances[::-1][:width] / variances.sum())


# --- scores --------------------------------------------------------------------------------------


def taught_items(config: VectorsConfig, names: tuple[str, ...]) -> Taught:
    """The items of the readout's table to learn from; ConfigError where the data hold too few of them."""
    assert config.readout
    table = read_vectors(config.readout, subjects="items", column="expected", aspects=names, gaps=True)
    check_ratings(table, config.readout)
    known = stored_table(config.data, schema.ITEMS).to_table(["item_id"])["item_id"].to_pylist()
    is_known_S, is_whole_S = np.isin(table.ids_S, known), ~np.isnan(table.values_SA).any(axis=1)
    # in the order of the ids, so that the draw depends on nothing but the items and the seed
    possible = np.flatnonzero(is_known_S & is_whole_S)
    possible = possible[np.argsort(table.ids_S[possible])]
    chosen = drawn(possible, config.readout_items or len(possible), seed=config.seed)
    if len(chosen) < LEAST_TAUGHT:
        raise ConfigError(
            f"readout: {config.readout} has all scores of {len(chosen)} items of {config.data}: at least "
            f"{LEAST_TAUGHT} are needed to learn from"
        )
    left_out = {
        "not_in_the_data": int((~is_known_S).sum()),
        "without_all_scores": int((is_known_S & ~is_whole_S).sum()),
        "not_drawn": len(possible) - len(chosen),
    }
    log_rows(f"items of {config.readout}", read=len(table.ids_S), kept=len(chosen), dropped=left_out)
    return Taught(table.ids_S[chosen].tolist(), table.values_SA[chosen], left_out)


def write_scores(
    run: runs.Run, config: VectorsConfig, model: PreTrainedModel, settings: PromptSettings, taught: Taught
) -> dict[str, Any]:
    """Write scores/, quality.json and readout.json; return the counts of the run."""
    encoder, names = encoder_of(settings), settings.aspects.names
    # only the last line: the task and the aspects before it cost more than half as much time as the items' own texts
    prefix = (encoder.shared[0], *encoder.encode(user_lead_in(settings.aspects, "items") + "\n"))
    score_of = dict(zip(taught.ids, taught.scores_SA, strict=True))
    own = [one for texts in item_texts(encoder, config, taught.ids) for one in texts if one.token_ids]
    if len(own) < LEAST_TAUGHT:
        raise ConfigError(f"readout: {len(own)} of {len(taught.ids)} items have a text: at least {LEAST_TAUGHT} must")
    batches = list(batches_of_states(model, prefix, own, config.batch_size))
    features_SX = np.concatenate([states_BXD.reshape(len(ids), -1) for ids, states_BXD in batches])
    scores_SA = np.array([score_of[item] for ids, _ in batches for item in ids])
    logger.info("vectors: %d items to learn from", len(own))
    readout = fit_readout(features_SX, scores_SA)
    found = readout_agreement(features_SX, scores_SA, seed=config.seed)
    write_agreement(run, names, found, taught=len(own), penalty=readout.penalty)
    tables = []
    for texts in item_texts(encoder, config):
        left = [one for one in texts if one.item_id not in score_of and one.token_ids]
        read: dict[str, np.ndarray] = {}
        for ids, states_BXD in batches_of_states(model, prefix, left, config.batch_size):
            read |= zip(ids, readout.scores(states_BXD.reshape(len(ids), -1)), strict=True)
        rows = [
            score_row(one, names, score_of[one.item_id], mode=schema.TAUGHT, model=config.readout)
            if one.item_id in score_of
            else score_row(one, names, read.get(one.item_id), mode=schema.READ_OUT, model=config.llm)
            for one in texts
        ]
        tables.append(pa.Table.from_pylist(rows, schema=schema.score_schema(names)))
        log_progress(logger, "vectors", sum(map(len, tables)), None, "items")
    scores = pa.concat_tables(tables).unify_dictionaries()
    files.write_table(scores, files.join(run.file(schema.SCORES), "part-0.parquet"))
    quality = score_quality(scores.to_batches(), names)
    files.write_json(quality, run.file(schema.QUALITY))
    log_quality(quality)
    return {
        "subjects": len(scores),
        "by_reason": quality["by_reason"],
        "taught": scores["mode"].to_pylist().count(schema.TAUGHT),
        "table_left_out": taught.left_out,
    }


def score_row(
    text: Text, names: tuple[str, ...], scores_A: np.ndarray | None, *, mode: str, model: str | None
) -> dict[str, Any]:
    """A SCORE row; `scores_A` is None for an item without text, which cannot be read out."""
    unread = [None] * len(names)
    return {
        "subject_id": text.item_id,
        "ratings": unread if scores_A is None else np.rint(scores_A).astype(int).tolist(),
        "expected": unread if scores_A is None else scores_A.tolist(),
        "reason": WITHOUT_TEXT if scores_A is None else "ok",
        "completion": "",
        "prompt_sha256": prompt_sha256(text.token_ids),
        "prompt_tokens": len(text.token_ids),
        "cutoff": None,
        "cutoff_position": None,
        "model": model,
        "adapter": "",
        "mode": mode,
    }


def write_agreement(
    run: runs.Run, names: tuple[str, ...], found: list[AspectAgreement], *, taught: int, penalty: float
) -> None:
    """Write readout.json, and log it as a small table."""
    means = mean_agreement(found)
    aspects = {name: one._asdict() for name, one in zip(names, found, strict=True)}
    files.write_json({"taught": taught, "penalty": penalty, "mean": means, "aspects": aspects}, run.file(READOUT))
    logger.info("agreement of held-out items with their scores, each read out by a fit without its fifth of the items:")
    widest = max(map(len, names))
    logger.info("%-*s  Spearman  error  of the mean guess  bias  slope", widest, "aspect")
    for name, one in {**aspects, "mean": means}.items():
        shown = [np.nan if one[field] is None else one[field] for field in AspectAgreement._fields]
        logger.info("%-*s  %8.2f  %5.2f  %17.2f  %+4.2f  %5.2f", widest, name, *shown)
