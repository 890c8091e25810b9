"""Raw files as bounded streams: blocks of whole lines, and batches of columns of MovieLens and Parquet files.

The file name states the compression. A damaged compressed stream ends at the damage: `RawFile.broken` states the
reason, and every row before the damage is read.
"""

import codecs
import gzip
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple
from zipfile import ZipFile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.compression import compr
from fsspec.utils import infer_compression

from raygr.prepare.bad_rows import InputError, Refusal, cut_snippet

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 256 << 20
PARQUET_ROWS = 20_000
# First bytes of files that are no text although their names say so.
MISNAMED = {
    b"\x1f\x8b": "its first bytes are those of a gzip file: rename it to end in .gz",
    b"BZh": "its first bytes are those of a bzip2 file: rename it to end in .bz2",
    b"\xfd7zXZ": "its first bytes are those of an xz file: rename it to end in .xz",
    b"PK\x03\x04": "its first bytes are those of a zip or Excel file: unpack it, or save it as CSV",
    b"PAR1": "its first bytes are those of a Parquet file: rename it to end in .parquet",
    codecs.BOM_UTF16_LE: "its first bytes are those of UTF-16 text: set encoding, or save it as UTF-8",
    codecs.BOM_UTF16_BE: "its first bytes are those of UTF-16 text: set encoding, or save it as UTF-8",
}


def expand_files(patterns: Sequence[str], *, what: str) -> list[str]:
    """The files of all patterns, in the order of the patterns; those of one glob are sorted.

    InputError names a pattern that matches no file.
    """
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
    """The lower-case extension in front of any compression suffix, such as "csv"."""
    name = path.rpartition("/")[2].lower()
    stem = name.rpartition(".")[0] if infer_compression(name) else name
    return stem.rpartition(".")[2]


class Broken(NamedTuple):
    """Why a file cannot be read to its end."""

    reason: str
    text: str


class RawFile:
    """A decompressed stream of UTF-8 text with LF or CRLF line ends.

    `broken` states why the stream ended too early; it is None while the stream is whole.
    """

    def __init__(self, file: IO[bytes], *, compression: str | None, encoding: str | None) -> None:
        self.broken: Broken | None = None
        self._stored, self._compression = file, compression
        self._read: Callable[[int], bytes] | None = None
        self._decoder = codecs.getincrementaldecoder(encoding)("replace") if encoding else None
        self._returns = False

    def read(self, size: int) -> bytes:
        """About `size` bytes; fewer only at the end of the file."""
        is_start = self._read is None
        pieces, missing = [], size
        while missing > 0 and self.broken is None:
            piece = self._read_piece(missing)
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        data = b"".join(pieces)
        if self._decoder:
            data = self._decoder.decode(data, final=missing > 0).encode()
        return self._checked_start(data) if is_start else data.replace(b"\r", b"\n") if self._returns else data

    def _read_piece(self, size: int) -> bytes:
        if self._compression is None:
            self._read = self._stored.read
            return self._read(size)
        try:
            if self._read is None:
                # read1 returns what is decompressed so far, so that damage further on does not cost it.
                self._read = decompressed(self._stored, self._compression).read1
            return self._read(size)
        except Exception as error:  # each compression library raises errors of its own
            self._read = self._read or self._stored.read
            self.broken = Broken(f"broken_{self._compression}", error_text(error))
            return b""

    def _checked_start(self, data: bytes) -> bytes:
        for start, what in MISNAMED.items():
            if data.startswith(start):
                self.broken = Broken("misnamed_file", what)
                return b""
        self._returns = b"\n" not in data and b"\r" in data
        data = data.removeprefix(codecs.BOM_UTF8)
        return data.replace(b"\r", b"\n") if self._returns else data


def decompressed(file: IO[bytes], compression: str) -> io.BufferedIOBase:
    if compression == "zip":
        names = [name for name in ZipFile(file).namelist() if not name.startswith("__MACOSX/") and name[-1] != "/"]
        if len(names) != 1:
            raise ValueError(f"the archive holds {len(names)} files, not one: unpack it")
        return compr["zip"](file, filename=names[0])
    if compression == "gzip":  # fsspec would take isal where it is installed, which loses the data before a damage
        return gzip.GzipFile(fileobj=file, mode="rb")
    return compr[compression](file, mode="rb")


@contextmanager
def open_raw(path: str, encoding: str | None = None) -> Iterator[RawFile]:
    with fsspec.open(path, "rb") as file:
        yield RawFile(file, compression=infer_compression(path), encoding=encoding)


def read_blocks(file: RawFile) -> Iterator[bytes]:
    """Blocks of whole lines of about BLOCK_BYTES, without the incomplete last line of a broken file.

    A line of more than MAX_LINE_BYTES loses its end.
    """
    rest = b""
    while data := file.read(BLOCK_BYTES):
        if len(rest) > MAX_LINE_BYTES:
            _, newline, data = data.partition(b"\n")
            if newline:
                yield rest + newline
                rest = b""
        head, newline, tail = data.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += data
    if rest and file.broken is None:
        yield rest


