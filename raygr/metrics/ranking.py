"""Ranks with one tie rule, metrics of ranks, and their expectation under chance.

Rank of the target = 1 + items with a greater score + half the other items with the same score: constant scores put
every target in the middle. Metrics are averaged over a user's targets first and then over users, so every user has the
same weight. Shape letters: `B` targets of a batch, `E` targets, `I` items, `C` candidates.
"""

import numpy as np
import torch
from torch import Tensor

TIE_RULE = "mean rank"
AVERAGE = "targets of a user, then users"
RECALL_AT, NDCG_AT = (1, 5, 10, 20), (5, 10, 20)
METRICS = ("mrr", *(f"recall_at_{k}" for k in RECALL_AT), *(f"ndcg_at_{k}" for k in NDCG_AT))


def full_ranks(scores_BI: Tensor, target_B: Tensor, seen_row_N: Tensor, seen_item_N: Tensor) -> Tensor:
    """Ranks of the targets among all items except the seen ones, (B,) float.

    Column `item_index - 1` of `scores_BI` holds an item's score. Seen items are (row, item_index) pairs; a target that
    is among them is ranked as well. ValueError where a score is not finite.
    """
    check_finite(scores_BI)
    target_B1 = (target_B - 1)[:, None]
    target_score_B1 = scores_BI.gather(1, target_B1)
    others_BI = scores_BI.clone()
    others_BI[seen_row_N, seen_item_N - 1] = -torch.inf
    others_BI.scatter_(1, target_B1, -torch.inf)
    return mean_ranks(others_BI, target_score_B1)


def candidate_ranks(scores_BI: Tensor, target_B: Tensor, candidates_BC: Tensor) -> Tensor:
    """Ranks of the targets among their own candidates (item_index, without the target), (B,) float."""
    check_finite(scores_BI)
    return mean_ranks(scores_BI.gather(1, candidates_BC - 1), scores_BI.gather(1, (target_B - 1)[:, None]))


def mean_ranks(others_BC: Tensor, target_B1: Tensor) -> Tensor:
    greater_B, equal_B = (others_BC > target_B1).sum(1), (others_BC == target_B1).sum(1)
    return 1 + greater_B.float() + equal_B.float() / 2


def check_finite(scores: Tensor) -> None:
    """ValueError where a score is not finite: NaN compares false with every number and would rank first."""
    if not torch.isfinite(scores).all():
        raise ValueError("the recommender's scores are not finite: training diverged (lower the learning rate)")


def metric_values(metric: str, rank: np.ndarray) -> np.ndarray:
    """The metric of each rank: 1 / rank (mrr), 1 up to rank k (recall), or 1 / log2(1 + rank) up to rank k (ndcg)."""
    rank = np.asarray(rank, dtype=np.float64)
    if metric == "mrr":
        return 1 / rank
    name, _, k = metric.rpartition("_at_")
    gain = 1 / np.log2(1 + rank) if name == "ndcg" else np.ones_like(rank)
    return np.where(rank <= int(k), gain, 0.0)


def rank_metrics(rank: np.ndarray) -> dict[str, float]:
    """The mean of every metric over the ranks. MRR takes all ranks, without a cut-off."""
    return {metric: float(metric_values(metric, rank).mean()) for metric in METRICS}


def chance_values(metric: str, among_E: np.ndarray) -> np.ndarray:
    """The expected metric of ranks that are uniform on 1..among, where `among` counts the target too."""
    values = metric_values(metric, np.arange(1, int(among_E.max(initial=1)) + 1))
    return values.cumsum()[among_E - 1] / among_E


def metric_name(metric: str) -> str:
    """The name that tables print, such as `MRR` or `Recall@10`."""
    name, _, cutoff = metric.partition("_at_")
    words = name.capitalize() if name == "recall" else name.upper()
    return f"{words}@{cutoff}" if cutoff else words


def user_means(values_E: np.ndarray, user_E: np.ndarray) -> np.ndarray:
    """The mean over each user's targets, (U,), in the order of user_index. Users without targets are left out."""
    _, place_E = np.unique(user_E, return_inverse=True)
    return np.bincount(place_E, weights=values_E) / np.bincount(place_E)
