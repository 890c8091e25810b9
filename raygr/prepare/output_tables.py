"""Kept interactions and their texts -> tables of the pipeline's schemas: pure functions on Arrow tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.prepare import selection, splits
from raygr.prepare.metadata import ITEM_TEXT_SCHEMA, TEXT_NAMES, item_texts
from raygr.prepare.reviews import REVIEW_TEXTS
from raygr.prepare.scanned_rows import filled
from raygr.prepare.selection import Kept
from raygr.schema import INTERACTION_SCHEMA, ITEM_SCHEMA, NEW_INTERACTION_SCHEMA, REVIEW_SCHEMA, USER_SCHEMA


class Part(NamedTuple):
    """A table to be written and counts: rows written, texts cut and repaired, and items without text."""

    table: pa.Table
    counts: Mapping[str, int]


# --- reviews --------------------------------------------------------------------------------------


def kept_rows(kept: Kept, which: np.ndarray | slice) -> pa.Table:
    """The numbers of REVIEW_SCHEMA with `row`, of some interactions."""
    rating = kept.rating[which]
    return pa.table(
        {
            "user_index": kept.user_index[which],
            "item_index": kept.item_index[which],
            "position": kept.position[which],
            "rating": pa.array(rating, mask=np.isnan(rating)),
            "timestamp": kept.timestamp[which],
            "split": pa.DictionaryArray.from_arrays(kept.part[which], pa.array(splits.PARTS)),
            "row": kept.row[which],
        }
    )


def interactions(kept: Kept, size: int) -> Iterator[pa.Table]:
    """INTERACTION_SCHEMA of all kept interactions, in tables of `size` rows."""
    for start in range(0, len(kept.row), size):
        yield kept_rows(kept, slice(start, start + size)).select(INTERACTION_SCHEMA.names).cast(INTERACTION_SCHEMA)


def new_interactions(kept: Kept) -> pa.Table:
    """NEW_INTERACTION_SCHEMA of all interactions with new items."""
    columns = kept.new._asdict() | {"rating": pa.array(kept.new.rating, mask=np.isnan(kept.new.rating))}
    return pa.table(columns).cast(NEW_INTERACTION_SCHEMA)


def review_part(rows: pa.Table, texts: pa.Table, limit: int) -> Part:
    """REVIEW_SCHEMA of rows of `kept_rows` with their texts of TEXT_SCHEMA, cut to `limit` characters."""
    columns = {name: rows[name] for name in INTERACTION_SCHEMA.names}
    return part_with_texts(columns, texts, REVIEW_TEXTS, REVIEW_SCHEMA, limit)


def empty_texts(count: int) -> pa.Table:
    """ITEM_TEXT_SCHEMA of `count` rows with "" in every text."""
    return filled(ITEM_TEXT_SCHEMA, dict.fromkeys(TEXT_NAMES, pa.repeat("", count)), count)


def part_with_texts(
    columns: Mapping[str, pa.ChunkedArray], texts: pa.Table, names: Sequence[str], schema: pa.Schema, limit: int
) -> Part:
    """`schema` of the `columns` and the text columns `names`, cut to `limit` characters."""
    counts = {"written": len(texts), "text_cut": 0, "text_repaired": pc.sum(texts["repaired"]).as_py() or 0}
    whole = {**columns, **{name: texts[name] for name in names}}
    for name in names:
        longest = pc.max(pc.binary_length(texts[name])).as_py() or 0
        longer = longest > limit and pc.sum(pc.greater(pc.utf8_length(texts[name]), limit)).as_py()
        if longer:
            whole[name] = pc.utf8_slice_codeunits(texts[name], 0, limit)
            counts["text_cut"] += longer
    return Part(pa.table({name: whole[name] for name in schema.names}).cast(schema), counts)


# --- items and users ------------------------------------------------------------------------------


def item_rows(kept: Kept) -> pa.Table:
    """The columns of ITEM_SCHEMA except texts, sorted by item_index from 1; all_* are means over all parts."""
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


def item_part(rows: pa.Table, raw_texts: pa.Table, limit: int) -> Part:
    """ITEM_SCHEMA of rows of `item_rows` with their texts of `read_items`, cut to `limit` characters.

    An average rating that the metadata states replaces that of the reviews in all_rating.
    """
    texts = item_texts(raw_texts)
    stated = pc.is_valid(texts["rating"])
    columns = {
        **{name: rows[name] for name in ("item_index", "item_id", "train_rating", "train_rating_count")},
        "all_rating": pc.if_else(stated, texts["rating"], rows["all_rating"]),
        "all_rating_count": pc.if_else(stated, texts["rating_count"].fill_null(0), rows["all_rating_count"]),
    }
    part = part_with_texts(columns, texts, TEXT_NAMES, ITEM_SCHEMA, limit)
    together = pc.binary_join_element_wise(*(part.table[name] for name in TEXT_NAMES), "")
    without_text = pc.sum(pc.equal(pc.utf8_trim_whitespace(together), "")).as_py() or 0
    return part._replace(counts={**part.counts, "without_text": without_text})


def users(kept: Kept) -> pa.Table:
    """USER_SCHEMA of all kept users."""
    index = np.arange(len(kept.user_ids), dtype=np.int32)
    return pa.table({"user_index": index, "user_id": kept.user_ids, **selection.user_cutoffs(kept)}).cast(USER_SCHEMA)


def statistics(kept: Kept) -> dict[str, float]:
    """Sizes as in the paper's Table 1, history lengths, and the filled share of the user-item matrix."""
    users, items, rows = len(kept.user_ids), len(kept.item_ids), len(kept.row)
    lengths = np.bincount(kept.user_index, minlength=users)
    pairs = kept.user_index.astype(np.int64) * items + kept.item_index
    pairs.sort()
    return {
        "users": users,
        "items": items,
        "reviews": rows,
        "mean_history": float(lengths.mean()),
        "median_history": float(np.median(lengths)),
        "density": (1 + int(np.count_nonzero(np.diff(pairs)))) / (users * items),
    }
