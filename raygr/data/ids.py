"""Ids from outside as strings: Arrow columns of all types that can hold ids, and files with one id per line."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr import files

EXACT_FLOATS = 2.0**53  # from here on a float cannot distinguish neighbouring whole numbers


def id_strings(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The ids as strings, null where there is none, and the mask of the values that are no ids.

    Text stays as it is. Whole numbers of any type are written without a decimal point, because pandas turns integer
    columns with gaps into floats: 7.0 is the id "7". Fractions, floats from 2**53 on and bytes that are no UTF-8 are no
    ids. ValueError for a type that cannot hold ids.
    """
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = flat.type
    if pa.types.is_dictionary(kind):
        return id_strings(flat.dictionary_decode())
    if pa.types.is_floating(kind):
        return of_floats(flat.cast(pa.float64()).to_numpy(zero_copy_only=False))
    if pa.types.is_decimal(kind):
        text = pc.replace_substring_regex(flat.cast(pa.string()), r"\.0+$", "")
        is_bad = pc.invert(pc.match_substring_regex(text, r"^-?\d+$")).fill_null(False)
        return pc.if_else(is_bad, None, text), is_bad.to_numpy(zero_copy_only=False)
    if is_binary(kind):
        return of_bytes(flat)
    if is_text(kind) and not is_utf8(flat):
        return of_bytes(flat.cast(pa.binary()))
    if is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        return flat.cast(pa.string()), np.zeros(len(flat), bool)
    raise ValueError(f"values of type {kind} are no ids: use text or whole numbers")


def bad_id_reason(*kinds: pa.DataType) -> str:
    """The reason to refuse the rows that `id_strings` marks in columns of these types."""
    return "invalid_utf8" if all(is_text(kind) or is_binary(kind) for kind in kinds) else "id_not_whole"


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_binary(kind: pa.DataType) -> bool:
    plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return plain or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind)


def is_utf8(texts: pa.Array) -> bool:
    """False if a text column holds bytes that are no UTF-8: Arrow does not check when it reads Parquet."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def of_floats(values: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """`id_strings` of floats; NaN is a missing value, because pandas writes it so."""
    absent = np.isnan(values)
    whole = (np.abs(values) < EXACT_FLOATS) & (values == np.floor(values))
    numbers = np.where(whole, values, 0).astype(np.int64)
    return pa.array(numbers, mask=~whole).cast(pa.string()), ~whole & ~absent


def of_bytes(values: pa.Array) -> tuple[pa.Array, np.ndarray]:
    try:
        return values.cast(pa.string()), np.zeros(len(values), bool)
    except pa.ArrowInvalid:
        found = [None if value is None else decode_or_none(value) for value in values.to_pylist()]
        is_bad = pc.and_(pc.is_valid(values), pc.is_null(pa.array(found, pa.string())))
        return pa.array(found, pa.string()), is_bad.to_numpy(zero_copy_only=False)


def decode_or_none(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def complete_ids(column: pa.ChunkedArray, where: str, *, length: np.ndarray | None = None) -> pa.ChunkedArray:
    """The ids of a column that must have one in every row; ValueError names `where` and the row.

    `length` is the number of values in each row; None means one value per row.
    """
    chunks, before = [], 0
    for chunk in column.chunks:
        try:
            strings, is_bad = id_strings(chunk)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        wrong = np.flatnonzero(is_bad | strings.is_null().to_numpy(zero_copy_only=False))
        if len(wrong):
            value, place = chunk[int(wrong[0])].as_py(), before + int(wrong[0])
            row = place if length is None else int(np.searchsorted(np.cumsum(length), place, side="right"))
            raise ValueError(f"{where}: row {row + 1} has no id, but {value!r}: ids are text or whole numbers")
        chunks.append(strings)
        before += len(chunk)
    return pa.chunked_array(chunks, pa.string())


def read_id_lines(path: str) -> list[str]:
    """Reads a file of one id per line, as `write_id_lines` writes it.

    Only line feeds end a line, so an id may hold U+2028 or U+0085.
    """
    filesystem, inner = files.filesystem_of(path)
    with filesystem.open(inner, "rb", compression="infer") as file:
        text = file.read().decode("utf-8-sig")
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def write_id_lines(ids: Sequence[str], path: str) -> None:
    """Writes one id per line for `read_id_lines`; the ids must pass `check_lines`."""
    files.write_text("".join(f"{one}\n" for one in ids), path)


def check_lines(ids: Sequence[str]) -> None:
    """ValueError if an id cannot be read back from a file of one id per line."""
    broken = [one for one in ids if "\n" in one or "\r" in one]
    if broken:
        raise ValueError(
            f"{broken[0]!r} ({len(broken)} such) holds a line break: a file of one id per line cannot hold it"
        )
