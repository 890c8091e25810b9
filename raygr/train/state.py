"""What one worker trains with: model, optimizers and progress, and the part of it that a checkpoint holds.

A checkpoint needs no generator state, because all random numbers of an epoch come from (seed, epoch, worker).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygr.models.bert4rec import BERT4Rec
from raygr.models.embeddings import Fusion, RefinedEmbedding
from raygr.models.gru4rec import GRU4Rec
from raygr.models.guided_state import HISTORY_PARTS, Part
from raygr.models.inference import SequenceModel
from raygr.models.negatives import popularity_sums
from raygr.models.sasrec import SASRec
from raygr.models.workers import Share
from raygr.train.config import TrainConfig
from raygr.train.inputs import Inputs
from raygr.train.optimizer import build_optimizers


@dataclass
class Progress:
    """How far training has come; part of every checkpoint."""

    epoch: int = 0
    best_epoch: int = 0
    best_score: float = -1.0
    evaluations_since_best: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    """One per epoch, for epochs.jsonl."""


@dataclass
class Training:
    """Everything that one worker trains with. `checkpoint_state` names what changes."""

    config: TrainConfig
    inputs: Inputs
    share: Share
    device: torch.device
    model: SequenceModel
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    popularity_I: Tensor
    """Shared negatives are drawn by it: see negatives.popularity_sums."""
    best_weights: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)
    session_BD: Tensor | None = None
    """`session_parallel`: GRU4Rec's hidden state of each lane after the last batch. An epoch begins without one."""


def start_training(config: TrainConfig, inputs: Inputs, device: torch.device, share: Share) -> Training:
    """A model with random weights, its optimizers, and no progress yet."""
    torch.manual_seed(config.seed)
    torch.sparse.check_sparse_tensor_invariants.disable()  # an explicit choice: torch warns where none was made
    model = build_model(
        config,
        items=inputs.items,
        scores_IA=inputs.scores.scores_IA if inputs.scores else None,
        users_UA=inputs.user_vectors.evaluation_UA if inputs.user_vectors else None,
        rating_deviation=inputs.rating_deviation,
    ).to(device)
    known = inputs.items - inputs.new_items
    with torch.no_grad():
        model.embedding.base_ID[known:] = 0  # new items have no learned part, and the loss gives them no gradient
    optimizers = build_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    popularity_I = popularity_sums(inputs.train_count_I[:known], config.negative_alpha)
    return Training(config, inputs, share, device, model, optimizers, scaler, popularity_I, copied_weights(model))


def build_model(
    config: TrainConfig,
    *,
    items: int,
    scores_IA: np.ndarray | None,
    users_UA: np.ndarray | None,
    rating_deviation: float = 1.0,
) -> SequenceModel:
    """The configured recommender for `items` items, their scores, and the users' standardised vectors."""
    state: tuple[Part, ...] = ()
    if config.user_side == "learned":
        state = (*(HISTORY_PARTS if config.user_scores == "history" else ()), *(() if users_UA is None else ("user",)))
    user_side = "off" if users_UA is None or config.user_side == "learned" else config.user_side
    embedding = RefinedEmbedding(
        items,
        config.base_width,
        fusion=Fusion(config.fusion, config.add_map, config.linear_map, user_side, config.guided_weight, state),
        scores_IA=scores_IA,
        users_UA=users_UA,
        train_users=config.train_user_guided,
        rating_deviation=rating_deviation,
        # plain Adam moves all rows, also those without a gradient
        sparse=config.loss != "cross_entropy" and config.optimizer in ("adagrad", "sparse_adam"),
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


def copied_weights(model: SequenceModel) -> dict[str, Tensor]:
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
    """Goes back to a `checkpoint_state`."""
    training.model.load_state_dict(state["model"])
    for optimizer, stored in zip(training.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    training.scaler.load_state_dict(state["scaler"])
    training.best_weights = state["best_weights"]
    training.progress = Progress(**state["progress"])
