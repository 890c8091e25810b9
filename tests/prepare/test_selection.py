"""Properties of the kept interactions on random inputs: balance, order, splits, minimum counts."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygr.prepare.bad_rows import InputError
from raygr.prepare.coded_rows import CodedRows
from raygr.prepare.config import PrepareConfig
from raygr.prepare.selection import Kept, ScannedInteractions, assign, from_rows, reduce, user_cutoffs
from raygr.prepare.splits import TEST_PART, TRAIN_PART, VALIDATION_PART
from raygr.prepare.stage import HELD

Row = tuple[int, int, int]  # user, item, time

ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 8)), min_size=1, max_size=60)
FILTERS = st.sampled_from(["k_core", "items_then_users", "users_then_items"])
KEEP = st.sampled_from(["first", "last", "all"])
MANY = settings(max_examples=60, deadline=None)


def scanned(rows: list[Row]) -> ScannedInteractions:
    """Scanned interactions of `rows`; row n belongs to file n % 2, and ids are text."""
    users, items, times = zip(*rows, strict=True)
    number = np.arange(len(rows))
    table = pa.table(
        {
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{item}" for item in items],
            "rating": pa.array([1.0 + item for item in items], pa.float32()),
            "timestamp": pa.array(times, pa.int64()),
            "row": number,
        }
    )
    coded = CodedRows(("user_id", "item_id"), HELD)
    for file in (1, 0):
        coded.add(table.filter(pa.array(number % 2 == file)), file)
    return from_rows(coded)


def configured(**changes: object) -> PrepareConfig:
    loose = {"output": "o", "reviews": ("r",), "min_user_interactions": 1, "min_item_interactions": 1}
    return PrepareConfig(**{**loose, **changes})


def histories(kept: Kept) -> list[list[tuple[int, int, int]]]:
    """(time, file, row) of the interactions of each user, in their order."""
    places = zip(kept.timestamp.tolist(), kept.file.tolist(), kept.row.tolist(), strict=True)
    found: list[list[tuple[int, int, int]]] = [[] for _ in kept.user_ids]
    for user, place in zip(kept.user_index.tolist(), places, strict=True):
        found[user].append(place)
    return found


@MANY
@given(
    ROWS, FILTERS, KEEP, st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 3]), st.sampled_from([None, 2])
)
def test_what_is_read_is_kept_or_left_out_by_a_reason(rows, filter, keep, users, items, last, sample):
    data = scanned(rows)
    config = configured(
        filter=filter,
        keep_duplicate=keep,
        min_user_interactions=users,
        min_item_interactions=items,
        last_interactions=last,
        sample_users=sample,
    )
    try:
        kept, dropped = reduce(data, config)
    except InputError:
        return
    totals = [sum(column) for column in zip(*dropped.values(), strict=True)]
    assert len(kept) + totals[0] == len(rows)
    assert len(np.unique(kept.user)) + totals[1] == len({user for user, _, _ in rows})
    assert len(np.unique(kept.item)) + totals[2] == len({item for _, item, _ in rows})
    assert all(count >= 0 for one in dropped.values() for count in one)
    if keep == "all":
        assert not any(dropped["duplicate"])
    places = set(zip(kept.file.tolist(), kept.row.tolist(), strict=True))
    assert len(places) == len(kept) and places <= {(number % 2, number) for number in range(len(rows))}


@MANY
@given(ROWS, st.integers(1, 4), st.integers(1, 4), KEEP)
def test_the_k_core_holds_and_is_the_largest(rows, users, items, keep):
    data = scanned(rows)
    core = configured(min_user_interactions=users, min_item_interactions=items, keep_duplicate=keep)
    whole, _ = reduce(data, configured(keep_duplicate=keep))
    pairs = list(zip(whole.user.tolist(), whole.item.tolist(), strict=True))
    while True:  # the plain definition: drop one too rare user or item at a time
        by_user, by_item = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        left = [(user, item) for user, item in pairs if by_user[user] >= users and by_item[item] >= items]
        if len(left) == len(pairs):
            break
        pairs = left
    if not pairs:
        with pytest.raises(InputError, match="no interaction is left"):
            reduce(data, core)
        return
    kept, _ = reduce(data, core)
    assert sorted(zip(kept.user.tolist(), kept.item.tolist(), strict=True)) == sorted(pairs)


@MANY
@given(ROWS, KEEP)
def test_of_each_user_and_item_the_first_the_last_or_all_stay(rows, keep):
    kept, _ = reduce(scanned(rows), configured(keep_duplicate=keep))
    expected: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for time, file, row in sorted((time, number % 2, number) for number, (_, _, time) in enumerate(rows)):
        expected.setdefault(rows[row][:2], []).append((time, file, row))
    chosen = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[keep]
    places = zip(kept.timestamp.tolist(), kept.file.tolist(), kept.row.tolist(), strict=True)
    assert sorted(places) == sorted(place for found in expected.values() for place in found[chosen])


@MANY
@given(ROWS, KEEP)
def test_histories_are_in_time_and_input_order_and_the_last_is_the_test(rows, keep):
    rows = [*rows, *((0, item, 3) for item in range(3))]  # a user with a test part: without any it is refused
    reduced, _ = reduce(scanned(rows), configured(keep_duplicate=keep))
    kept, _ = assign(reduced, configured(keep_duplicate=keep))
    assert len(kept.row) == len(reduced)
    cutoffs = user_cutoffs(kept)["cutoff_position"].to_pylist()
    for user, history in enumerate(histories(kept)):
        of_user = kept.user_index == user
        assert history == sorted(history)
        assert kept.position[of_user].tolist() == list(range(len(history)))
        last = [VALIDATION_PART, TEST_PART] if len(history) >= 3 else []
        assert kept.part[of_user].tolist() == [TRAIN_PART] * (len(history) - len(last)) + last
        assert cutoffs[user] == len(history) - len(last) - 1
    assert [kept.item_ids[place - 1].as_py() for place in kept.item_index] == [f"i{rows[row][1]}" for row in kept.row]
    assert [kept.user_ids[user].as_py() for user in kept.user_index] == [f"u{rows[row][0]}" for row in kept.row]


@MANY
@given(ROWS, st.floats(0.1, 0.9))
def test_a_temporal_split_never_trains_on_what_comes_later(rows, quantile):
    later = [(user, item, time + 1_600_000_000_000) for user, item, time in rows]
    reduced, _ = reduce(scanned(later), configured())
    config = configured(split="temporal", temporal_quantile=quantile)
    try:
        kept, _ = assign(reduced, config)
    except InputError:
        assert (reduced.timestamp <= np.quantile(reduced.timestamp, quantile)).all()
        return
    times = [kept.timestamp[kept.part == part] for part in (TRAIN_PART, VALIDATION_PART, TEST_PART)]
    assert sum(map(len, times)) == len(reduced)
    before = np.concatenate(times[:2])
    assert not len(before) or before.max() < times[2].min()
    for user in range(len(kept.user_ids)):
        assert (np.diff(kept.part[kept.user_index == user]) >= 0).all()


def test_new_items_by_time_and_the_histories_before_them():
    # item 5 is the newest by its first interaction; user 2 has nothing else and is dropped
    rows = [(0, 0, 1), (0, 1, 2), (0, 5, 9), (0, 2, 10), (0, 3, 11), (1, 5, 12), (1, 0, 13), (1, 1, 14), (2, 5, 15)]
    rows += [(3, 2, 0), (3, 3, 1)]
    data, _ = reduce(scanned(rows), configured())
    kept, dropped = assign(data, configured(new_items=0.2, new_items_by="time"))
    assert [one.as_py() for one in kept.item_ids] == ["i0", "i1", "i2", "i3", "i5"] and kept.new_items == 1
    assert [one.as_py() for one in kept.user_ids] == ["u0", "u1", "u3"]
    assert kept.item_index.tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert kept.position.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert kept.part.tolist() == [TRAIN_PART, TRAIN_PART, VALIDATION_PART, TEST_PART, *[TRAIN_PART] * 4]
    assert kept.new.user_index.tolist() == [0, 1] and kept.new.item_index.tolist() == [5, 5]
    assert kept.new.position.tolist() == [2, 0] and kept.new.timestamp.tolist() == [9, 12]
    assert dropped == (1, 1, 0)


@MANY
@given(ROWS, st.sampled_from([0.2, 0.5]), st.sampled_from(["seed", "time"]))
def test_no_new_item_is_in_another_part(rows, share, by):
    rows = [*rows, *((user, item, 3) for user in (0, 1) for item in range(6))]
    data, _ = reduce(scanned(rows), configured())
    try:
        kept, dropped = assign(data, configured(new_items=share, new_items_by=by))
    except InputError:
        return
    assert kept.new_items == round(share * 6)
    assert kept.item_index.max() + kept.new_items == len(kept.item_ids) == len(np.unique(data.item)) - dropped.items
    assert set(kept.item_index) | set(kept.new.item_index) == set(range(1, len(kept.item_ids) + 1))
    assert len(kept.row) + len(kept.new.position) + dropped.interactions == len(data)
    assert len(kept.user_ids) + dropped.users == len(np.unique(data.user))
    for user, item, position, time in zip(
        *[kept.new._asdict()[name] for name in ("user_index", "item_index", "position", "timestamp")], strict=True
    ):
        assert item > kept.item_index.max()
        times = kept.timestamp[kept.user_index == user]
        assert (times[:position] <= time).all() and (times[position:] >= time).all()


def test_new_items_drawn_with_the_seed():
    data, _ = reduce(scanned([(user, item, item) for user in range(3) for item in range(6)]), configured())
    drawn = {
        seed: tuple(assign(data, configured(new_items=0.3, seed=seed))[0].item_ids.to_pylist()[-2:])
        for seed in range(9)
    }
    assert drawn[0] == tuple(assign(data, configured(new_items=0.3))[0].item_ids.to_pylist()[-2:])
    assert len(set(drawn.values())) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "temporal", "test_interactions": 2}, "test_interactions: no effect on split: temporal"),
        ({"new_items_by": "time"}, "new_items_by: no effect without new_items"),
        ({"new_items": 0.2, "new_items_by": "time", "timestamps": "position"}, "needs times"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        configured(**settings)


def test_too_small_a_share_of_new_items_is_refused():
    data, _ = reduce(scanned([(0, item, item) for item in range(6)]), configured())
    with pytest.raises(InputError, match="makes 0 of 6 items new"):
        assign(data, configured(new_items=0.01))
