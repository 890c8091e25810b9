"""New items as rows of scores, from Python or from a file: read, checked, and in the order of the run's aspects.

Shape letters: `S` subjects, `A` aspects.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np

from raygr.data.vector_tables import named, read_vectors, select_aspects
from raygr.train.config import TrainConfig

NewItems = str | Mapping[str, Mapping[str, float] | Sequence[float]]
"""A score run or a table of vectors; or item id -> scores by aspect, or in the order of the run's aspects."""


class ScoreRows(NamedTuple):
    """One row per new item."""

    ids_S: np.ndarray
    scores_SA: np.ndarray
    """NaN where a score is missing."""


def read_score_rows(
    given: NewItems, config: TrainConfig, aspects: tuple[str, ...], known: Collection[str]
) -> ScoreRows:
    """The rows of new items for a train run whose catalogue holds the item ids `known`.

    ValueError names what is wrong: aspects that the run does not have or that a file lacks, values that are no numbers,
    items without any score or already in the catalogue, and train runs that cannot rank a new item.
    """
    if not aspects:
        raise ValueError(f"new_items: {config.output} was trained without item_scores, which are all a new item has")
    if config.control != "none":
        raise ValueError(
            f"new_items: {config.output} is a control arm (control: {config.control}): its scores say nothing"
        )
    if isinstance(given, str):
        found, source = rows_of_file(given, config, aspects), given
    else:
        rows = [row_of_scores(f"new_items: {item_id}", row, aspects) for item_id, row in given.items()]
        found, source = ScoreRows(np.array(list(given), str), np.array(rows).reshape(-1, len(aspects))), "new_items"
    if not len(found.ids_S):
        raise ValueError(f"{source}: no item is in it")
    is_known_S = np.array([one in known for one in found.ids_S.tolist()])
    is_empty_S = np.isnan(found.scores_SA).all(axis=1)
    for is_wrong_S, text in ((is_known_S, "already in the catalogue"), (is_empty_S, "without any score")):
        if is_wrong_S.any():
            raise ValueError(
                f"{source}: {text}: {named(found.ids_S[is_wrong_S])} ({is_wrong_S.sum()} such); leave it out"
            )
    return found


def rows_of_file(path: str, config: TrainConfig, aspects: tuple[str, ...]) -> ScoreRows:
    """A table may have more columns only where the train run chose some with `aspect_names`."""
    vectors = read_vectors(path, subjects="items", column=config.score_column, aspects=None, gaps=True)
    chosen = select_aspects(vectors, aspects, path)
    check_aspects(path, () if config.aspect_names else vectors.aspects, aspects)
    return ScoreRows(chosen.ids_S, chosen.values_SA)


def row_of_scores(where: str, row: Mapping[str, float] | Sequence[float], aspects: tuple[str, ...]) -> list[float]:
    """The scores of one item in the order of `aspects`; an aspect that a mapping lacks is NaN."""
    if isinstance(row, Mapping):
        check_aspects(where, tuple(row), aspects)
        values = [row.get(name, math.nan) for name in aspects]
    else:
        values = list(row)
    if len(values) != len(aspects):
        raise ValueError(f"{where} has {len(values)} scores; the run has {len(aspects)} aspects: {', '.join(aspects)}")
    for name, value in zip(aspects, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, Real) or math.isinf(value):
            raise ValueError(
                f"{where}: {name} is {value!r}, not a finite number; leave out what is missing, or give NaN"
            )
    return [float(value) for value in values]


def check_aspects(where: str, given: Collection[str], aspects: Sequence[str]) -> None:
    """ValueError for aspects that the train run does not have."""
    unknown = [name for name in given if name not in aspects]
    if unknown:
        raise ValueError(f"{where}: no aspect {', '.join(unknown)}; the run has: {', '.join(aspects)}")
