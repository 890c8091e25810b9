"""The two passes over raw files that reviews and metadata share.

The first pass yields SCAN_SCHEMA: ids and numbers of every raw row, with the reason where a row is refused. The second
pass yields the texts of the kept rows, by row number. Both passes stream tables of bounded size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.prepare.bad_rows import Refusal, cut_snippet, limited_snippets
from raygr.prepare.column_values import as_texts
from raygr.prepare.json_lines import Record, decode_block, decode_line
from raygr.prepare.raw_files import Columns, read_json_lines

SCAN_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),  # null in metadata
        ("item_id", pa.string()),
        ("rating", pa.float32()),  # null for implicit data and in metadata
        ("timestamp", pa.int64()),  # milliseconds, or the position; null in metadata
        ("time_form", pa.string()),  # one of timestamps.FORMS; null where the format declares its unit
        ("row", pa.int64()),  # number in the file, from 0
        ("reason", pa.string()),  # null for a usable row
        ("snippet", pa.string()),  # of the first refused rows
    ]
)


def filled(schema: pa.Schema, columns: Mapping[str, object], count: int) -> pa.Table:
    """A table of `count` rows; columns of the schema that are not given are null."""
    whole = {field.name: columns.get(field.name, pa.nulls(count, field.type)) for field in schema}
    return pa.table(whole, schema=schema)


# --- first pass: ids and numbers of every row -----------------------------------------------------


def scan_json_lines(
    path: str,
    decoder: msgspec.json.Decoder[Record],
    repair: Callable[[Mapping[str, Any]], Record],
    scan: Callable[[list[Record], np.ndarray, list[bytes]], pa.Table],
) -> Iterator[pa.Table]:
    """SCAN_SCHEMA of a file of JSON lines; `scan` makes it from decoded records, their row numbers and their lines."""
    for lines in read_json_lines(path):
        decoded = decode_block(lines, decoder, repair)
        at = [i for i, record in enumerate(decoded) if isinstance(record, msgspec.Struct)]
        records = [record for record in decoded if record is not None and not isinstance(record, str)]
        reasons = {i: reason for i, reason in enumerate(decoded) if isinstance(reason, str)}
        refused = [Refusal(lines.first + i, reason, cut_snippet(lines.lines[i])) for i, reason in reasons.items()]
        rows = lines.first + np.array(at, np.int64)
        known = scan(records, rows, [lines.lines[i] for i in at])
        yield pa.concat_tables([known, refused_rows([*lines.refused, *refused])])


def scan_columns(batches: Iterator[Columns], scan: Callable[[Columns], pa.Table]) -> Iterator[pa.Table]:
    """SCAN_SCHEMA of a file of columns; `scan` makes it from the readable rows of a batch."""
    for columns in batches:
        refused = refused_rows(columns.refused)
        yield pa.concat_tables([scan(columns), refused]) if len(columns.rows) else refused


def scan_rows(
    rows: np.ndarray,
    columns: Mapping[str, object],
    conditions: Mapping[str, np.ndarray],
    show: Callable[[int], bytes | str],
) -> pa.Table:
    """SCAN_SCHEMA of N readable rows.

    `columns` are those of SCAN_SCHEMA that are not null. `conditions` maps a reason to the mask of the rows that it
    refuses; the first reason of a row counts. `show` gives the raw content of the row at an index, for the snippets.
    """
    reasons = [None, *conditions]
    which = np.select(list(conditions.values()), range(1, len(reasons)), default=0)
    if which.any():
        reason_of = [reasons[i] for i in which]
        columns = {**columns, "reason": reason_of, "snippet": limited_snippets(reason_of, show)}
    return filled(SCAN_SCHEMA, {**columns, "row": rows}, len(rows))


def refused_rows(refused: Sequence[Refusal]) -> pa.Table:
    """SCAN_SCHEMA of rows that could not be read at all."""
    reasons = [one.reason for one in refused]
    snippets = limited_snippets(reasons, lambda at: refused[at].snippet)
    rows = [one.row for one in refused]
    return filled(SCAN_SCHEMA, {"row": rows, "reason": reasons, "snippet": snippets}, len(refused))


def is_empty(ids: pa.Array) -> np.ndarray:
    """Mask of the ids that are null or empty."""
    return pc.equal(ids.fill_null(""), "").to_numpy(zero_copy_only=False)


# --- second pass: texts of the kept rows ----------------------------------------------------------


def read_json_texts(
    path: str,
    rows: np.ndarray,
    decoder: msgspec.json.Decoder[Record],
    repair: Callable[[Mapping[str, Any]], Record],
    texts: Callable[[list[Any]], Mapping[str, object]],
    schema: pa.Schema,
) -> Iterator[pa.Table]:
    """`schema` of the lines with these sorted row numbers; `texts` makes its columns from decoded records."""
    for lines in read_json_lines(path):
        kept = rows[np.searchsorted(rows, lines.first) : np.searchsorted(rows, lines.first + len(lines.lines))]
        records = [decode_line(lines.lines[row - lines.first], decoder, repair) for row in kept.tolist()]
        yield filled(schema, {"row": kept, **texts(records), "repaired": np.zeros(len(kept), bool)}, len(kept))


def read_column_texts(
    batches: Iterator[Columns], rows: np.ndarray, names: Sequence[str], schema: pa.Schema
) -> Iterator[pa.Table]:
    """`schema` of the rows with these numbers, with the text columns `names`."""
    for columns in batches:
        chosen = np.isin(columns.rows, rows, assume_unique=True)
        table = columns.table.filter(chosen) if len(chosen) else columns.table
        kept = columns.rows[chosen]
        texts, repaired = zip(*(as_texts(table, name, len(kept)) for name in names), strict=True)
        found = {**dict(zip(names, texts, strict=True)), "repaired": np.logical_or.reduce(repaired)}
        yield filled(schema, {"row": kept, **found}, len(kept))
