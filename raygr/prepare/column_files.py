"""Files that hold columns: those of MovieLens, and Parquet, CSV or JSON lines with named columns.

Each `*_columns` function yields batches of bounded size under our column names; optional columns may be absent. Values
keep the type that they have in the file (bytes in CSV); column_values.py converts them.
"""

import codecs
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.config import ConfigError
from raygr.prepare.bad_rows import Refusal, cut_snippet
from raygr.prepare.column_values import as_texts
from raygr.prepare.config import PrepareConfig
from raygr.prepare.csv_files import csv_form, read_csv
from raygr.prepare.json_lines import OBJECT, as_id, as_text, decode_block, decode_object, without_surrogates
from raygr.prepare.raw_files import (
    Columns,
    file_kind,
    lost_rest,
    no_columns,
    parquet_schema,
    read_delimited,
    read_json_lines,
    read_parquet,
)

REVIEW_NAMES = ("user_id", "item_id", "rating", "timestamp", "review_title", "review_text")
ITEM_NAMES = ("item_id", "title", "description", "categories", "details")

# Our name -> its names in the CSV files of MovieLens. `position` is the order of a copy of ml-1m that has no times.
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
UITEM_GENRES = ("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
                "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War",
                "Western")  # fmt: skip
UITEM_FIRST_GENRE = 5

JSON_KINDS = ("json", "jsonl", "ndjson")
# Each value of these columns is one id or number; the others may be nested.
PLAIN_NAMES = ("user_id", "item_id", "rating", "timestamp")


def review_columns(path: str, config: PrepareConfig) -> Iterator[Columns]:
    """Columns of one file of reviews: those of REVIEW_NAMES that it has.

    A file without user_id, item_id or timestamp is refused as a whole.
    """
    required = ("user_id", "item_id", "timestamp")
    if config.format == "movielens" and file_kind(path) in DELIMITERS:
        wanted = {"user_id": 0, "item_id": 1, "rating": 2, "timestamp": 3}
        return read_delimited(path, delimiter=DELIMITERS[file_kind(path)], wanted=wanted)
    if config.format == "movielens":
        return named_columns(path, MOVIELENS_RATINGS, required=(*required, "rating"))
    return table_columns(path, REVIEW_NAMES, config.columns, config, required=required)


def item_columns(path: str, config: PrepareConfig) -> Iterator[Columns]:
    """Columns of one metadata file: those of ITEM_NAMES that it has.

    The plot of MovieLens becomes the description, the genres become the categories.
    """
    match config.format, file_kind(path):
        case "movielens", "item":
            flags = {genre: UITEM_FIRST_GENRE + i for i, genre in enumerate(UITEM_GENRES)}
            wanted = {"item_id": 0, "title": 1, **flags}
            return map(join_genre_flags, read_delimited(path, delimiter="|", wanted=wanted))
        case "movielens", "dat":
            wanted = {"item_id": 0, "title": 1, "genres": 2}
            return map(movie_items, read_delimited(path, delimiter="::", wanted=wanted))
        case "movielens", _:
            return map(movie_items, named_columns(path, MOVIELENS_MOVIES, required=("item_id", "title")))
        case _:
            shared = config.columns if config.header else {}  # positions describe reviews only
            columns = {**shared, **config.item_columns}
            own_id = {"item_id": "item_id"} if "item_id" not in config.item_columns else {}
            return table_columns(path, ITEM_NAMES, columns, config, required=("item_id",), instead=own_id)


def table_columns(
    path: str,
    names: Sequence[str],
    columns: Mapping[str, str | int],
    config: PrepareConfig,
    *,
    required: Sequence[str],
    instead: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Columns]:
    """The columns that a table has; `columns` maps our `names` to its own, `instead` to a second choice."""
    is_named = not any(isinstance(theirs, int) for theirs in columns.values())
    known = {ours: (columns.get(ours, ours), *([instead[ours]] if ours in instead else [])) for ours in names}
    aliases = {ours: theirs for ours, theirs in known.items() if is_named or ours in columns}
    asked = [ours for ours in names if ours in required or ours in columns]
    return named_columns(path, aliases, required=asked, delimiter=config.delimiter, encoding=config.encoding)


def check_columns(config: PrepareConfig) -> None:
    """ConfigError if a setting for tables has an unknown name, has no effect, or contradicts another setting."""
    settings = {
        "columns": config.columns,
        "item_columns": config.item_columns,
        "delimiter": config.delimiter,
        "encoding": config.encoding,
        "header": not config.header,
    }
    given = [name for name, value in settings.items() if value]
    if given and config.format != "table":
        raise ConfigError(f"{given[0]}: only for format: table, not for {config.format}")
    for setting, columns, ours in (
        ("columns", config.columns, [*REVIEW_NAMES, *ITEM_NAMES]),
        ("item_columns", config.item_columns, ITEM_NAMES),
    ):
        unknown = [name for name in columns if name not in ours]
        if unknown:
            known = ", ".join(dict.fromkeys(ours))
            raise ConfigError(f"{setting}: our names do not include {', '.join(unknown)}; they are {known}")
        if len({isinstance(theirs, int) for theirs in columns.values()}) > 1:
            raise ConfigError(f"{setting}: give either names or positions, not both: {dict(columns)}")
    check_header(config)
    try:
        codecs.lookup(config.encoding or "utf-8")
    except LookupError as error:
        raise ConfigError(f"encoding: {error}") from None


