"""Frames of pandas, polars or Arrow, and `prepare_frame`: raw interactions -> filtered and split ones, in memory.

The stage's own code reads, filters and splits the rows, so the results are those of `raygr prepare`. Errors name the
column and the row, counted from 1.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from raygr.config import ConfigError, check_config, did_you_mean
from raygr.data.ids import complete_ids
from raygr.prepare import output_tables
from raygr.prepare.bad_rows import REMEDIES, InputError, Tally, usable
from raygr.prepare.coded_rows import HELD, CodedRows
from raygr.prepare.column_files import PLAIN_NAMES
from raygr.prepare.config import PrepareConfig
from raygr.prepare.raw_files import Columns
from raygr.prepare.reviews import scan_table
from raygr.prepare.run_counts import kept_and_counts

# Fields of PrepareConfig that have a meaning for a frame of interactions; the others are about files and texts.
PREPARE_SETTINGS = (
    "timestamps", "rating_range", "keep_duplicate", "filter", "min_user_interactions", "min_item_interactions",
    "sample_users", "last_interactions", "split", "test_interactions", "temporal_quantile", "max_bad_fraction", "seed",
)  # fmt: skip
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Frame(Protocol):
    """A frame of pandas, polars or Arrow."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


def prepare_frame(
    reviews: Frame, *, columns: Mapping[str, str] = NOTHING, settings: Mapping[str, Any] = NOTHING
) -> pd.DataFrame:
    """Filters and splits interactions as `raygr prepare` does.

    `reviews` has the columns user_id, item_id, timestamp and, if there are ratings, rating; `columns` maps these names
    to yours. `settings` are those of `raygr prepare` in PREPARE_SETTINGS, such as `{"min_item_interactions": 3}`.
    Returns user_id, item_id, rating (NaN where there is none), timestamp (UTC; a whole number with `timestamps:
    position`), position (0 is the user's oldest) and split (train, validation or test), sorted by user and position.
    Its `attrs["counts"]` say how many rows were left out, and why. ConfigError or InputError says what is wrong.
    """
    unknown = [name for name in settings if name not in PREPARE_SETTINGS]
    if unknown:
        like = did_you_mean(unknown[0], PREPARE_SETTINGS)
        raise ConfigError(f"prepare_frame: no setting {unknown[0]}{like}; settings are {', '.join(PREPARE_SETTINGS)}")
    given = {**settings, "output": ".", "reviews": (), "format": "table"}
    config = check_config(PrepareConfig, given, source="settings of prepare_frame")
    table = renamed(arrow_table(reviews, "reviews"), columns)
    scan = scan_table(Columns(np.arange(len(table)), table, []), config=config)
    tally = Tally([""])  # one file, without a name
    tally.add(scan, 0)
    check_rows(tally, table, columns, config.max_bad_fraction)
    rows = CodedRows(("user_id", "item_id"), HELD)
    rows.add(usable(scan), 0)
    kept, counts = kept_and_counts(rows, tally, config)
    (found,) = output_tables.interactions(kept, len(kept.row))
    times = found["timestamp"].cast(pa.timestamp("ms")) if config.timestamps == "time" else found["timestamp"]
    ids = {"user_id": kept.user_ids.take(kept.user_index), "item_id": kept.item_ids.take(kept.item_index - 1)}
    others = {"rating": found["rating"], "timestamp": times, "position": found["position"], "split": found["split"]}
    frame = pa.table({**ids, **others}).to_pandas()
    frame.attrs["counts"] = counts
    return frame


def arrow_table(frame: Frame, what: str) -> pa.Table:
    """The frame as an Arrow table; a named index of pandas is a column. ValueError for a column of several types."""
    try:
        return pa.table(frame)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        for name, column in frame.items() if isinstance(frame, pd.DataFrame) else ():
            there = zip(column, column.notna(), strict=True)
            values = [(row, value) for row, (value, is_there) in enumerate(there, start=1) if is_there]
            other = next(((row, value) for row, value in values if type(value) is not type(values[0][1])), None)
            if other:
                raise ValueError(
                    f"{what}: column {name!r} holds values of several types: row {other[0]} has {other[1]!r}, row "
                    f"{values[0][0]} has {values[0][1]!r}; convert it, such as with .astype(str)"
                ) from None
        raise ValueError(f"{what}: {'; '.join(map(str, error.args))}") from None


def renamed(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """The columns of PLAIN_NAMES under these names; ConfigError where one is missing."""
    unknown = [name for name in columns if name not in PLAIN_NAMES]
    if unknown:
        raise ConfigError(f"columns: our names are {', '.join(PLAIN_NAMES)}, not {', '.join(unknown)}")
    wanted = {ours: columns.get(ours, ours) for ours in PLAIN_NAMES}
    found = {ours: table[theirs] for ours, theirs in wanted.items() if theirs in table.column_names}
    absent = [name for name in PLAIN_NAMES if name not in found and (name != "rating" or name in columns)]
    if absent:
        raise ConfigError(
            f"reviews: no column {', '.join(wanted[name] for name in absent)}; the frame has "
            f"{', '.join(table.column_names)}: name yours, such as columns={{{absent[0]!r}: ...}}"
        )
    if "rating" in found and pa.types.is_floating(found["rating"].type):  # NaN is how frames leave a rating out
        found["rating"] = pc.if_else(pc.is_nan(found["rating"]), None, found["rating"])
    return pa.table(found)


def check_rows(tally: Tally, table: pa.Table, columns: Mapping[str, str], max_bad_fraction: float) -> None:
    """InputError where no row is usable, or too many are not: the first row of each reason with its value."""
    bad = tally.by_reason.total()
    if not tally.read:
        raise InputError("reviews: the frame has no rows")
    if bad <= max_bad_fraction * tally.read and bad < tally.read:
        return
    lines = []
    for reason, (first, *_) in sorted(tally.examples.items()):
        values = [
            f"column {columns.get(name, name)!r} has {table[name][first.line - 1].as_py()!r}"
            for name in columns_of(reason)
        ]
        remedy = f"; {REMEDIES[reason]}" if reason in REMEDIES else ""
        lines.append(
            f"  {reason}: {tally.by_reason[reason]}, first in row {first.line}: {' and '.join(values)}{remedy}"
        )
    raise InputError(
        f"reviews: {bad} of {tally.read} rows are bad, more than max_bad_fraction={max_bad_fraction}:\n"
        + "\n".join(lines)
    )


def columns_of(reason: str) -> tuple[str, ...]:
    """Our names of the columns that a reason of scan_reviews is about."""
    match reason.split("_"):
        case ["missing", which]:
            return (f"{which}_id",)
        case ["rating", *_]:
            return ("rating",)
        case ["time" | "date", *_]:
            return ("timestamp",)
    return ("user_id", "item_id")


def check_names(table: pa.Table, names: Sequence[str], what: str) -> None:
    absent = [name for name in names if name not in table.column_names]
    if absent or not len(table):
        wrong = f"no column {', '.join(absent)}" if absent else "no rows"
        raise ConfigError(f"{what}: {wrong}; the frame has the columns {', '.join(table.column_names)}")


def column_ids(table: pa.Table, name: str, what: str) -> np.ndarray:
    return complete_ids(table[name], f"{what}: column {name!r}").to_numpy().astype(str)
