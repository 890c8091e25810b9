"""Reviews and metadata that come as columns: MovieLens' files, and Parquet, CSV or JSON lines with named columns.

Each `*_columns` yields bounded batches under our column names; optional columns may be absent.
Values keep the file's type (CSV: bytes) until the `as_*` functions, one bad value costing its row only.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.config import ConfigError, PrepareConfig
from raygr.data.json_lines import as_id, as_text, decode_loosely
from raygr.data.raw_files import (
    Columns,
    csv_header,
    file_kind,
    lost_rest,
    no_columns,
    parquet_header,
    read_csv,
    read_delimited,
    read_lines,
    read_parquet,
)
from raygr.data.refusals import Refusal, cut_snippet

REVIEW_NAMES = ("user_id", "item_id", "rating", "timestamp", "review_title", "review_text")
ITEM_NAMES = ("item_id", "title", "description", "categories", "details")

# Our name -> the names it goes by in the CSV files of MovieLens; ml-1m here has positions, no clock.
MOVIELENS_RATINGS = {
    "user_id": ("user_id", "userId"),
    "item_id": ("movie_id", "movieId"),
    "rating": ("rating",),
    "timestamp": ("timestamp", "position"),
}
MOVIELENS_MOVIES = {
    "item_id": ("movie_id", "movieId"),
    "title": ("title",),
    "genres": ("genres",),
    "director": ("director",),
    "actors": ("actors",),
    "plot": ("plot",),
}
DELIMITERS = {"dat": "::", "data": "\t", "item": "|"}
UITEM_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
UITEM_FIRST_GENRE = 5

NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?\s*$"
YEAR_1990_S, YEAR_2100_S = 631_152_000, 4_102_444_800


def review_columns(path: str, config: PrepareConfig) -> Iterator[Columns]:
    """REVIEW_NAMES of one file, as far as it has them; refused as a whole without its ids and times."""
    if config.format == "movielens" and file_kind(path) in DELIMITERS:
        wanted = {"user_id": 0, "item_id": 1, "rating": 2, "timestamp": 3}
        return read_delimited(path, delimiter=DELIMITERS[file_kind(path)], wanted=wanted)
    if config.format == "movielens":
        return named_columns(path, MOVIELENS_RATINGS, required=("user_id", "item_id", "rating", "timestamp"))
    required = asked_for(REVIEW_NAMES, config, always=("user_id", "item_id", "timestamp"))
    return named_columns(path, aliases(REVIEW_NAMES, config.columns), required=required)


def item_columns(path: str, config: PrepareConfig) -> Iterator[Columns]:
    """ITEM_NAMES of one metadata file; MovieLens' plot is the description, its genres the categories."""
    match config.format, file_kind(path):
        case "movielens", "item":
            return map(join_genre_flags, read_delimited(path, delimiter="|", wanted=uitem_positions()))
        case "movielens", "dat":
            wanted = {"item_id": 0, "title": 1, "genres": 2}
            return map(movie_items, read_delimited(path, delimiter="::", wanted=wanted))
        case "movielens", _:
            return map(movie_items, named_columns(path, MOVIELENS_MOVIES, required=("item_id", "title")))
        case _:
            required = asked_for(ITEM_NAMES, config, always=("item_id",))
            return named_columns(path, aliases(ITEM_NAMES, config.columns), required=required)


def asked_for(names: Sequence[str], config: PrepareConfig, *, always: Sequence[str]) -> list[str]:
    """Of our names for one kind of file: those that it must have, and those that `columns` says it has."""
    return [name for name in names if name in always or name in config.columns]


def check_columns(config: PrepareConfig) -> None:
    """ConfigError where `columns` names what we have not, or belongs to another format."""
    if config.columns and config.format != "table":
        raise ConfigError(f"columns are for format: table, not for {config.format}")
    ours = dict.fromkeys([*REVIEW_NAMES, *ITEM_NAMES])
    unknown = [name for name in config.columns if name not in ours]
    if unknown:
        raise ConfigError(f"columns: no {', '.join(unknown)} among our names, which are {', '.join(ours)}")


def aliases(names: Sequence[str], columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: (columns.get(name, name),) for name in names}


def named_columns(path: str, names: Mapping[str, Sequence[str]], *, required: Sequence[str]) -> Iterator[Columns]:
    """Columns of a Parquet, CSV or JSON-lines file by their first alias that the file has."""
    if file_kind(path) in ("json", "jsonl"):
        yield from json_columns(path, {ours: theirs[0] for ours, theirs in names.items()})
        return
    is_parquet = file_kind(path) == "parquet"
    header = parquet_header(path) if is_parquet else csv_header(path)
    if header is None:
        yield no_columns([Refusal(0, "unreadable_parquet", "not a Parquet file")])
        return
    wanted = {ours: alias for ours, options in names.items() for alias in options if alias in header}
    missing = ["/".join(names[name]) for name in required if name not in wanted]
    if missing and header:
        snippet = cut_snippet(f"no {', '.join(missing)} among {', '.join(header)}")
        yield no_columns([Refusal(0, "missing_columns", snippet)])
    elif header:
        yield from (read_parquet if is_parquet else read_csv)(path, wanted)


