"""Raw reviews to rows: ids and numbers, and texts.

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
from raygr.prepare.json_lines import as_id, as_number, as_text, decode_line, without_html
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.raw_files import Columns, Lines, read_json_lines
from raygr.prepare.scanned_rows import Scanned, is_empty, scan_columns, scan_lines, scan_rows
from raygr.prepare.timestamps import DATE_AS_NUMBER, DECLARED, FORMS, NOT_READ, OUT_OF_RANGE, Times, checked, read_times

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


class AmazonReview(ReviewIds, gc=False):
    """All fields, for lines whose fields all have their usual types."""

    title: str | None = None
    text: str | None = None
    summary: str | None = None
    reviewText: str | None = None


IDS, TEXT, REVIEWS = (msgspec.json.Decoder(kind) for kind in (ReviewIds, ReviewText, AmazonReview))


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


def read_reviews(path: str, config: PrepareConfig, cpus: Cpus) -> Iterator[Scanned]:
    """Every raw row of one file in tables of bounded size, with TEXT_SCHEMA of the readable rows."""
    if config.format == "amazon":
        return cpus.in_processes(partial(scan_amazon_lines, config=config), read_json_lines(path))
    return scan_columns(review_columns(path, config), partial(scan_table, config=config), REVIEW_TEXTS, cpus)


def scan_amazon_lines(lines: Lines, *, config: PrepareConfig) -> Scanned:
    return scan_lines(lines, REVIEWS, decode_review, partial(scan_amazon, config=config))


def decode_review(line: bytes) -> AmazonReview | str | None:
    """`decode_line` of one review; ids or texts of another type than usual do not change the others."""
    ids = decode_line(line, IDS, repair_ids)
    text = decode_line(line, TEXT, repair_text)
    if isinstance(ids, ReviewIds) and isinstance(text, ReviewText):
        return AmazonReview(**msgspec.structs.asdict(ids), **msgspec.structs.asdict(text))
    return text if isinstance(ids, ReviewIds) else ids  # type: ignore[return-value]  # a reason or None


def scan_amazon(
    records: Sequence[AmazonReview], rows: np.ndarray, raw: Sequence[bytes], *, config: PrepareConfig
) -> Scanned:
    scanned = scan_reviews(
        rows,
        users=pa.array([r.user_id or r.reviewerID or None for r in records], pa.string()),
        items=pa.array([r.parent_asin or r.asin or None for r in records], pa.string()),
        ratings=floats([r.rating if r.overall is None else r.overall for r in records]),
        times=amazon_times(records),
        rating_range=config.rating_range,
        show=lambda at: raw[at],
    )
    texts = {
        "review_title": pa.array([without_html(r.title or r.summary or "") for r in records], pa.string()),
        "review_text": pa.array([without_html(r.text or r.reviewText or "") for r in records], pa.string()),
    }
    return Scanned(scanned, pa.table({"row": rows, **texts, "repaired": np.zeros(len(rows), bool)}))


def amazon_times(records: Sequence[AmazonReview]) -> Times:
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
    columns = {
        "user_id": users,
        "item_id": items,
        "rating": pa.array(ratings.astype(np.float32), mask=~np.isfinite(ratings)),
        "timestamp": np.where(times.form > DATE_AS_NUMBER, times.milliseconds, 0).astype(np.int64),
        "time_form": pa.array(times.form, mask=times.form <= DECLARED),
    }
    return scan_rows(rows, columns, conditions, show)
