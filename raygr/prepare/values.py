"""Columns of any type to texts, numbers and times; a value that cannot be read costs its row only."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.data.ids import decode_or_none, is_text, is_utf8
from raygr.prepare.json_lines import as_text
from raygr.prepare.times import NUMBER, Times, read_times


def plain(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece, as plain values: no dictionary, text or bytes of the usual width, text that is UTF-8."""
    flat = column.combine_chunks()
    kind = flat.type
    if pa.types.is_dictionary(kind):
        return plain(pa.chunked_array([flat.dictionary_decode()]))
    if is_text(kind):
        return flat.cast(pa.string() if is_utf8(flat) else pa.binary())
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return flat.cast(pa.binary())
    return flat


def as_strings(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The values as strings, and which of them are no UTF-8."""
    flat = plain(column)
    try:
        return flat.cast(pa.string()), np.zeros(len(flat), bool)
    except pa.ArrowInvalid:
        values = [v if v is None else decode_or_none(v) for v in flat.to_pylist()]
        invalid = [v is not None and text is None for v, text in zip(flat.to_pylist(), values, strict=True)]
        return pa.array(values, pa.string()), np.array(invalid)


def as_texts(table: pa.Table, name: str, count: int) -> tuple[pa.Array, np.ndarray]:
    """A text column without nulls, "" where the file has no such column, and which texts had to be repaired.

    What is no UTF-8 is read as Windows-1252; U+FFFD stands for what was lost before.
    """
    if name not in table.column_names:
        return pa.array([""] * count, pa.string()), np.zeros(count, bool)
    flat = plain(table[name])
    if pa.types.is_nested(flat.type):
        return pa.array([as_text(v) for v in flat.to_pylist()], pa.string()), np.zeros(count, bool)
    try:
        texts, invalid = flat.cast(pa.string()).fill_null(""), np.zeros(count, bool)
    except pa.ArrowInvalid:
        invalid = as_strings(table[name])[1]
        texts = pa.array([as_windows_text(v or b"") for v in flat.to_pylist()], pa.string())
    if not pc.all(pc.string_is_ascii(texts)).as_py():
        invalid = invalid | pc.match_substring(texts, "\ufffd").to_numpy(zero_copy_only=False)
    return texts, invalid


def as_windows_text(value: bytes) -> str:
    text = decode_or_none(value)
    return value.decode("cp1252", "replace") if text is None else text


def as_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64 with NaN where a value is null, empty or no number."""
    flat = plain(column)
    if not (pa.types.is_string(flat.type) or pa.types.is_binary(flat.type)):
        try:
            return flat.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a time, for example
            return np.full(len(flat), np.nan)
    strings, _ = as_strings(column)
    written = pc.match_substring_regex(strings, NUMBER)
    cleaned = pc.if_else(written, pc.utf8_trim_whitespace(strings), None)
    return cleaned.cast(pa.float64()).to_numpy(zero_copy_only=False)


def as_ratings(table: pa.Table, *, implicit: bool) -> np.ndarray:
    """Ratings with NaN for no number and, where `implicit`, -inf for an absent one."""
    if "rating" not in table.column_names:
        return np.full(table.num_rows, -np.inf)
    numbers = as_numbers(table["rating"])
    if not implicit:
        return numbers
    absent = [v in (None, "", b"") for v in table["rating"].to_pylist()] if np.isnan(numbers).any() else False
    return np.where(absent, -np.inf, numbers)


def as_times(column: pa.ChunkedArray, kind: Literal["time", "position"]) -> Times:
    flat = plain(column)
    return read_times(as_strings(column)[0] if pa.types.is_binary(flat.type) else flat, kind)


class RowTexts(Sequence[str]):
    """Rows as they would stand in a CSV file, made only when one is looked at."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> str:
        return ",".join(cell_text(column[row]) for column in self.table.columns)


def cell_text(cell: pa.Scalar) -> str:
    try:
        value = cell.as_py()
    except (ValueError, OverflowError):  # a date that Python has not
        return "?"
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
