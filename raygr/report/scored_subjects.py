"""Scores as matrices: those of a score run and another model, their agreement, and the subjects that are drawn."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.data.row_counts import log_rows
from raygr.data.vector_tables import read_score_table, read_vectors, score_values
from raygr.files import join, read_table
from raygr.metrics.agreement import spearman
from raygr.schema import INTERACTIONS, ITEMS, TAUGHT, TRAIN, USERS

DRAWN_SUBJECTS, NEWEST_TITLES, LONGEST_NAME = 3, 3, 60


class ScoreMatrix(NamedTuple):
    """Row s of `scores_SA` belongs to `ids[s]`, column a to `aspects[a]`; NaN where there is no score."""

    ids: list[str]
    aspects: list[str]
    scores_SA: np.ndarray
    taught_ids: Collection[str] = ()
    """Subjects whose scores the LLM was taught, which say nothing about its own."""


class Agreement(NamedTuple):
    """Spearman's correlation of two models over the `items` that both scored; None if one of them is constant."""

    aspect: str
    correlation: float | None
    items: int


class Subject(NamedTuple):
    """An item or user that is drawn."""

    name: str
    note: str
    scores_A: np.ndarray


def read_scores(run: str) -> ScoreMatrix:
    """The expected scores of a score run's subjects, if all their ratings could be read."""
    table, aspects = read_score_table(run, ["subject_id", "expected", "reason", "mode"])
    read = len(table)
    table = table.filter(pc.equal(table["reason"], "ok"))
    log_rows(f"subjects of {run}", read=read, kept=len(table), dropped={"not_read_in_full": read - len(table)})
    values_SA = score_values(table["expected"], len(aspects), run)
    taught = table.filter(pc.equal(table["mode"], TAUGHT))["subject_id"].to_pylist()
    return ScoreMatrix(table["subject_id"].to_pylist(), list(aspects), values_SA, frozenset(taught))


def read_reference(path: str) -> ScoreMatrix:
    """Another model's scores: a CSV or Parquet file of id and aspects, or a score run."""
    vectors = read_vectors(path, subjects="items", column="expected", aspects=None)
    return ScoreMatrix(vectors.ids_S.tolist(), list(vectors.aspects), vectors.values_SA)


# --- agreement ----------------------------------------------------------------------------------


def compare_scores(ours: ScoreMatrix, reference: ScoreMatrix) -> list[Agreement]:
    """The agreement in each aspect that both have, in our order, over the items that both have, without taught ones."""
    row_of = {item: row for row, item in enumerate(reference.ids) if item not in ours.taught_ids}
    shared = [(row, row_of[item]) for row, item in enumerate(ours.ids) if item in row_of]
    rows, reference_rows = np.array(shared, dtype=int).reshape(-1, 2).T
    found = []
    for column, aspect in enumerate(ours.aspects):
        if aspect in reference.aspects:
            left = ours.scores_SA[rows, column]
            right = reference.scores_SA[reference_rows, reference.aspects.index(aspect)]
            both = np.isfinite(left) & np.isfinite(right)
            found.append(Agreement(aspect, spearman(left[both], right[both]), int(both.sum())))
    return found


# --- subjects -----------------------------------------------------------------------------------


def most_reviewed_items(matrix: ScoreMatrix, data: str) -> list[Subject]:
    """The scored items with the most train interactions; ties in the order of their index."""
    items = read_table(join(data, ITEMS), ["item_index", "item_id", "title", "train_rating_count"])
    chosen = largest(items, matrix, id_name="item_id", count="train_rating_count", index="item_index")
    return [
        Subject(
            short(row["title"] or row["item_id"]),
            f"{row['train_rating_count']:,} training reviews",
            matrix.scores_SA[matrix.ids.index(row["item_id"])],
        )
        for row in chosen
    ]


def longest_histories(matrix: ScoreMatrix, data: str) -> list[Subject]:
    """The scored users with the most interactions; ties in the order of their index."""
    users = read_table(join(data, USERS), ["user_index", "user_id", "interactions"])
    chosen = largest(users, matrix, id_name="user_id", count="interactions", index="user_index")
    newest = newest_titles([row["user_index"] for row in chosen], data)
    return [
        Subject(
            short(f"User {row['user_id']}"),
            f"{row['interactions']:,} interactions; newest: {'; '.join(titles)}",
            matrix.scores_SA[matrix.ids.index(row["user_id"])],
        )
        for row, titles in zip(chosen, newest, strict=True)
    ]


def largest(table: pa.Table, matrix: ScoreMatrix, *, id_name: str, count: str, index: str) -> list[dict[str, Any]]:
    """The rows of the scored subjects with the largest counts, at most DRAWN_SUBJECTS."""
    scored = table.filter(pc.is_in(table[id_name], pa.array(matrix.ids, pa.string())))
    return scored.sort_by([(count, "descending"), (index, "ascending")]).slice(0, DRAWN_SUBJECTS).to_pylist()


def newest_titles(user_indices: Sequence[int], data: str) -> list[list[str]]:
    """The titles of each user's last train items, newest first."""
    history = read_table(join(data, INTERACTIONS), ["user_index", "item_index", "position", "split"])
    train = history.filter(pc.equal(history["split"], TRAIN)).sort_by([("position", "descending")])
    items = read_table(join(data, ITEMS), ["item_index", "item_id", "title"])
    found = []
    for user in user_indices:
        newest = train.filter(pc.equal(train["user_index"], user))["item_index"].slice(0, NEWEST_TITLES)
        rows = items.filter(pc.is_in(items["item_index"], newest.combine_chunks())).to_pylist()
        titles = {row["item_index"]: short(row["title"] or row["item_id"]) for row in rows}
        found.append([titles[item] for item in newest.to_pylist()])
    return found


def short(text: str) -> str:
    """One line of at most LONGEST_NAME characters, because some titles are whole paragraphs."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1].rstrip() + "…"
