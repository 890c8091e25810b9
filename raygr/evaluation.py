"""Ranks with one tie rule, metrics of ranks, and paired bootstrap intervals.

Rank of the target = 1 + items with a greater score + half the other items with the same score: constant
scores put every target in the middle. A user's targets are averaged before the users are, so every user weighs
the same however many targets it has. Shape suffixes: `B` and `E` targets, `I` items, `C` candidates,
`R` runs of an arm, `U` users, `S` bootstrap samples.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TIE_RULE = "mean rank"
AVERAGE = "targets of a user, then users"
RECALL_AT, NDCG_AT = (1, 5, 10, 20), (5, 10, 20)
METRICS = ("mrr", *(f"recall_at_{k}" for k in RECALL_AT), *(f"ndcg_at_{k}" for k in NDCG_AT))
CONFIDENCE = 0.95


def full_ranks(scores_BI: Tensor, target_B: Tensor, seen_row_N: Tensor, seen_item_N: Tensor) -> Tensor:
    """Ranks among all items but the seen ones; column `item_index - 1` of `scores_BI`, (B,) float.

    Seen items come as (row, item_index) pairs; a target among them is ranked all the same.
    """
    check_finite(scores_BI)
    target_B1 = (target_B - 1)[:, None]
    target_score_B1 = scores_BI.gather(1, target_B1)
    others_BI = scores_BI.clone()
    others_BI[seen_row_N, seen_item_N - 1] = -torch.inf
    others_BI.scatter_(1, target_B1, -torch.inf)
    return mean_ranks(others_BI, target_score_B1)


def candidate_ranks(scores_BI: Tensor, target_B: Tensor, candidates_BC: Tensor) -> Tensor:
    """Ranks of the target among its own candidates (item_index, without the target), (B,) float."""
    check_finite(scores_BI)
    return mean_ranks(scores_BI.gather(1, candidates_BC - 1), scores_BI.gather(1, (target_B - 1)[:, None]))


def mean_ranks(others_BC: Tensor, target_B1: Tensor) -> Tensor:
    greater_B, equal_B = (others_BC > target_B1).sum(1), (others_BC == target_B1).sum(1)
    return 1 + greater_B.float() + equal_B.float() / 2


def check_finite(scores: Tensor) -> None:
    """NaN compares false with everything and would rank first."""
    if not torch.isfinite(scores).all():
        raise ValueError("the recommender's scores are not finite: training diverged (lower the learning rate)")


def metric_values(metric: str, rank: np.ndarray) -> np.ndarray:
    """One value per rank: reciprocal rank, hit at k, or the gain 1 / log2(1 + rank) at k."""
    rank = np.asarray(rank, dtype=np.float64)
    if metric == "mrr":
        return 1 / rank
    name, _, k = metric.rpartition("_at_")
    gain = 1 / np.log2(1 + rank) if name == "ndcg" else np.ones_like(rank)
    return np.where(rank <= int(k), gain, 0.0)


def rank_metrics(rank: np.ndarray) -> dict[str, float]:
    """Every metric's mean over the ranks; MRR is over all ranks, with no cut."""
    return {metric: float(metric_values(metric, rank).mean()) for metric in METRICS}


def user_means(values_E: np.ndarray, user_E: np.ndarray) -> np.ndarray:
    """(U,): each user's mean over its targets, in the order of user_index; users without a target have no place."""
    _, place_E = np.unique(user_E, return_inverse=True)
    return np.bincount(place_E, weights=values_E) / np.bincount(place_E)


class Gain(NamedTuple):
    """Difference arm - base with its interval, absolute and in percent of the base."""

    difference: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float


def paired_bootstrap(arm_RU: np.ndarray, base_RU: np.ndarray, *, samples: int, seed: int) -> Gain:
    """95% percentile interval of the gain over resampled users and, where an arm has several, resampled runs.

    Both arms see the same users in a sample, and the same runs where they have equally many (one per seed).
    """
    generator = np.random.default_rng(seed)
    users = arm_RU.shape[1]
    weights_SU = generator.multinomial(users, np.full(users, 1 / users), size=samples) / users
    runs_SR = generator.integers(len(arm_RU), size=(samples, len(arm_RU)))
    same = len(arm_RU) == len(base_RU)
    base_runs_SR = runs_SR if same else generator.integers(len(base_RU), size=(samples, len(base_RU)))
    arm_S = np.take_along_axis(weights_SU @ arm_RU.T, runs_SR, axis=1).mean(axis=1)
    base_S = np.take_along_axis(weights_SU @ base_RU.T, base_runs_SR, axis=1).mean(axis=1)
    difference = float(arm_RU.mean() - base_RU.mean())
    low, high = interval(arm_S - base_S)
    relative_low, relative_high = interval(in_percent(arm_S - base_S, base_S))
    relative = float(in_percent(np.array(difference), np.array(base_RU.mean())))
    return Gain(difference, low, high, relative, relative_low, relative_high)


def in_percent(difference: np.ndarray, base: np.ndarray) -> np.ndarray:
    """0 where the base is 0 and nothing can be said."""
    return np.where(base > 0, 100 * difference / np.where(base > 0, base, 1.0), 0.0)


def interval(values_S: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values_S, [tail, 1 - tail])
    return float(low), float(high)
