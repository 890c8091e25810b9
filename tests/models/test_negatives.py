"""Negatives against brute force."""

import numpy as np
import pytest
import torch

from raygr.models.negatives import (
    expected_counts,
    is_owned,
    owned_items,
    owned_pairs,
    popularity_sums,
    sample_negatives,
    shared_negatives,
)


def test_negatives_are_never_the_users_own_and_uniform_over_the_rest():
    owned = {0: [1, 2, 5, 5], 1: [6], 2: [3, 4, 6]}
    user_N = np.concatenate([np.full(len(items), user) for user, items in owned.items()])
    item_N = np.concatenate([np.array(items) for items in owned.values()])
    table = owned_items(user_N, item_N, users=3, items=6)
    drawn_N = sample_negatives(
        table, torch.arange(3).repeat_interleave(6000), generator=torch.Generator().manual_seed(0)
    )
    for user, items in owned.items():
        free = sorted(set(range(1, 7)) - set(items))
        counts = np.bincount(drawn_N[user * 6000 : (user + 1) * 6000], minlength=7)
        assert np.flatnonzero(counts).tolist() == free
        assert counts[free] == pytest.approx(6000 / len(free), rel=0.1)


def test_expected_counts_by_hand():
    """Weights 1, 0, 4 and 9 and alpha 1/2 are chances of 1/6, 0, 2/6 and 3/6; three draws."""
    sums_I = popularity_sums(np.array([1, 0, 4, 9]), 0.5)
    assert expected_counts(sums_I, torch.tensor([1, 4, 3])).tolist() == pytest.approx([0.5, 1.5, 1.0])


def test_owned_pairs_mark_the_users_items_and_the_padding():
    """First for items 1 to 3 at their own places; then for items 2 and 3 alone, at places 1 and 2."""
    table = owned_items(np.array([0, 0, 0, 2]), np.array([3, 1, 3, 2]), users=3, items=3)
    user_B, asked_K = torch.tensor([2, 0, 1]), torch.tensor([3, 0, 1, 2, 3])
    pairs = owned_pairs(table, user_B, torch.tensor([1, 2, 3]))
    assert is_owned(pairs, 3, asked_K).int().tolist() == [[0, 1, 0, 1, 0], [1, 1, 1, 0, 1], [0, 1, 0, 0, 0]]
    pairs = owned_pairs(table, user_B, torch.tensor([2, 3]))
    assert is_owned(pairs, 3, torch.tensor([1, 2, 0])).int().tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
    assert is_owned(pairs, 3, torch.tensor([], dtype=torch.long)).shape == (3, 0)


def test_owned_items_take_no_room_for_the_catalogue():
    """Ten million items: a matrix of 4,096 users would have taken 38 GiB."""
    items, users = 10_000_000, 4096
    table = owned_items(np.arange(users), np.arange(1, users + 1) * 2000, users=users, items=items)
    item_J = torch.arange(1, 1001) * 2000
    pairs = owned_pairs(table, torch.arange(users), item_J)
    is_owned_BK = is_owned(pairs, users, torch.arange(1, 1001))
    assert torch.equal(is_owned_BK, torch.arange(users)[:, None] == torch.arange(1000))


@pytest.mark.parametrize(("alpha", "shares"), [(0.0, [0.25] * 4), (0.5, [1 / 6, 0, 2 / 6, 3 / 6]), (1.0, [1, 0, 4, 9])])
def test_shared_negatives_are_drawn_by_popularity_to_alpha(alpha: float, shares: list[float]):
    """Train counts 1, 0, 4 and 9."""
    sums_I = popularity_sums(np.array([1, 0, 4, 9]), alpha)
    drawn_K = shared_negatives(sums_I, 20_000, generator=torch.Generator().manual_seed(0))
    found = np.bincount(drawn_K, minlength=5)[1:] / 20_000
    assert found == pytest.approx(np.array(shares) / sum(shares), abs=0.012)
