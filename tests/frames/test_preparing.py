"""`prepare_frame`: rows are filtered and split as by hand, frames of all libraries are alike, errors name the cell."""

import datetime
from typing import Any

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest

from raygr import prepare_frame
from raygr.config import ConfigError
from raygr.prepare.bad_rows import InputError

NAMES = {"user_id": "customer", "item_id": "sku", "timestamp": "ordered_at", "rating": "stars"}
LOOSE = {"min_user_interactions": 3, "min_item_interactions": 1}


def orders(**changes: Any) -> pd.DataFrame:
    """C9 orders 3, 1, 2 and once more 1; C10 orders 1, 2, 3, 4; C1 orders once. The rows are not in order of time."""
    rows = [
        ("C10", 2, "2024-01-02", 4.0), ("C9", 1, "2024-02-02", 5.0), ("C9", 3, "2024-02-01", 3.0),
        ("C10", 1, "2024-01-01", 1.0), ("C9", 2, "2024-02-03", None), ("C1", 1, "2024-03-01", 2.0),
        ("C10", 4, "2024-01-04", 5.0), ("C10", 3, "2024-01-03", 2.0), ("C9", 1, "2024-02-04", 1.0),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["customer", "sku", "ordered_at", "stars"]).assign(**changes)


def test_rows_are_filtered_ordered_and_split():
    frame = prepare_frame(orders(), columns=NAMES, settings=LOOSE)
    # "C10" sorts before "C9"; whole numbers are ids; the second order of item 1 is a duplicate, C1 has one order
    assert frame[["user_id", "item_id", "position", "split"]].values.tolist() == [
        ["C10", "1", 0, "train"], ["C10", "2", 1, "train"], ["C10", "3", 2, "validation"], ["C10", "4", 3, "test"],
        ["C9", "3", 0, "train"], ["C9", "1", 1, "validation"], ["C9", "2", 2, "test"],
    ]  # fmt: skip
    assert frame["rating"].tolist()[:6] == [1, 4, 2, 5, 3, 5] and np.isnan(frame["rating"][6])
    assert frame["timestamp"][4] == pd.Timestamp("2024-02-01")
    counts = frame.attrs["counts"]
    assert counts["reviews"]["kept"] == 7 and counts["reviews"]["read"] == 9
    assert counts["reviews"]["by_reason"] == {"duplicate": 1, "too_few_interactions": 1}


def test_repeats_and_positions_are_settings_as_in_the_stage():
    places = [2, 2, 1, 1, 3, 1, 4, 3, 4]
    numbered = orders(ordered_at=places).drop(columns="stars")
    names = {ours: theirs for ours, theirs in NAMES.items() if ours != "rating"}
    settings = LOOSE | {"keep_duplicate": "all", "timestamps": "position", "test_interactions": 2}
    frame = prepare_frame(numbered, columns=names, settings=settings)
    assert frame.loc[frame["user_id"] == "C9", "item_id"].tolist() == ["3", "1", "2", "1"]
    assert frame["split"].tolist() == ["train", "validation", "test", "test"] * 2
    assert frame["timestamp"].tolist() == [1, 2, 3, 4] * 2 and frame["rating"].isna().all()


def test_frames_of_all_libraries_and_types_of_time_give_the_same():
    expected = prepare_frame(orders(), columns=NAMES, settings=LOOSE)
    days = pd.to_datetime(orders()["ordered_at"])
    given = [
        orders(ordered_at=days),
        orders(ordered_at=days.astype("int64") // 10**3 if days.dt.unit == "us" else days.astype("int64")),
        orders(ordered_at=[one.to_pydatetime().replace(tzinfo=datetime.UTC) for one in days]),
        orders().set_index("customer"),
        orders().set_index(pd.Index([5] * 9)),
        orders(sku=orders()["sku"].astype("category"), customer=orders()["customer"].astype("category")),
        polars.DataFrame(orders().to_dict(orient="list")),
        pa.Table.from_pandas(orders()),
    ]
    for frame in given:
        pd.testing.assert_frame_equal(prepare_frame(frame, columns=NAMES, settings=LOOSE), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ordered_at": ["2024-01-02", "yesterday", *["2024-01-03"] * 7]},
            "'ordered_at' has 'yesterday'; a time is",
        ),
        (
            {"stars": [1, 9, *[2.0] * 7]},
            "rating_out_of_range: 1, first in row 2: column 'stars' has 9.0; ",
        ),
        ({"customer": ["C1", None, *["C2"] * 7]}, "missing_user: 1, first in row 2: column 'customer' has None"),
        ({"sku": [1.0, 2.5, *[3.0] * 7]}, "row 2: column 'customer' has 'C9' and column 'sku' has 2.5"),
        ({"sku": [1, "two", *[3] * 7]}, r"column 'sku' holds values of several types: row 2 has 'two', row 1 has 1"),
    ],
)
def test_errors_name_column_and_row(changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_frame(orders(**changes), columns=NAMES, settings=LOOSE)


def test_a_few_bad_rows_are_left_out_and_counted():
    bad = pd.concat([orders()] * 20, ignore_index=True)
    bad.loc[4, "ordered_at"] = "?"
    counts = prepare_frame(bad, columns=NAMES, settings=LOOSE).attrs["counts"]
    assert counts["reviews"]["by_reason"]["time_not_read"] == 1


def test_what_is_no_setting_or_no_column_is_refused():
    with pytest.raises(ConfigError, match=r"no setting min_user_interaction; did you mean min_user_interactions\?"):
        prepare_frame(orders(), columns=NAMES, settings={"min_user_interaction": 2})
    with pytest.raises(ConfigError, match=r"settings of prepare_frame is no .*\n.*test_interactions: Input should"):
        prepare_frame(orders(), columns=NAMES, settings={"test_interactions": 0})
    with pytest.raises(ConfigError, match=r"reviews: no column user_id, item_id, timestamp; the frame has customer"):
        prepare_frame(orders())
    with pytest.raises(ConfigError, match="our names are user_id, item_id, rating, timestamp, not user"):
        prepare_frame(orders(), columns={"user": "customer"})
    with pytest.raises(InputError, match="the frame has no rows"):
        prepare_frame(orders().iloc[:0], columns=NAMES)
    with pytest.raises(InputError, match="no interaction is left"):
        prepare_frame(orders(), columns=NAMES)
