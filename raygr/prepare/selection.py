"""Coded rows -> the kept interactions with indexes, positions and split, in numpy only.

Interactions are sorted by user, then in chronological order, equal times by file and row. Users and items are numbered
by their ids in byte order, so the numbers do not depend on the order of reading.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from raygr.prepare import splits
from raygr.prepare.bad_rows import InputError
from raygr.prepare.coded_rows import CodedRows
from raygr.prepare.config import PrepareConfig


@dataclasses.dataclass(frozen=True)
class ScannedInteractions:
    """Columns of N interactions; `user` and `item` are indexes into `user_ids` and `item_ids`."""

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray  # float32, NaN for implicit data
    timestamp: np.ndarray  # int64
    file: np.ndarray
    row: np.ndarray
    user_ids: pa.Array
    item_ids: pa.Array

    def __len__(self) -> int:
        return len(self.user)

    def take(self, which: np.ndarray) -> "ScannedInteractions":
        """The interactions of a mask, without a copy if it holds all of them."""
        if which.all():
            return self
        return dataclasses.replace(self, **{name: column[which] for name, column in self.columns().items()})

    def columns(self) -> dict[str, np.ndarray]:
        return {name: column for name, column in vars(self).items() if isinstance(column, np.ndarray)}


def from_rows(rows: CodedRows) -> ScannedInteractions:
    """The interactions of usable rows, whose columns are moved out of `rows`."""
    (user, user_ids), (item, item_ids) = (rows.pop_ids(name) for name in ("user_id", "item_id"))
    columns = {"user": user, "item": item}
    columns |= {name: rows.pop(name) for name in ("rating", "timestamp", "file", "row")}
    order = np.lexsort((columns["timestamp"], user))  # stable, and the rows are in the order of files and rows
    del user, item
    for name in columns:
        columns[name] = columns[name][order]
    return ScannedInteractions(**columns, user_ids=user_ids, item_ids=item_ids)


class Dropped(NamedTuple):
    """What one step of `reduce` drops; a user or an item is dropped with its last interaction."""

    interactions: int
    users: int
    items: int


def reduce(data: ScannedInteractions, config: PrepareConfig) -> tuple[ScannedInteractions, dict[str, Dropped]]:
    """The interactions that stay, and the counts of the dropped ones by reason; InputError if none stays."""
    steps = {
        "duplicate": lambda kept: distinct(kept, keep=config.keep_duplicate),
        "user_not_sampled": lambda kept: sample_users(kept, config.sample_users, seed=config.seed),
        "before_last_interactions": lambda kept: newest(kept, config.last_interactions),
        "too_few_interactions": lambda kept: enough(kept, config),
    }
    dropped = {}
    before = sizes(data)
    for reason, step in steps.items():
        data = data.take(step(data))
        after = sizes(data)
        dropped[reason] = Dropped(*(b - a for b, a in zip(before, after, strict=True)))
        before = after
    if len(data) == 0:
        counts = ", ".join(f"{one.interactions} {reason}" for reason, one in dropped.items() if one.interactions)
        raise InputError(
            f"no interaction is left (dropped: {counts}): lower min_user_interactions="
            f"{config.min_user_interactions} or min_item_interactions={config.min_item_interactions}, "
            f"or use another filter than {config.filter}"
        )
    return data, dropped


def sizes(data: ScannedInteractions) -> tuple[int, int, int]:
    """The numbers of interactions, and of the users and items that have any."""
    users = np.count_nonzero(np.bincount(data.user))
    return len(data), int(users), int(np.count_nonzero(np.bincount(data.item)))


def distinct(data: ScannedInteractions, *, keep: str) -> np.ndarray:
    """Mask of the first, last or all interactions of each (user, item)."""
    if keep == "all":
        return np.ones(len(data), bool)
    pair = data.user.astype(np.int64) * len(data.item_ids) + data.item
    order = np.argsort(pair, kind="stable")
    changes = np.diff(pair[order]) != 0
    edge = np.r_[True, changes] if keep == "first" else np.r_[changes, True]
    mask = np.zeros(len(data), bool)
    mask[order[edge[: len(order)]]] = True
    return mask


def sample_users(data: ScannedInteractions, count: int | None, *, seed: int) -> np.ndarray:
    """Mask of the interactions of `count` users drawn without replacement; None, or too many, keeps all."""
    users = np.flatnonzero(np.bincount(data.user))
    if count is None or count >= len(users):
        return np.ones(len(data), bool)
    drawn = np.random.default_rng(seed).choice(users, count, replace=False)
    return np.isin(data.user, drawn)


def newest(data: ScannedInteractions, count: int | None) -> np.ndarray:
    """Mask of the last `count` interactions of each user; None keeps all."""
    if count is None:
        return np.ones(len(data), bool)
    position, length = positions(data.user)
    return length - position <= count


def positions(user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The position of each interaction in the history of its user, from 0, and the length of that history, as int32.

    The users are sorted.
    """
    count = np.bincount(user).astype(np.int32)
    start = np.cumsum(count) - count
    return (np.arange(len(user)) - start[user]).astype(np.int32), count[user]


