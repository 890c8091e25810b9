"""Negatives of next-item losses: which items a user owns, and random items that the user does not own.

A user's train items, the target among them, are never negatives. In data that keep repeat purchases nothing counts as
owned, and only the target is no negative. Held-out items may be drawn: sparing them would tell the model which they
are. Shape suffixes: `N` positions in the loss, `B` histories, `K` shared negatives, `I` items, `J` items of a batch,
`U` users, `P` owned (user, item) pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class OwnedItems(NamedTuple):
    """Every user's distinct train items, for sampling around them."""

    item_P: Tensor
    """item_index, sorted by (user, item)."""
    free_before_P: Tensor
    """Per owned item: user * (I + 1) + the number of items below it that the user does not own. Sorted."""
    offset_U: Tensor
    count_U: Tensor
    items: int


class OwnedPairs(NamedTuple):
    """The train items of a batch's users, as (row of the batch, item) pairs."""

    row_P: Tensor
    item_P: Tensor


def owned_items(user_N: np.ndarray, item_N: np.ndarray, *, users: int, items: int) -> OwnedItems:
    """Groups (user_index, item_index) pairs by user; pairs may repeat."""
    pair_P = np.unique(user_N.astype(np.int64) * (items + 1) + item_N)
    user_P, item_P = np.divmod(pair_P, items + 1)
    count_U = np.bincount(user_P, minlength=users)
    offset_U = np.cumsum(count_U) - count_U
    owned_below_P = np.arange(len(pair_P)) - offset_U[user_P]
    free_before_P = user_P * (items + 1) + (item_P - 1 - owned_below_P)
    columns = [torch.from_numpy(column) for column in (item_P, free_before_P, offset_U, count_U)]
    return OwnedItems(columns[0], columns[1], columns[2], columns[3], items)


def sample_negatives(owned: OwnedItems, user_N: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draws one item_index per position, uniform over the items that the position's user does not own.

    It takes the r-th of these items for a random r. 0 where the user owns every item.
    """
    free_N = owned.items - owned.count_U[user_N]
    drawn_N = (torch.rand(len(user_N), generator=generator, dtype=torch.float64) * free_N).long()
    key_N = user_N * (owned.items + 1) + drawn_N
    skipped_N = torch.searchsorted(owned.free_before_P, key_N, right=True) - owned.offset_U[user_N]
    return torch.where(free_N > 0, drawn_N + skipped_N + 1, 0)


def owned_pairs(owned: OwnedItems, user_B: Tensor, item_J: Tensor) -> OwnedPairs:
    """Pairs of the train items that are among the sorted `item_J`, each as its place there, from 1."""
    count_B = owned.count_U[user_B]
    row_P = torch.repeat_interleave(torch.arange(len(user_B)), count_B)
    step_P = torch.arange(len(row_P)) - (count_B.cumsum(0) - count_B)[row_P]
    item_P = owned.item_P[owned.offset_U[user_B][row_P] + step_P]
    is_there_P, place_P = places(item_J, item_P)
    return OwnedPairs(row_P[is_there_P], place_P[is_there_P] + 1)


def places(sorted_J: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """Tells whether each value is among the sorted ones, and the place where it is or would be."""
    place_P = torch.searchsorted(sorted_J, value_P).clamp(max=len(sorted_J) - 1)
    return sorted_J[place_P] == value_P, place_P


def is_owned(owned: OwnedPairs, rows: int, item_K: Tensor) -> Tensor:
    """Tells whether the user of each row owns each item, (B, K). True for the padding, 0.

    Memory grows with the distinct items in `item_K`, not with the catalogue.
    """
    if not len(item_K):
        return torch.zeros(rows, 0, dtype=torch.bool, device=item_K.device)
    distinct_J, place_K = item_K.unique(return_inverse=True)
    is_asked_P, place_P = places(distinct_J, owned.item_P)
    is_owned_BJ = (distinct_J == 0).expand(rows, -1).clone()
    is_owned_BJ[owned.row_P[is_asked_P], place_P[is_asked_P]] = True
    return is_owned_BJ[:, place_K]


def popularity_sums(train_count_I: np.ndarray, alpha: float) -> Tensor:
    """Cumulative sampling weights (train interactions ** alpha) of items 1..I; the last one is 1."""
    weight_I = train_count_I.astype(np.float64) ** alpha
    return torch.from_numpy(np.cumsum(weight_I) / weight_I.sum())


def shared_negatives(sums_I: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Draws (K,) item_index with replacement, by the weights of `popularity_sums`."""
    drawn_K = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.searchsorted(sums_I, drawn_K, right=True).clamp(max=len(sums_I) - 1) + 1


def expected_counts(sums_I: Tensor, drawn_K: Tensor) -> Tensor:
    """The expected number of draws of each drawn item among K draws, (K,)."""
    chance_I = sums_I.diff(prepend=sums_I.new_zeros(1))
    return (len(drawn_K) * chance_I[drawn_K - 1]).float()
