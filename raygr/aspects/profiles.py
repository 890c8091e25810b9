"""User vectors made from item scores: what a user's ratings say about each aspect, without an LLM.

Shape suffixes: `N` interactions, `U` users, `I` items, `A` aspects.
"""

import numpy as np


def user_profiles(
    user_N: np.ndarray, item_N: np.ndarray, rating_N: np.ndarray, *, standardised_IA: np.ndarray, users: int
) -> np.ndarray:
    """Per user the mean over interactions of (rating - the user's mean rating) * item scores: (U, A).

    `item_N` is item_index, 1..I, row `item_index - 1` of `standardised_IA`. A user without ratings, or
    whose ratings are all the same, has the plain mean of the scores; one without interactions has 0.
    """
    weight_N = rating_weights(user_N, rating_N, users)
    total_UA = np.zeros((users, standardised_IA.shape[1]))
    np.add.at(total_UA, user_N, weight_N[:, None] * standardised_IA[item_N - 1])
    return total_UA / np.maximum(np.bincount(user_N, minlength=users), 1)[:, None]


def rating_weights(user_N: np.ndarray, rating_N: np.ndarray, users: int) -> np.ndarray:
    """Rating minus the user's mean rating, in stars; 1 for users whose ratings tell nothing apart."""
    rated = ~np.isnan(rating_N)
    total_U = np.bincount(user_N[rated], weights=rating_N[rated], minlength=users)
    mean_U = total_U / np.maximum(np.bincount(user_N[rated], minlength=users), 1)
    centred_N = np.where(rated, rating_N - mean_U[user_N], 0.0)
    spread_U = np.bincount(user_N, weights=np.abs(centred_N), minlength=users)
    return np.where(spread_U[user_N] > 1e-9, centred_N, 1.0)


def prompt_lengths(train_count_U: np.ndarray, fraction: float) -> np.ndarray:
    """How many of each user's first train interactions make the `after_prompt` vector: at least one of them."""
    return np.minimum(np.maximum((train_count_U * fraction).astype(np.int64), 1), train_count_U)
