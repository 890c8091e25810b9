"""The training loop on plain arguments: no Ray, and torch.distributed only where there are several workers.

All randomness of an epoch comes from (seed, epoch, worker), so a checkpoint needs no generator state and an
interrupted run that resumes equals the straight one. Shape suffixes as in losses.py and metrics/ranking.py.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from raygr.metrics.ranking import candidate_ranks, full_ranks, rank_metrics
from raygr.models.bert4rec import BERT4Rec
from raygr.models.embeddings import Fusion, RefinedEmbedding
from raygr.models.gru4rec import GRU4Rec
from raygr.models.losses import popularity_sums
from raygr.models.sasrec import SASRec
from raygr.models.workers import Share
from raygr.schema import TEST, VALIDATION
from raygr.train.batches import Batch, Targets, history_batch, length_groups, seen_pairs, worker_part
from raygr.train.config import TrainConfig
from raygr.train.inputs import Inputs
from raygr.train.optimizer import (
    build_optimizers,
    clip_gradients,
    gradient_values,
    has_sparse_rows,
    join_rows,
    learning_rate,
)
from raygr.train.step import Recommender, WholeBatch, epoch_contents, epoch_draws, renumbered, summed_loss, whole_batch

logger = logging.getLogger(__name__)

TARGETS_AT_ONCE = 256  # 256 x 30,000 items x 4 bytes = 31 MB of scores
SHARES_OF_USERS = 512
POSITIONS_AT_ONCE = 1536  # of a forward and backward pass on a CPU: little padding, and activations fit its cache
CHOSEN_BY = "ndcg_at_10"


@dataclass
class Progress:
    """Where training stands; part of every checkpoint."""

    epoch: int = 0
    best_epoch: int = 0
    best_score: float = -1.0
    evaluations_since_best: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    """One per epoch, for epochs.jsonl."""


@dataclass
class Training:
    """All that one worker trains with. A checkpoint holds what changes: see `checkpoint_state`."""

    config: TrainConfig
    inputs: Inputs
    share: Share
    device: torch.device
    model: Recommender
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    popularity_I: Tensor
    """For drawing shared negatives: see losses.popularity_sums."""
    best_weights: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)


def build_model(config: TrainConfig, inputs: Inputs) -> Recommender:
    torch.manual_seed(config.seed)
    torch.sparse.check_sparse_tensor_invariants.disable()  # torch warns where nobody has said so
    users = inputs.user_vectors
    user_side = config.user_side if users else "off"
    fusion = Fusion(config.fusion, config.add_map, config.linear_map, user_side, config.guided_weight)
    embedding = RefinedEmbedding(
        inputs.items,
        config.base_width,
        fusion=fusion,
        scores_IA=inputs.scores.scores_IA if inputs.scores else None,
        users_UA=users.evaluation_UA if users else None,
        train_users=config.train_user_guided,
        sparse=has_sparse_rows(config),
    )
    dropout, length = config.dropout, config.max_history
    match config.model:
        case "gru4rec":
            input_dropout = dropout if config.input_dropout is None else config.input_dropout
            return GRU4Rec(embedding, hidden_width=config.hidden_width, dropout=dropout, input_dropout=input_dropout)
        case "sasrec":
            return SASRec(embedding, blocks=config.blocks, heads=config.heads, dropout=dropout, max_history=length)
        case "bert4rec":
            return BERT4Rec(embedding, blocks=config.blocks, heads=config.heads, dropout=dropout, max_history=length)


def start_training(config: TrainConfig, inputs: Inputs, device: torch.device, share: Share) -> Training:
    model = build_model(config, inputs).to(device)
    optimizers = build_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    popularity_I = popularity_sums(inputs.train_count_I, config.negative_alpha)
    return Training(config, inputs, share, device, model, optimizers, scaler, popularity_I, copied_weights(model))


def copied_weights(model: Recommender) -> dict[str, Tensor]:
    return {name: values.detach().cpu().clone() for name, values in model.state_dict().items()}


def checkpoint_state(training: Training) -> dict[str, Any]:
    return {
        "model": training.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
        "scaler": training.scaler.state_dict(),
        "best_weights": training.best_weights,
        "progress": asdict(training.progress),
    }


def restore(training: Training, state: dict[str, Any]) -> None:
    training.model.load_state_dict(state["model"])
    for optimizer, stored in zip(training.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    training.scaler.load_state_dict(state["scaler"])
    training.best_weights = state["best_weights"]
    training.progress = Progress(**state["progress"])


def training_rounds(training: Training) -> Iterator[None]:
    """Trains until validation NDCG@10 has not risen for `patience` evaluations; yields after each evaluation."""
    config, progress = training.config, training.progress
    while progress.epoch < config.epochs and progress.evaluations_since_best < config.patience:
        progress.epoch += 1
        started = time.perf_counter()
        loss = train_epoch(training)
        line = {"epoch": progress.epoch, "loss": loss, "seconds": time.perf_counter() - started, "time": time.time()}
        line["learning_rate"] = training.optimizers[0].param_groups[0]["lr"]
        is_evaluated = progress.epoch % config.evaluate_every == 0 or progress.epoch == config.epochs
        if is_evaluated:
            line |= evaluate_epoch(training)
        progress.lines.append(line)
        logger.info(progress_line(line, epochs=config.epochs, progress=progress))
        if is_evaluated:
            yield


def progress_line(line: dict[str, Any], *, epochs: int, progress: Progress) -> str:
    text = f"epoch {line['epoch']:>3}/{epochs}  loss {line['loss']:.4f}  {line['seconds']:.1f} s"
    if "validation" in line:
        score = line["validation"][CHOSEN_BY]
        text += f"  validation NDCG@10 {score:.4f} (best {progress.best_score:.4f} in epoch {progress.best_epoch})"
    return text


def train_epoch(training: Training) -> float:
    """One pass over all histories; the mean loss per position."""
    config, epoch, share = training.config, training.progress.epoch, training.share
    draws = epoch_draws(config.seed, epoch, share.rank)
    torch.manual_seed(draws.dropout_seed)
    training.model.train()
    total, positions = torch.zeros((), device=training.device), 0
    contents = epoch_contents(config, training.inputs, epoch)
    for step, content in enumerate(contents, start=(epoch - 1) * len(contents)):
        whole = whole_batch(config, training.inputs, content, training.popularity_I, draws)
        total += accumulate_gradients(training, whole)
        take_step(training, learning_rate(config, step, config.epochs * len(contents)))
        positions += whole.positions()
    mean = float(share.total(total)) / positions
    if not math.isfinite(mean):
        raise ValueError(f"the loss of epoch {epoch} is {mean}: lower the learning rate")
    return mean


def accumulate_gradients(training: Training, whole: WholeBatch) -> Tensor:
    """Sets the gradient of the whole batch's mean loss, equal on all workers; the summed loss of the own part."""
    config, inputs, model = training.config, training.inputs, training.model
    model.zero_grad(set_to_none=True)
    if config.loss != "cross_entropy":
        whole = renumbered(whole, inputs.items)
    total = torch.zeros((), device=training.device)
    for group in passes(training, worker_part(whole.batch, *training.share)):
        loss = summed_loss(config, inputs, model, whole, group)
        training.scaler.scale(loss / max(1, whole.positions())).backward()
        total += loss.detach()
    join_rows(model.embedding, whole.item_J)
    sum_gradients(training)
    return total