class Lines(NamedTuple):
    """Consecutive lines of a file; `first` is the number of the first one, from 0.

    `refused` holds lines that cannot be read, and the reason why a file ends too early.
    """

    first: int
    block: bytes
    refused: list[Refusal]

    def split(self) -> list[bytes]:
        """The lines without their newlines."""
        return self.block.removesuffix(b"\n").split(b"\n") if self.block else []


def read_lines(path: str, encoding: str | None = None) -> Iterator[Lines]:
    """The lines of a file in groups of bounded size."""
    first = 0
    with open_raw(path, encoding) as file:
        for block in read_blocks(file):
            if len(block) > MAX_LINE_BYTES and b"\n" not in block[:MAX_LINE_BYTES]:
                yield Lines(first, b"", [Refusal(first, "line_too_long", cut_snippet(block))])
                block, first = block.partition(b"\n")[2], first + 1
            if block:
                yield Lines(first, block, [])
                first += block.count(b"\n") + (not block.endswith(b"\n"))
        if file.broken:
            yield Lines(first, b"", [lost_rest(first, file.broken)])


def read_json_lines(path: str, encoding: str | None = None) -> Iterator[Lines]:
    """`read_lines` of a file with one JSON object per line.

    A file that holds a JSON array, or objects over several lines, is refused as a whole.
    """
    for lines in read_lines(path, encoding):
        what = not_json_lines(lines.split()) if lines.first == 0 else None
        if what:
            yield Lines(0, b"", [Refusal(0, "not_json_lines", what)])
            return
        yield lines


def not_json_lines(lines: list[bytes]) -> str | None:
    """What a file that begins with these lines is, or None if it may hold JSON lines."""
    start = next((stripped for line in lines if (stripped := line.strip())), b"")
    if start[:1] == b"[" and start[1:].lstrip()[:1] in (b"", b"{"):
        return "a JSON array, not JSON lines: convert it with `jq -c '.[]' FILE`"
    return "a JSON object over several lines: convert it with `jq -c . FILE`" if start == b"{" else None


class Columns(NamedTuple):
    """Some rows of a file under our column names, their numbers in the file from 0, and the refused rows."""

    rows: np.ndarray
    table: pa.Table
    refused: list[Refusal]


def no_columns(refused: list[Refusal]) -> Columns:
    return Columns(np.empty(0, np.int64), pa.table({}), refused)


def lost_rest(row: int, broken: Broken) -> Refusal:
    if broken.reason == "misnamed_file":
        return Refusal(row, *broken)
    return Refusal(row, broken.reason, f"breaks off after row {row} ({broken.text})")


def read_delimited(path: str, *, delimiter: str, wanted: Mapping[str, int]) -> Iterator[Columns]:
    """Columns of MovieLens files, which have no header and no quotes; `wanted` maps our names to their positions.

    Text is UTF-8 (ml-10m) or else Latin-1 (ml-100k, ml-1m). The number of a row is the number of its line.
    """
    width = max(wanted.values()) + 1
    for group in read_lines(path):
        if group.refused:
            yield no_columns(group.refused)
            continue
        lines = group.split()
        cells = [movielens_text(line).split(delimiter) for line in lines]
        whole = [i for i, row in enumerate(cells) if len(row) >= width]
        short = [i for i, row in enumerate(cells) if len(row) < width and lines[i].strip()]
        table = {ours: pa.array([cells[i][at] for i in whole], pa.string()) for ours, at in wanted.items()}
        refused = [Refusal(group.first + i, "missing_columns_in_line", cut_snippet(lines[i])) for i in short]
        yield Columns(group.first + np.array(whole, np.int64), pa.table(table), refused)


def movielens_text(line: bytes) -> str:
    try:
        return line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        return line.decode("latin-1").rstrip("\r")


def read_parquet(path: str, wanted: Mapping[str, str | int]) -> Iterator[Columns]:
    """Columns of a Parquet file with their own types, in batches; `wanted` maps our names to those of the file."""
    first = 0
    with fsspec.open(path, "rb") as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(PARQUET_ROWS, columns=list(wanted.values())):
                table = pa.table({ours: batch[theirs] for ours, theirs in wanted.items()})
                yield Columns(np.arange(first, first + table.num_rows), table, [])
                first += batch.num_rows
        except (pa.ArrowException, OSError, ValueError) as error:
            yield no_columns([lost_rest(first, Broken("broken_parquet", error_text(error)))])


def parquet_schema(path: str) -> pa.Schema | Refusal:
    """The schema of a Parquet file, or the reason why the file cannot be read."""
    with fsspec.open(path, "rb") as file:
        try:
            return pq.read_schema(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            return Refusal(0, "broken_parquet", f"cannot be read as Parquet ({error_text(error)})")


def error_text(error: Exception) -> str:
    """The error in one line; the type is named unless the error is ours."""
    line = str(error).partition("\n")[0]
    return line if isinstance(error, InputError) else cut_snippet(f"{type(error).__name__}: {line}")
