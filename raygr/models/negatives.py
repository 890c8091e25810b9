"""Negatives of next-item losses: which items a user owns, and random items that the user does not own.

A user's train items, the target among them, are never negatives. In data that keep repeat purchases nothing counts as
owned, and only the target is no negative. Held-out items may be drawn: sparing them would tell the model which they
are.
Shape letters: `N` interactions, `B` histories, `K` negatives that a batch shares, `I` items, `J` items that a batch
touches, `U` users, `O` owned pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class OwnedItems(NamedTuple):
    """Every user's distinct train items, for sampling around them."""

    item_O: Tensor
    """item_index, sorted by (user, item)."""
    free_before_O: Tensor
    """Per owned item: user * (I + 1) + the number of items below it that the user does not own. Sorted."""
    offset_U: Tensor
    count_U: Tensor
    items: int


class OwnedPairs(NamedTuple):
    """The train items of a batch's users, as (row of the batch, item) pairs."""

    row_O: Tensor
    item_O: Tensor


def owned_items(user_N: np.ndarray, item_N: np.ndarray, *, users: int, items: int) -> OwnedItems:
    """Groups (user_index, item_index) pairs by user; pairs may repeat."""
    pair_O = np.unique(user_N.astype(np.int64) * (items + 1) + item_N)
    user_O, item_O = np.divmod(pair_O, items + 1)
    count_U = np.bincount(user_O, minlength=users)
    offset_U = np.cumsum(count_U) - count_U
    owned_below_O = np.arange(len(pair_O)) - offset_U[user_O]
    free_before_O = user_O * (items + 1) + (item_O - 1 - owned_below_O)
    columns = [torch.from_numpy(column) for column in (item_O, free_before_O, offset_U, count_U)]
    return OwnedItems(columns[0], columns[1], columns[2], columns[3], items)


def sample_negatives(owned: OwnedItems, user_N: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draws one item_index per position, uniform over the items that the position's user does not own.

    It takes the r-th of these items for a random r. 0 where the user owns every item.
    """
    free_N = owned.items - owned.count_U[user_N]
    drawn_N = (torch.rand(len(user_N), generator=generator, dtype=torch.float64) * free_N).long()
    key_N = user_N * (owned.items + 1) + drawn_N
    skipped_N = torch.searchsorted(owned.free_before_O, key_N, right=True) - owned.offset_U[user_N]
    return torch.where(free_N > 0, drawn_N + skipped_N + 1, 0)


def owned_pairs(owned: OwnedItems, user_B: Tensor, item_J: Tensor) -> OwnedPairs:
    """Pairs of the train items that are among the sorted `item_J`, each as its place there, from 1."""
    count_B = owned.count_U[user_B]
    row_O = torch.repeat_interleave(torch.arange(len(user_B)), count_B)
    step_O = torch.arange(len(row_O)) - (count_B.cumsum(0) - count_B)[row_O]
    item_O = owned.item_O[owned.offset_U[user_B][row_O] + step_O]
    is_there_O, place_O = places(item_J, item_O)
    return OwnedPairs(row_O[is_there_O], place_O[is_there_O] + 1)


def places(sorted_J: Tensor, value_O: Tensor) -> tuple[Tensor, Tensor]:
    """Tells whether each value is among the sorted ones, and the place where it is or would be."""
    place_O = torch.searchsorted(sorted_J, value_O).clamp(max=len(sorted_J) - 1)
    return sorted_J[place_O] == value_O, place_O


def is_owned(owned: OwnedPairs, rows: int, item_K: Tensor) -> Tensor:
    """Tells whether the user of each row owns each item, (B, K). True for the padding, 0.

    Memory grows with the distinct items in `item_K`, not with the catalogue.
    """
    if not len(item_K):
        return torch.zeros(rows, 0, dtype=torch.bool, device=item_K.device)
    distinct_J, place_K = item_K.unique(return_inverse=True)
    is_asked_O, place_O = places(distinct_J, owned.item_O)
    is_owned_BJ = (distinct_J == 0).expand(rows, -1).clone()
    is_owned_BJ[owned.row_O[is_asked_O], place_O[is_asked_O]] = True
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
