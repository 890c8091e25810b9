"""Raw item metadata, in two passes over each file: every row's item id, then the texts of the kept rows.

`read_item_ids` yields SCAN_SCHEMA (item_id, row and reason are set), `read_item_texts` yields
ITEM_TEXT_SCHEMA for the row numbers asked for. Whitespace in Amazon's texts is collapsed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from raygr.data.ids import bad_id_reason, id_strings
from raygr.prepare import named_columns, values
from raygr.prepare.bad_rows import Refusal, cut_snippet, limited_snippets
from raygr.prepare.config import PrepareConfig
from raygr.prepare.json_lines import as_id, as_number, as_text, decode_block, decode_line, decode_loosely
from raygr.prepare.raw_files import Columns, Lines, read_json_lines
from raygr.prepare.reviews import SCAN_SCHEMA, is_empty, refused_rows, within

TEXT_NAMES = ("title", "description", "categories", "details")
ITEM_TEXT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        *((name, pa.string()) for name in TEXT_NAMES),
        ("rating", pa.float32()),  # the metadata's own average; null where it has none
        ("rating_count", pa.int32()),
        ("repaired", pa.bool_()),  # a text was no UTF-8, or holds U+FFFD
    ]
)


class ItemId(msgspec.Struct, gc=False):
    parent_asin: str | None = None
    asin: str | None = None


class ItemTexts(msgspec.Struct, gc=False):
    """Fields of 2023, and of 2018 and 2014 (category, feature, brand); any may hold any type."""

    title: Any = None
    description: Any = None
    features: Any = None
    feature: Any = None
    categories: Any = None
    category: Any = None
    main_category: Any = None
    details: Any = None
    brand: Any = None
    average_rating: Any = None
    rating_number: Any = None


MAX_COUNT, MAX_RATING = 2**31 - 1, 1e6
IDS, TEXTS = msgspec.json.Decoder(ItemId), msgspec.json.Decoder(ItemTexts)


def repair_id(values: Mapping[str, Any]) -> ItemId:
    return ItemId(parent_asin=as_id(values.get("parent_asin")), asin=as_id(values.get("asin")))


def repair_texts(values: Mapping[str, Any]) -> ItemTexts:
    return ItemTexts(*(values.get(name) for name in ItemTexts.__struct_fields__))


def read_item_ids(path: str, config: PrepareConfig) -> Iterator[pa.Table]:
    """SCAN_SCHEMA of every metadata row of one file, in bounded tables."""
    if config.format == "amazon":
        for lines in read_json_lines(path):
            yield amazon_item_ids(lines)
        return
    for columns in named_columns.item_columns(path, config, ("item_id",)):
        yield table_item_ids(columns)


def amazon_item_ids(lines: Lines) -> pa.Table:
    if lines.refused:
        return refused_rows(lines.refused)
    ids: list[str | None] = []
    rows: list[int] = []
    refused: list[Refusal] = []
    for row, record in enumerate(decode_block(lines, IDS, repair_id), start=lines.first):
        if isinstance(record, ItemId):
            ids.append(record.parent_asin or record.asin)
            rows.append(row)
        elif record is not None:
            refused.append(Refusal(row, record, cut_snippet(lines.lines[row - lines.first])))
    raw = [lines.lines[row - lines.first] for row in rows]
    known = item_rows(np.array(rows, np.int64), pa.array(ids, pa.string()), raw, np.full(len(rows), ""))
    return pa.concat_tables([known, refused_rows(refused)])


def table_item_ids(columns: Columns) -> pa.Table:
    refused = refused_rows(columns.refused)
    if not len(columns.rows):
        return refused
    column = columns.table["item_id"]
    ids, is_bad = id_strings(column)
    bad = np.where(is_bad, bad_id_reason(column.type), "")
    return pa.concat_tables([item_rows(columns.rows, ids, values.RowTexts(columns.table), bad), refused])


def item_rows(rows: np.ndarray, ids: pa.Array, raw: Any, bad: np.ndarray) -> pa.Table:
    """SCAN_SCHEMA of metadata rows; `raw` holds what a refused row shows, `bad` why its id is none, or ""."""
    named = np.where((bad == "") & is_empty(ids), "missing_item", bad).tolist()
    reasons = [name or None for name in named]
    filled = {"item_id": ids, "row": rows, "reason": reasons, "snippet": limited_snippets(reasons, raw)}
    nothing = pa.nulls(len(rows))
    return pa.table({name: filled.get(name, nothing) for name in SCAN_SCHEMA.names}).cast(SCAN_SCHEMA)


def read_item_texts(path: str, config: PrepareConfig, rows: np.ndarray) -> Iterator[pa.Table]:
    """ITEM_TEXT_SCHEMA of the rows with these sorted numbers, uncut, in bounded tables."""
    if config.format == "amazon":
        for lines in read_json_lines(path):
            yield amazon_item_texts(lines, rows)
        return
    for columns in named_columns.item_columns(path, config, ("item_id", *TEXT_NAMES)):
        yield table_item_texts(columns, rows)


def amazon_item_texts(lines: Lines, rows: np.ndarray) -> pa.Table:
    kept = within(rows, lines.first, lines.first + len(lines.lines))
    decoded = [decode_line(lines.lines[row - lines.first], TEXTS, repair_texts) for row in kept.tolist()]
    texts = [[text_of(record) for record in decoded] for text_of in (title, description, categories, details)]
    ratings = [within_or_none(record.average_rating, MAX_RATING) for record in decoded]
    counts = [within_or_none(record.rating_number, MAX_COUNT) for record in decoded]
    counts = [count if count is None else int(count) for count in counts]
    return pa.table([kept, *texts, ratings, counts, np.zeros(len(kept), bool)], schema=ITEM_TEXT_SCHEMA)


def within_or_none(value: Any, highest: float) -> float | None:
    """The number that it is; one that is negative or too large is as unknown as none."""
    number = as_number(value)
    return number if number is not None and 0 <= number <= highest else None


def title(record: ItemTexts) -> str:
    return as_text(record.title)


def description(record: ItemTexts) -> str:
    """The description; the feature list stands in where an item has none."""
    return as_text(record.description) or as_text(record.features or record.feature)


def categories(record: ItemTexts) -> str:
    return as_text(record.categories or record.category) or as_text(record.main_category)


def details(record: ItemTexts) -> str:
    """ "key: value" pairs, of an object or of one written as a JSON string; the brand of 2018 first."""
    pairs = record.details
    if isinstance(pairs, str) and pairs.lstrip().startswith("{"):
        pairs = decode_loosely(pairs) or pairs
    brand = as_text(record.brand)
    return f"Brand: {brand} {as_text(pairs)}".rstrip() if brand else as_text(pairs)


def table_item_texts(columns: Columns, rows: np.ndarray) -> pa.Table:
    chosen = np.isin(columns.rows, rows, assume_unique=True)
    table = columns.table.filter(chosen) if len(chosen) else columns.table
    kept = columns.rows[chosen]
    texts, repaired = zip(*(values.as_texts(table, name, len(kept)) for name in TEXT_NAMES), strict=True)
    nothing = [None] * len(kept)
    columns = [kept, *texts, nothing, nothing, np.logical_or.reduce(repaired)]
    return pa.table(columns, schema=ITEM_TEXT_SCHEMA)
