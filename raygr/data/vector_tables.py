"""Reads tables of id -> vector: a score run (SCORE_SCHEMA), or own vectors as CSV, Parquet or `.npy`.

Shape letters: `S` subjects, `I` items, `A` aspects.
"""

import csv
import io
import json
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.ids import complete_ids, read_id_lines
from raygr.schema import ASPECTS, SCORES

NAMED_IDS = 5  # number of ids that an error message shows


class Vectors(NamedTuple):
    """One row per subject; NaN where the score run has no readable score."""

    ids_S: np.ndarray
    aspects: tuple[str, ...]
    values_SA: np.ndarray
    cutoffs_S: np.ndarray | None = None
    """For users of a score run: position of the newest review in the prompt, -1 for none."""
    cutoff_times_S: np.ndarray | None = None
    """For users of a score run: timestamp of that review, -1 for none."""
    data: str | None = None
    """For score runs: fingerprint of the prepare run that holds the subjects."""


class AlignedScores(NamedTuple):
    """Item scores in the order of item_index 1..I, with counts of missing and unknown ones."""

    scores_IA: np.ndarray
    """NaN where a score is missing."""
    aspects: tuple[str, ...]
    missing: int
    """Number of items with at least one missing score."""
    unknown: int
    """Number of subjects of the table that the data does not hold."""


def read_vectors(
    path: str,
    *,
    subjects: Literal["items", "users"],
    column: str,
    aspects: tuple[str, ...] | None,
    gaps: bool = False,
) -> Vectors:
    """The table at `path`, with `aspects` in their order, or all if None; ValueError explains what is wrong with it.

    A score run must hold scores of `subjects`; a file of vectors does not state its subjects. `column` names the
    scores of a score run to read. `gaps` allows empty cells in a file; they are NaN, as in a score run.
    """
    filesystem, inner = files.filesystem_of(path)
    if not filesystem.exists(inner):
        raise FileNotFoundError(
            f"{path}: no such scores: give a finished score run, or a CSV, Parquet or .npy file of ids and numbers"
        )
    is_run = filesystem.isdir(inner)
    vectors = read_score_run(path, subjects=subjects, column=column) if is_run else read_vector_file(path, gaps=gaps)
    return vectors if aspects is None else select_aspects(vectors, aspects, path)


def read_score_run(path: str, *, subjects: Literal["items", "users"], column: str) -> Vectors:
    record = runs.read_run(path, job="score")
    config = record.config
    if config["subjects"] != subjects:
        raise ValueError(f"{path} has scores of {config['subjects']}: name a score run of {subjects} here")
    table, aspects = read_score_table(path, ["subject_id", column, "cutoff", "cutoff_position"])
    ids_S = table["subject_id"].to_numpy().astype(str)
    unique, first, counts = np.unique(ids_S, return_index=True, return_counts=True)
    if len(unique) < len(ids_S):
        raise ValueError(f"{path}: more than one score of {named(unique[counts > 1])}")
    table = table.take(pa.array(first))  # in the order of the ids
    cutoffs_S = table["cutoff_position"].fill_null(-1).to_numpy().astype(np.int64)
    times_S = table["cutoff"].fill_null(-1).to_numpy()
    values_SA = score_values(table[column], len(aspects), path)
    return Vectors(unique, aspects, values_SA, cutoffs_S, times_S, record.inputs.get(config["data"]))


def read_score_table(run: str, columns: list[str]) -> tuple[pa.Table, tuple[str, ...]]:
    """SCORE rows of a run, and the names of their aspects; ValueError where its rows have different aspects."""
    place = files.join(run, SCORES)
    table = files.read_table(place, columns)
    if ASPECTS in (table.schema.metadata or {}):
        return table, tuple(json.loads(table.schema.metadata[ASPECTS]))
    # versions before 0.2 wrote the names into every row
    lists = files.read_table(place, ["aspects"])["aspects"].combine_chunks()
    aspects = tuple(lists[0].as_py()) if len(lists) else ()
    if pc.list_flatten(lists).to_pylist() != [*aspects] * len(lists):
        raise ValueError(f"{run}: not all rows have the aspects {', '.join(aspects)}; score again into a new folder")
    return table, aspects