def passes(training: Training, own: Batch) -> list[Batch]:
    """What goes through the model at once: of a transformer on a CPU, histories of about one length.

    A GRU takes a history step by step, so that one wide batch is cheaper than several narrow ones; as is a GPU.
    """
    if not len(own.user_B):
        return []
    if training.device.type != "cpu" or training.config.model == "gru4rec":
        return [own]
    return length_groups(own, POSITIONS_AT_ONCE)


def take_step(training: Training, rate: float) -> None:
    config, scaler = training.config, training.scaler
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        if config.max_grad_norm is not None:
            scaler.unscale_(optimizer)
    if config.max_grad_norm is not None:
        clip_gradients(training.model, config.max_grad_norm)
    for optimizer in training.optimizers:
        scaler.step(optimizer)
    scaler.update()


def sum_gradients(training: Training) -> None:
    """Sums the gradients of all workers; a worker without examples in this batch adds zeros."""
    if training.share.workers == 1:
        return
    for parameter in training.model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    training.share.add_up(gradient_values(training.model))


def evaluate_epoch(training: Training) -> dict[str, Any]:
    """Validation metrics of the epoch; keeps the weights where they are the best so far."""
    started = time.perf_counter()
    progress = training.progress
    metrics = rank_metrics(target_ranks(training, VALIDATION, ["full"])["full"].numpy())
    progress.evaluations_since_best += 1
    if metrics[CHOSEN_BY] > progress.best_score:
        progress.best_score, progress.best_epoch = metrics[CHOSEN_BY], progress.epoch
        progress.evaluations_since_best = 0
        training.best_weights = copied_weights(training.model)
    return {"validation": metrics, "evaluation_seconds": time.perf_counter() - started}


