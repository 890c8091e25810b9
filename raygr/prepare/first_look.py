"""`raygr init` looks at one's own files: which column is which, how times are written, how far a k-core may go."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raygr.config import ConfigError
from raygr.prepare.column_files import JSON_KINDS, named_columns
from raygr.prepare.column_values import as_numbers, as_texts, plain
from raygr.prepare.csv_files import DELIMITERS, csv_form
from raygr.prepare.json_lines import decode_object
from raygr.prepare.raw_files import file_kind, parquet_schema, read_json_lines
from raygr.prepare.timestamps import DATES, read_times

MOST_ROWS = 1_000_000  # of a file, from its start
READABLE = 0.99  # share of the times in a column of times
CORES = (5, 4, 3)  # fewest interactions; 3 are one each for train, validation and test
LEAST_KEPT = 0.5  # share of the interactions that a core may leave

# raygr's name -> words of column names, the likeliest first
REVIEW_HINTS = {
    "user_id": "user customer client buyer shopper member account visitor reviewer email",
    "item_id": "item sku product asin article isbn movie game track book ean upc code",
    "timestamp": "timestamp time date datetime created ordered purchased at",
    "rating": "rating stars overall",
    "review_title": "summary headline",
    "review_text": "review comment text",
}
ITEM_HINTS = {
    "title": "title name",
    "description": "description plot about features",
    "categories": "categories category genres genre tags department type",
    "details": "details brand author artist director maker material platform",
}
REQUIRED = ("user_id", "item_id", "timestamp")


class FirstLook(NamedTuple):
    """What the files seem to hold."""

    columns: dict[str, str]
    """raygr's names of the columns of reviews -> the file's names."""
    names: list[str]
    """All columns of reviews."""
    item_columns: dict[str, str]
    """The same for metadata."""
    item_names: list[str]
    """All columns of metadata."""
    timestamps: str
    """`time` or `position`, as prepare takes it."""
    first_time: str
    """A time as the file writes it."""
    rating_range: tuple[float, float] | None
    """None where there are no ratings or all are 1 to 5, prepare's default."""
    rows: int
    repeated: int
    """Rows of a user and an item that an earlier row has, too."""
    core: int
    cores: dict[int, tuple[int, int, int]]
    """k -> users, items and interactions of the k-core."""
    texts: list[str]
    """All that the metadata say about each item."""


def look_at(reviews: str, metadata: str, given: Mapping[str, str]) -> FirstLook:
    """Look at a file of interactions and one of items; `given` are columns that the user has named.

    ConfigError where a needed column cannot be told, or too few interactions are there.
    """
    sample = columns_of(reviews, column_names(reviews), most=1)
    columns = matched(reviews, sample.column_names, REVIEW_HINTS, given)
    free = [name for name in sample.column_names if name not in columns.values()]
    if "timestamp" not in columns and (times := [name for name in free if has_times(sample[name])]):
        columns["timestamp"] = times[0]
    check_found(columns, sample.column_names, reviews)
    rows = columns_of(reviews, list(columns.values()))
    codes = [np.unique(as_texts(rows, columns[name], len(rows))[0], return_inverse=True)[1] for name in REQUIRED[:2]]
    pairs = np.unique(np.stack(codes), axis=1)
    cores = {k: core_sizes(pairs, k) for k in CORES}
    fitting = [k for k in CORES if cores[k][2] >= LEAST_KEPT * pairs.shape[1]]
    core = fitting[0] if fitting else CORES[-1]
    if not cores[core][0]:
        raise ConfigError(f"{reviews}: no user and item have {core} interactions each among {len(rows)} rows: too few")
    item_names = column_names(metadata)
    item_columns, texts = look_at_items(metadata, item_names, rows[columns["item_id"]], columns["item_id"], given)
    kind = "time" if has_times(rows[columns["timestamp"]]) else "position"
    if kind == "position" and not has_times(rows[columns["timestamp"]], kind):
        example = rows[columns["timestamp"]][0].as_py()
        raise ConfigError(
            f"{columns['timestamp']}: times such as {text_of(example)!r} cannot be read: write them as 2026-01-31 or "
            "2026-01-31 18:30, or name another column: --columns timestamp=NAME"
        )
    return FirstLook(
        columns=columns,
        names=sample.column_names,
        item_columns=item_columns,
        item_names=item_names,
        timestamps=kind,
        first_time=text_of(rows[columns["timestamp"]][0].as_py()),
        rating_range=rating_range(as_numbers(rows[columns["rating"]])) if "rating" in columns else None,
        rows=len(rows),
        repeated=len(rows) - pairs.shape[1],
        core=core,
        cores=cores,
        texts=texts,
    )