def check_header(config: PrepareConfig) -> None:
    """ConfigError unless positions come with `header: false` and the other way round."""
    has_positions = any(isinstance(theirs, int) for theirs in config.columns.values())
    missing = [name for name in ("user_id", "item_id", "timestamp") if name not in config.columns]
    if config.header and has_positions:
        raise ConfigError("columns: positions are for files without a line of names: set header: false")
    if not config.header and (missing or not has_positions):
        raise ConfigError(
            "header: false needs positions from 0 in columns, such as {user_id: 0, item_id: 1, timestamp: 3}"
        )


def named_columns(
    path: str,
    names: Mapping[str, Sequence[str | int]],
    *,
    required: Sequence[str],
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Iterator[Columns]:
    """Columns of a Parquet, CSV or JSON-lines file; `names` maps ours to those of the file, the first found counts.

    Columns that are `required` and absent make the file refused.
    """
    if file_kind(path) in JSON_KINDS:
        yield from json_columns(path, names, required=required, encoding=encoding)
        return
    if file_kind(path) == "parquet":
        schema = parquet_schema(path)
        if isinstance(schema, Refusal):
            yield no_columns([schema])
            return
        header, broken = schema.names, None
    else:
        form = csv_form(path, [a for aliases in names.values() for a in aliases], delimiter, encoding)
        schema, header, broken = None, form.names, form.broken
    wanted = {ours: alias for ours, aliases in names.items() for alias in aliases[::-1] if alias in header}
    problem = column_problem(names, required, wanted, header, schema)
    if not header:
        yield no_columns([lost_rest(0, broken)] if broken else [])
    elif problem:
        yield no_columns([Refusal(0, "missing_columns", cut_snippet(problem))])
    else:
        yield from read_parquet(path, wanted) if schema else read_csv(path, wanted, form)


def column_problem(
    names: Mapping[str, Sequence[str | int]],
    required: Sequence[str],
    wanted: Mapping[str, str | int],
    header: Sequence[str | int],
    schema: pa.Schema | None,
) -> str | None:
    """The reason why the `wanted` columns cannot be read, or None."""
    missing = ["/".join(map(str, names[name])) for name in required if name not in wanted]
    if missing:
        return f"no {', '.join(missing)} among {', '.join(map(str, header))}"
    twice = [theirs for theirs in wanted.values() if list(header).count(theirs) > 1]
    if twice:
        return f"{twice[0]} occurs twice among {', '.join(map(str, header))}"
    if schema is None:
        return None
    kinds = {theirs: schema.field(theirs).type for ours, theirs in wanted.items() if ours in PLAIN_NAMES}
    nested = [f"{theirs} is a {kind}" for theirs, kind in kinds.items() if pa.types.is_nested(kind)]
    return nested[0] if nested else None


def json_columns(
    path: str,
    names: Mapping[str, Sequence[str | int]],
    *,
    required: Sequence[str],
    encoding: str | None,
) -> Iterator[Columns]:
    """Columns of JSON lines as text; absent values are null. A required name that no row has is a missing column."""
    missing = {ours: names[ours] for ours in required}
    keys: Sequence[str] = ()
    for lines in read_json_lines(path, encoding):
        at, _, rows, refused = decode_block(lines, OBJECT, decode_object)
        table = {ours: json_column(ours, picked(rows, theirs)) for ours, theirs in names.items()}
        yield Columns(lines.first + np.array(at, np.int64), pa.table(table), [*lines.refused, *refused])
        keys = keys or list(rows[0] if rows else ())
        missing = {
            ours: theirs for ours, theirs in missing.items() if not any(name in row for row in rows for name in theirs)
        }
    if missing and keys:
        shown = ", ".join("/".join(map(str, theirs)) for theirs in missing.values())
        yield no_columns([Refusal(0, "missing_columns", cut_snippet(f"no {shown} among {', '.join(keys)}"))])


def picked(rows: Sequence[Mapping[Any, object]], names: Sequence[str | int]) -> list[object]:
    """The value of each row under the first of the names that the row has."""
    if len(names) == 1:
        return [row.get(names[0]) for row in rows]
    return [next((row[name] for name in names if name in row), None) for row in rows]


def json_column(name: str, values: Sequence[object]) -> pa.Array:
    """Ids, or the texts of values of any type."""
    if name in ("user_id", "item_id"):
        return pa.array(map(as_id, values), pa.string())
    texts = [None if v is None else v if isinstance(v, str) else as_text(v) for v in values]
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([None if text is None else without_surrogates(text) for text in texts], pa.string())


def join_genre_flags(columns: Columns) -> Columns:
    """Replaces the 0/1 column that u.item has per genre by the names of the genres."""
    table = columns.table
    if not len(columns.rows):
        return columns
    flags = zip(*(table[genre].to_pylist() for genre in UITEM_GENRES), strict=True)
    genres = [" ".join(g for g, flag in zip(UITEM_GENRES, row, strict=True) if flag == "1") for row in flags]
    kept = table.select(["item_id", "title"]).append_column("categories", pa.array(genres, pa.string()))
    return columns._replace(table=kept)


def movie_items(columns: Columns) -> Columns:
    """Turns plot, genres, director and actors into description, categories and details."""
    count = len(columns.rows)
    if not count:
        return columns
    texts = {name: as_texts(columns.table, name, count)[0] for name in MOVIELENS_MOVIES}
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
