"""Candidate sets: a hundred different items, none of them the user's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygr.train import candidates
from raygr.train.candidates import CANDIDATES, candidate_weights, sample_candidates

USERS, ITEMS = 600, 150
USER_N = np.repeat(np.arange(USERS), 5)
ITEM_N = np.random.default_rng(0).integers(1, ITEMS + 1, len(USER_N))


def draw(weight_I: np.ndarray, seed: int = 0) -> np.ndarray:
    return sample_candidates(USER_N, ITEM_N, weight_I=weight_I, users=USERS, seed=[seed])


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
        sample_candidates(np.zeros(2, int), np.array([1, 2]), weight_I=np.ones(101), users=1, seed=[0])


def test_repeated_purchases_are_one_item_of_the_hundred_that_must_be_left():
    user_N, item_N = np.zeros(9, int), np.ones(9, int)
    assert sample_candidates(user_N, item_N, weight_I=np.ones(101), users=1, seed=[0]).shape == (1, 100)


@settings(deadline=None, max_examples=40)
@given(st.integers(100, 400), st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 3), st.booleans())
def test_no_repeats_and_none_of_the_users_own(items: int, owned: list[float], seed: int, popular: bool):
    """Users have from no item to all but a hundred. Weights leave most items to be drawn last."""
    generator = np.random.default_rng(seed)
    own = [generator.permutation(items)[: int(share * (items - 100))] + 1 for share in owned]
    user_N = np.repeat(np.arange(len(own)), [len(one) for one in own])
    weight_I = np.where(np.arange(items) < 5, 1e9, 0.0) if popular else np.ones(items)
    found_UC = sample_candidates(user_N, np.concatenate(own), weight_I=weight_I, users=len(own), seed=[seed])
    for one, found_C in zip(own, found_UC, strict=True):
        assert len(set(found_C.tolist())) == CANDIDATES and found_C.min() >= 1 and found_C.max() <= items
        assert not set(found_C.tolist()) & set(one.tolist())


@pytest.mark.parametrize("draws", [(8, 8), (2, 1)], ids=["drawn one after another", "most completed by keys"])
def test_sets_come_up_as_often_as_weights_without_replacement_say(draws: tuple[int, int], monkeypatch):
    """Two of the items with weights 1, 2 and 5; the fourth, with 9, is the user's own.

    {1, 2}: 1/8 2/7 + 2/8 1/6; {1, 3}: 1/8 5/7 + 5/8 1/3; {2, 3}: 2/8 5/6 + 5/8 2/3.
    """
    for name, value in zip(("CANDIDATES", "FIRST_DRAWS", "MORE_DRAWS"), (2, *draws), strict=True):
        monkeypatch.setattr(candidates, name, value)
    users, weight_I = 30_000, np.array([1.0, 2.0, 5.0, 9.0])
    found_UC = sample_candidates(np.arange(users), np.full(users, 4), weight_I=weight_I, users=users, seed=[0])
    pairs, counts = np.unique(np.sort(found_UC, axis=1), axis=0, return_counts=True)
    assert pairs.tolist() == [[1, 2], [1, 3], [2, 3]]
    expected = [1 / 28 + 1 / 24, 5 / 56 + 5 / 24, 5 / 24 + 5 / 12]
    assert counts / users == pytest.approx(expected, abs=0.012)  # four standard errors
