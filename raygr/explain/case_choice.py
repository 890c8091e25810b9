"""The choice of an explanation's item and users by ratings alone.

Shape letters: `N` interactions, `U` users, `I` items.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raygr.data.interactions import Interactions
from raygr.schema import TRAIN


class Case(NamedTuple):
    """The item and the users of an explanation."""

    item: int
    """item_index."""
    users: list[int]
    """user_index."""
    chosen: str
    """How they were chosen, in words."""


def choose_case(
    found: Interactions, item: int | None, users: Sequence[int], *, scored_I: np.ndarray, valued_U: np.ndarray
) -> Case:
    """Completes the given item and users by ratings alone, so that no case is picked for a good explanation.

    The item is the one with the widest span of ratings, then the one with the most ratings, then the first in the data.
    The users are the first in the data who rated the item highest and lowest. Held-out interactions are preferred,
    because neither the training nor a user's values know their ratings. Only items with scores, users with values, and
    interactions with a history before them count. ValueError where nothing is left.
    """
    if item is not None and users:
        return Case(item, list(users), "item and users as given")
    has_history_N = np.diff(found.user_N, prepend=-1) == 0
    usable_N = has_history_N & ~np.isnan(found.rating_N) & scored_I[found.item_N - 1] & valued_U[found.user_N]
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
        raise ValueError("no item has two different ratings to pick it by: set item")
    raise ValueError("no user with values has rated the item after another one: set users")


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
    """The item with the given users, or with those who rated it highest and lowest."""
    at_N = np.flatnonzero(allowed_N & (found.item_N == item))
    rating_N = found.rating_N[at_N]
    high = int(rating_N.argmax())
    low = int(rating_N.argmin()) if np.ptp(rating_N) > 0 else len(at_N) - 1
    raters = list(dict.fromkeys(found.user_N[at_N[[high, low]]].tolist()))
    return Case(item, list(users) or raters, f"{chosen} ({rating_N[high]:g} and {rating_N[low]:g})")
