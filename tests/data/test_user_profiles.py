"""User profiles by hand. Scores have mean 0 and standard deviation 1, except in the last test."""

import numpy as np
import pytest

from raygr.data.user_profiles import prompt_lengths, user_profiles

SCORES_IA = np.array([[1.0, 0.0], [-1.0, 1.5], [1.0, -1.5], [-1.0, 0.0]]) / np.array([1.0, 1.125**0.5])
WIDE = 1.5 / 1.125**0.5


def profile(items: list[int], ratings: list[float]) -> list[float]:
    users = np.zeros(len(items), int)
    return user_profiles(users, np.array(items), np.array(ratings), scores_IA=SCORES_IA, users=1)[0].tolist()


def test_rating_centred_mean_by_hand():
    """Ratings 5 and 1 around 3: (2 * [1, 0] - 2 * [-1, w]) / 2 = [2, -w]."""
    assert profile([1, 2], [5, 1]) == pytest.approx([2.0, -WIDE])


def test_without_a_rating_spread_it_is_the_plain_mean():
    assert profile([1, 2], [4, 4]) == pytest.approx([0.0, WIDE / 2])
    assert profile([1, 3], [np.nan, np.nan]) == pytest.approx([1.0, -WIDE / 2])


def test_users_do_not_touch_each_other_and_one_without_interactions_has_none():
    rows = (np.array([0, 0, 2]), np.array([1, 2, 3]), np.array([5.0, 1.0, 2.0]))
    profiles_UA = user_profiles(*rows, scores_IA=SCORES_IA, users=3)
    assert profiles_UA == pytest.approx(np.array([[2.0, -WIDE], [np.nan, np.nan], [1.0, -WIDE]]), nan_ok=True)


def test_an_item_without_a_score_has_no_part_in_the_mean():
    """Scores 2 and 4 are -1 and 1; the third item has no score, so a profile of items 2 and 3 is that of item 2."""
    rows = (np.array([0, 0, 1]), np.array([2, 3, 3]), np.array([3.0, 3.0, 3.0]))
    profiles_UA = user_profiles(*rows, scores_IA=np.array([[2.0], [4.0], [np.nan]]), users=2)
    assert profiles_UA == pytest.approx(np.array([[1.0], [np.nan]]), nan_ok=True)


def test_prompt_is_the_first_part_and_at_least_one():
    assert prompt_lengths(np.array([0, 1, 3, 10]), 0.5).tolist() == [0, 1, 1, 5]