def score_values(column: pa.ChunkedArray, width: int, source: str) -> np.ndarray:
    """Ratings or expected ratings of SCORE rows, (S, A); NaN where there is none, in a row or in a list."""
    values_SA = np.full((len(column), width), np.nan)
    is_there_S = column.is_valid().to_numpy()
    value_N = pc.list_flatten(column).cast(pa.float64()).to_numpy()
    if len(value_N) != width * is_there_S.sum():
        raise ValueError(f"{source}: {len(value_N)} scores of {is_there_S.sum()} subjects and {width} aspects")
    values_SA[is_there_S] = value_N.reshape(-1, width)
    return values_SA


def read_vector_file(path: str, *, gaps: bool = False) -> Vectors:
    """Vectors from a file: the first column is the id, the others are numbers or one list of numbers.

    Columns of numbers may have empty cells, which are NaN, where `gaps` is true.
    """
    table = read_any_table(path)
    if table.num_columns < 2:
        raise ValueError(f"{path}: expected an id column and at least one numeric column")
    id_name, *aspects = table.column_names
    ids_S = complete_ids(table[id_name], f"{path}: column {id_name!r}").to_numpy().astype(str)
    unique, counts = np.unique(ids_S, return_counts=True)
    if len(unique) < len(ids_S):
        raise ValueError(f"{path}: id {named(unique[counts > 1])} occurs more than once")
    if len(aspects) == 1 and is_list(table.schema.field(1).type):
        values_SA = list_rows(table.column(1), f"{path}: column {aspects[0]!r}")
        return Vectors(ids_S, tuple(f"v{place}" for place in range(values_SA.shape[1])), values_SA)
    values_SA = np.stack([numbers(table[name], f"{path}: column {name!r}", gaps=gaps) for name in aspects], axis=1)
    return Vectors(ids_S, tuple(aspects), values_SA)


def read_any_table(path: str) -> pa.Table:
    if path.endswith(".parquet"):
        return files.read_table(path)
    filesystem, inner = files.filesystem_of(path)
    if path.endswith(".npy"):
        return table_of_array(np.load(io.BytesIO(filesystem.cat_file(inner))), path)
    with filesystem.open(inner, "rb", compression="infer") as file:
        names = next(csv.reader([file.readline().decode("utf-8-sig")]))
    # The first column stays text: an id such as 0005019281 is no number.
    options = pacsv.ConvertOptions(column_types={name: pa.string() for name in names[:1]})
    with filesystem.open(inner, "rb", compression="infer") as file:
        return pacsv.read_csv(file, convert_options=options)


def table_of_array(vectors: np.ndarray, path: str) -> pa.Table:
    """A `.npy` array of one row per vector; `<name>.ids.txt` beside it has one id per line."""
    names = path.removesuffix(".npy") + ".ids.txt"
    if not files.exists(names):
        raise FileNotFoundError(f"{path} holds no ids: write one id per line, in the order of its rows, to {names}")
    ids = read_id_lines(names)
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise ValueError(f"{path} has shape {vectors.shape}, but {names} has {len(ids)} ids: expected one row per id")
    return pa.table({"id": ids, **{f"v{place}": column for place, column in enumerate(vectors.T)}})


def list_rows(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """(N, W) from a column of N lists; ValueError unless all lists have the same length W."""
    lengths = pc.list_value_length(column)
    if lengths.null_count or len(pc.unique(lengths)) > 1:
        raise ValueError(f"{where}: the lists have different lengths")
    width = lengths[0].as_py() if len(lengths) else 0
    # By chunk, because all values together may need more than 32-bit offsets.
    values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    return numbers(values, where, width=width).reshape(len(column), width)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def numbers(column: pa.ChunkedArray, where: str, *, width: int = 1, gaps: bool = False) -> np.ndarray:
    """The column as float64; `width`, the number of values per row, serves the error message."""
    is_empty = gaps and pa.types.is_null(column.type)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or is_empty):
        raise ValueError(f"{where} is {column.type}, not numeric (the first column must be the id){first_word(column)}")
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    is_wrong = np.isinf(values) if gaps else ~np.isfinite(values)
    if is_wrong.any():
        row = int(np.flatnonzero(is_wrong)[0]) // width + 1
        raise ValueError(f"{where} has an {'' if gaps else 'empty or '}infinite value in row {row}: leave this id out")
    return values


