"""Raw values on 1..10 of items and users, in which an explanation compares them. Nothing here is standardised.

Shape suffixes: `N` interactions, `U` users, `I` items, `A` aspects.
"""

from typing import NamedTuple

import numpy as np

from raygr.data.interactions import Interactions
from raygr.data.vector_tables import AlignedScores, read_vectors, rows_by_id
from raygr.models.embeddings import LEVELS
from raygr.recommend.recommender import Recommender
from raygr.schema import TRAIN
from raygr.train.config import TrainConfig
from raygr.train.inputs import read_item_scores

LIKED = "mean score of the train items that the user rated at or above their own mean rating, the item itself left out"
PROFILE = "; the model itself is given the rating-centred profile of all train items"
LLM = "the LLM's scores of the prompt of the user's train interactions"


class Values(NamedTuple):
    """The model's items and users before any normalisation."""

    aspects: tuple[str, ...]
    items_IA: np.ndarray
    scored_I: np.ndarray
    """False: at least one score is missing (NaN)."""
    users_UA: np.ndarray | None
    """The LLM's, NaN where unread; None: a user's value is that of the liked items."""
    valued_U: np.ndarray
    """Users with values for any item."""
    meaning: str
    """What a user's values are, in words."""


def read_values(recommender: Recommender, found: Interactions) -> Values:
    """ValueError for a model without scores of its own items on 1..10."""
    config, scores = recommender.config, read_item_scores(recommender.config)
    check_explainable(config, scores)
    scored_I = ~np.isnan(scores.scores_IA).any(axis=1)
    if config.user_scores == "llm":
        source, column = config.user_score_run, config.score_column
        table = read_vectors(source, subjects="users", column=column, aspects=scores.aspects)
        users_UA = rows_by_id(table, recommender.user_ids_U)[0]
        valued_U = ~np.isnan(users_UA).any(axis=1)
        return Values(scores.aspects, scores.scores_IA, scored_I, users_UA, valued_U, LLM)
    # two train items, so that one is left without the explained one
    train_count_U = np.bincount(found.user_N[found.split_N == TRAIN], minlength=found.users)
    meaning = LIKED + (PROFILE if config.user_scores == "profile" else "")
    return Values(scores.aspects, scores.scores_IA, scored_I, None, train_count_U >= 2, meaning)


def check_explainable(config: TrainConfig, scores: AlignedScores | None) -> None:
    if scores is None:
        raise ValueError(f"{config.output} is a base model without aspects: give a run trained with item_scores")
    if config.control != "none":
        raise ValueError(f"{config.output} is a control arm ({config.control}): its scores are not those of its items")
    low, high = np.nanmin(scores.scores_IA), np.nanmax(scores.scores_IA)
    if low < 1 or high > LEVELS:
        raise ValueError(
            f"{config.item_scores} has values from {low:g} to {high:g}: only scores on 1..10 are explained"
        )


def user_values(values: Values, found: Interactions, user: int, item: int) -> np.ndarray:
    """The user's values, (A,), without a say of item_index `item`; NaN where there are none."""
    if values.users_UA is not None:
        return values.users_UA[user]
    first, end = np.searchsorted(found.user_N, [user, user + 1])
    other_N = (found.split_N[first:end] == TRAIN) & (found.item_N[first:end] != item)
    items_N, rating_N = found.item_N[first:end][other_N], found.rating_N[first:end][other_N]
    if not len(items_N):
        return np.full(len(values.aspects), np.nan)
    is_rated_N = ~np.isnan(rating_N)
    liked_N = rating_N >= rating_N[is_rated_N].mean() if is_rated_N.any() else ~is_rated_N
    liked_KA = values.items_IA[items_N[liked_N] - 1]
    return liked_KA[~np.isnan(liked_KA).any(axis=1)].mean(axis=0)
