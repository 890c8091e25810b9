"""Sampled candidate sets: 100 items per user, never one of the user's own items, so never a target.

Where the data keep repeat purchases, own items are those of the held-out parts: what a user has had competes too.
Shape suffixes: `U` users, `N` interactions, `I` items, `C` candidates.
"""

import numpy as np

CANDIDATES = 100
USERS_AT_ONCE = 512
UNPOPULAR = 1e-9  # weight of an item without train interactions: drawn only after all others


def sample_candidates(
    user_N: np.ndarray, item_N: np.ndarray, *, weight_I: np.ndarray, users: int, seed: int
) -> np.ndarray:
    """(U, 100) item_index, drawn without replacement by `weight_I` from the items the user has not in `item_N`.

    Exponential keys divided by the weights: the smallest 100 are a weighted sample (Efraimidis, Spirakis 2006).
    `user_N` must be sorted.
    """
    check_enough_items(user_N, items=len(weight_I))
    generator = np.random.default_rng(seed)
    offsets_U = np.searchsorted(user_N, np.arange(users + 1))
    parts = []
    for first in range(0, users, USERS_AT_ONCE):
        last = min(first + USERS_AT_ONCE, users)
        own = slice(offsets_U[first], offsets_U[last])
        keys_UI = generator.exponential(size=(last - first, len(weight_I))) / np.maximum(weight_I, UNPOPULAR)
        keys_UI[user_N[own] - first, item_N[own] - 1] = np.inf
        parts.append(np.argpartition(keys_UI, CANDIDATES - 1, axis=1)[:, :CANDIDATES] + 1)
    return np.concatenate(parts)


def check_enough_items(user_N: np.ndarray, *, items: int) -> None:
    most = int(np.bincount(user_N).max())
    if items - most < CANDIDATES:
        raise ValueError(
            f"{CANDIDATES} candidates need more items: there are {items}, and one user has {most}; "
            "rank among the full catalogue (candidates: [full])"
        )


def candidate_weights(name: str, train_count_I: np.ndarray) -> np.ndarray:
    """Equal weights for `uniform-100`, train interactions for `popularity-100`."""
    return train_count_I.astype(np.float64) if name == "popularity-100" else np.ones(len(train_count_I))
