"""Sampled candidate sets: 100 items per user, none of the user's own items, so never a target.

Items are drawn one after another by their weights; the user's own items and items drawn before are skipped. This is a
weighted sample without replacement. In data with repeat purchases, own items are those of the held-out parts only, so
items of the train part compete too. Sets are not cached: a seed draws the same sets again, faster than a training
starts.
Shape letters: `N` interactions, `U` users, `I` items, `C` candidates, `B` users of a batch, `K` draws, `O` owned pairs.
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
    pair_O = np.unique(user_N.astype(np.int64) * (items + 1) + item_N)
    check_enough_items(pair_O // (items + 1), items=items)
    weight_I = np.maximum(weight_I, UNPOPULAR)
    sums_I = np.cumsum(weight_I)
    sums_I /= sums_I[-1]
    generator = np.random.default_rng(seed)
    found_UC = np.zeros((users, CANDIDATES), np.int32)
    for first in range(0, users, USERS_AT_ONCE):
        rows = np.arange(first, min(first + USERS_AT_ONCE, users))
        found_UC[rows] = drawn_sets(rows, pair_O, sums_I=sums_I, weight_I=weight_I, generator=generator)
    return found_UC


def drawn_sets(
    user_B: np.ndarray, pair_O: np.ndarray, *, sums_I: np.ndarray, weight_I: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Candidate sets of some users, (B, 100) item_index: the first valid draws of each user."""
    found_BC = first_new(draws(sums_I, len(user_B), FIRST_DRAWS, generator), user_B, pair_O, len(sums_I))
    short_B = np.flatnonzero(found_BC[:, -1] == 0)
    if not len(short_B):
        return found_BC
    more_BK = np.hstack([found_BC[short_B], draws(sums_I, len(short_B), MORE_DRAWS, generator)])
    found_BC[short_B] = first_new(more_BK, user_B[short_B], pair_O, len(sums_I))
    short_B = short_B[found_BC[short_B, -1] == 0]
    at_once = max(1, KEYS_AT_ONCE // len(weight_I))
    for place in range(0, len(short_B), at_once):
        some_B = short_B[place : place + at_once]
        found_BC[some_B] = completed(found_BC[some_B], user_B[some_B], pair_O, weight_I, generator)
    return found_BC


def draws(sums_I: np.ndarray, rows: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws item_index with replacement, (B, K). Sorted numbers are searched faster; the shuffle undoes the order."""
    drawn_N = np.searchsorted(sums_I, np.sort(generator.random(rows * count)), side="right")
    generator.shuffle(drawn_N)
    return drawn_N.reshape(rows, count) + 1


def first_new(drawn_BK: np.ndarray, user_B: np.ndarray, pair_O: np.ndarray, items: int) -> np.ndarray:
    """The first draws that are new and not the user's own, (B, 100), padded by 0. A draw of 0 is none."""
    count = drawn_BK.shape[1]
    # sorted by item, then by place
    by_item_BK = np.sort(drawn_BK * count + np.arange(count), axis=1)
    item_BK, place_BK = np.divmod(by_item_BK, count)
    is_new_BK = item_BK > 0
    is_new_BK[:, 1:] &= item_BK[:, 1:] != item_BK[:, :-1]
    is_new_BK &= ~is_owned(user_B[:, None] * (items + 1) + item_BK, pair_O)
    by_place_BK = np.sort(np.where(is_new_BK, place_BK * (items + 1) + item_BK, count * (items + 1)), axis=1)
    return by_place_BK[:, :CANDIDATES] % (items + 1)


def is_owned(pair_BK: np.ndarray, pair_O: np.ndarray) -> np.ndarray:
    """Marks the pairs that are among the sorted `pair_O`. Rows must be in the order of users."""
    low, high = np.searchsorted(pair_O, [pair_BK.min(), pair_BK.max() + 1])
    near_O = np.append(pair_O[low:high], -1)
    return near_O[np.searchsorted(near_O[:-1], pair_BK)] == pair_BK


def completed(
    found_BC: np.ndarray, user_B: np.ndarray, pair_O: np.ndarray, weight_I: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Fills incomplete sets by random keys of all items, for users who own nearly everything.

    Keys are exponential numbers divided by the weights: the smallest are a weighted sample (Efraimidis, Spirakis 2006).
    """
    items = len(weight_I)
    keys_BI = np.full((len(user_B), items + 1), np.inf)
    keys_BI[:, 1:] = generator.exponential(size=(len(user_B), items)) / weight_I
    keys_BI[is_owned(user_B[:, None] * (items + 1) + np.arange(items + 1), pair_O)] = np.inf
    np.put_along_axis(keys_BI, found_BC, np.inf, axis=1)
    smallest_BC = np.argsort(keys_BI, axis=1)[:, :CANDIDATES]
    missing_BC = found_BC == 0
    place_BC = np.cumsum(missing_BC, axis=1) - 1
    return np.where(missing_BC, np.take_along_axis(smallest_BC, np.maximum(place_BC, 0), axis=1), found_BC)


def check_enough_items(user_O: np.ndarray, *, items: int) -> None:
    """ValueError where a user has fewer than 100 other items; `user_O` holds the user of each own item."""
    most = int(np.bincount(user_O, minlength=1).max())
    if items - most < CANDIDATES:
        raise ValueError(
            f"{CANDIDATES} candidates need more items: there are {items}, and one user has {most}; "
            "rank among the full catalogue (candidates: [full])"
        )


def candidate_weights(name: str, train_count_I: np.ndarray) -> np.ndarray:
    """Weights of items 1..I: equal for `uniform-100`, train interactions for `popularity-100`."""
    return train_count_I.astype(np.float64) if name == "popularity-100" else np.ones(len(train_count_I))
