"""Raw files to rows, for reviews and metadata: ids and numbers of every row with its reason if refused, and texts.

Each block of a file is parsed whole; only a block that holds anything unusual is read row by row, with the same checks.
Blocks are parsed on all CPUs while the next one is read and decompressed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.prepare.bad_rows import Refusal, limited_snippets
from raygr.prepare.column_values import as_texts
from raygr.prepare.json_lines import Record, decode_block
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.raw_files import Columns, Lines

SCAN_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),  # null in metadata
        ("item_id", pa.string()),
        ("rating", pa.float32()),  # null for implicit data and in metadata
        ("timestamp", pa.int64()),  # milliseconds, or the position; null in metadata
        ("time_form", pa.int8()),  # an index into timestamps.FORMS; null where the format declares its unit
        ("row", pa.int64()),  # number in the file, from 0
        ("reason", pa.string()),  # null for a usable row
        ("snippet", pa.string()),  # of the first refused rows
    ]
)


class Scanned(NamedTuple):
    """Some rows of a file: SCAN_SCHEMA, usable rows in order, and the texts of readable rows with their `row`."""

    rows: pa.Table
    texts: pa.Table


def filled(schema: pa.Schema, columns: Mapping[str, object], count: int) -> pa.Table:
    """A table of `count` rows; columns of the schema that are not given are null."""
    whole = {field.name: columns.get(field.name, pa.nulls(count, field.type)) for field in schema}
    return pa.table(whole, schema=schema)


def scan_lines(
    lines: Lines,
    decoder: msgspec.json.Decoder[Record],
    decode_one: Callable[[bytes], Record | str | None],
    scan: Callable[[Sequence[Record], np.ndarray, Sequence[bytes]], Scanned],
) -> Scanned:
    """The rows of JSON lines; `scan` makes them from decoded records, their row numbers and their lines.

    See `decode_block` for `decoder` and `decode_one`.
    """
    at, raw, records, refused = decode_block(lines, decoder, decode_one)
    known = scan(records, lines.first + np.array(at, np.int64), raw)
    return with_refused(known, [*lines.refused, *refused])


def scan_columns(
    batches: Iterator[Columns], scan: Callable[[Columns], pa.Table], text_names: Sequence[str], cpus: Cpus
) -> Iterator[Scanned]:
    """The rows of a file of columns; `scan` makes SCAN_SCHEMA from the readable rows of a batch."""

    def scan_batch(columns: Columns) -> Scanned:
        count = len(columns.rows)
        if not count:
            return Scanned(refused_rows(columns.refused), pa.table({}))
        texts, repaired = zip(*(as_texts(columns.table, name, count) for name in text_names), strict=True)
        named = dict(zip(text_names, texts, strict=True))
        kept = pa.table({"row": columns.rows, **named, "repaired": np.logical_or.reduce(repaired)})
        return with_refused(Scanned(scan(columns), kept), columns.refused)

    return cpus.in_threads(scan_batch, batches)


def with_refused(known: Scanned, refused: Sequence[Refusal]) -> Scanned:
    if not refused:
        return known
    return known._replace(rows=pa.concat_tables([known.rows, refused_rows(refused)]))


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
