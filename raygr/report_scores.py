"""Scores as matrices, for the report: a score run, another model's scores, and how far they agree."""

import csv
from typing import BinaryIO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from raygr.runs import join, read_table
from raygr.schema import SCORES


class ScoreMatrix(NamedTuple):
    """Row s of `scores_SA` belongs to `ids[s]`, column a to `aspects[a]`; NaN where there is no number."""

    ids: list[str]
    aspects: list[str]
    scores_SA: np.ndarray


class Agreement(NamedTuple):
    """Spearman's correlation of two models over the `items` that both scored; None where one is constant."""

    aspect: str
    correlation: float | None
    items: int


def read_scores(run: str) -> ScoreMatrix:
    """The expected scores of a score run's subjects whose ratings were all read.

    A run has one list of aspects; rows with another list than the first row's are left out.
    """
    table = read_table(join(run, SCORES), ["subject_id", "aspects", "expected", "reason"])
    table = table.filter(pc.equal(table["reason"], "ok"))
    lists = table["aspects"].to_pylist()
    aspects = lists[0] if lists else []
    table = table.filter(pa.array([names == aspects for names in lists], pa.bool_()))
    values = pc.list_flatten(table["expected"]).cast(pa.float64()).to_numpy()
    return ScoreMatrix(table["subject_id"].to_pylist(), aspects, values.reshape(-1, len(aspects) or 1))


def read_reference(path: str) -> ScoreMatrix:
    """Scores from a CSV or Parquet file: the first column is the item id, every other one an aspect."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    with filesystem.open(inner, "rb") as file:
        table = pq.read_table(file) if inner.endswith(".parquet") else read_csv(file)
    id_name, *aspects = table.column_names
    ids = table[id_name].cast(pa.string()).to_pylist()
    return ScoreMatrix(ids, aspects, np.array([table[name].cast(pa.float64()).to_numpy() for name in aspects]).T)


def read_csv(file: BinaryIO) -> pa.Table:
    # The first column stays text: an id such as 0005019281 is no number.
    id_name = next(csv.reader([file.readline().decode("utf-8-sig")]))[0]
    file.seek(0)
    return pa.csv.read_csv(file, convert_options=pa.csv.ConvertOptions(column_types={id_name: pa.string()}))


def compare_scores(ours: ScoreMatrix, reference: ScoreMatrix) -> list[Agreement]:
    """One entry per aspect that both have, in our order, over the items that both have."""
    row_of = {item: row for row, item in enumerate(reference.ids)}
    shared = [(row, row_of[item]) for row, item in enumerate(ours.ids) if item in row_of]
    rows, reference_rows = np.array(shared, dtype=int).reshape(-1, 2).T
    return [
        compare_aspect(
            aspect,
            ours.scores_SA[rows, column],
            reference.scores_SA[reference_rows, reference.aspects.index(aspect)],
        )
        for column, aspect in enumerate(ours.aspects)
        if aspect in reference.aspects
    ]


def compare_aspect(aspect: str, ours: np.ndarray, reference: np.ndarray) -> Agreement:
    both = np.isfinite(ours) & np.isfinite(reference)
    return Agreement(aspect, spearman(ours[both], reference[both]), int(both.sum()))


def spearman(left: np.ndarray, right: np.ndarray) -> float | None:
    """Correlation of the ranks, ties sharing their mean rank; None below two values or without spread."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(np.corrcoef(mean_ranks(left), mean_ranks(right))[0, 1])


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Rank 1 for the smallest; equal values share the mean of their ranks."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (sizes.cumsum() - (sizes - 1) / 2)[group]
