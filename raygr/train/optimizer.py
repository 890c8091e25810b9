"""Optimizers, gradients and the learning rate of each step."""

import torch
from torch import Tensor, nn

from raygr.models.embeddings import RefinedEmbedding
from raygr.train.config import TrainConfig


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Adam, with decoupled weight decay if configured (Sun et al. 2019), or Adagrad (Hidasi et al. 2016).

    `sparse_adam` is torch's SparseAdam for the learned item rows and Adam for the rest: a row and its moments do not
    change in steps without its gradient, while the bias correction counts every step.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adagrad":
        return [torch.optim.Adagrad(learned, lr=config.learning_rate)]
    if config.optimizer == "sparse_adam":
        rows = model.get_parameter("embedding.base_ID")
        others = [parameter for parameter in learned if parameter is not rows]
        lazy = torch.optim.SparseAdam([rows], lr=config.learning_rate)
        return [torch.optim.Adam(others, lr=config.learning_rate, fused=True), lazy]
    if not config.weight_decay:
        return [torch.optim.Adam(learned, lr=config.learning_rate, fused=True)]
    matrices, others = [p for p in learned if p.dim() > 1], [p for p in learned if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)]


def join_rows(embedding: RefinedEmbedding, item_J: Tensor | None) -> None:
    """Makes the sparse gradient of the learned rows hold one row for each of the batch's items, in their order.

    All workers then have the same rows. A dense gradient is left alone.
    """
    rows_ID = embedding.base_ID
    if not embedding.sparse or item_J is None:
        return
    if rows_ID.grad is None:  # this worker has no example in the batch
        zeros_JD = rows_ID.new_zeros(len(item_J), rows_ID.shape[1])
        rows_ID.grad = torch.sparse_coo_tensor((item_J - 1)[None].to(rows_ID.device), zeros_JD, rows_ID.shape)
    rows_ID.grad = rows_ID.grad.coalesce()


def gradient_values(model: nn.Module) -> list[Tensor]:
    """The tensors of all gradients, to be changed in place; of a sparse gradient its rows."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]


def clip_gradients(model: nn.Module, limit: float) -> None:
    """Scales all gradients down to the norm `limit`, like torch's clip_grad_norm_, which refuses sparse ones."""
    values = gradient_values(model)
    factor = (limit / (torch.nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for gradient in values:
        gradient.mul_(factor)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of step 0, 1, ... of `steps`: a linear warm-up, then constant, or linear to 0 after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (steps - step) / max(1, steps - config.warmup_steps)
