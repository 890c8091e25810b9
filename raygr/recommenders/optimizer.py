"""The optimizer of a run, and the learning rate of each of its steps."""

import torch
from torch import nn

from raygr.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam, with decoupled weight decay where asked for (Sun et al. 2019), or Adagrad (Hidasi et al. 2016)."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adagrad":
        return torch.optim.Adagrad(learned, lr=config.learning_rate)
    if not config.weight_decay:
        return torch.optim.Adam(learned, lr=config.learning_rate, fused=True)
    matrices, others = [p for p in learned if p.dim() > 1], [p for p in learned if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Of step 0, 1, ... of `steps`: a linear warm-up, then constant, or linear towards 0 after the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (steps - step) / max(1, steps - config.warmup_steps)
