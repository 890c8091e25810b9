"""Agreement of predicted scores with a teacher's, by hand."""

import numpy as np
import pytest

from raygr.metrics.agreement import agreement, mean_agreement, spearman


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