def look_at_items(
    path: str, names: Sequence[str], bought: pa.ChunkedArray, item_column: str, given: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return the columns of a file of items, whose ids are like those that were `bought`, and each item's text."""
    rows = columns_of(path, names)
    if "item_id" in given and given["item_id"] in names:
        own = given["item_id"]
    else:  # by the ids in it: the name may be another one
        known = set(as_texts(pa.table({"ids": bought}), "ids", len(bought))[0].to_pylist())
        shares = {name: len(known & set(as_texts(rows, name, len(rows))[0].to_pylist())) for name in names}
        own = max(names, key=lambda name: (shares[name], name == item_column))
        if not shares[own]:
            raise ConfigError(f"{path}: no column holds ids of {item_column} of the orders, such as {bought[0]}")
    columns = {"item_id": own} | matched(path, [name for name in names if name != own], ITEM_HINTS, given)
    told = [name for name in ITEM_HINTS if name in columns]
    if not told:
        raise ConfigError(
            f"{path}: no title, description or category of the items among {', '.join(names)}, so that an LLM has "
            "nothing to rate: give a file that has them, or name a column: --columns title=NAME"
        )
    _, first = np.unique(as_texts(rows, own, len(rows))[0], return_index=True)
    parts = [as_texts(rows, columns[name], len(rows))[0].take(pa.array(first)).to_pylist() for name in told]
    return columns, [" ".join(texts) for texts in zip(*parts, strict=True)]


# --- columns -------------------------------------------------------------------------------------


def column_names(path: str) -> list[str]:
    """Return the names of a file's columns; ConfigError where it has none."""
    if file_kind(path) == "parquet":
        schema = parquet_schema(path)
        names = schema.names if isinstance(schema, pa.Schema) else []
    elif file_kind(path) in JSON_KINDS:
        lines = [line for lines in read_json_lines(path) for line in lines.split()[:100]][:100]
        names = list(
            dict.fromkeys(key for line in lines if isinstance(row := decode_object(line), dict) for key in row)
        )
    else:
        forms = [csv_form(path, (), delimiter, None) for delimiter in DELIMITERS]
        names = [str(name) for name in max(forms, key=lambda form: len(form.names)).names]
    if not names:
        raise ConfigError(f"{path}: no columns found: it must be CSV with a line of names, JSON lines or Parquet")
    return names


def columns_of(path: str, names: Sequence[str], most: int = MOST_ROWS) -> pa.Table:
    """Return columns of a file under its own names: batches of rows from its start, until there are `most`."""
    parts: list[pa.Table] = []
    for batch in named_columns(path, {name: (name,) for name in names}, required=()):
        if batch.table.num_rows:
            parts.append(pa.table({name: plain(batch.table[name]) for name in batch.table.column_names}))
        if sum(map(len, parts)) >= most:
            break
    if not parts:
        raise ConfigError(f"{path}: no row could be read")
    return pa.concat_tables(parts, promote_options="permissive")


def matched(path: str, names: Sequence[str], hints: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Return raygr's name -> the column whose name has the likeliest word of `hints`, or the one that is `given`."""
    found: dict[str, str] = {}
    for ours, words in hints.items():
        if ours in given:
            found[ours] = given[ours]
            continue
        free = [name for name in names if name not in found.values() and name not in given.values()]
        places = {name: rank for name in free if (rank := likeness(name, ours, words.split())) is not None}
        if places:
            found[ours] = min(places, key=lambda name: places[name])
    unknown = [name for ours, name in found.items() if name not in names]
    if unknown:
        raise ConfigError(f"--columns: {path} has no column {unknown[0]}; it has {', '.join(names)}")
    return found


def likeness(name: str, ours: str, words: Sequence[str]) -> int | None:
    """Return how well a column's name fits, 0 best; None where none of the words is in it."""
    parts = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower())
    if "_".join(parts) == ours:
        return 0
    places = [place for place, word in enumerate(words, start=1) if word in parts or f"{word}id" in parts]
    return min(places) * 10 + len(parts) - 2 * ("id" in parts) if places else None


def check_found(columns: Mapping[str, str], names: Sequence[str], path: str) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        flags = " ".join(f"{name}=NAME" for name in missing)
        raise ConfigError(
            f"{path}: which column is {' and which is '.join(missing)}? It has {', '.join(names)}: --columns {flags}"
        )


# --- values --------------------------------------------------------------------------------------


def has_times(column: pa.ChunkedArray, kind: Any = "time") -> bool:
    values = plain(column)
    texts = (
        as_texts(pa.table({"times": values}), "times", len(values))[0] if pa.types.is_binary(values.type) else values
    )
    return float(np.mean(read_times(texts, kind).form >= DATES)) >= READABLE


def rating_range(ratings: np.ndarray) -> tuple[float, float] | None:
    known = ratings[np.isfinite(ratings)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (1.0, 5.0)
    return None if low >= 1 and high <= 5 else (min(low, 1.0), high)


def text_of(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def core_sizes(pairs: np.ndarray, k: int) -> tuple[int, int, int]:
    """Users, items and interactions of the k-core of distinct (user, item) pairs, shape (2, N)."""
    while True:
        counts = [np.bincount(side)[side] for side in pairs] if pairs.shape[1] else []
        stays = np.logical_and(*(count >= k for count in counts)) if counts else np.ones(0, bool)
        if stays.all():
            return len(np.unique(pairs[0])), len(np.unique(pairs[1])), pairs.shape[1]
        pairs = pairs[:, stays]
