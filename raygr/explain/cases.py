"""Which item and users a case study shows where they are not given: one that one user rated high and another low.

Nothing is drawn by chance, and no model has a say in it: a case is not chosen by how well it is explained. Shape
suffixes: `N` interactions, `U` users, `I` items, `R` rated interactions that may be picked.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raygr.data.interactions import Interactions
from raygr.schema import TRAIN


class Case(NamedTuple):
    item: int
    """item_index."""
    users: list[int]
    """user_index."""
    chosen: str
    """How, in words."""


def choose_case(
    found: Interactions, item: int | None, users: Sequence[int], *, scored_I: np.ndarray, valued_U: np.ndarray
) -> Case:
    """The given item and users; those that were not given are picked.

    Picked is the item with the widest span of ratings, of those the most rated, then the first in the data; and as
    users the first in the data who rated the item highest and lowest. Ratings of held-out interactions come before all
    others, because neither the training nor a user's values know them. Only items with scores, users with values,
    and interactions with a history before them count. ValueError where nothing is left.
    """
    if item is not None and users:
        return Case(item, list(users), "item and users as given")
    usable_N = is_usable(found, scored_I, valued_U)
    if item is not None:
        usable_N &= found.item_N == item
    if users:
        usable_N &= np.isin(found.user_N, users)
    what = " and ".join(name for name, given in (("item", item is not None), ("users", users)) if not given)
    for allowed_N, words in ((usable_N & (found.split_N != TRAIN), "held-out ratings"), (usable_N, "ratings")):
        widest, span = widest_item(found, allowed_N)
        if span > 0 or (item is not None and allowed_N is usable_N and usable_N.any()):
            return picked_case(found, allowed_N, widest, users, chosen=f"{what} picked by the widest span of {words}")
    if item is None:
        raise ValueError("no item has two unlike ratings to pick it by: give one with --item")
    raise ValueError("nobody with values has rated the item after another one: give users with --user")


def is_usable(found: Interactions, scored_I: np.ndarray, valued_U: np.ndarray) -> np.ndarray:
    """(N,): rated interactions with a history before them, of items with scores and users with values."""
    has_history_N = np.diff(found.user_N, prepend=-1) == 0
    return has_history_N & ~np.isnan(found.rating_N) & scored_I[found.item_N - 1] & valued_U[found.user_N]


def widest_item(found: Interactions, allowed_N: np.ndarray) -> tuple[int, float]:
    """item_index and span of the widest allowed ratings; ties go to the most rated item, then to the first."""
    low_I, high_I = np.full(found.items, np.nan), np.full(found.items, np.nan)
    np.fmin.at(low_I, found.item_N[allowed_N] - 1, found.rating_N[allowed_N])
    np.fmax.at(high_I, found.item_N[allowed_N] - 1, found.rating_N[allowed_N])
    span_I = np.nan_to_num(high_I - low_I, nan=-1.0)
    count_I = np.bincount(found.item_N[allowed_N] - 1, minlength=found.items)
    place = np.lexsort((-count_I, -span_I))[0]
    return int(place) + 1, float(span_I[place])


def picked_case(found: Interactions, allowed_N: np.ndarray, item: int, users: Sequence[int], *, chosen: str) -> Case:
    """With the given users, or those who rated the item highest and lowest."""
    at_R = np.flatnonzero(allowed_N & (found.item_N == item))
    rating_R = found.rating_N[at_R]
    high = int(rating_R.argmax())
    low = int(rating_R.argmin()) if np.ptp(rating_R) > 0 else len(at_R) - 1
    raters = list(dict.fromkeys(found.user_N[at_R[[high, low]]].tolist()))
    return Case(item, list(users) or raters, f"{chosen} ({rating_R[high]:g} and {rating_R[low]:g})")
