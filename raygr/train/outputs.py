"""The files of a finished training: ranks, candidates, the model with its files for serving, and metrics.

ranks.parquet (RANK rows), candidates.parquet (CANDIDATE rows, if a set was sampled), the files of serving.py, and
metrics.json: protocol, shares, training figures, the metrics of each part and ranking and of cold-start targets, and
the diversity of recommended lists. Shape letters: `E` targets, `U` users, `C` candidates.
"""

import logging

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raygr import files
from raygr.data.list_columns import list_column
from raygr.metrics.rank_tables import Ranking, candidates_of, cold_metrics, ranking_metrics, read_rankings
from raygr.schema import (
    CALIBRATED,
    CANDIDATE_SCHEMA,
    CANDIDATES,
    METRICS,
    NEW,
    NEW_ITEMS,
    RANK_SCHEMA,
    RANKS,
    TEST,
    VALIDATION,
    WHOLE,
)
from raygr.train.batches import is_last_of_user
from raygr.train.candidates import CANDIDATES as CANDIDATES_OF_A_USER
from raygr.train.config import TrainConfig
from raygr.train.evaluate import base_moved, list_metrics, score_shares, target_ranks
from raygr.train.inputs import Inputs
from raygr.train.loop import CHOSEN_BY
from raygr.train.new_items import calibrated_offset
from raygr.train.run_metrics import NewItemFigures, RunMetrics
from raygr.train.serving import write_serving
from raygr.train.state import Training

logger = logging.getLogger(__name__)

LEAST_USER_SHARE = 0.01  # below this share the user side changes next to nothing, whatever the metrics say


def write_outputs(training: Training) -> None:
    """Writes ranks, metrics and the model. All workers call it and share the ranking; rank 0 writes."""
    inputs, config = training.inputs, training.config
    offset = calibrated_offset(training) if inputs.new_items or inputs.scores else 0.0
    sets: dict[str, tuple[str, ...]] = {VALIDATION: config.candidates, TEST: config.candidates}
    if inputs.new_items:
        sets |= {TEST: (*config.candidates, WHOLE, CALIBRATED), NEW: (NEW_ITEMS, WHOLE, CALIBRATED)}
    ranks = {part: target_ranks(training, part, names, offset) for part, names in sets.items()}
    if training.share.rank > 0:
        return
    table = pa.concat_tables(
        [
            rank_table(inputs, part, name, rank_E.numpy())
            for part, found in ranks.items()
            for name, rank_E in found.items()
        ]
    )
    files.write_table(table, files.join(config.output, RANKS))
    if inputs.candidates:
        files.write_table(candidate_table(inputs.candidates), files.join(config.output, CANDIDATES))
    write_serving(config, inputs, training.best_weights, offset)
    metrics = run_metrics(training, table, offset)
    for text in metrics.warnings:
        logger.warning("%s", text)
    files.write_json(metrics, files.join(config.output, METRICS))
    found = ", ".join(f"{scores[CHOSEN_BY]:.4f} ({name})" for name, scores in metrics.test.items())
    logger.info("test NDCG@10 %s", found)


def rank_table(inputs: Inputs, part: str, candidate_set: str, rank_E: np.ndarray) -> pa.Table:
    targets = inputs.targets[part]
    user_E, target_E = targets.user_E.numpy(), targets.items(inputs.items_N, torch.arange(len(targets.user_E))).numpy()
    columns = {
        "user_index": user_E,
        "position": (targets.target_at_E - targets.first_seen_E).numpy(),
        "last": is_last_of_user(user_E),
        "part": pa.repeat(part, len(target_E)),
        "candidates": pa.repeat(candidate_set, len(target_E)),
        "target": target_E,
        "rank": rank_E,
        "target_train_count": inputs.train_count_I[target_E - 1],
    }
    return pa.table(columns).cast(RANK_SCHEMA)


