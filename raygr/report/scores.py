"""Scores as matrices, for the report: a score run, another model's scores, and how far they agree."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.data.row_counts import log_rows
from raygr.data.vector_tables import read_vectors
from raygr.files import join, read_table
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
    read = len(table)
    table = table.filter(pc.equal(table["reason"], "ok"))
    lists = table["aspects"].to_pylist()
    aspects = lists[0] if lists else []
    other = sum(names != aspects for names in lists)
    dropped = {"not_read_in_full": read - len(lists), "of_other_aspects": other}
    log_rows(f"subjects of {run}", read=read, kept=len(lists) - other, dropped=dropped)
    table = table.filter(pa.array([names == aspects for names in lists], pa.bool_()))
    values = pc.list_flatten(table["expected"]).cast(pa.float64()).to_numpy()
    return ScoreMatrix(table["subject_id"].to_pylist(), aspects, values.reshape(-1, len(aspects) or 1))


def read_reference(path: str) -> ScoreMatrix:
    """Another model's scores: a CSV or Parquet file of id and aspects, or a score run."""
    vectors = read_vectors(path, subjects="items", column="expected", aspects=None)
    return ScoreMatrix(vectors.ids_S.tolist(), list(vectors.aspects), vectors.values_SA)


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
