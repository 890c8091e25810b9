"""Columns of any type to texts, numbers and times; a value that cannot be read costs only its own row."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.data.ids import decode_or_none, is_text, is_utf8
from raygr.prepare.json_lines import as_text
from raygr.prepare.timestamps import NUMBER


def plain(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array without dictionary, with text or bytes of the usual width; its text is valid UTF-8."""
    flat = column.combine_chunks()
    kind = flat.type
    if pa.types.is_dictionary(kind):
        return plain(pa.chunked_array([flat.dictionary_decode()]))
    if is_text(kind):
        return flat.cast(pa.string() if is_utf8(flat) else pa.binary())
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return flat.cast(pa.binary())
    return flat


def as_strings(flat: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """`plain` values as strings, and the mask of those that are no UTF-8, which become null."""
    try:
        return flat.cast(pa.string()), np.zeros(len(flat), bool)
    except pa.ArrowInvalid:
        values = flat.to_pylist()
        texts = [None if value is None else decode_or_none(value) for value in values]
        invalid = [value is not None and text is None for value, text in zip(values, texts, strict=True)]
        return pa.array(texts, pa.string()), np.array(invalid)


def as_texts(table: pa.Table, name: str, count: int) -> tuple[pa.Array, np.ndarray]:
    """A text column without nulls, and the mask of the texts that had to be repaired.

    A column that the file lacks is "" in all `count` rows. Bytes that are no UTF-8 are read as Windows-1252. A text
    with U+FFFD counts as repaired, because an earlier program lost some of it.
    """
    if name not in table.column_names:
        return pa.array([""] * count, pa.string()), np.zeros(count, bool)
    flat = plain(table[name])
    if pa.types.is_nested(flat.type):
        return pa.array([as_text(v) for v in flat.to_pylist()], pa.string()), np.zeros(count, bool)
    strings, repaired = as_strings(flat)
    texts = strings.fill_null("")
    if repaired.any():
        windows = [
            v.decode("cp1252", "replace") if bad else None for v, bad in zip(flat.to_pylist(), repaired, strict=True)
        ]
        texts = pc.coalesce(pa.array(windows, pa.string()), texts)
    if not pc.all(pc.string_is_ascii(texts)).as_py():
        repaired = repaired | pc.match_substring(texts, "\ufffd").to_numpy(zero_copy_only=False)
    return texts, repaired


def as_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64 with NaN where a value is null, empty or no number."""
    flat = plain(column)
    if not (pa.types.is_string(flat.type) or pa.types.is_binary(flat.type)):
        try:
            return flat.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # times, for example
            return np.full(len(flat), np.nan)
    strings, _ = as_strings(flat)
    written = pc.match_substring_regex(strings, NUMBER)
    cleaned = pc.if_else(written, pc.utf8_trim_whitespace(strings), None)
    return cleaned.cast(pa.float64()).to_numpy(zero_copy_only=False)


def as_ratings(table: pa.Table, *, implicit: bool) -> np.ndarray:
    """float64 ratings: NaN where a value is no number and, with `implicit`, -inf where a rating is absent."""
    if "rating" not in table.column_names:
        return np.full(table.num_rows, -np.inf)
    numbers = as_numbers(table["rating"])
    if not implicit:
        return numbers
    absent = [v in (None, "", b"") for v in table["rating"].to_pylist()] if np.isnan(numbers).any() else False
    return np.where(absent, -np.inf, numbers)


def row_text(table: pa.Table, row: int) -> str:
    """One row as a CSV file would show it."""
    return ",".join(cell_text(column[row]) for column in table.columns)


def cell_text(cell: pa.Scalar) -> str:
    try:
        value = cell.as_py()
    except (ValueError, OverflowError):  # a date that Python cannot hold
        return "?"
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
