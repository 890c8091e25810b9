"""Candidate sets: a hundred different items, none of them the user's own."""

import numpy as np
import pytest

from raygr.data.candidates import CANDIDATES, candidate_weights, sample_candidates

USERS, ITEMS = 600, 150  # more users than one chunk
USER_N = np.repeat(np.arange(USERS), 5)
ITEM_N = np.random.default_rng(0).integers(1, ITEMS + 1, len(USER_N))


def draw(weight_I: np.ndarray, seed: int = 0) -> np.ndarray:
    return sample_candidates(USER_N, ITEM_N, weight_I=weight_I, users=USERS, seed=seed)


def test_candidates_are_distinct_and_never_the_users_own_items():
    candidates_UC = draw(np.ones(ITEMS))
    assert candidates_UC.shape == (USERS, CANDIDATES)
    assert candidates_UC.min() >= 1 and candidates_UC.max() <= ITEMS
    for user in range(USERS):
        assert len(set(candidates_UC[user])) == CANDIDATES
        assert not set(candidates_UC[user]) & set(ITEM_N[user == USER_N])


def test_the_same_seed_draws_the_same():
    assert np.array_equal(draw(np.ones(ITEMS)), draw(np.ones(ITEMS)))
    assert not np.array_equal(draw(np.ones(ITEMS)), draw(np.ones(ITEMS), seed=1))


def test_popular_items_are_drawn_more_and_unknown_ones_last():
    train_count_I = np.arange(ITEMS)
    train_count_I[:20] = 0
    drawn_I = np.bincount(draw(candidate_weights("popularity-100", train_count_I)).ravel(), minlength=ITEMS + 1)[1:]
    assert drawn_I[:20].sum() == 0  # 130 - 5 others are enough
    assert drawn_I[20:50].mean() < 0.8 * drawn_I[120:].mean()
    uniform_I = np.bincount(draw(candidate_weights("uniform-100", train_count_I)).ravel(), minlength=ITEMS + 1)[1:]
    assert uniform_I[:20].mean() == pytest.approx(uniform_I[120:].mean(), rel=0.1)


def test_too_few_items_are_refused():
    with pytest.raises(ValueError, match="candidates need more items"):
        sample_candidates(np.zeros(2, int), np.array([1, 2]), weight_I=np.ones(101), users=1, seed=0)
