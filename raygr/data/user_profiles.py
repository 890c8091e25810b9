"""User vectors from item scores and the user's ratings, without an LLM.

Shape letters: `N` interactions, `U` users, `I` items, `A` aspects.
"""

import numpy as np

from raygr.metrics.z_scores import standardise


def user_profiles(
    user_N: np.ndarray, item_N: np.ndarray, rating_N: np.ndarray, *, scores_IA: np.ndarray, users: int
) -> np.ndarray:
    """Compute each user's profile of the aspects, (U, A).

    A profile is the mean over the user's interactions of (rating - the user's mean rating) * standardised item scores.
    `item_N` is item_index, 1..I, for row `item_index - 1` of `scores_IA`; a missing score is NaN and is left out of the
    mean. Users without ratings, or with equal ratings only, have the plain mean of the scores; users none of whose
    items has a score of the aspect have NaN.
    """
    weight_N = rating_weights(user_N, rating_N, users)
    scores_NA, scored_NA = standardise(scores_IA)[0][item_N - 1], ~np.isnan(scores_IA)[item_N - 1]
    total_UA, count_UA = np.zeros((2, users, scores_IA.shape[1]))
    np.add.at(total_UA, user_N, weight_N[:, None] * scores_NA)
    np.add.at(count_UA, user_N, scored_NA)
    return np.where(count_UA > 0, total_UA / np.maximum(count_UA, 1), np.nan)


def rating_weights(user_N: np.ndarray, rating_N: np.ndarray, users: int) -> np.ndarray:
    """Rating minus the user's mean rating; 1 for users without ratings or with equal ratings only."""
    rated = ~np.isnan(rating_N)
    total_U = np.bincount(user_N[rated], weights=rating_N[rated], minlength=users)
    mean_U = total_U / np.maximum(np.bincount(user_N[rated], minlength=users), 1)
    centred_N = np.where(rated, rating_N - mean_U[user_N], 0.0)
    spread_U = np.bincount(user_N, weights=np.abs(centred_N), minlength=users)
    return np.where(spread_U[user_N] > 1e-9, centred_N, 1.0)


def prompt_lengths(train_count_U: np.ndarray, fraction: float) -> np.ndarray:
    """Number of each user's first train interactions in the share `fraction`, at least one where there are any."""
    return np.minimum(np.maximum((train_count_U * fraction).astype(np.int64), 1), train_count_U)
