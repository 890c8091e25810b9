"""Standardised scores by hand."""

import math

import numpy as np
import pytest

from raygr.metrics.z_scores import standardise, standardised_like


def test_standardise_by_hand_and_without_spread():
    """Scores 2, 4, 6: mean 4, deviation sqrt(8/3)."""
    values_SA, flat_A = standardise(np.array([[2.0, 5.0], [4.0, 5.0], [6.0, 5.0]]))
    assert values_SA[:, 0] == pytest.approx([-2 / math.sqrt(8 / 3), 0, 2 / math.sqrt(8 / 3)])
    assert values_SA[:, 1].tolist() == [0, 0, 0]
    assert flat_A.tolist() == [False, True]


def test_the_least_spread_is_the_callers():
    scores_SA = np.array([[1.0], [1.001]])
    assert standardise(scores_SA)[0][:, 0] == pytest.approx([-1, 1])
    values_SA, flat_A = standardise(scores_SA, least_spread=0.01)
    assert (values_SA.tolist(), flat_A.tolist()) == ([[0], [0]], [True])


def test_mean_and_deviation_of_other_rows():
    values_SA, _ = standardised_like(np.array([[7.0], [np.nan]]), np.array([[1.0], [3.0]]))
    assert values_SA.tolist() == [[5.0], [0.0]]
