"""Rewards, advantages, and format marks of completions.

`Reward` describes a reward function, the configured ones and a user's own. This module needs numpy and torch alone.
Shape letters: `B` users of a batch, `G` completions, `A` aspects, `C` candidates, `T` tokens. `X` are groups of
completions: none for one user's, or B.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FORMAT, PADDING = -1, -2  # in `aspect_BGT`: a token that belongs to no rating, and no token

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(user_GA, items_CA, relevant_C) -> reward_G: one reward in [-1, 1] for each completion of one user.

user_GA     float64, the ratings of G completions, standardised per aspect; 0 where no rating was read, so a row may be
            all zeros, and its reward must still be finite
items_CA    float64, the scores of C items, standardised per aspect; 0 where an item has no score
relevant_C  bool; base task: the target, which is item 0; classification task: the liked items
reward_G    float, (G,), finite
All tensors are on the CPU.
"""
RewardName = Literal["reciprocal_rank", "log_prob", "auc", "accuracy"]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per aspect, (A,); fixed during reinforcement learning, empty before it."""

    item_mean: tuple[float, ...] = ()
    item_std: tuple[float, ...] = ()
    user_mean: tuple[float, ...] = ()
    user_std: tuple[float, ...] = ()


def standardised(values_XA: Tensor, mean_A: Sequence[float], std_A: Sequence[float]) -> Tensor:
    """z-scores per aspect; 0 where a value is missing (NaN) or the aspect has no spread."""
    mean, std = (torch.as_tensor(values, dtype=values_XA.dtype, device=values_XA.device) for values in (mean_A, std_A))
    scaled_XA = torch.where(std > 1e-6, (values_XA - mean) / std.clamp(min=1e-6), 0.0)
    return scaled_XA.nan_to_num(nan=0.0)


def similarity(user_GA: Tensor, items_CA: Tensor) -> Tensor:
    """Dot products, (G, C)."""
    return user_GA @ items_CA.T


def mean_rank(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """Rank, from 1, of the best relevant item among the items that are not relevant; ties take their mean rank."""
    scores_GC = similarity(user_GA, items_CA)
    best_G1 = scores_GC[:, relevant_C].max(dim=1, keepdim=True).values
    others_GC = scores_GC[:, ~relevant_C]
    return 1 + (others_GC > best_G1).sum(1) + 0.5 * (others_GC == best_G1).sum(1)


def reciprocal_rank(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """2 / rank - 1, with the mean rank of ties."""
    return 2 / mean_rank(user_GA, items_CA, relevant_C) - 1


def log_prob(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """1 + log softmax of the relevant items / log C, at least -1; 0 where all items have the same similarity."""
    log_probs_GC = similarity(user_GA, items_CA).log_softmax(dim=1)
    relevant_G = log_probs_GC[:, relevant_C].logsumexp(dim=1)
    return (1 + relevant_G / np.log(len(items_CA))).clamp(min=-1)


def auc(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """2 AUC - 1 over pairs of a liked and another item; a tie counts half. NaN where all or none are liked."""
    scores_GC = similarity(user_GA, items_CA)
    difference_GCC = scores_GC[:, relevant_C, None] - scores_GC[:, None, ~relevant_C]
    return difference_GCC.sign().mean(dim=(1, 2))


def accuracy(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """2 accuracy - 1, where a positive similarity predicts that the user likes the item."""
    is_right_GC = (similarity(user_GA, items_CA) > 0) == relevant_C
    return 2 * is_right_GC.to(user_GA.dtype).mean(dim=1) - 1


def reward_function(name: RewardName) -> Reward:
    match name:
        case "reciprocal_rank":
            return reciprocal_rank
        case "log_prob":
            return log_prob
        case "auc":
            return auc
        case "accuracy":
            return accuracy


def mean_of_others(values: Tensor, dim: int = 0) -> Tensor:
    """Mean over the other completions of the group, which lie along `dim`; 0 for a group of one."""
    return (values.sum(dim, keepdim=True) - values) / max(values.shape[dim] - 1, 1)


def leave_one_out_advantage(reward_XG: Tensor) -> Tensor:
    """Reward minus the mean reward of the user's other completions, (..., G); 0 for a group of one."""
    return reward_XG - mean_of_others(reward_XG, dim=-1) if reward_XG.shape[-1] > 1 else torch.zeros_like(reward_XG)


def aspect_credit(users_XGA: Tensor, items_CA: Tensor, relevant_C: Tensor, reward: Reward) -> Tensor:
    """Advantage of each rating, (..., G, A): the reward that is lost with the other completions' mean in its place."""
    a = users_XGA.shape[-1]
    is_changed_AA = torch.eye(a, dtype=torch.bool, device=users_XGA.device)
    changed_XGAA = torch.where(is_changed_AA, mean_of_others(users_XGA, dim=-2)[..., None, :], users_XGA[..., None, :])
    changed_XGA = reward(changed_XGAA.reshape(-1, a), items_CA, relevant_C).view(users_XGA.shape)
    return reward(users_XGA.reshape(-1, a), items_CA, relevant_C).view(users_XGA.shape[:-1])[..., None] - changed_XGA


def token_advantages(advantage_BGA: Tensor, aspect_BGT: Tensor, correct_BGT: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages of rating tokens and of format tokens, (B, G, T) each; 0 at all other tokens.

    A rating token takes the advantage of its aspect. A format token's reward is 1 where it is in format and -1 where
    it is not (A.3); its advantage is that reward minus the mean over the format tokens of the user's other completions.
    """
    is_rating, is_format = aspect_BGT >= 0, aspect_BGT == FORMAT
    rating_BGT = advantage_BGA.gather(2, aspect_BGT.clamp(min=0)) * is_rating
    reward_BGT = (2.0 * correct_BGT - 1.0) * is_format
    mean_BG = reward_BGT.sum(2) / is_format.sum(2).clamp(min=1)
    return rating_BGT, (reward_BGT - mean_of_others(mean_BG, dim=1)[..., None]) * is_format


def correct_characters(text: str, names: tuple[str, ...]) -> tuple[np.ndarray, bool]:
    """Which characters of a completion are in format, and whether the whole text is the expected answer.

    A line is in format if it reads "name: <1..10>" and its aspect comes after the aspect of the last line in format.
    Its line break is in format too, except after the last aspect.
    """
    correct = np.zeros(len(text), dtype=bool)
    expected, start, found = 0, 0, 0
    for line in text.split("\n"):
        is_line = re.fullmatch(r"(.*): (10|[1-9])", line)
        if is_line and is_line[1] in names[expected:]:
            expected = names.index(is_line[1]) + 1
            found += 1
            correct[start : start + len(line) + (expected < len(names))] = True
        start += len(line) + 1
    return correct, found == len(names) and bool(correct.all())
