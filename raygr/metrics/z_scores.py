"""Standardised scores: mean 0 and standard deviation 1 per aspect. The one place for the package.

Shape letters: `S` subjects, `A` aspects.
"""

import numpy as np

LEAST_SPREAD = 1e-8  # an aspect with a smaller standard deviation has no spread


def standardise(scores_SA: np.ndarray, *, least_spread: float = LEAST_SPREAD) -> tuple[np.ndarray, np.ndarray]:
    """(A.5) before its scaling: scores with mean 0 and deviation 1 per aspect, and which aspects have no spread, (A,).

    A missing score is NaN: it does not count in mean and deviation, and becomes 0, the mean. An aspect without spread
    becomes 0.
    """
    return standardised_like(scores_SA, scores_SA, least_spread=least_spread)


def standardised_like(
    scores_SA: np.ndarray, reference_SA: np.ndarray, *, least_spread: float = LEAST_SPREAD
) -> tuple[np.ndarray, np.ndarray]:
    """`standardise` with the mean and the deviation of `reference_SA`, which has a value of every aspect."""
    spread_A = np.nanstd(reference_SA, axis=0)
    is_flat_A = ~(spread_A >= least_spread)  # also true of an aspect without any value, whose spread is NaN
    centred_SA = scores_SA - np.nanmean(reference_SA, axis=0)
    return np.where(is_flat_A | np.isnan(scores_SA), 0.0, centred_SA / np.where(is_flat_A, 1.0, spread_A)), is_flat_A
