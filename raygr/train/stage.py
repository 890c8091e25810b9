"""The train stage: prepare run (+ scores) -> epochs.jsonl, and the files of outputs.py.

The driver checks all inputs. Then the loop of loop.py runs in the calling process, or in one or more workers of Ray
Train. A replaced worker, or a run started again in an unfinished folder, resumes from the checkpoint of the last
evaluation.
"""

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import pyarrow.parquet as pq

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.row_counts import log_rows
from raygr.execution.in_process import (
    Worker,
    last_checkpoint,
    remove_checkpoint,
    runs_here,
    save_checkpoint,
    torch_of_a_worker,
    worker_here,
)
from raygr.execution.loggers import Loggers, Point, check_loggers
from raygr.models.workers import Share
from raygr.schema import HISTORY, INTERACTIONS, TEST, VALIDATION
from raygr.train.config import TrainConfig
from raygr.train.inputs import Inputs, load_inputs, with_absolute_paths
from raygr.train.loop import CHOSEN_BY, training_rounds
from raygr.train.outputs import write_outputs
from raygr.train.state import checkpoint_state, restore, start_training

logger = logging.getLogger(__name__)

BEST = f"best_{CHOSEN_BY}"
WATCHED_EVERY = 0.1  # seconds; a longer interval would outlast a small epoch
# Interactions times epochs. SASRec takes 47 us each on one core (docs/scaling.md), 8 minutes in all, of which starting
# Ray would be a tenth; above it Ray's restart of a killed worker is worth that.
SMALL = 10_000_000


def train(
    config: TrainConfig,
    *,
    gpu_share: float = 1.0,
    at_once: int = 1,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> runs.Run:
    """Trains one recommender and evaluates it once on test, with the weights that were best on validation.

    On Ray, `at_once` runs share the machine's cores, and each takes `gpu_share` of a GPU. `report` takes the metrics of
    every evaluation of a training in the calling process. ConfigError, ValueError or RunError before anything is
    trained.
    """
    runs.check_unfinished(config.output)
    check_loggers(config.loggers)
    inputs = load_inputs(config)
    counts = row_counts(inputs)
    log_users(counts)
    learned, there = counts["train_targets_used"], counts["train_targets"]
    logger.info("train targets in the windows of an epoch: %d of %d (%.1f%%)", learned, there, 100 * learned / there)
    is_small = config.workers == 1 and training_size(config) <= SMALL
    is_here = runs_here(config.ray, is_small=is_small)
    run_loop = loop_here(config, inputs, report) if is_here else loop_on_ray(config, gpu_share, at_once)
    read = [config.data, config.item_scores, config.user_score_run, config.user_table, config.list_scores]
    used = [path for path in read if path]
    run = runs.start_run(config.output, job="train", config=config, inputs=used)
    run_loop(run)
    runs.finish_run(run, inputs=used, counts=counts)
    remove_checkpoint(run.path)
    return run


def training_size(config: TrainConfig) -> int:
    """Interactions of the data times epochs."""
    filesystem, inner = files.filesystem_of(files.join(config.data, INTERACTIONS))
    with filesystem.open(inner, "rb") as file:
        return pq.read_metadata(file).num_rows * config.epochs


def loop_here(
    config: TrainConfig, inputs: Inputs, report: Callable[[dict[str, Any]], None] | None
) -> Callable[[runs.Run], None]:
    """Checks the room; returns what trains in the calling process."""
    worker = worker_here(config.use_gpu, config.threads)
    worker = worker._replace(report=report or worker.report)

    def run_loop(run: runs.Run) -> None:
        with torch_of_a_worker(worker, config.threads):
            train_and_write(with_absolute_paths(config), inputs, worker)

    return run_loop


def loop_on_ray(config: TrainConfig, gpu_share: float, at_once: int) -> Callable[[runs.Run], None]:
    """Checks the room; returns what trains in workers of Ray Train."""
    from raygr.execution.distributed import reserve_workers, run_workers

    placed = reserve_workers(config.workers, config.use_gpu, config.threads, gpu_share=gpu_share, at_once=at_once)
    settings = {"config": with_absolute_paths(config)}
    return lambda run: run_workers(train_per_worker, settings, run, placed=placed, watched_every=WATCHED_EVERY)


def train_all(train_one: Callable[[TrainConfig], None], configs: Sequence[TrainConfig], at_once: int) -> None:
    """Trains all configurations in order, `at_once` at a time; several at a time on one Ray.

    After the first failure no further run starts; its error is raised once the runs under way have ended.
    """
    if at_once == 1:
        for config in configs:
            train_one(config)
        return
    if any(config.ray == "never" for config in configs):
        raise ConfigError(f"at_once: {at_once} train runs side by side need Ray, and ray: never forbids it")
    import ray

    from raygr.execution.distributed import check_at_once
    from raygr.ray_setup import connect

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


def train_per_worker(settings: dict[str, Any], worker: Worker) -> None:
    """The function that every Ray Train worker runs."""
    train_and_write(settings["config"], load_inputs(settings["config"]), worker)


def train_and_write(config: TrainConfig, inputs: Inputs, worker: Worker) -> None:
    """Trains from the last checkpoint on. Rank 0 writes the run's files."""
    share = Share(worker.rank, worker.workers)
    training = start_training(config, inputs, worker.device, share)
    state = last_checkpoint(config.output, training.device)
    if state is not None:
        restore(training, state)
        logger.info("resumed after epoch %d", training.progress.epoch)
    lines, loggers = training.progress.lines, None
    if share.rank == 0:
        loggers = Loggers(config.loggers, config.output, vars(config), logged={"epochs": len(lines)})
    for _ in training_rounds(training):
        if loggers:
            files.write_text("".join(json.dumps(line) + "\n" for line in lines), files.join(config.output, HISTORY))
            loggers.write("epochs", list(map(curve_point, lines)))
            save_checkpoint(checkpoint_state(training), config.output)
        worker.report(evaluated(lines, best=training.progress.best_score))
    if loggers:
        loggers.close()
    training.model.load_state_dict(training.best_weights)
    write_outputs(training)


def curve_point(line: dict[str, Any]) -> Point:
    """The figures of an epoch's line that are drawn as curves."""
    figures = {f"train/{name}": line[name] for name in ("loss", "learning_rate", "seconds")}
    figures |= {f"validation/{name}": value for name, value in line.get("validation", {}).items()}
    return Point(line["epoch"], figures, line["time"])


def evaluated(lines: list[dict[str, Any]], *, best: float) -> dict[str, float]:
    """The reported figures: the last epoch, its validation metrics, and the best NDCG@10 so far."""
    return {"epoch": lines[-1]["epoch"], **lines[-1]["validation"], BEST: best}
