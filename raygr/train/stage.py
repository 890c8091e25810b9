"""The train stage: prepare run (+ scores) -> epochs.jsonl, and the files of outputs.py.

The driver checks all inputs, then Ray Train runs the loop of loop.py in one or more workers. A replaced worker, or a
run started again in an unfinished folder, resumes from the checkpoint of the last evaluation.
"""

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import ray
import ray.train.torch

from raygr import files, runs
from raygr.data.row_counts import log_rows
from raygr.distributed import (
    begin_worker,
    check_at_once,
    last_checkpoint,
    placement,
    report,
    run_workers,
    wants_gpu,
    worker_cpus,
)
from raygr.models.workers import Share
from raygr.ray_setup import connect
from raygr.schema import EVENTS, HISTORY, TEST, VALIDATION
from raygr.train.config import TrainConfig
from raygr.train.events import EventFile
from raygr.train.inputs import Inputs, load_inputs, with_absolute_paths
from raygr.train.loop import CHOSEN_BY, training_rounds
from raygr.train.outputs import write_outputs
from raygr.train.state import checkpoint_state, restore, start_training

logger = logging.getLogger(__name__)

BEST = f"best_{CHOSEN_BY}"
WATCHED_EVERY = 0.1  # seconds; a longer interval would outlast a small epoch


def train(
    config: TrainConfig,
    *,
    gpu_share: float = 1.0,
    at_once: int = 1,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> runs.Run:
    """Trains one recommender and evaluates it once on test, with the weights that were best on validation.

    `at_once` runs share the machine's cores, and each takes `gpu_share` of a GPU. `callbacks` are Ray Train's; a sweep
    follows the evaluations of its trials through them. ConfigError, ValueError or RunError before anything is trained.
    """
    runs.check_unfinished(config.output)
    inputs = load_inputs(config)
    counts = row_counts(inputs)
    log_users(counts)
    learned, there = counts["train_targets_used"], counts["train_targets"]
    logger.info("train targets in the windows of an epoch: %d of %d (%.1f%%)", learned, there, 100 * learned / there)
    connect()
    use_gpu = wants_gpu(config.workers, config.use_gpu, gpu_share, threads=config.threads)
    shared = gpu_share if use_gpu else None
    cpus = worker_cpus(config.workers, config.threads, gpu_share=shared, at_once=at_once)
    placed = placement(config.workers, use_gpu=use_gpu, gpu_share=gpu_share, cpus=cpus)
    read = [config.data, config.item_scores, config.user_score_run, config.user_table, config.list_scores]
    used = [path for path in read if path]
    run = runs.start_run(config.output, job="train", config=config, inputs=used)
    settings = {"config": with_absolute_paths(config)}
    run_workers(train_loop_per_worker, settings, run, placed=placed, watched_every=WATCHED_EVERY, callbacks=callbacks)
    runs.finish_run(run, inputs=used, counts=counts)
    return run


def train_all(train_one: Callable[[TrainConfig], None], configs: Sequence[TrainConfig], at_once: int) -> None:
    """Trains all configurations in order, `at_once` at a time, on one Ray.

    After the first failure no further run starts; its error is raised once the runs under way have ended.
    """
    if at_once == 1:
        for config in configs:
            train_one(config)
        return
    connect()  # before the threads, each of which would start a Ray
    for config in configs:
        check_at_once(config.workers, min(at_once, len(configs)), config.threads)
    with ThreadPoolExecutor(at_once) as pool:
        started = [pool.submit(train_one, config) for config in configs]
        try:
            for future in as_completed(started):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                ray.shutdown()  # nothing else ends the runs that the other threads wait for
            raise


def row_counts(inputs: Inputs) -> dict[str, Any]:
    users = len(inputs.first_U) - 1
    return {
        "items": inputs.items,
        "interactions": len(inputs.items_N),
        "users": users,
        "users_without_training_target": users - len(inputs.windows.user_E.unique()),
        "users_without_test_target": users - len(inputs.targets[TEST].user_E.unique()),
        "training_users": len(inputs.windows.user_E.unique()),
        "train_windows": len(inputs.windows.user_E),
        "train_targets": inputs.windows.learnable,
        "train_targets_used": inputs.windows.targets(),
        "validation_targets": len(inputs.targets[VALIDATION].user_E),
        "test_targets": len(inputs.targets[TEST].user_E),
        "items_without_scores": inputs.scores.missing if inputs.scores else 0,
        "scored_ids_not_in_data": inputs.scores.unknown if inputs.scores else 0,
        "users_without_scores": inputs.user_vectors.without_scores if inputs.user_vectors else 0,
    }


def log_users(counts: dict[str, Any]) -> None:
    """Logs how many users have no target in training or in the test."""
    for what in ("training", "test"):
        without = counts[f"users_without_{what}_target"]
        dropped = {f"without_a_{what}_target_behind_a_history": without}
        log_rows(f"users of the {what}", read=counts["users"], kept=counts["users"] - without, dropped=dropped)


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """The function that every Ray Train worker runs. Rank 0 writes the run's files."""
    config: TrainConfig = settings["config"]
    share = Share(*begin_worker())
    training = start_training(config, load_inputs(config), ray.train.torch.get_device(), share)
    state = last_checkpoint(training.device)
    if state is not None:
        restore(training, state)
        logger.info("resumed after epoch %d", training.progress.epoch)
    events = EventFile(files.join(config.output, EVENTS)) if share.rank == 0 else None
    for _ in training_rounds(training):
        if events:
            lines = training.progress.lines
            files.write_text("".join(json.dumps(line) + "\n" for line in lines), files.join(config.output, HISTORY))
            events.write(lines)
        report(
            evaluated(training.progress.lines, best=training.progress.best_score),
            checkpoint_state(training) if share.rank == 0 else None,
        )
    if events:
        events.close()
    training.model.load_state_dict(training.best_weights)
    write_outputs(training)


def evaluated(lines: list[dict[str, Any]], *, best: float) -> dict[str, float]:
    """The reported figures: the last epoch, its validation metrics, and the best NDCG@10 so far."""
    return {"epoch": lines[-1]["epoch"], **lines[-1]["validation"], BEST: best}