def enough(data: ScannedInteractions, config: PrepareConfig) -> np.ndarray:
    """Mask of the interactions that pass the minimum counts, applied as `config.filter` says."""
    user_step = (data.user, config.min_user_interactions)
    item_step = (data.item, config.min_item_interactions)
    match config.filter:
        case "users_then_items":
            return passes([user_step, item_step], repeat=False)
        case "items_then_users":
            return passes([item_step, user_step], repeat=False)
        case "k_core":
            return passes([item_step, user_step], repeat=True)


def passes(steps: Sequence[tuple[np.ndarray, int]], *, repeat: bool) -> np.ndarray:
    """Mask of the rows that stay when ids with too few rows are dropped, once or until nothing changes.

    `steps`: ids (N,) and their minimum number of rows, in the order of the drops.
    """
    left = np.arange(len(steps[0][0]))
    while True:
        before = len(left)
        for ids, minimum in steps:
            left = left[np.bincount(ids[left])[ids[left]] >= minimum]
        if not repeat or len(left) == before:
            break
    mask = np.zeros(len(steps[0][0]), bool)
    mask[left] = True
    return mask


class NewInteractions(NamedTuple):
    """Interactions with new items, sorted by user and time; empty without new items."""

    user_index: np.ndarray
    item_index: np.ndarray
    position: np.ndarray  # number of the user's other interactions before it
    rating: np.ndarray
    timestamp: np.ndarray


@dataclasses.dataclass(frozen=True)
class Kept:
    """The final N interactions of U users and I items, sorted by user and position.

    Items are numbered in the order of their ids, new items after all others.
    """

    user_index: np.ndarray  # 0..U-1
    item_index: np.ndarray  # 1..I
    position: np.ndarray
    rating: np.ndarray
    timestamp: np.ndarray
    part: np.ndarray  # indexes into splits.PARTS
    file: np.ndarray
    row: np.ndarray
    user_ids: pa.Array  # (U,)
    item_ids: pa.Array  # (I,)
    new: NewInteractions
    new_items: int


def new_item_mask(data: ScannedInteractions, config: PrepareConfig) -> np.ndarray:
    """Mask of the interactions with new items; InputError if the share is below one item."""
    if not config.new_items:
        return np.zeros(len(data), bool)
    items = np.flatnonzero(np.bincount(data.item))
    count = round(config.new_items * len(items))
    if not 0 < count < len(items):
        raise InputError(f"new_items={config.new_items} makes {count} of {len(items)} items new: choose another share")
    if config.new_items_by == "time":
        _, first = np.unique(data.item[chronological(data)], return_index=True)
        chosen = items[np.argsort(first)[-count:]]
    else:
        chosen = np.random.default_rng([config.seed, 1]).choice(items, count, replace=False)
    return np.isin(data.item, chosen)


def chronological(data: ScannedInteractions) -> np.ndarray:
    """Indexes of the interactions of all users by time, equal times by file and row."""
    return np.lexsort((data.row, data.file, data.timestamp))


