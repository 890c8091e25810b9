"""Raw files as bounded streams: blocks of whole lines, and batches of CSV or Parquet columns.

Compression is taken from the file name. A compressed stream that breaks ends there, and says so in
`RawFile.broken`; every row before the break is delivered.
"""

import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.utils import infer_compression

from raygr.data.refusals import InputError, Refusal, cut_snippet

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 256 << 20
PARQUET_ROWS = 20_000
BROKEN_STREAM = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


def expand_files(patterns: Sequence[str], *, what: str) -> list[str]:
    """Every file of the patterns, in their order, sorted inside a glob; InputError names one without a file."""
    files: list[str] = []
    for pattern in patterns:
        filesystem, inner = fsspec.core.url_to_fs(pattern)
        is_glob = any(mark in inner for mark in "*?[")
        found = sorted(filesystem.glob(inner)) if is_glob else [inner] * filesystem.isfile(inner)
        if not found:
            raise InputError(f"{what}: no file matches {pattern}")
        files += [filesystem.unstrip_protocol(f) if "://" in pattern else f for f in found]
    return list(dict.fromkeys(files))


def file_kind(path: str) -> str:
    """The extension before any compression suffix, such as "csv"."""
    name = path.rpartition("/")[2].lower()
    stem = name.rpartition(".")[0] if infer_compression(name) else name
    return stem.rpartition(".")[2]


class RawFile(io.RawIOBase):
    """A decompressed stream; `broken` is the reason for which it ended too early, or None."""

    def __init__(self, file: IO[bytes], *, compressed: bool) -> None:
        self.broken: str | None = None
        # read1 hands over what is decompressed so far, so that a break loses none of it.
        self._read = file.read1 if compressed else file.read

    def readable(self) -> bool:
        return True

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        pieces, missing = [], size
        while missing > 0 and self.broken is None:
            piece = self._read_piece(missing)
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _read_piece(self, size: int) -> bytes:
        try:
            return self._read(size)
        except BROKEN_STREAM:
            self.broken = "broken_gzip"
            return b""


@contextmanager
def open_raw(path: str) -> Iterator[RawFile]:
    with fsspec.open(path, "rb", compression="infer") as file:
        yield RawFile(file, compressed=infer_compression(path) is not None)


def read_blocks(file: RawFile) -> Iterator[bytes]:
    """Blocks of whole lines, about BLOCK_BYTES each; the cut last line of a broken file is left out."""
    rest = b""
    while data := file.read(BLOCK_BYTES):
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += data
        if len(rest) > MAX_LINE_BYTES:
            file.broken = "line_too_long"
            return
    if rest and file.broken is None:
        yield rest


class Lines(NamedTuple):
    """Consecutive lines of a file without their newlines; `first` is the 0-based number of the first."""

    first: int
    lines: list[bytes]
    block: bytes
    broken: str | None


def read_lines(path: str) -> Iterator[Lines]:
    """The file's lines in bounded groups; a last, empty group carries the reason of a broken file."""
    first = 0
    with open_raw(path) as file:
        for block in read_blocks(file):
            text = block.removeprefix(b"\xef\xbb\xbf") if first == 0 else block
            lines = text.removesuffix(b"\n").split(b"\n")
            yield Lines(first, lines, text, None)
            first += len(lines)
        if file.broken:
            yield Lines(first, [], b"", file.broken)


class Columns(NamedTuple):
    """Some rows of a file under our column names, `rows` being their 0-based numbers, and those refused."""

    rows: np.ndarray
    table: pa.Table
    refused: list[Refusal]


def no_columns(refused: list[Refusal]) -> Columns:
    return Columns(np.empty(0, np.int64), pa.table({}), refused)


def lost_rest(row: int, reason: str) -> Refusal:
    return Refusal(row, reason, "the rest of this file is lost")


def numbered(first: int, table: pa.Table, refused: list[Refusal]) -> Columns:
    return Columns(np.arange(first, first + table.num_rows), table, refused)


def rename(table: pa.Table, wanted: Mapping[str, str]) -> pa.Table:
    return pa.table({ours: table[theirs] for ours, theirs in wanted.items()})


def csv_header(path: str) -> list[str]:
    with open_raw(path) as file:
        line = next(read_blocks(file), b"").partition(b"\n")[0]
    return next(csv.reader([line.decode("utf-8-sig", "replace").strip("\r")]), [])


def read_csv(path: str, wanted: Mapping[str, str]) -> Iterator[Columns]:
    """The wanted columns (our name -> the file's, all present) as binary, in bounded batches.

    Rows are numbered over the readable ones only: the same in each pass over the file.
    """
    lost: list[Refusal] = []

    def skip_row(row: pa.csv.InvalidRow) -> str:
        lost.append(Refusal(row.number or 0, "malformed_csv", cut_snippet(row.text or "")))
        return "skip"

    first = 0
    with open_raw(path) as file:
        try:
            for batch in open_csv(file, list(wanted.values()), skip_row):
                yield numbered(first, rename(pa.table(batch), wanted), lost.copy())
                lost.clear()
                first += batch.num_rows
        except pa.ArrowInvalid as error:
            lost.append(Refusal(first, "malformed_csv", cut_snippet(str(error))))
        if file.broken:
            lost.append(lost_rest(first, file.broken))
        yield no_columns(lost)


def open_csv(
    file: RawFile, names: list[str], skip_row: Callable[[pa.csv.InvalidRow], str]
) -> pa.csv.CSVStreamingReader:
    # Binary, not string: one byte that is no UTF-8 must cost its row only.
    return pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip_row),
        convert_options=pa.csv.ConvertOptions(
            check_utf8=False, include_columns=names, column_types={name: pa.binary() for name in names}
        ),
    )


def read_delimited(path: str, *, delimiter: str, wanted: Mapping[str, int]) -> Iterator[Columns]:
    """MovieLens' files without header or quotes; our name -> the position of its column.

    Text is UTF-8 (ml-10m) or else Latin-1 (ml-100k, ml-1m). Rows are numbered by line.
    """
    width = max(wanted.values()) + 1
    for group in read_lines(path):
        if group.broken:
            yield no_columns([lost_rest(group.first, group.broken)])
            return
        cells = [decode_line(line).split(delimiter) for line in group.lines]
        whole = [i for i, row in enumerate(cells) if len(row) >= width]
        short = [i for i, row in enumerate(cells) if len(row) < width and group.lines[i].strip()]
        table = {ours: pa.array([cells[i][at] for i in whole], pa.string()) for ours, at in wanted.items()}
        refused = [Refusal(group.first + i, "missing_columns_in_line", cut_snippet(group.lines[i])) for i in short]
        yield Columns(group.first + np.array(whole, np.int64), pa.table(table), refused)


def decode_line(line: bytes) -> str:
    try:
        return line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        return line.decode("latin-1").rstrip("\r")


def read_parquet(path: str, wanted: Mapping[str, str]) -> Iterator[Columns]:
    """The wanted columns with the file's own types, in bounded batches."""
    first = 0
    with fsspec.open(path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(PARQUET_ROWS, columns=list(wanted.values())):
            yield numbered(first, rename(pa.table(batch), wanted), [])
            first += batch.num_rows


def parquet_header(path: str) -> list[str] | None:
    """The file's columns; None where it is no Parquet file."""
    with fsspec.open(path, "rb") as file:
        try:
            return pq.read_schema(file).names
        except pa.ArrowInvalid:
            return None
