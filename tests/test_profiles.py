"""User profiles by hand."""

import numpy as np

from raygr.aspects.profiles import prompt_lengths, user_profiles

SCORES_IA = np.array([[1.0, 0.0], [-1.0, 2.0], [0.5, -2.0]])


def profile(items: list[int], ratings: list[float]) -> list[float]:
    users = np.zeros(len(items), int)
    return user_profiles(users, np.array(items), np.array(ratings), standardised_IA=SCORES_IA, users=1)[0].tolist()


def test_rating_centred_mean_by_hand():
    """Ratings 5 and 1 around 3: (2 * [1, 0] - 2 * [-1, 2]) / 2 = [2, -2]."""
    assert profile([1, 2], [5, 1]) == [2.0, -2.0]


def test_without_a_rating_spread_it_is_the_plain_mean():
    assert profile([1, 2], [4, 4]) == [0.0, 1.0]
    assert profile([1, 3], [np.nan, np.nan]) == [0.75, -1.0]


def test_users_do_not_touch_each_other():
    rows = (np.array([0, 0, 2]), np.array([1, 2, 3]), np.array([5.0, 1.0, 2.0]))
    profiles_UA = user_profiles(*rows, standardised_IA=SCORES_IA, users=3)
    assert profiles_UA.tolist() == [[2.0, -2.0], [0.0, 0.0], [0.5, -2.0]]


def test_prompt_is_the_first_part_and_at_least_one():
    assert prompt_lengths(np.array([0, 1, 3, 10]), 0.5).tolist() == [0, 1, 1, 5]
