"""The training loop, top down: batch, loss, backward, step, evaluation, early stopping, checkpoint.

It takes plain arguments and needs no Ray, and torch.distributed only where there are several workers. A resumed run
equals an uninterrupted one: see state.py.
"""

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from raygr.execution.console import log_progress
from raygr.metrics.ranking import rank_metrics
from raygr.schema import VALIDATION
from raygr.train.batches import Batch, length_groups, worker_part
from raygr.train.config import TrainConfig
from raygr.train.evaluate import target_ranks
from raygr.train.optimizer import clip_gradients, gradient_values, join_rows, learning_rate
from raygr.train.state import Progress, Training, copied_weights
from raygr.train.step import WholeBatch, epoch_contents, epoch_draws, renumbered, summed_loss, whole_batch

logger = logging.getLogger(__name__)

POSITIONS_AT_ONCE = 1536  # of a forward and backward pass on a CPU: little padding, and activations fit its cache
CHOSEN_BY = "ndcg_at_10"


def training_rounds(training: Training) -> Iterator[None]:
    """Trains until validation NDCG@10 has not risen for `patience` evaluations. Yields after each evaluation.

    At a yield the caller may save `checkpoint_state`. The best weights are kept in `training.best_weights`.
    ValueError where the loss is not finite.
    """
    config, inputs, share, progress = training.config, training.inputs, training.share, training.progress
    log_progress(logger, run_name(config), progress.epoch, config.epochs, "epochs")
    while progress.epoch < config.epochs and progress.evaluations_since_best < config.patience:
        progress.epoch += 1
        epoch, started = progress.epoch, time.perf_counter()
        draws = epoch_draws(config.seed, epoch, share.rank)
        torch.manual_seed(draws.dropout_seed)
        training.session_BD = None
        training.model.train()
        contents = epoch_contents(config, inputs, epoch)
        total, positions = torch.zeros((), device=training.device), 0
        for step, content in enumerate(contents, start=(epoch - 1) * len(contents)):
            whole = whole_batch(config, inputs, content, training.popularity_I, draws)
            total += accumulate_gradients(training, whole)
            take_step(training, learning_rate(config, step, config.epochs * len(contents)))
            positions += whole.positions()
        loss = float(share.total(total)) / positions
        if not math.isfinite(loss):
            raise ValueError(f"the loss of epoch {epoch} is {loss}: lower the learning rate")
        seconds = time.perf_counter() - started
        line: dict[str, Any] = {"epoch": epoch, "loss": loss, "seconds": seconds, "time": time.time()}
        line["learning_rate"] = training.optimizers[0].param_groups[0]["lr"]

        is_evaluated = epoch % config.evaluate_every == 0 or epoch == config.epochs
        if is_evaluated:
            started = time.perf_counter()
            metrics = rank_metrics(target_ranks(training, VALIDATION, ["full"])["full"].numpy())
            progress.evaluations_since_best += 1
            if metrics[CHOSEN_BY] > progress.best_score:  # otherwise early stopping comes nearer
                progress.best_score, progress.best_epoch = metrics[CHOSEN_BY], epoch
                progress.evaluations_since_best = 0
                training.best_weights = copied_weights(training.model)
            line |= {"validation": metrics, "evaluation_seconds": time.perf_counter() - started}
        progress.lines.append(line)
        log_progress(logger, run_name(config), epoch, config.epochs, "epochs", figures(line, progress))
        if is_evaluated:
            yield  # the caller saves a checkpoint
    if progress.epoch < config.epochs:
        done = (progress.epoch, progress.epoch, "epochs", f"stopped early, {best_so_far(progress)}")
        log_progress(logger, run_name(config), *done)


def accumulate_gradients(training: Training, whole: WholeBatch) -> Tensor:
    """Sets the gradient of the whole batch's mean loss, the same on all workers.

    Returns the summed loss of this worker's part of the batch.
    """
    config, inputs, model, share = training.config, training.inputs, training.model, training.share
    model.zero_grad(set_to_none=True)
    if config.loss != "cross_entropy":
        whole = renumbered(whole, inputs.items)
    total = torch.zeros((), device=training.device)
    for part in passes(training, worker_part(whole.batch, *share)):
        loss, training.session_BD = summed_loss(config, inputs, model, whole, part, training.session_BD)
        training.scaler.scale(loss / max(1, whole.positions())).backward()
        total += loss.detach()
    join_rows(model.embedding, whole.item_J)
    if share.workers > 1:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # this worker has no example in the batch
        share.add_up(gradient_values(model))
    return total


def take_step(training: Training, rate: float) -> None:
    """One step of all optimizers at this learning rate, on clipped gradients."""
    limit, scaler = training.config.max_grad_norm, training.scaler
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if limit is not None:
            scaler.unscale_(optimizer)
    if limit is not None:
        clip_gradients(training.model, limit)
    for optimizer in training.optimizers:
        scaler.step(optimizer)
    scaler.update()


def passes(training: Training, own: Batch) -> list[Batch]:
    """Cuts this worker's part of a batch into forward passes.

    A transformer on a CPU takes histories of similar length together, to avoid padding. A GRU computes step by step, so
    one wide batch costs less than several narrow ones; so it does on a GPU.
    """
    if not len(own.user_B):
        return []
    if training.device.type != "cpu" or training.config.model == "gru4rec":
        return [own]
    return length_groups(own, POSITIONS_AT_ONCE)


def run_name(config: TrainConfig) -> str:
    """The last part of the run's path, which tells runs apart on the console."""
    return config.output.rstrip("/").rpartition("/")[2]


def figures(line: dict[str, Any], progress: Progress) -> str:
    return f"loss {line['loss']:.4f}" + (f", {best_so_far(progress)}" if progress.best_epoch else "")


def best_so_far(progress: Progress) -> str:
    return f"best validation NDCG@10 {progress.best_score:.4f} in epoch {progress.best_epoch}"