def first_word(column: pa.ChunkedArray) -> str:
    """Says which row of a text column is the first that holds no number; "" for other columns."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        for row, text in enumerate(column.to_pylist(), start=1):
            try:
                float(text or "nan")
            except ValueError:
                return f": row {row} has {text!r}"
    return ""


def select_aspects(vectors: Vectors, aspects: tuple[str, ...], path: str) -> Vectors:
    absent = [name for name in aspects if name not in vectors.aspects]
    if absent or len(set(aspects)) < len(aspects):
        wrong = f"no aspect {', '.join(absent)}" if absent else "an aspect is named twice"
        raise ValueError(f"{path}: {wrong}; it has: {', '.join(vectors.aspects)}")
    columns = [vectors.aspects.index(name) for name in aspects]
    return vectors._replace(aspects=tuple(aspects), values_SA=vectors.values_SA[:, columns])


def align_items(
    vectors: Vectors, item_ids_I: np.ndarray, *, missing: Literal["mean", "refuse"], control: str, seed: int
) -> AlignedScores:
    """One row of scores per item of the data, changed for a control arm."""
    scores_IA, unknown = rows_by_id(vectors, item_ids_I)
    incomplete_I = np.isnan(scores_IA).any(axis=1)
    if missing == "refuse" and incomplete_I.any():
        examples = named(item_ids_I[incomplete_I])
        raise ValueError(f"{incomplete_I.sum()} items have no complete scores, such as {examples}")
    check_read(scores_IA, vectors.aspects)
    changed_IA = controlled(scores_IA, control=control, seed=seed)
    return AlignedScores(changed_IA, vectors.aspects, int(incomplete_I.sum()), unknown)


def rows_by_id(vectors: Vectors, ids: np.ndarray) -> tuple[np.ndarray, int]:
    """The rows of the table in the order of `ids`, and the number of unknown subjects.

    An id without a row gets NaN.
    """
    row_of = {subject: row for row, subject in enumerate(vectors.ids_S.tolist())}
    rows = np.array([row_of.get(subject, -1) for subject in ids.tolist()])
    if (rows < 0).all():
        raise ValueError(f"none of the scored ids ({named(vectors.ids_S)}) is an id of the data ({named(ids)})")
    values = vectors.values_SA[rows].copy()
    values[rows < 0] = np.nan
    return values, len(row_of) - int((rows >= 0).sum())


def controlled(scores_IA: np.ndarray, *, control: str, seed: int) -> np.ndarray:
    """Scores of a control arm: the rows of scored items permuted, or replaced by standard normal rows."""
    generator = np.random.default_rng(seed)
    scored = np.flatnonzero(~np.isnan(scores_IA).all(axis=1))
    changed = scores_IA.copy()
    match control:
        case "shuffled":
            changed[scored] = scores_IA[generator.permutation(scored)]
        case "random":
            changed[scored] = generator.standard_normal((len(scored), scores_IA.shape[1]))
    return changed


def check_read(scores_SA: np.ndarray, aspects: tuple[str, ...], subject: str = "item") -> None:
    """ValueError if there are aspects of which no subject has a score."""
    unread = [name for name, empty in zip(aspects, np.isnan(scores_SA).all(axis=0), strict=True) if empty]
    if unread:
        raise ValueError(f"no {subject} has a score of {', '.join(unread)}")


def check_ratings(vectors: Vectors, source: str) -> None:
    """ConfigError where a teacher's ratings lie outside 1..10."""
    outside_S = ((vectors.values_SA < 1) | (vectors.values_SA > 10)).any(axis=1)
    if outside_S.any():
        raise ConfigError(f"{source}: ratings outside 1..10 of {named(vectors.ids_S[outside_S])}")


def check_same_data(vectors: Vectors, data: str, *, source: str) -> None:
    """ConfigError if a score run of users belongs to another prepare run, whose split may differ."""
    if vectors.cutoffs_S is not None and vectors.data != files.fingerprint(data):
        raise ConfigError(
            f"{source}: its users were scored from other data than {data}, so their prompts may contain targets of "
            f"this data: score the users of {data} (answers in the store are reused)"
        )


def named(ids: np.ndarray) -> str:
    shown = ", ".join(str(one) for one in ids[:NAMED_IDS])
    return shown if len(ids) <= NAMED_IDS else f"{shown}, ..."