@torch.inference_mode()
def target_ranks(training: Training, part: str, candidate_sets: Sequence[str]) -> dict[str, Tensor]:
    """Rank of every target of the part among each candidate set, (E,); the workers share the targets."""
    training.model.eval()
    targets, share = training.inputs.targets[part], training.share
    ranks = {name: torch.zeros(len(targets.user_E)) for name in candidate_sets}
    rows_ID = training.model.embedding.item_rows()
    for example_B in torch.arange(share.rank, len(targets.user_E), share.workers).split(TARGETS_AT_ONCE):
        scores_BI = item_scores(training, targets, example_B, rows_ID)
        for name, rank_E in ranks.items():
            rank_E[example_B] = batch_ranks(training, targets, example_B, scores_BI, candidate_set=name).cpu()
    # gathering is adding: every worker left the others' targets at 0
    return {name: share.total(rank_E.to(training.device)).cpu() for name, rank_E in ranks.items()}


def batch_ranks(
    training: Training, targets: Targets, example_B: Tensor, scores_BI: Tensor, *, candidate_set: str
) -> Tensor:
    inputs, device = training.inputs, training.device
    target_B = inputs.items_N[targets.target_at_E[example_B]].to(device)
    if candidate_set == "full":
        return full_ranks(scores_BI, target_B, *left_out(training, targets, example_B))
    return candidate_ranks(
        scores_BI, target_B, inputs.candidates[candidate_set][targets.user_E[example_B]].long().to(device)
    )


def left_out(training: Training, targets: Targets, example_B: Tensor) -> tuple[Tensor, Tensor]:
    """(row in the batch, item_index) of what no list holds: the seen items; nothing where items come back."""
    inputs, device = training.inputs, training.device
    pairs = seen_pairs(inputs.items_N, targets, example_B[:0] if inputs.repeats else example_B)
    return pairs[0].to(device), pairs[1].to(device)


def item_scores(training: Training, targets: Targets, example_B: Tensor, rows_ID: Tensor) -> Tensor:
    """<state, item> of items 1..I, (B, I)."""
    return user_states(training, targets, example_B, rows_ID) @ rows_ID.T


def user_states(training: Training, targets: Targets, example_B: Tensor, rows_ID: Tensor) -> Tensor:
    """(9b) before the targets: the vectors whose products with item rows are the scores, (B, D)."""
    encoder_BD, guided_BA = encoder_states(training, targets, example_B, rows_ID)
    return training.model.embedding.refined_state(encoder_BD[:, None], guided_BA)[:, 0]


def encoder_states(
    training: Training, targets: Targets, example_B: Tensor, rows_ID: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The encoder's states (B, D) and the users' vectors (B, A) before the targets."""
    device, embedding = training.device, training.model.embedding
    length_B = targets.length_E[example_B]
    history_BL = history_batch(training.inputs.items_N, targets.start_E[example_B], length_B)
    encoder_BD = training.model.last_state(rows_ID, history_BL.to(device), length_B.to(device))
    user_B = targets.user_E[example_B].to(device)
    if not embedding.has_user_side:
        return encoder_BD, None
    return encoder_BD, embedding.tuned_users(embedding.users_UA[user_B], user_B)


@torch.inference_mode()
def score_shares(training: Training) -> dict[str, float] | None:
    """Where the spread of the test users' scores comes from; None for a base model."""
    if training.inputs.scores is None:
        return None
    training.model.eval()
    targets = training.inputs.targets[TEST]
    example_B = torch.arange(min(len(targets.user_E), SHARES_OF_USERS))
    rows_ID = training.model.embedding.item_rows()
    return training.model.embedding.score_shares(*encoder_states(training, targets, example_B, rows_ID))