def candidate_table(candidates: dict[str, Tensor]) -> pa.Table:
    """CANDIDATE rows of all sampled sets."""
    tables = []
    for name, items_UC in candidates.items():
        users = len(items_UC)
        columns = [
            np.arange(users, dtype=np.int32),
            pa.repeat(name, users),
            list_column(items_UC.numpy().astype(np.int32)),
        ]
        tables.append(pa.table(columns, schema=CANDIDATE_SCHEMA))
    return pa.concat_tables(tables)


def new_item_figures(inputs: Inputs, rankings: dict[str, Ranking], offset: float) -> NewItemFigures | None:
    if not inputs.new_items:
        return None
    metrics = {candidates_of(name): found for name, one in rankings.items() if (found := ranking_metrics(one))}
    targets = inputs.targets[NEW]
    return NewItemFigures(inputs.new_items, len(targets.user_E), len(targets.user_E.unique()), offset, metrics)


def run_metrics(training: Training, ranks: pa.Table, offset: float) -> RunMetrics:
    """metrics.json of a training with these RANK rows; `offset` is that of CALIBRATED."""
    inputs, progress, config = training.inputs, training.progress, training.config
    shares = score_shares(training)
    seconds = [line["seconds"] for line in progress.lines]
    test = read_rankings(ranks, part=TEST, targets=config.targets)
    validation = read_rankings(ranks, part=VALIDATION, targets=("last",))
    new = read_rankings(ranks, part=NEW, targets=("new",))
    below = config.cold_below
    return RunMetrics(
        protocol=inputs.protocol,
        shares=shares,
        base_moved=base_moved(training),
        best_epoch=progress.best_epoch,
        epochs=progress.epoch,
        parameters=sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        seconds_per_epoch=sum(seconds) / len(seconds),
        warnings=[
            *inputs.warnings,
            *share_warnings(inputs, training.config, shares),
            *chance_warnings(test | new, items=inputs.items, new_items=inputs.new_items, repeats=inputs.repeats),
        ],
        validation={name: ranking_metrics(ranking) for name, ranking in validation.items()},
        test={name: found for name, ranking in test.items() if (found := ranking_metrics(ranking))},
        cold={"below": below, **{name: cold_metrics(ranking, below) for name, ranking in test.items()}},
        lists=list_metrics(training),
        new=new_item_figures(inputs, new, offset),
    )


def chance_warnings(test: dict[str, Ranking], *, items: int, new_items: int = 0, repeats: bool = False) -> list[str]:
    """Names the rankings in which the recommender is no better than chance, in a catalogue of `items`.

    `repeats`: items of the history are ranked like any other. New items that a user had before are not counted.
    """
    sizes = {"full": items - new_items, WHOLE: items, CALIBRATED: items}
    found = []
    for name, ranking in test.items():
        candidates = candidates_of(name)
        among_E = np.full(len(ranking.user_E), new_items if candidates == NEW_ITEMS else CANDIDATES_OF_A_USER + 1)
        if candidates in sizes:
            among_E = sizes[candidates] - (0 if repeats else 1) * ranking.position_E
        metrics, by_chance = ranking_metrics(ranking), ranking_metrics(ranking._replace(among_E=np.maximum(among_E, 1)))
        if metrics is None or by_chance is None:  # no targets
            continue
        value, chance = metrics[CHOSEN_BY], by_chance[CHOSEN_BY]
        if value <= chance:
            found.append(f"test NDCG@10 among {name} candidates is {value:.4f}, no better than chance ({chance:.4f})")
    return found


def share_warnings(inputs: Inputs, config: TrainConfig, shares: dict[str, float] | None) -> list[str]:
    has_users = config.user_scores == "history" or inputs.user_vectors is not None
    if shares is None or not has_users or abs(shares["user_guided"]) >= LEAST_USER_SHARE:
        return []
    return [f"the users' part makes {shares['user_guided']:.2%} of the scores' spread: it decides next to nothing"]
