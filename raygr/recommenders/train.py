"""The train stage: prepare run (+ scores) -> model.safetensors, ranks.parquet, epochs.jsonl, metrics.json.

The driver checks everything, then Ray Train runs the loop of loop.py in one or more workers. A killed worker,
or a run started again on an unfinished folder, goes on from the last evaluation's checkpoint.
Left out of the checkpoint: generator states, because each epoch's randomness comes from (seed, epoch, worker).
"""

import dataclasses
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import safetensors.torch
import torch

from raygr import runs
from raygr.cluster import connect, wants_gpu
from raygr.config import TrainConfig
from raygr.evaluation import rank_metrics
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
from raygr.schema import HISTORY, METRICS, MODEL, RANK_SCHEMA, RANKS, TEST, VALIDATION

logger = logging.getLogger(__name__)

CHECKPOINT = "training.pt"
WORKER_RESTARTS = 2
LEAST_USER_SHARE = 0.01  # below this the user side decides nothing, whatever the metrics say


def train(config: TrainConfig) -> runs.Run:
    """Trains one recommender and evaluates it once on test, with the weights that were best on validation."""
    if runs.is_finished(config.output):
        raise runs.RunError(f"{config.output} is a finished run: choose another output, or delete the folder")
    inputs = load_inputs(config)
    connect()
    use_gpu = wants_gpu(config.workers, config.use_gpu)
    run = runs.start_run(config.output, job="train", config=config)
    fit(config, run, use_gpu=use_gpu)
    used = [path for path in (config.data, config.item_scores, config.user_score_run) if path]
    runs.finish_run(run, inputs=used, counts=row_counts(inputs))
    return run


def fit(config: TrainConfig, run: runs.Run, *, use_gpu: bool) -> None:
    # a worker waits in report until the controller's next look at it: by default up to 2 s, longer than a small epoch
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    trainer = ray.train.torch.TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"config": with_absolute_paths(config)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=use_gpu, resources_per_worker=worker_resources(use_gpu)
        ),
        run_config=ray.train.RunConfig(
            name="train",  # start_run has refused a folder of another configuration: going on here is right
            storage_path=runs.absolute(run.file("ray")),
            failure_config=ray.train.FailureConfig(max_failures=WORKER_RESTARTS),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    trainer.fit()


def worker_resources(use_gpu: bool) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}


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
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train sets INFO, and tells of every report
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // config.workers))
    context = ray.train.get_context()
    share = Share(context.get_world_rank(), context.get_world_size())
    logging.getLogger("raygr").setLevel(logging.INFO if share.rank == 0 else logging.WARNING)
    training = start_training(config, load_inputs(config), ray.train.torch.get_device(), share)
    resume(training)
    for _ in training_rounds(training):
        if share.rank == 0:
            write_history(training)
        report(training)
    training.model.load_state_dict(training.best_weights)
    write_outputs(training)


def resume(training: Training) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        restore(training, torch.load(Path(folder, CHECKPOINT), map_location=training.device, weights_only=True))
    logger.info("resumed after epoch %d", training.progress.epoch)


def report(training: Training) -> None:
    """A collective of all workers; rank 0 brings the checkpoint."""
    metrics = {"epoch": training.progress.epoch, **training.progress.lines[-1]["validation"]}
    if training.share.rank > 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(checkpoint_state(training), Path(folder, CHECKPOINT))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


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
