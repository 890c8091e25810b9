"""Agreement of predicted scores with a teacher's, by hand."""

import numpy as np
import pytest

from raygr.metrics.agreement import agreement, mean_agreement, spearman, spearman_interval


def test_spearman_by_hand():
    # Ranks 1,2,3,4 against 2,1,4,3: 1 - 6 * 4 / (4 * 15) = 0.6.
    assert spearman(np.array([1, 2, 3, 4.0]), np.array([5, 1, 70, 6.0])) == pytest.approx(0.6)
    # Ranks 1,2.5,2.5,4 against 1,2,3,4: 4.5 / sqrt(4.5 * 5).
    assert spearman(np.array([1, 2, 2, 3.0]), np.array([1, 2, 3, 4.0])) == pytest.approx(4.5 / np.sqrt(22.5))
    assert spearman(np.array([1, 1, 1.0]), np.array([1, 2, 3.0])) is None


def test_agreement_by_hand():
    predicted_SA = np.array([[2.0, 5, 1], [4, 5, 2], [6, 5, 3]])
    teacher_SA = np.array([[1.0, 3, 4], [5, 6, 4], [6, 9, 4]])
    first, alike, constant = agreement(predicted_SA, teacher_SA, guess_A=np.array([3.0, 6, 5]))
    assert first.spearman == 1 and first.mean_absolute_error == pytest.approx(2 / 3)
    assert first.mean_guess_error == pytest.approx((2 + 2 + 3) / 3)
    assert first.bias == pytest.approx(0.0) and first.slope == pytest.approx(10 / 8)  # covariance by variance
    # one prediction for all subjects orders nothing
    assert (alike.spearman, alike.slope, alike.bias) == (0.0, None, pytest.approx(-1.0))
    # where the teacher's scores are all alike there is no order to find
    assert (constant.spearman, constant.slope, constant.mean_guess_error) == (None, 0.0, 1.0)
    means = mean_agreement([first, alike, constant])
    assert means["spearman"] == 0.5 and means["slope"] == pytest.approx(0.625)


def test_the_interval_of_spearman_is_that_of_the_loop_and_widens_with_ratings_of_the_same_user():
    generator = np.random.default_rng(3)
    x_E = generator.normal(size=400)
    y_E = 0.5 * x_E + generator.normal(size=400)
    low, high = spearman_interval(x_E, y_E, np.arange(400))
    # Bonett and Wright (2000): Fisher's z with the standard error sqrt((1 + r^2 / 2) / (n - 3))
    rank = spearman(x_E, y_E)
    half = 1.96 * np.sqrt((1 + rank**2 / 2) / 397)
    assert (low, high) == pytest.approx((np.tanh(np.arctanh(rank) - half), np.tanh(np.arctanh(rank) + half)), abs=0.02)
    # each value four times is no more knowledge
    copies = [np.repeat(one, 4) for one in (x_E, y_E, np.arange(400))]
    assert spearman_interval(*copies) == pytest.approx((low, high), abs=0.01)
    assert (
        spearman_interval(x_E, y_E, np.zeros(400)) is None and spearman_interval(x_E, x_E * 0, np.arange(400)) is None
    )
