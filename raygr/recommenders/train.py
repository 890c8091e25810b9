"""The train stage: prepare run (+ scores) -> model.safetensors, ranks.parquet, epochs.jsonl, metrics.json.

The driver checks everything, then Ray Train runs the loop of loop.py in one or more workers. A killed worker,
or a run started again on an unfinished folder, goes on from the last evaluation's checkpoint.
Left out of the checkpoint: generator states, because each epoch's randomness comes from (seed, epoch, worker).
"""

import dataclasses
import json
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train.torch
import safetensors.torch

from raygr import runs
from raygr.cluster import connect
from raygr.config import TrainConfig
from raygr.evaluation import rank_metrics
from raygr.recommenders.events import EventFile
from raygr.recommenders.inputs import Inputs, load_inputs
from raygr.recommenders.loop import (
    CHOSEN_BY,
    Share,
    Training,
    checkpoint_state,
    restore,
    score_shares,
    start_training,
    target_ranks,
    training_rounds,
)
from raygr.schema import EVENTS, HISTORY, METRICS, MODEL, RANK_SCHEMA, RANKS, TEST, VALIDATION
from raygr.workers import begin_worker, last_checkpoint, report, run_workers, wants_gpu

logger = logging.getLogger(__name__)

LEAST_USER_SHARE = 0.01  # below this the user side decides nothing, whatever the metrics say


def train(config: TrainConfig) -> runs.Run:
    """Trains one recommender and evaluates it once on test, with the weights that were best on validation."""
    if runs.is_finished(config.output):
        raise runs.RunError(f"{config.output} is a finished run: choose another output, or delete the folder")
    inputs = load_inputs(config)
    connect()
    use_gpu = wants_gpu(config.workers, config.use_gpu)
    run = runs.start_run(config.output, job="train", config=config)
    settings = {"config": with_absolute_paths(config)}
    run_workers(train_loop_per_worker, settings, run, workers=config.workers, use_gpu=use_gpu)
    used = [path for path in (config.data, config.item_scores, config.user_score_run) if path]
    runs.finish_run(run, inputs=used, counts=row_counts(inputs))
    return run


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray Train's workers run in a folder of their own."""
    named = {"output": config.output, "data": config.data}
    named |= {"item_scores": config.item_scores, "user_score_run": config.user_score_run}
    return dataclasses.replace(config, **{name: runs.absolute(path) for name, path in named.items() if path})


def row_counts(inputs: Inputs) -> dict[str, Any]:
    return {
        "items": inputs.items,
        "interactions": len(inputs.items_N),
        "training_users": len(inputs.windows.user_E),
        "validation_targets": len(inputs.targets[VALIDATION].user_E),
        "test_targets": len(inputs.targets[TEST].user_E),
        "items_without_scores": inputs.scores.missing if inputs.scores else 0,
        "scored_ids_not_in_data": inputs.scores.unknown if inputs.scores else 0,
    }


def train_loop_per_worker(settings: dict[str, TrainConfig]) -> None:
    """What every Ray Train worker runs; rank 0 writes the run's files."""
    config = settings["config"]
    share = Share(*begin_worker(config.threads))
    training = start_training(config, load_inputs(config), ray.train.torch.get_device(), share)
    state = last_checkpoint(training.device)
    if state is not None:
        restore(training, state)
        logger.info("resumed after epoch %d", training.progress.epoch)
    events = EventFile(runs.join(config.output, EVENTS)) if share.rank == 0 else None
    for _ in training_rounds(training):
        if events:
            write_history(training)
            events.write(training.progress.lines)
        metrics = {"epoch": training.progress.epoch, **training.progress.lines[-1]["validation"]}
        report(metrics, checkpoint_state(training) if share.rank == 0 else None)
    if events:
        events.close()
    training.model.load_state_dict(training.best_weights)
    write_outputs(training)


def write_history(training: Training) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in training.progress.lines)
    runs.write_text(lines, runs.join(training.config.output, HISTORY))


def write_outputs(training: Training) -> None:
    """Ranks and metrics of validation and test, and the weights; the workers share the ranking."""
    output, sets = training.config.output, training.config.candidates
    ranks = {part: target_ranks(training, part, sets) for part in (VALIDATION, TEST)}
    if training.share.rank > 0:
        return
    pairs = [(part, name, rank_E.numpy()) for part, found in ranks.items() for name, rank_E in found.items()]
    tables = [rank_table(training.inputs, part, name, rank_E) for part, name, rank_E in pairs]
    runs.write_table(pa.concat_tables(tables), runs.join(output, RANKS))
    save_weights(training, runs.join(output, MODEL))
    metrics = run_metrics(training)
    for part, name, rank_E in pairs:
        metrics.setdefault(part, {})[name] = rank_metrics(rank_E)
    runs.write_json(metrics, runs.join(output, METRICS))
    logger.info("test NDCG@10 %s", {name: round(found[CHOSEN_BY], 4) for name, found in metrics[TEST].items()})


def rank_table(inputs: Inputs, part: str, candidate_set: str, rank_E: np.ndarray) -> pa.Table:
    targets = inputs.targets[part]
    target_E = inputs.items_N[targets.target_at_E].numpy()
    columns = {
        "user_index": targets.user_E.numpy(),
        "part": [part] * len(target_E),
        "candidates": [candidate_set] * len(target_E),
        "target": target_E,
        "rank": rank_E,
        "target_train_count": inputs.train_count_I[target_E - 1],
    }
    return pa.table(columns).cast(RANK_SCHEMA)


def save_weights(training: Training, path: str) -> None:
    filesystem, inner = runs.filesystem_of(path)
    weights = {name: values.contiguous() for name, values in training.best_weights.items()}
    with filesystem.open(inner, "wb") as file:
        file.write(safetensors.torch.save(weights))


def run_metrics(training: Training) -> dict[str, Any]:
    """metrics.json but for the two parts' metrics."""
    inputs, progress = training.inputs, training.progress
    shares = score_shares(training)
    seconds = [line["seconds"] for line in progress.lines]
    return {
        "protocol": inputs.protocol,
        "shares": shares,
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "parameters": sum(p.numel() for p in training.model.parameters() if p.requires_grad),
        "seconds_per_epoch": sum(seconds) / len(seconds),
        "warnings": inputs.warnings + share_warnings(inputs, shares),
    }


def share_warnings(inputs: Inputs, shares: dict[str, float] | None) -> list[str]:
    if shares is None or inputs.user_vectors is None or abs(shares["user_guided"]) >= LEAST_USER_SHARE:
        return []
    return [f"the user vectors make {shares['user_guided']:.2%} of the scores' spread: they decide next to nothing"]
