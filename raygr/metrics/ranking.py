"""Ranks with one tie rule, metrics of ranks, and what chance gives.

Rank of the target = 1 + items with a greater score + half the other items with the same score: constant
scores put every target in the middle. A user's targets are averaged before the users are, so every user weighs
the same however many targets it has. Shape suffixes: `B` and `E` targets, `I` items, `C` candidates, `U` users.
"""

import numpy as np
import torch
from torch import Tensor

TIE_RULE = "mean rank"
AVERAGE = "targets of a user, then users"
RECALL_AT, NDCG_AT = (1, 5, 10, 20), (5, 10, 20)
METRICS = ("mrr", *(f"recall_at_{k}" for k in RECALL_AT), *(f"ndcg_at_{k}" for k in NDCG_AT))


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


def chance_values(metric: str, among_E: np.ndarray) -> np.ndarray:
    """The metric's expectation where a target's rank is drawn from 1..among, the target itself counted."""
    values = metric_values(metric, np.arange(1, int(among_E.max(initial=1)) + 1))
    return values.cumsum()[among_E - 1] / among_E


def metric_name(metric: str) -> str:
    """As tables print it: `MRR`, `Recall@10`."""
    name, _, cutoff = metric.partition("_at_")
    words = name.capitalize() if name == "recall" else name.upper()
    return f"{words}@{cutoff}" if cutoff else words


def user_means(values_E: np.ndarray, user_E: np.ndarray) -> np.ndarray:
    """(U,): each user's mean over its targets, in the order of user_index; users without a target have no place."""
    _, place_E = np.unique(user_E, return_inverse=True)
    return np.bincount(place_E, weights=values_E) / np.bincount(place_E)