def set_aside(data: ScannedInteractions, config: PrepareConfig) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the interactions with new items, and of those that are dropped: of users who have only new items.

    The minimum counts hold before. Other items keep all their interactions, so the k-core still holds for them.
    """
    is_new = new_item_mask(data, config)
    known = np.bincount(data.user[~is_new], minlength=len(data.user_ids))
    return is_new, known[data.user] == 0


def assign(data: ScannedInteractions, config: PrepareConfig) -> tuple[Kept, Dropped]:
    """Adds indexes, positions, the split and new items to the reduced interactions.

    Also returns what new items drop. InputError if the test part is empty.
    """
    is_new, is_dropped = set_aside(data, config)
    before, known, new = sizes(data), data.take(~is_new), data.take(is_new & ~is_dropped)
    dropped = Dropped(*(b - a for b, a in zip(before, sizes(data.take(~is_dropped)), strict=True)))
    users, user_index = renumbered(known.user)
    items, item_place = renumbered(known.item)
    new_items, new_place = renumbered(new.item)
    position, length = positions(user_index)
    kept = Kept(
        user_index=user_index,
        item_index=item_place + 1,
        position=position,
        rating=known.rating,
        timestamp=known.timestamp,
        part=split(known, position, length, config),
        file=known.file,
        row=known.row,
        user_ids=data.user_ids.take(pa.array(users)),
        item_ids=data.item_ids.take(pa.array(np.concatenate([items, new_items]))),
        new=new_interactions(data, is_new, is_dropped, users, new_place + len(items) + 1),
        new_items=len(new_items),
    )
    return kept, dropped


def renumbered(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted distinct codes, and the index of each code among them as int32."""
    is_there = np.bincount(codes) > 0
    return np.flatnonzero(is_there), (np.cumsum(is_there, dtype=np.int32) - np.int32(1))[codes]


def new_interactions(
    data: ScannedInteractions, is_new: np.ndarray, is_dropped: np.ndarray, users: np.ndarray, item_index: np.ndarray
) -> NewInteractions:
    """Interactions with new items that are not dropped, whose items are `item_index`; `users` are sorted."""
    kept = data.take(~is_dropped)
    is_new = is_new[~is_dropped]
    before = np.cumsum(~is_new) - ~is_new  # known interactions before each one, of earlier users too
    position = before - before[np.searchsorted(kept.user, kept.user)]
    new = kept.take(is_new)
    user_index = np.searchsorted(users, new.user)
    return NewInteractions(user_index, item_index, position[is_new].astype(np.int32), new.rating, new.timestamp)


def split(known: ScannedInteractions, position: np.ndarray, length: np.ndarray, config: PrepareConfig) -> np.ndarray:
    if config.split == "leave_one_out":
        part = splits.leave_one_out(position, length, config.test_interactions)
        hint = "keep users with three or more interactions (min_user_interactions)"
    elif config.timestamps == "position":
        files = ", ".join(config.reviews)
        raise InputError(f"split=temporal needs times, but {files} has positions in the history: use leave_one_out")
    else:
        order = chronological(known)
        part = np.empty(len(order), np.int8)
        part[order] = splits.temporal(known.timestamp[order], quantile=config.temporal_quantile)
        hint = "lower temporal_quantile"
    if not (part == splits.TEST_PART).any():
        raise InputError(f"split={config.split} leaves no test interaction: {hint}")
    return part


def item_ratings(kept: Kept, which: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """(I,) mean ratings, null without ratings, and (I,) numbers of rated interactions, of the masked interactions."""
    rated = which & ~np.isnan(kept.rating)
    places, count_of = kept.item_index[rated] - 1, len(kept.item_ids)
    count = np.bincount(places, minlength=count_of)
    total = np.bincount(places, weights=kept.rating[rated], minlength=count_of)
    mean = total / np.maximum(count, 1)
    return pa.array(mean.astype(np.float32), mask=count == 0), pa.array(count.astype(np.int32))


def user_cutoffs(kept: Kept) -> Mapping[str, pa.Array]:
    """(U,) interaction counts, and time and position of the last train interaction; null and -1 without one."""
    users = len(kept.user_ids)
    count = np.bincount(kept.user_index, minlength=users)
    train = np.bincount(kept.user_index[kept.part == splits.TRAIN_PART], minlength=users)
    start = np.cumsum(count) - count
    # Train interactions come first in a history, so the last of them has the position `train - 1`.
    last = start + np.maximum(train, 1) - 1
    return {
        "interactions": pa.array(count.astype(np.int32)),
        "cutoff": pa.array(kept.timestamp[last], mask=train == 0),
        "cutoff_position": pa.array((train - 1).astype(np.int32)),
    }
