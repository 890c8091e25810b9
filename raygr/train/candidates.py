"""Sampled candidate sets: 100 items per user, none of the user's own items, so never a target.

Items are drawn one after another by their weights; the user's own items and items drawn before are skipped. This is a
weighted sample without replacement. In data with repeat purchases, own items are those of the held-out parts only, so
items of the train part compete too. Sets are not cached: a seed draws the same sets again, faster than a training
starts. Shape suffixes: `N` interactions, `U` users, `I` items, `C` candidates,
`R` users at a time, `K` draws, `P` owned (user, item) pairs.
"""

from collections.abc import Sequence

import numpy as np

CANDIDATES = 100
USERS_AT_ONCE = 4096
FIRST_DRAWS, MORE_DRAWS = 128, 256  # for each user, and again where fewer than 100 were left; then `completed`
KEYS_AT_ONCE = 1 << 22  # x 8 bytes = 32 MB
UNPOPULAR = 1e-9  # the weight of an item without train interactions: such items are drawn last


def sample_candidates(
    user_N: np.ndarray, item_N: np.ndarray, *, weight_I: np.ndarray, users: int, seed: Sequence[int]
) -> np.ndarray:
    """Draws item_index (U, 100) without replacement by `weight_I`, without the user's items in `item_N`.

    `user_N` must be sorted. ValueError where a user has too few other items.
    """
    items = len(weight_I)
    pair_P = np.unique(user_N.astype(np.int64) * (items + 1) + item_N)
    check_enough_items(pair_P // (items + 1), items=items)
    weight_I = np.maximum(weight_I, UNPOPULAR)
    sums_I = np.cumsum(weight_I)
    sums_I /= sums_I[-1]
    generator = np.random.default_rng(seed)
    found_UC = np.zeros((users, CANDIDATES), np.int32)
    for first in range(0, users, USERS_AT_ONCE):
        rows = np.arange(first, min(first + USERS_AT_ONCE, users))
        found_UC[rows] = drawn_sets(rows, pair_P, sums_I=sums_I, weight_I=weight_I, generator=generator)
    return found_UC


def drawn_sets(
    user_R: np.ndarray, pair_P: np.ndarray, *, sums_I: np.ndarray, weight_I: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Candidate sets of some users, (R, 100) item_index: the first valid draws of each user."""
    found_RC = first_new(draws(sums_I, len(user_R), FIRST_DRAWS, generator), user_R, pair_P, len(sums_I))
    short_R = np.flatnonzero(found_RC[:, -1] == 0)
    if not len(short_R):
        return found_RC
    more_RK = np.hstack([found_RC[short_R], draws(sums_I, len(short_R), MORE_DRAWS, generator)])
    found_RC[short_R] = first_new(more_RK, user_R[short_R], pair_P, len(sums_I))
    short_R = short_R[found_RC[short_R, -1] == 0]
    at_once = max(1, KEYS_AT_ONCE // len(weight_I))
    for place in range(0, len(short_R), at_once):
        some_R = short_R[place : place + at_once]
        found_RC[some_R] = completed(found_RC[some_R], user_R[some_R], pair_P, weight_I, generator)
    return found_RC


def draws(sums_I: np.ndarray, rows: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws item_index with replacement, (R, K). Sorted numbers are searched faster; the shuffle undoes the order."""
    drawn_N = np.searchsorted(sums_I, np.sort(generator.random(rows * count)), side="right")
    generator.shuffle(drawn_N)
    return drawn_N.reshape(rows, count) + 1


def first_new(drawn_RK: np.ndarray, user_R: np.ndarray, pair_P: np.ndarray, items: int) -> np.ndarray:
    """The first draws that are new and not the user's own, (R, 100), padded by 0. A draw of 0 is none."""
    count = drawn_RK.shape[1]
    # sorted by item, then by place
    by_item_RK = np.sort(drawn_RK * count + np.arange(count), axis=1)
    item_RK, place_RK = np.divmod(by_item_RK, count)
    is_new_RK = item_RK > 0
    is_new_RK[:, 1:] &= item_RK[:, 1:] != item_RK[:, :-1]
    is_new_RK &= ~is_owned(user_R[:, None] * (items + 1) + item_RK, pair_P)
    by_place_RK = np.sort(np.where(is_new_RK, place_RK * (items + 1) + item_RK, count * (items + 1)), axis=1)
    return by_place_RK[:, :CANDIDATES] % (items + 1)


def is_owned(pair_RK: np.ndarray, pair_P: np.ndarray) -> np.ndarray:
    """Marks the pairs that are among the sorted `pair_P`. Rows must be in the order of users."""
    low, high = np.searchsorted(pair_P, [pair_RK.min(), pair_RK.max() + 1])
    near_P = np.append(pair_P[low:high], -1)
    return near_P[np.searchsorted(near_P[:-1], pair_RK)] == pair_RK


def completed(
    found_RC: np.ndarray, user_R: np.ndarray, pair_P: np.ndarray, weight_I: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Fills incomplete sets by random keys of all items, for users who own nearly everything.

    Keys are exponential numbers divided by the weights: the smallest are a weighted sample (Efraimidis, Spirakis 2006).
    """
    items = len(weight_I)
    keys_RI = np.full((len(user_R), items + 1), np.inf)
    keys_RI[:, 1:] = generator.exponential(size=(len(user_R), items)) / weight_I
    keys_RI[is_owned(user_R[:, None] * (items + 1) + np.arange(items + 1), pair_P)] = np.inf
    np.put_along_axis(keys_RI, found_RC, np.inf, axis=1)
    smallest_RC = np.argsort(keys_RI, axis=1)[:, :CANDIDATES]
    missing_RC = found_RC == 0
    place_RC = np.cumsum(missing_RC, axis=1) - 1
    return np.where(missing_RC, np.take_along_axis(smallest_RC, np.maximum(place_RC, 0), axis=1), found_RC)


def check_enough_items(user_P: np.ndarray, *, items: int) -> None:
    """ValueError where a user has fewer than 100 other items; `user_P` holds the user of each own item."""
    most = int(np.bincount(user_P, minlength=1).max())
    if items - most < CANDIDATES:
        raise ValueError(
            f"{CANDIDATES} candidates need more items: there are {items}, and one user has {most}; "
            "rank among the full catalogue (candidates: [full])"
        )


def candidate_weights(name: str, train_count_I: np.ndarray) -> np.ndarray:
    """Weights of items 1..I: equal for `uniform-100`, train interactions for `popularity-100`."""
    return train_count_I.astype(np.float64) if name == "popularity-100" else np.ones(len(train_count_I))
