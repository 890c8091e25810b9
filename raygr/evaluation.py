"""Ranks with one tie rule, metrics of ranks, and paired bootstrap intervals.

Rank of the target = 1 + items with a greater score + half the other items with the same score: constant
scores put every target in the middle. A user's targets are averaged before the users are, so every user weighs
the same however many targets it has. Shape suffixes: `B` and `E` targets, `I` items, `C` candidates,
`M` metrics, `R` runs of an arm, `U` users, `S` bootstrap samples.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TIE_RULE = "mean rank"
AVERAGE = "targets of a user, then users"
RECALL_AT, NDCG_AT = (1, 5, 10, 20), (5, 10, 20)
METRICS = ("mrr", *(f"recall_at_{k}" for k in RECALL_AT), *(f"ndcg_at_{k}" for k in NDCG_AT))
CONFIDENCE = 0.95
DRAWS_AT_ONCE = 1 << 22  # 32 MB of users drawn at a time


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


def metric_name(metric: str) -> str:
    """As tables print it: `MRR`, `Recall@10`."""
    name, _, cutoff = metric.partition("_at_")
    words = name.capitalize() if name == "recall" else name.upper()
    return f"{words}@{cutoff}" if cutoff else words


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
    p: float
    """Two-sided, against no difference: where it is below 1 - CONFIDENCE the absolute interval leaves out 0."""


def paired_bootstrap(arm_RU: np.ndarray, base_RU: np.ndarray, *, samples: int, seed: int) -> Gain:
    """The gain of one metric; see `paired_bootstraps`."""
    (gain,) = paired_bootstraps(arm_RU[None], base_RU[None], samples=samples, seed=seed)
    return gain


def paired_bootstraps(arm_MRU: np.ndarray, base_MRU: np.ndarray, *, samples: int, seed: int) -> list[Gain]:
    """95% percentile interval of each metric's gain over resampled users and, where an arm has several, resampled runs.

    The unit is the user, however many runs and targets it has: its values move together. Both arms see the same
    users in a sample, and the same runs where they have equally many (one per seed). What differs between trainings
    is in it from two runs on; one run says nothing about it.
    """
    generator = np.random.default_rng(seed)
    arm_SMR, base_SMR = resampled_means([arm_MRU, base_MRU], samples=samples, generator=generator)
    runs_SR = generator.integers(arm_MRU.shape[1], size=(samples, arm_MRU.shape[1]))
    same = arm_MRU.shape[1] == base_MRU.shape[1]
    base_runs_SR = runs_SR if same else generator.integers(base_MRU.shape[1], size=(samples, base_MRU.shape[1]))
    arm_SM, base_SM = drawn_run_means(arm_SMR, runs_SR), drawn_run_means(base_SMR, base_runs_SR)
    means = zip(arm_MRU.mean(axis=(1, 2)), base_MRU.mean(axis=(1, 2)), strict=True)
    return [gain_of(arm, base, arm_SM[:, m], base_SM[:, m]) for m, (arm, base) in enumerate(means)]


def resampled_means(values: list[np.ndarray], *, samples: int, generator: np.random.Generator) -> list[np.ndarray]:
    """(M, R, U) each -> (S, M, R): means over users drawn with replacement, the same users for all."""
    users = values[0].shape[2]
    at_once = max(1, DRAWS_AT_ONCE // users)
    parts: list[list[np.ndarray]] = [[] for _ in values]
    for first in range(0, samples, at_once):
        count = min(at_once, samples - first)
        drawn_SU = generator.integers(users, size=(count, users)) + users * np.arange(count)[:, None]
        weights_SU = np.bincount(drawn_SU.ravel(), minlength=count * users).reshape(count, users) / users
        for part, values_MRU in zip(parts, values, strict=True):
            part.append((weights_SU @ values_MRU.reshape(-1, users).T).reshape(count, *values_MRU.shape[:2]))
    return [np.concatenate(part) for part in parts]


def drawn_run_means(values_SMR: np.ndarray, runs_SR: np.ndarray) -> np.ndarray:
    """(S, M): means over the drawn runs, their distance from the mean of all runs stretched by sqrt(R / (R - 1)).

    Runs drawn from so few of them vary by (R - 1) / R of what trainings do: half of it with two (Rao, Wu 1988).
    """
    runs = values_SMR.shape[2]
    all_SM = values_SMR.mean(axis=2)
    drawn_SM = np.take_along_axis(values_SMR, runs_SR[:, None], axis=2).mean(axis=2)
    return all_SM + math.sqrt(runs / max(runs - 1, 1)) * (drawn_SM - all_SM)


def gain_of(arm: float, base: float, arm_S: np.ndarray, base_S: np.ndarray) -> Gain:
    """The gain of two means, with the intervals of their resampled values."""
    difference_S = arm_S - base_S
    relative = float(in_percent(np.array(arm - base), np.array(base)))
    relative_bounds = interval(in_percent(difference_S, base_S))
    return Gain(float(arm - base), *interval(difference_S), relative, *relative_bounds, two_sided_p(difference_S))


def two_sided_p(difference_S: np.ndarray) -> float:
    """Twice the share of samples on the smaller side of 0, which themselves count as one more on either side."""
    smaller = min((difference_S <= 0).sum(), (difference_S >= 0).sum())
    return min(1.0, 2 * float(smaller + 1) / (len(difference_S) + 1))


def in_percent(difference: np.ndarray, base: np.ndarray) -> np.ndarray:
    """0 where the base is 0 and nothing can be said."""
    return np.where(base > 0, 100 * difference / np.where(base > 0, base, 1.0), 0.0)


def interval(values_S: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values_S, [tail, 1 - tail])
    return float(low), float(high)