def json_columns(path: str, wanted: Mapping[str, str]) -> Iterator[Columns]:
    """Columns of JSON lines as text; null and absent values are null."""
    for lines in read_lines(path):
        if lines.broken:
            yield no_columns([lost_rest(lines.first, lines.broken)])
            return
        values = [decode_object(line) for line in lines.lines]
        good = [i for i, v in enumerate(values) if isinstance(v, dict)]
        bad = {i: v for i, v in enumerate(values) if isinstance(v, str)}
        table = {ours: json_column(ours, [values[i].get(theirs) for i in good]) for ours, theirs in wanted.items()}
        refused = [Refusal(lines.first + i, reason, cut_snippet(lines.lines[i])) for i, reason in bad.items()]
        yield Columns(lines.first + np.array(good, np.int64), pa.table(table), refused)


def decode_object(line: bytes) -> dict[str, object] | str | None:
    """The line's object, the reason for which it has none, or None where blank."""
    try:
        text = str(line, "utf-8")
    except UnicodeDecodeError:
        return "invalid_utf8"
    if not text.strip():
        return None
    try:
        values = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        values = decode_loosely(text)
    return values if isinstance(values, dict) else "malformed_json"


def json_column(name: str, values: Sequence[object]) -> pa.Array:
    """Ids, or the text of any values."""
    return pa.array(map(as_id, values), pa.string()) if name in ("user_id", "item_id") else text_column(values)


def text_column(values: Sequence[object]) -> pa.Array:
    return pa.array([None if v is None else v if isinstance(v, str) else as_text(v) for v in values], pa.string())


def uitem_positions() -> dict[str, int]:
    flags = {genre: UITEM_FIRST_GENRE + i for i, genre in enumerate(UITEM_GENRES)}
    return {"item_id": 0, "title": 1, **flags}


def join_genre_flags(columns: Columns) -> Columns:
    """u.item has one 0/1 column per genre."""
    table = columns.table
    if not len(columns.rows):
        return columns
    flags = zip(*(table[genre].to_pylist() for genre in UITEM_GENRES), strict=True)
    genres = [" ".join(g for g, flag in zip(UITEM_GENRES, row, strict=True) if flag == "1") for row in flags]
    kept = table.select(["item_id", "title"]).append_column("categories", pa.array(genres, pa.string()))
    return columns._replace(table=kept)


def movie_items(columns: Columns) -> Columns:
    """Plot, genres, director and actors as description, categories and details."""
    count = len(columns.rows)
    if not count:
        return columns
    texts = {name: as_texts(columns.table, name, count) for name in MOVIELENS_MOVIES}
    credits = [
        pc.if_else(pc.equal(texts[n], ""), "", pc.binary_join_element_wise(label, texts[n], " "))
        for n, label in (("director", "Director:"), ("actors", "Actors:"))
    ]
    items = {
        "item_id": columns.table["item_id"],
        "title": texts["title"],
        "description": texts["plot"],
        "categories": pc.replace_substring(texts["genres"], "|", " "),
        "details": pc.utf8_trim_whitespace(pc.binary_join_element_wise(*credits, " ")),
    }
    return columns._replace(table=pa.table(items))


def as_strings(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Ids as strings, and which of them are no UTF-8."""
    flat = column.combine_chunks()
    try:
        return flat.cast(pa.string()), np.zeros(len(flat), bool)
    except pa.ArrowInvalid:
        values = [v if v is None else decode_or_none(v) for v in flat.to_pylist()]
        invalid = [v is not None and text is None for v, text in zip(flat.to_pylist(), values, strict=True)]
        return pa.array(values, pa.string()), np.array(invalid)


def decode_or_none(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def as_texts(table: pa.Table, name: str, count: int) -> pa.Array:
    """A text column without nulls, "" where the file has no such column; bytes that are no UTF-8 become U+FFFD."""
    if name not in table.column_names:
        return pa.array([""] * count, pa.string())
    flat = table[name].combine_chunks()
    if pa.types.is_nested(flat.type):
        return pa.array([as_text(v) for v in flat.to_pylist()], pa.string())
    try:
        return flat.cast(pa.string()).fill_null("")
    except pa.ArrowInvalid:
        return pa.array([(v or b"").decode("utf-8", "replace") for v in flat.to_pylist()], pa.string())


def as_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64 with NaN where a value is null, empty or no number."""
    flat = column.combine_chunks()
    if not (pa.types.is_string(flat.type) or pa.types.is_binary(flat.type) or pa.types.is_large_string(flat.type)):
        return flat.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
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


def as_milliseconds(column: pa.ChunkedArray) -> np.ndarray:
    """Times: Parquet timestamps, numbers in seconds of 1990..2100 scaled, other numbers as they are."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms")).cast(pa.int64())
        return as_numbers(column)
    times = as_numbers(column)
    return np.where((times >= YEAR_1990_S) & (times <= YEAR_2100_S), times * 1000, times)


def row_texts(table: pa.Table) -> Sequence[str]:
    """Rows as they would stand in a CSV file, made only when one is looked at."""
    return RowTexts(table)


class RowTexts(Sequence[str]):
    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> str:
        values = self.table.slice(row, 1).to_pylist()[0].values()
        return ",".join(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)
