"""Reads the interactions of a prepare run as flat arrays, checked against schema.py.

Shape letter: `N` interactions.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raygr import files, runs
from raygr.schema import INTERACTIONS, ITEMS, NEW_INTERACTIONS, TEST, TRAIN, USERS, VALIDATION


class Interactions(NamedTuple):
    """N interactions, sorted by user and position; items count from 1, users from 0."""

    user_N: np.ndarray
    item_N: np.ndarray
    rating_N: np.ndarray
    """NaN for implicit data."""
    split_N: np.ndarray
    users: int
    items: int
    repeats: bool = False
    """Repeat purchases were kept, so a target may be an item that the user had before."""
    new_items: int = 0
    """Number of items, the last ones, that no interaction here has: see `read_new_targets`."""


class NewTargets(NamedTuple):
    """N interactions with new items, sorted by user and time."""

    user_N: np.ndarray
    item_N: np.ndarray
    position_N: np.ndarray
    """The number of the user's other interactions before it."""


def read_interactions(data: str) -> Interactions:
    """The interactions of the prepare run at `data`; ValueError if its files break the contract of schema.py."""
    columns = ["user_index", "item_index", "position", "rating", "split"]
    table = files.read_table(files.join(data, INTERACTIONS), columns)
    user_N, item_N, position_N = (table[name].to_numpy().astype(np.int64) for name in columns[:3])
    rating_N = table["rating"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    items = files.read_table(files.join(data, ITEMS), ["item_index"]).num_rows
    users = files.read_table(files.join(data, USERS), ["user_index"]).num_rows
    split_N = table["split"].to_numpy().astype(str)
    repeats = runs.read_run(data, job="prepare").config.get("keep_duplicate") == "all"
    new = read_new_targets(data)
    new_items = 0 if new is None else len(np.unique(new.item_N))
    found = Interactions(user_N, item_N, rating_N, split_N, users, items, repeats, new_items)
    check_interactions(found, position_N, data)
    return found


def read_new_targets(data: str) -> NewTargets | None:
    """The interactions with new items of the prepare run at `data`; None where it has no new items."""
    path = files.join(data, NEW_INTERACTIONS)
    if not files.exists(path):
        return None
    names = ("user_index", "item_index", "position")
    table = files.read_table(path, list(names))
    return NewTargets(*(table[name].to_numpy().astype(np.int64) for name in names))


def check_interactions(found: Interactions, position_N: np.ndarray, data: str) -> None:
    """ValueError if the interactions break the contract of schema.py, on which the flat arrays rely."""
    order = np.array([TRAIN, VALIDATION, TEST])
    same_user = np.diff(found.user_N) == 0
    is_sorted = (np.diff(found.user_N) >= 0).all() and (np.diff(position_N)[same_user] > 0).all()
    stage_N = np.argmax(found.split_N[:, None] == order, axis=1)
    is_outside_N = (found.item_N < 1) | (found.item_N > found.items)
    first_outside = np.flatnonzero(is_outside_N)[:1] + 1
    problems = {
        "no rows": not len(found.user_N),
        f"an item_index outside 1..{found.items} in row {', '.join(map(str, first_outside))}": is_outside_N.any(),
        "a new item in a history": (found.item_N > found.items - found.new_items).any(),
        "a user_index outside 0..users-1": ((found.user_N < 0) | (found.user_N >= found.users)).any(),
        "rows not sorted by user_index and position": not is_sorted,
        "a split that is not train, validation or test": not np.isin(found.split_N, order).all(),
        "a train interaction after a held-out one": (np.diff(stage_N)[same_user] < 0).any(),
    }
    wrong = [name for name, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise ValueError(f"{data}/{INTERACTIONS}: {'; '.join(wrong)}; run `raygr prepare` again")


def read_ids(data: str, table: str, kind: str) -> np.ndarray:
    """The ids of `table`, in the order of `<kind>_index`; `kind` is user or item."""
    rows = files.read_table(files.join(data, table), [f"{kind}_index", f"{kind}_id"]).sort_by(f"{kind}_index")
    return rows[f"{kind}_id"].to_numpy().astype(str)
