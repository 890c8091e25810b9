"""CSV files, damaged ones too: header, delimiter, and batches of columns. A bad row costs only itself.

Quotes may hold line ends. A quote that never closes, or that closes inside other rows, shows itself by the grammar of
CSV (a closing quote precedes a delimiter or a line end) and by the lines inside it. The first line of such a quote is
refused, and reading continues with the next line. numpy cuts the blocks whose quotes are in order: nearly all of them.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv

from raygr.prepare import raw_files
from raygr.prepare.bad_rows import Refusal, cut_snippet
from raygr.prepare.raw_files import Broken, Columns, RawFile, file_kind, lost_rest, no_columns, open_raw

QUOTE, NEWLINE, RETURN = b'"\n\r'
DELIMITERS = (",", ";", "\t", "|")
HEADER_BYTES = 1 << 20
LIKELY_QUOTE_BYTES = 1 << 20
MAX_ROW_BYTES = 64 << 20
TYPED_NAME = re.compile(r"(.+):(?:token|float)(?:_seq)?")


class CsvForm(NamedTuple):
    """How a file separates its values, and the names of its columns, or their positions if it has no header."""

    delimiter: str
    names: Sequence[str | int]
    has_header: bool
    encoding: str | None
    broken: Broken | None


def csv_form(path: str, expected: Sequence[str | int], delimiter: str | None, encoding: str | None) -> CsvForm:
    """The form of a CSV file.

    `expected` holds column names, or positions for a file without a header. If `delimiter` is None, the first one that
    finds most of them is taken. An empty file has no names.
    """
    with open_raw(path, encoding) as file:
        start, broken = file.read(HEADER_BYTES).decode("utf-8", "replace"), file.broken
    has_header = not any(isinstance(name, int) for name in expected)
    usual = "\t" if file_kind(path) in ("tsv", "inter") else ","
    forms = []
    for candidate in [delimiter] if delimiter else dict.fromkeys((usual, *DELIMITERS)):
        cells = first_cells(start, candidate)
        names: Sequence[str | int] = [cell.strip() for cell in cells] if has_header else range(len(cells))
        typed = [TYPED_NAME.fullmatch(str(name)) for name in names]  # RecBole's user_id:token
        if has_header and all(typed):
            names = [match[1] for match in typed if match]
        forms.append(CsvForm(candidate, names, has_header, encoding, broken))
    return max(forms, key=lambda form: len({*form.names} & {*expected}))


def first_cells(text: str, delimiter: str) -> list[str]:
    try:
        return next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row), [])
    except csv.Error:
        return text.splitlines()[0].split(delimiter)


class Grammar(NamedTuple):
    """Patterns of a row of `width` cells: on one line (`line`), or with line ends inside quotes (`row`)."""

    delimiter: bytes
    width: int
    line: re.Pattern[bytes]
    row: re.Pattern[bytes]
    any_line: re.Pattern[bytes]
    """A line with any number of cells."""
    open: re.Pattern[bytes]
    """Matches a row that ends, with the buffer, inside a quote."""


BLANK = re.compile(rb"[\r\n]*")
QUOTED = re.compile(rb'"[^"]*+(?:""[^"]*+)*+"')


def make_grammar(delimiter: str, width: int) -> Grammar:
    # A cell is bare or quoted. Behind its closing quote comes any text (loose), or a delimiter or line end (strict).
    d = re.escape(delimiter.encode())
    bare = rb'[^"%b\r\n][^%b\r\n]*+|' % (d, d)
    loose = rb'(?:"[^"\n]*+(?:""[^"\n]*+)*+"[^%b\r\n]*+|%b)' % (d, bare)
    strict = rb"(?:%b(?=%b|\r?\n|\Z)|%b)" % (QUOTED.pattern, d, bare)
    end, count = rb"(?:\r?\n|\r?\Z)", width - 1
    patterns = (
        rb"(?:%b%b){%d}%b%b" % (loose, d, count, loose, end),
        rb"(?:%b%b){%d}%b%b" % (strict, d, count, strict, end),
        rb"(?:%b%b)*+%b%b" % (loose, d, loose, end),
        rb'(?:%b%b)*+"[^"]*+(?:""[^"]*+)*+\Z' % (strict, d),
    )
    return Grammar(delimiter.encode(), width, *map(re.compile, patterns))


def read_csv(path: str, wanted: Mapping[str, str | int], form: CsvForm) -> Iterator[Columns]:
    """Columns as binary values, in batches of bounded size; `wanted` maps our names to those of the file, all present.

    Rows, refused ones included, are numbered from 0 after the header, equally in both passes over the file.
    """
    places = {ours: form.names.index(theirs) for ours, theirs in wanted.items()}
    grammar = make_grammar(form.delimiter, len(form.names))
    first = -1 if form.has_header else 0
    with open_raw(path, form.encoding) as file:
        for columns in parse_blocks(file, grammar, places, first):
            start = int((columns.rows < 0).sum())  # 1 for the block with the header
            refused = [row for row in columns.refused if row.row >= 0]
            yield Columns(columns.rows[start:], columns.table.slice(start), refused)
            first += len(columns.rows) + len(columns.refused)
        if file.broken:
            yield no_columns([lost_rest(max(first, 0), file.broken)])


def parse_blocks(file: RawFile, grammar: Grammar, places: Mapping[str, int], first: int) -> Iterator[Columns]:
    """The columns at `places` of all rows, numbered from `first`, without the incomplete last line of a broken file."""
    rest, more = b"", True
    while more:
        data = file.read(max(raw_files.BLOCK_BYTES, len(rest)))
        more = bool(data)
        end = data.rfind(b"\n") + 1
        if not more and file.broken:
            rest = rest[: rest.rfind(b"\n") + 1]
        # `rest` is the beginning of a row whose end is still to come.
        whole = b"".join((rest, memoryview(data)[:end])) if end or not more else b""
        tail = data[end:] if end or not more else rest + data
        final = not more or len(whole) > MAX_ROW_BYTES
        columns, used = cut_rows(whole, grammar, places, first, final=final)
        rest = whole[used:] + tail
        if len(rest) > MAX_ROW_BYTES:  # a single line
            row = first + len(columns.rows) + len(columns.refused)
            columns.refused.append(Refusal(row, "line_too_long", cut_snippet(rest)))
            rest = skip_line(file)
        first += len(columns.rows) + len(columns.refused)
        yield columns


def skip_line(file: RawFile) -> bytes:
    """Reads up to the next line end and returns the bytes after it."""
    while data := file.read(raw_files.BLOCK_BYTES):
        _, newline, rest = data.partition(b"\n")
        if newline:
            return rest
    return b""


def cut_rows(
    buffer: bytes, grammar: Grammar, places: Mapping[str, int], first: int, *, final: bool
) -> tuple[Columns, int]:
    """The rows in a buffer of whole lines, and the number of bytes they take; `final`: no more lines follow."""
    used = len(buffer)
    # Unless quotes are in disorder, the last whole row ends in front of the last quote if that one is open.
    if not final and buffer.rfind(b'"') >= len(buffer) - LIKELY_QUOTE_BYTES and buffer.count(b'"') % 2:
        used = start_of_open_row(buffer)
    block = buffer[:used]
    table = parse_rows(block, grammar, places)
    if table is not None and (
        block.count(b"\n") + (block[-1:] not in (b"\n", b"")) != table.num_rows
        or block.count(b"\r") != block.count(b"\r\n")
    ):  # line ends inside quotes
        orderly = orderly_end(buffer, grammar)
        if orderly is None or (final and orderly < len(buffer)) or swallows_rows(buffer[:orderly], grammar):
            table = None
        elif orderly != used:
            table, used = parse_rows(buffer[:orderly], grammar, places), orderly
    if table is not None:
        return Columns(np.arange(first, first + table.num_rows), table, []), used
    kept, numbers, refused, used = walk_rows(buffer, grammar, first, final=final)
    table = parse_rows(kept, grammar, places)
    if table is None or table.num_rows != len(numbers):  # wrong row numbers would be worse
        lost = [Refusal(number, "malformed_csv", "") for number in numbers]
        return no_columns([*refused, *lost]), used
    return Columns(np.array(numbers, np.int64), table, refused), used


def parse_rows(data: bytes, grammar: Grammar, places: Mapping[str, int]) -> pa.Table | None:
    """The columns as bytes; None if a row has another number of cells."""
    if BLANK.fullmatch(data):
        return pa.table({name: pa.array([], pa.binary()) for name in places})
    # Binary, not string: a byte that is no UTF-8 must cost only its own row.
    wanted = {str(place): pa.binary() for place in places.values()}
    names = [str(place) for place in range(grammar.width)]
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
            parse_options=pa.csv.ParseOptions(delimiter=grammar.delimiter.decode(), newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(check_utf8=False, include_columns=list(wanted), column_types=wanted),
        )
    except pa.ArrowInvalid:
        return None
    return table.rename_columns(list(places))


def start_of_open_row(buffer: bytes) -> int:
    """The start of the row whose quote is open at the end: the quote is the last odd run of quote characters."""
    start = len(buffer)
    while True:
        last = start = buffer.rfind(b'"', 0, start)
        while start > 0 and buffer[start - 1] == QUOTE:
            start -= 1
        if (last - start) % 2 == 0:
            return buffer.rfind(b"\n", 0, start + 1) + 1


def orderly_end(buffer: bytes, grammar: Grammar) -> int | None:
    """The end of the last whole row; None if a quote or a carriage return is in a doubtful place."""
    if b"\r" in buffer and buffer.count(b"\r") != buffer.count(b"\r\n"):
        return None
    if b'"' not in buffer:
        return len(buffer)
    chars = np.frombuffer(buffer, np.uint8)
    quotes = np.flatnonzero(chars == QUOTE)
    opened, closed = quotes[::2], quotes[1::2]
    before, after = chars[opened[opened > 0] - 1], chars[closed[closed < len(chars) - 1] + 1]
    around = (ord(grammar.delimiter), NEWLINE, QUOTE)
    if not (is_among(before, around).all() and is_among(after, (*around, RETURN)).all()):
        return None
    return len(buffer) if len(quotes) % 2 == 0 else start_of_open_row(buffer)


def is_among(chars: np.ndarray, allowed: Sequence[int]) -> np.ndarray:
    return np.logical_or.reduce([chars == one for one in allowed])


def swallows_rows(data: bytes, grammar: Grammar) -> bool:
    """Whether quotes that are in order nevertheless hold whole rows."""
    chars = np.frombuffer(data, np.uint8)
    ends = np.append(0, np.flatnonzero(chars == NEWLINE) + 1)  # ends of lines, which are the starts of the next ones
    starts = ends[np.searchsorted(np.flatnonzero(chars == QUOTE), ends) % 2 == 0]  # starts of rows
    delimiters = np.diff(np.searchsorted(np.flatnonzero(chars == ord(grammar.delimiter)), ends))
    doubtful = ends[:-1][~np.isin(ends[:-1], starts) & (delimiters == grammar.width - 1)]
    rows = np.unique(np.searchsorted(starts, doubtful, side="right"))
    bounds = np.append(starts, len(data))
    return any(holds_rows(data[bounds[row - 1] : bounds[row]], grammar) for row in rows)


def walk_rows(
    buffer: bytes, grammar: Grammar, first: int, *, final: bool
) -> tuple[bytes, list[int], list[Refusal], int]:
    """`cut_rows` line by line: the good rows, their numbers, the refused rows, and the bytes of both together."""
    kept: list[bytes] = []
    numbers: list[int] = []
    refused: list[Refusal] = []
    at, number = 0, first
    while at < len(buffer):
        row = grammar.line.match(buffer, at) or grammar.row.match(buffer, at)
        is_line = row or grammar.any_line.match(buffer, at)
        if not is_line and not final and grammar.open.match(buffer, at):
            break
        if row and holds_rows(row[0], grammar):
            row = is_line = None
        text = row[0] if row else buffer[at : buffer.find(b"\n", at) + 1 or len(buffer)]
        at += len(text)
        if not text.strip(b"\r\n"):
            continue
        if row:
            kept.append(text)
            numbers.append(number)
        else:
            reason = "malformed_csv" if is_line or b'"' not in text else "unclosed_quote"
            refused.append(Refusal(number, reason, cut_snippet(text)))
        number += 1
    return b"".join(kept), numbers, refused, at


def holds_rows(text: bytes, grammar: Grammar) -> bool:
    """Whether the quotes of a row hold rows: lines with as many cells, and with digits where the row has digits."""
    inner = [line for line in text.split(b"\n")[1:] if line.count(grammar.delimiter) == grammar.width - 1]
    if not inner:
        return False
    cells = QUOTED.sub(b"", text).split(grammar.delimiter)
    numeric = [i for i, cell in enumerate(cells) if cell[:1].isdigit()]
    rows = [line.split(grammar.delimiter) for line in inner] if numeric else []
    return any(all(i < len(row) and row[i][:1].isdigit() for i in numeric) for row in rows)
