"""What a completion's ratings are worth: task rewards in [-1, 1], advantages, and format correctness by character.

A task reward is a function (user_GA, items_CA, relevant_C) -> (G,) of standardised vectors; one's own is of the same
form, finite even for a row of zeros, which stands for an answer that nothing was read from.
G completions of one prompt (or any rows), A aspects, C items, B prompts, T tokens.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]
RewardName = Literal["reciprocal_rank", "log_prob", "auc", "accuracy"]


class Normalisation(NamedTuple):
    """Means and standard deviations, (A,); fitted once and fixed during reinforcement learning."""

    item_mean: tuple[float, ...]
    item_std: tuple[float, ...]
    user_mean: tuple[float, ...]
    user_std: tuple[float, ...]


def standardised(values_NA: Tensor, mean_A: Sequence[float], std_A: Sequence[float]) -> Tensor:
    """Zero where a value is missing or the aspect has no spread."""
    mean, std = (torch.as_tensor(values, dtype=values_NA.dtype, device=values_NA.device) for values in (mean_A, std_A))
    scaled_NA = torch.where(std > 1e-6, (values_NA - mean) / std.clamp(min=1e-6), 0.0)
    return scaled_NA.nan_to_num(nan=0.0)


def similarity(user_GA: Tensor, items_CA: Tensor) -> Tensor:
    return user_GA @ items_CA.T


def mean_rank(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """Rank of the best relevant item among those that are not relevant, from 1; ties take the mean rank."""
    scores_GC = similarity(user_GA, items_CA)
    best_G1 = scores_GC[:, relevant_C].max(dim=1, keepdim=True).values
    others_GC = scores_GC[:, ~relevant_C]
    return 1 + (others_GC > best_G1).sum(1) + 0.5 * (others_GC == best_G1).sum(1)


def reciprocal_rank(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """2 / rank - 1."""
    return 2 / mean_rank(user_GA, items_CA, relevant_C) - 1


def log_prob(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """1 + log softmax of the relevant items / log C, at least -1: 0 where all items look alike."""
    log_probs_GC = similarity(user_GA, items_CA).log_softmax(dim=1)
    relevant_G = log_probs_GC[:, relevant_C].logsumexp(dim=1)
    return (1 + relevant_G / np.log(len(items_CA))).clamp(min=-1)


def auc(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """2 AUC - 1 over pairs of a liked and another item, ties half; NaN where all or none are liked."""
    scores_GC = similarity(user_GA, items_CA)
    difference_GPN = scores_GC[:, relevant_C, None] - scores_GC[:, None, ~relevant_C]
    return difference_GPN.sign().mean(dim=(1, 2))


def accuracy(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
    """2 accuracy - 1, an item being called liked where its similarity is positive."""
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


def mean_of_others(values_GX: Tensor) -> Tensor:
    """Mean over the other completions of the group (first axis); 0 for a group of one."""
    g = len(values_GX)
    return (values_GX.sum(0, keepdim=True) - values_GX) / max(g - 1, 1)


def leave_one_out_advantage(reward_G: Tensor) -> Tensor:
    """Reward minus the mean reward of the user's other completions; 0 for a group of one."""
    return reward_G - mean_of_others(reward_G) if len(reward_G) > 1 else torch.zeros_like(reward_G)


def aspect_credit(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor, reward: Reward) -> Tensor:
    """Reward of each completion minus that of the same completion with one aspect at the others' mean, (G, A)."""
    g, a = user_GA.shape
    mean_GA = mean_of_others(user_GA)
    changed_GAA = torch.where(torch.eye(a, dtype=torch.bool, device=user_GA.device), mean_GA[:, None], user_GA[:, None])
    changed_GA = reward(changed_GAA.reshape(g * a, a), items_CA, relevant_C).view(g, a)
    return reward(user_GA, items_CA, relevant_C)[:, None] - changed_GA


def token_advantages(advantage_BGA: Tensor, aspect_BGT: Tensor, correct_BGT: Tensor) -> tuple[Tensor, Tensor]:
    """Per token the advantage of a value (0 elsewhere) and that of a format token (0 elsewhere), (B, G, T) each.

    A value token takes its aspect's task advantage. A format token's reward is 1 where it is in format and -1
    where not (A.3), less the mean over the format tokens of the user's other completions.
    """
    is_value, is_format = aspect_BGT >= 0, aspect_BGT == -1
    value_BGT = advantage_BGA.gather(2, aspect_BGT.clamp(min=0)) * is_value
    reward_BGT = (2.0 * correct_BGT - 1.0) * is_format
    mean_BG = reward_BGT.sum(2) / is_format.sum(2).clamp(min=1)
    g = mean_BG.shape[1]
    baseline_BG = (mean_BG.sum(1, keepdim=True) - mean_BG) / max(g - 1, 1)
    return value_BGT, (reward_BGT - baseline_BG[..., None]) * is_format


def correct_characters(text: str, names: tuple[str, ...]) -> tuple[np.ndarray, bool]:
    """Which characters are those of the expected answer, and whether the text is that answer.

    A line is correct that is "name: <1..10>" of an aspect behind the last correct line's; its line break is
    correct except behind the last aspect.
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
