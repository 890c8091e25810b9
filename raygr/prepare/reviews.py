"""Raw reviews in two passes: ids and numbers of every row, then the texts of the kept rows.

Formats: Amazon Reviews 2023, Amazon 2018 and 2014 (told apart line by line by their keys), MovieLens, and tables with
named columns as Parquet, CSV or JSON lines. Tables keep their texts as written, apart from JSON fields that hold no
string; HTML in Amazon's texts becomes plain text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from raygr.data.ids import bad_id_reason, id_strings
from raygr.prepare.column_files import review_columns
from raygr.prepare.column_values import as_ratings, as_strings, plain, row_text
from raygr.prepare.config import PrepareConfig
from raygr.prepare.json_lines import as_id, as_number, as_text, without_html
from raygr.prepare.raw_files import Columns
from raygr.prepare.timestamps import DATE_AS_NUMBER, DECLARED, FORMS, NOT_READ, OUT_OF_RANGE, Times, checked, read_times
from raygr.prepare.two_passes import (
    is_empty,
    read_column_texts,
    read_json_texts,
    scan_columns,
    scan_json_lines,
    scan_rows,
)

REVIEW_IDS = ("user_id", "item_id", "rating", "timestamp")
REVIEW_TEXTS = ("review_title", "review_text")
TEXT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        *((name, pa.string()) for name in REVIEW_TEXTS),
        ("repaired", pa.bool_()),  # a text was no UTF-8, or holds U+FFFD
    ]
)


class ReviewIds(msgspec.Struct, gc=False):
    """The fields of 2023 (first four), and of 2018 and 2014."""

    user_id: str | None = None
    parent_asin: str | None = None
    timestamp: float | None = None  # milliseconds
    rating: float | None = None
    reviewerID: str | None = None
    asin: str | None = None
    unixReviewTime: float | None = None  # seconds
    overall: float | None = None


class ReviewText(msgspec.Struct, gc=False):
    title: str | None = None
    text: str | None = None
    summary: str | None = None
    reviewText: str | None = None


IDS, TEXT = msgspec.json.Decoder(ReviewIds), msgspec.json.Decoder(ReviewText)


def repair_ids(values: Mapping[str, Any]) -> ReviewIds:
    return ReviewIds(
        user_id=as_id(values.get("user_id")),
        parent_asin=as_id(values.get("parent_asin")),
        timestamp=as_number(values.get("timestamp")),
        rating=as_number(values.get("rating")),
        reviewerID=as_id(values.get("reviewerID")),
        asin=as_id(values.get("asin")),
        unixReviewTime=as_number(values.get("unixReviewTime")),
        overall=as_number(values.get("overall")),
    )


def repair_text(values: Mapping[str, Any]) -> ReviewText:
    return ReviewText(*(as_text(values.get(name)) for name in ReviewText.__struct_fields__))


# --- first pass -----------------------------------------------------------------------------------


def read_ids(path: str, config: PrepareConfig) -> Iterator[pa.Table]:
    """SCAN_SCHEMA of every raw row of one file, in tables of bounded size."""
    if config.format == "amazon":
        return scan_json_lines(path, IDS, repair_ids, partial(scan_amazon, config=config))
    return scan_columns(review_columns(path, config, REVIEW_IDS), partial(scan_table, config=config))


def scan_amazon(records: list[ReviewIds], rows: np.ndarray, raw: list[bytes], *, config: PrepareConfig) -> pa.Table:
    return scan_reviews(
        rows,
        users=pa.array([r.user_id or r.reviewerID or None for r in records], pa.string()),
        items=pa.array([r.parent_asin or r.asin or None for r in records], pa.string()),
        ratings=floats([r.rating if r.overall is None else r.overall for r in records]),
        times=amazon_times(records),
        rating_range=config.rating_range,
        show=lambda at: raw[at],
    )


def amazon_times(records: Sequence[ReviewIds]) -> Times:
    """Seconds in 2018 and 2014, milliseconds in 2023; the name of the field says which."""
    seconds = floats([r.unixReviewTime for r in records])
    is_seconds = ~np.isnan(seconds)
    milliseconds = np.where(is_seconds, seconds * 1000, floats([r.timestamp for r in records]))
    return checked(milliseconds, np.where(np.isnan(milliseconds), NOT_READ, DECLARED))


def floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def scan_table(columns: Columns, *, config: PrepareConfig) -> pa.Table:
    """One batch of MovieLens or of a table; only a table may leave a rating empty."""
    table = columns.table
    users, bad_user = id_strings(table["user_id"])
    items, bad_item = id_strings(table["item_id"])
    times = plain(table["timestamp"])
    return scan_reviews(
        columns.rows,
        users=users,
        items=items,
        ratings=as_ratings(table, implicit=config.format == "table"),
        times=read_times(as_strings(times)[0] if pa.types.is_binary(times.type) else times, config.timestamps),
        rating_range=config.rating_range,
        show=lambda at: row_text(table, at),
        bad_ids={bad_id_reason(table["user_id"].type, table["item_id"].type): bad_user | bad_item},
    )


def scan_reviews(
    rows: np.ndarray,
    *,
    users: pa.Array,
    items: pa.Array,
    ratings: np.ndarray,
    times: Times,
    rating_range: tuple[float, float] | None,
    show: Callable[[int], bytes | str],
    bad_ids: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> pa.Table:
    """SCAN_SCHEMA of reviews that could be read; all arguments have one value per row.

    `ratings`: NaN stands for a value that is no number, -inf for an absent rating that is allowed.
    `bad_ids`: the reason for which ids are refused, and the mask of their rows.
    """
    assert rating_range is not None  # PrepareConfig replaces None by the range of its format
    low, high = rating_range
    conditions = {
        **bad_ids,
        "missing_user": is_empty(users),
        "missing_item": is_empty(items),
        "rating_not_a_number": np.isnan(ratings),
        "rating_out_of_range": ((ratings < low) | (ratings > high)) & (ratings != -np.inf),
        **{FORMS[code]: times.form == code for code in (NOT_READ, OUT_OF_RANGE, DATE_AS_NUMBER)},
    }
    forms = pa.DictionaryArray.from_arrays(times.form.astype(np.int8), FORMS, mask=times.form <= DECLARED)
    columns = {
        "user_id": users,
        "item_id": items,
        "rating": pa.array(ratings.astype(np.float32), mask=~np.isfinite(ratings)),
        "timestamp": np.where(times.form > DATE_AS_NUMBER, times.milliseconds, 0).astype(np.int64),
        "time_form": forms.cast(pa.string()),
    }
    return scan_rows(rows, columns, conditions, show)


# --- second pass ----------------------------------------------------------------------------------


def has_text(config: PrepareConfig) -> bool:
    """False for MovieLens, which has ratings only: its files need no second pass."""
    return config.format != "movielens"


def read_texts(path: str, config: PrepareConfig, rows: np.ndarray) -> Iterator[pa.Table]:
    """TEXT_SCHEMA of the rows with these sorted numbers, uncut, in tables of bounded size."""
    if config.format == "amazon":
        return read_json_texts(path, rows, TEXT, repair_text, amazon_texts, TEXT_SCHEMA)
    return read_column_texts(review_columns(path, config, ("item_id", *REVIEW_TEXTS)), rows, REVIEW_TEXTS, TEXT_SCHEMA)


def amazon_texts(records: Sequence[ReviewText]) -> dict[str, list[str]]:
    return {
        "review_title": [without_html(r.title or r.summary or "") for r in records],
        "review_text": [without_html(r.text or r.reviewText or "") for r in records],
    }
