"""Kept interactions and texts -> tables of the pipeline's schemas: pure functions on Arrow tables."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.prepare import metadata, selection, splits
from raygr.prepare.selection import Kept
from raygr.schema import ITEM_SCHEMA, REVIEW_SCHEMA


def kept_table(kept: Kept) -> pa.Table:
    """The numbers of REVIEW_SCHEMA, with `part`, `file` and `row`."""
    return pa.table(
        {
            "user_index": kept.user_index,
            "item_index": kept.item_index,
            "position": kept.position,
            "rating": nullable(kept.rating),
            "timestamp": kept.timestamp,
            "part": kept.part,
            "file": kept.file,
            "row": kept.row,
        }
    )


def nullable(rating: np.ndarray) -> pa.Array:
    return pa.array(rating, mask=np.isnan(rating))


def review_part(rows: pa.Table, titles: pa.Array, texts: pa.Array) -> pa.Table:
    """REVIEW_SCHEMA of rows of `kept_table` with their texts."""
    columns = {name: rows[name] for name in ("user_index", "item_index", "position", "rating", "timestamp")}
    parts = part_names(rows["part"].to_numpy())
    return pa.table({**columns, "split": parts, "review_title": titles, "review_text": texts}).cast(REVIEW_SCHEMA)


def part_names(part: np.ndarray) -> pa.Array:
    return pa.DictionaryArray.from_arrays(part, pa.array(splits.PARTS)).cast(pa.string())


def rows_of_file(table: pa.Table, file: int) -> pa.Table:
    """The rows of one file of a table sorted by (file, row)."""
    start, end = np.searchsorted(table["file"].to_numpy(), [file, file + 1])
    return table.slice(start, end - start)


def cut_texts(texts: pa.ChunkedArray, limit: int) -> tuple[pa.ChunkedArray, int]:
    """Texts of at most `limit` characters, and how many were longer."""
    longer = pc.sum(pc.greater(pc.utf8_length(texts), limit)).as_py() or 0
    return (pc.utf8_slice_codeunits(texts, 0, limit) if longer else texts), longer


def item_numbers(kept: Kept) -> pa.Table:
    """ITEM_SCHEMA without its texts, sorted by item_index from 1; all_* are means over all parts."""
    train = kept.part == splits.TRAIN_PART
    train_rating, train_count = selection.item_ratings(kept, train)
    all_rating, all_count = selection.item_ratings(kept, np.ones_like(train))
    return pa.table(
        {
            "item_index": pa.array(np.arange(1, len(kept.item_ids) + 1, dtype=np.int32)),
            "item_id": kept.item_ids,
            "train_rating": train_rating,
            "train_rating_count": train_count,
            "all_rating": all_rating,
            "all_rating_count": all_count,
        }
    )


def item_part(numbers: pa.Table, texts: pa.Table, limit: int) -> tuple[pa.Table, int]:
    """ITEM_SCHEMA of items with metadata, and how many texts were cut; the metadata's own average wins."""
    cut = {name: cut_texts(texts[name], limit) for name in metadata.TEXT_NAMES}
    own = pc.is_valid(texts["rating"])
    columns = {
        **{name: numbers[name] for name in ("item_index", "item_id", "train_rating", "train_rating_count")},
        **{name: text for name, (text, _) in cut.items()},
        "all_rating": pc.if_else(own, texts["rating"], numbers["all_rating"]),
        "all_rating_count": pc.if_else(own, texts["rating_count"].fill_null(0), numbers["all_rating_count"]),
    }
    table = pa.table({name: columns[name] for name in ITEM_SCHEMA.names}).cast(ITEM_SCHEMA)
    return table, sum(count for _, count in cut.values())


def bare_items(numbers: pa.Table) -> pa.Table:
    """ITEM_SCHEMA of items without metadata: empty texts."""
    empty = pa.array([""] * numbers.num_rows, pa.string())
    texts = {name: empty for name in metadata.TEXT_NAMES}
    columns = {**{name: numbers[name] for name in numbers.column_names}, **texts}
    return pa.table({name: columns[name] for name in ITEM_SCHEMA.names}).cast(ITEM_SCHEMA)


def count_without_text(items: pa.Table) -> int:
    """Items of ITEM_SCHEMA whose title and other texts are all blank."""
    together = pc.binary_join_element_wise(*(items[name] for name in metadata.TEXT_NAMES), "")
    return pc.sum(pc.equal(pc.utf8_trim_whitespace(together), "")).as_py() or 0


def statistics(kept: Kept) -> dict[str, float]:
    """Sizes as in the paper's Table 1, history lengths, and the filled share of the user-item matrix."""
    users, items, rows = len(kept.user_ids), len(kept.item_ids), len(kept.row)
    lengths = np.bincount(kept.user_index, minlength=users)
    pairs = len(np.unique(kept.user_index.astype(np.int64) * items + kept.item_index - 1))
    return {
        "users": users,
        "items": items,
        "reviews": rows,
        "mean_history": float(lengths.mean()),
        "median_history": float(np.median(lengths)),
        "density": pairs / (users * items),
    }
