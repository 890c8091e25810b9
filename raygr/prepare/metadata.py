"""Raw item metadata to rows: item ids, and texts. Amazon's lines are kept whole until their texts are needed.

Whitespace in Amazon's texts is collapsed.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from raygr.data.ids import bad_id_reason, id_strings
from raygr.prepare.column_files import item_columns
from raygr.prepare.column_values import row_text
from raygr.prepare.config import PrepareConfig
from raygr.prepare.json_lines import as_id, as_number, as_text, decode_line, decode_loosely
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.raw_files import Columns, Lines, read_json_lines
from raygr.prepare.scanned_rows import Scanned, filled, is_empty, scan_columns, scan_lines, scan_rows

TEXT_NAMES = ("title", "description", "categories", "details")
ITEM_TEXT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        *((name, pa.string()) for name in TEXT_NAMES),
        ("rating", pa.float32()),  # average that the metadata states; null where it states none
        ("rating_count", pa.int32()),
        ("repaired", pa.bool_()),  # a text was no UTF-8, or holds U+FFFD
    ]
)


class ItemId(msgspec.Struct, gc=False):
    parent_asin: str | None = None
    asin: str | None = None


class ItemTexts(msgspec.Struct, gc=False):
    """Fields of 2023, and of 2018 and 2014 (category, feature, brand); each may hold any type."""

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


def read_items(path: str, config: PrepareConfig, cpus: Cpus) -> Iterator[Scanned]:
    """Every metadata row of one file, in tables of bounded size; `item_texts` makes ITEM_TEXT_SCHEMA from the texts."""
    if config.format == "amazon":
        return cpus.in_processes(scan_amazon_item_lines, read_json_lines(path))
    return scan_columns(item_columns(path, config), scan_item_table, TEXT_NAMES, cpus)


def scan_amazon_item_lines(lines: Lines) -> Scanned:
    return scan_lines(lines, IDS, partial(decode_line, decoder=IDS, repair=repair_id), scan_amazon_items)


def scan_amazon_items(records: Sequence[ItemId], rows: np.ndarray, raw: Sequence[bytes]) -> Scanned:
    ids = pa.array([record.parent_asin or record.asin for record in records], pa.string())
    scanned = scan_rows(rows, {"item_id": ids}, {"missing_item": is_empty(ids)}, lambda at: raw[at])
    return Scanned(scanned, pa.table({"row": rows, "line": pa.array(raw, pa.binary())}))


def scan_item_table(columns: Columns) -> pa.Table:
    column = columns.table["item_id"]
    ids, is_bad = id_strings(column)
    conditions = {bad_id_reason(column.type): is_bad, "missing_item": is_empty(ids)}
    return scan_rows(columns.rows, {"item_id": ids}, conditions, lambda at: row_text(columns.table, at))


def item_texts(texts: pa.Table) -> pa.Table:
    """ITEM_TEXT_SCHEMA of texts of `read_items`."""
    found = {name: texts[name] for name in texts.column_names}
    if "line" in found:
        records = [decode_line(line, TEXTS, repair_texts) for line in texts["line"].to_pylist()]
        found |= amazon_item_texts(records) | {"repaired": np.zeros(len(texts), bool)}
    return filled(ITEM_TEXT_SCHEMA, found, len(texts))


def amazon_item_texts(records: Sequence[Any]) -> dict[str, list[Any]]:
    counts = [within_or_none(record.rating_number, MAX_COUNT) for record in records]
    return {
        "title": [as_text(record.title) for record in records],
        "description": [description(record) for record in records],
        "categories": [categories(record) for record in records],
        "details": [details(record) for record in records],
        "rating": [within_or_none(record.average_rating, MAX_RATING) for record in records],
        "rating_count": [None if count is None else int(count) for count in counts],
    }


def within_or_none(value: object, highest: float) -> float | None:
    """The value as a number; None where it is no number, negative or larger than `highest`."""
    number = as_number(value)
    return number if number is not None and 0 <= number <= highest else None


def description(record: ItemTexts) -> str:
    """The description, or the list of features where an item has no description."""
    return as_text(record.description) or as_text(record.features or record.feature)


def categories(record: ItemTexts) -> str:
    return as_text(record.categories or record.category) or as_text(record.main_category)


def details(record: ItemTexts) -> str:
    """The brand of 2018, then "key: value" pairs of an object, which may be written as a JSON string."""
    pairs = record.details
    if isinstance(pairs, str) and pairs.lstrip().startswith("{"):
        pairs = decode_loosely(pairs) or pairs
    brand = as_text(record.brand)
    return f"Brand: {brand} {as_text(pairs)}".rstrip() if brand else as_text(pairs)
