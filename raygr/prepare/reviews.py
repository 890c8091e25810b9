"""Raw reviews, in two passes over each file: ids and numbers of every row, then the text of the kept rows.

`read_ids` yields tables of SCAN_SCHEMA, one row per raw row, refused ones with their reason;
`read_texts` yields TEXT_SCHEMA for the row numbers asked for. Formats: Amazon Reviews 2023, Amazon
2018 and 2014 (told apart line by line by their keys), MovieLens, and any Parquet, CSV or JSON-lines
table with named columns. Texts are kept as written, apart from JSON fields that hold no string.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.data.ids import bad_id_reason, id_strings
from raygr.prepare import named_columns, values
from raygr.prepare.bad_rows import Refusal, cut_snippet, limited_snippets
from raygr.prepare.config import PrepareConfig
from raygr.prepare.json_lines import as_id, as_number, as_text, decode_block, decode_line, without_html
from raygr.prepare.raw_files import Columns, Lines, read_json_lines
from raygr.prepare.times import DATE_AS_NUMBER, DECLARED, FORMS, NOT_READ, OUT_OF_RANGE, Times, checked

SCAN_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.float32()),  # null for implicit data
        ("timestamp", pa.int64()),  # milliseconds, or the position
        ("time_form", pa.string()),  # of times.FORMS; null where the format declares its unit
        ("row", pa.int64()),  # in its file, from 0
        ("reason", pa.string()),  # null for a usable row
        ("snippet", pa.string()),  # of the first refused rows
    ]
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
    names = ("title", "text", "summary", "reviewText")
    return ReviewText(*(as_text(values.get(name)) for name in names))


def has_text(config: PrepareConfig) -> bool:
    """False where no raw file needs a second reading: MovieLens has ratings only."""
    return config.format != "movielens"


def read_ids(path: str, config: PrepareConfig) -> Iterator[pa.Table]:
    """SCAN_SCHEMA of every raw row of one file, in bounded tables."""
    if config.format == "amazon":
        for lines in read_json_lines(path):
            yield amazon_ids(lines, config.rating_range)
        return
    for columns in named_columns.review_columns(path, config, REVIEW_IDS):
        yield table_ids(columns, config)


def amazon_ids(lines: Lines, rating_range: tuple[float, float]) -> pa.Table:
    if lines.refused:
        return refused_rows(lines.refused)
    decoded = decode_block(lines, IDS, repair_ids)
    at = np.array([i for i, r in enumerate(decoded) if isinstance(r, ReviewIds)], np.int64)
    records = [decoded[i] for i in at]
    known = scan_rows(
        lines.first + at,
        users=[r.user_id or r.reviewerID or None for r in records],
        items=[r.parent_asin or r.asin or None for r in records],
        ratings=floats([r.rating if r.overall is None else r.overall for r in records]),
        times=amazon_times(records),
        rating_range=rating_range,
        raw=[lines.lines[i] for i in at] if len(at) < len(decoded) else lines.lines,
    )
    reasons = {i: r for i, r in enumerate(decoded) if isinstance(r, str)}
    refused = [Refusal(lines.first + i, reason, cut_snippet(lines.lines[i])) for i, reason in reasons.items()]
    return pa.concat_tables([known, refused_rows(refused)]) if refused else known


def amazon_times(records: Sequence[ReviewIds]) -> Times:
    """Seconds of 2018 and 2014, milliseconds of 2023: the field says which."""
    seconds = floats([r.unixReviewTime for r in records])
    is_seconds = ~np.isnan(seconds)
    milliseconds = np.where(is_seconds, seconds * 1000, floats([r.timestamp for r in records]))
    return checked(milliseconds, np.where(np.isnan(milliseconds), NOT_READ, DECLARED))


def floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def table_ids(columns: Columns, config: PrepareConfig) -> pa.Table:
    """One batch of MovieLens or of a table; a rating may be empty in a table only."""
    refused = refused_rows(columns.refused)
    if not len(columns.rows):
        return refused
    table, implicit = columns.table, config.format == "table"
    users, bad_user = id_strings(table["user_id"])
    items, bad_item = id_strings(table["item_id"])
    known = scan_rows(
        columns.rows,
        users=users,
        items=items,
        ratings=values.as_ratings(table, implicit=implicit),
        times=values.as_times(table["timestamp"], config.timestamps),
        rating_range=config.rating_range,
        raw=values.RowTexts(table),
        bad_ids=bad_user | bad_item,
        bad_ids_are=bad_id_reason(table["user_id"].type, table["item_id"].type),
    )
    return pa.concat_tables([known, refused])


def scan_rows(
    rows: np.ndarray,
    *,
    users: Sequence[str | None] | pa.Array,
    items: Sequence[str | None] | pa.Array,
    ratings: np.ndarray,
    times: Times,
    rating_range: tuple[float, float],
    raw: Sequence[bytes | str],
    bad_ids: np.ndarray | bool = False,
    bad_ids_are: str = "invalid_utf8",
) -> pa.Table:
    """SCAN_SCHEMA of rows whose fields could be read; all arguments have one value per row.

    `ratings`: NaN is no number, -inf an absent one that is allowed.
    """
    users, items = pa.array(users, pa.string()), pa.array(items, pa.string())
    low, high = rating_range
    outside = ((ratings < low) | (ratings > high)) & (ratings != -np.inf)
    conditions = {
        bad_ids_are: np.broadcast_to(bad_ids, len(rows)),
        "missing_user": is_empty(users),
        "missing_item": is_empty(items),
        "rating_not_a_number": np.isnan(ratings),
        "rating_out_of_range": outside,
        **{FORMS[code]: times.form == code for code in (NOT_READ, OUT_OF_RANGE, DATE_AS_NUMBER)},
    }
    reasons, snippets = first_reasons(conditions, raw)
    return pa.table(
        [
            users,
            items,
            pa.array(ratings.astype(np.float32), mask=~np.isfinite(ratings)),
            np.where(times.form > DATE_AS_NUMBER, times.milliseconds, 0).astype(np.int64),
            form_names(times.form),
            rows,
            reasons,
            snippets,
        ],
        schema=SCAN_SCHEMA,
    )


def first_reasons(conditions: Mapping[str, np.ndarray], raw: Sequence[bytes | str]) -> tuple[pa.Array, pa.Array]:
    """Per row the name of the first condition that holds, null where none does; and snippets of some."""
    names = [None, *conditions]
    which = np.select(list(conditions.values()), range(1, len(names)), default=0)
    if not which.any():
        empty = pa.nulls(len(which), pa.string())
        return empty, empty
    reasons = [names[i] for i in which]
    return pa.array(reasons, pa.string()), pa.array(limited_snippets(reasons, raw), pa.string())


def form_names(form: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(form.astype(np.int8), FORMS, mask=form <= DECLARED).cast(pa.string())


def is_empty(ids: pa.Array) -> np.ndarray:
    return pc.equal(ids.fill_null(""), "").to_numpy(zero_copy_only=False)


def refused_rows(refused: Sequence[Refusal]) -> pa.Table:
    """SCAN_SCHEMA of rows that could not be read at all."""
    reasons = [r.reason for r in refused]
    filled = {
        "row": [r.row for r in refused],
        "reason": reasons,
        "snippet": limited_snippets(reasons, [r.snippet for r in refused]),
    }
    nothing = [None] * len(refused)
    return pa.table({name: filled.get(name, nothing) for name in SCAN_SCHEMA.names}, schema=SCAN_SCHEMA)


def read_texts(path: str, config: PrepareConfig, rows: np.ndarray) -> Iterator[pa.Table]:
    """TEXT_SCHEMA of the rows with these sorted numbers, uncut, in bounded tables."""
    if config.format == "amazon":
        for lines in read_json_lines(path):
            yield amazon_texts(lines, rows)
        return
    for columns in named_columns.review_columns(path, config, ("item_id", *REVIEW_TEXTS)):
        yield table_texts(columns, rows)


def amazon_texts(lines: Lines, rows: np.ndarray) -> pa.Table:
    kept = within(rows, lines.first, lines.first + len(lines.lines))
    decoded = [decode_line(lines.lines[row - lines.first], TEXT, repair_text) for row in kept.tolist()]
    titles = [without_html(r.title or r.summary or "") for r in decoded]
    texts = [without_html(r.text or r.reviewText or "") for r in decoded]
    return pa.table([kept, titles, texts, np.zeros(len(kept), bool)], schema=TEXT_SCHEMA)


def within(rows: np.ndarray, start: int, end: int) -> np.ndarray:
    """The sorted row numbers in [start, end)."""
    return rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]


def table_texts(columns: Columns, rows: np.ndarray) -> pa.Table:
    chosen = np.isin(columns.rows, rows, assume_unique=True)
    table = columns.table.filter(chosen) if len(chosen) else columns.table
    kept = columns.rows[chosen]
    texts, repaired = zip(*(values.as_texts(table, name, len(kept)) for name in REVIEW_TEXTS), strict=True)
    return pa.table([kept, *texts, np.logical_or.reduce(repaired)], schema=TEXT_SCHEMA)
