"""Explains why an item suits some users and not others (the paper's Figure 5), without an LLM call or Ray.

    recommender = load_recommender("outputs/quickstart/train/shipped")
    print(explain_item(recommender, "F0182", ["S00288", "S00358"]).sentences())

The score of an item is split exactly into a base part and terms of the aspects. The split is of the last product, not
of causes: the encoder reads the aspects of a history, so the base part depends on aspects, too. How far it does is
measured with every aspect of the history at the catalogue's mean.

Scores are forecasts where possible: an item that a user has interacted with is scored after the history before that
interaction, an unseen item after the whole history.

Shape letters: `N` interactions, `U` users, `I` items, `A` aspects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from raygr import files
from raygr.data.interactions import Interactions, read_interactions
from raygr.data.vector_tables import AlignedScores, read_vectors, rows_by_id
from raygr.explain.case_choice import choose_case
from raygr.explain.sentences import AspectTerm, Explanation, UserExplanation, level_word
from raygr.models.embeddings import LEVELS
from raygr.models.inference import relative_change
from raygr.recommend.recommender import Recommender, check_known
from raygr.schema import ITEMS, TRAIN
from raygr.train.config import TrainConfig
from raygr.train.inputs import read_item_scores
from raygr.train.serving import check_sources

LIKED = "mean score of the train items that the user rated at or above their own mean rating, the item itself left out"
PROFILE = "; the model itself is given the rating-centred profile of all train items"
LLM = "the LLM's scores of the prompt of the user's train interactions"


class Values(NamedTuple):
    """Raw values on 1..10 of the model's items and users. Nothing here is standardised."""

    aspects: tuple[str, ...]
    items_IA: np.ndarray
    scored_I: np.ndarray
    """False: at least one score of the item is missing (NaN)."""
    users_UA: np.ndarray | None
    """The LLM's scores, NaN where there are none; None: a user's values are the means of the liked items."""
    valued_U: np.ndarray
    """Whether a user has values for any item."""
    meaning: str
    """What a user's values are, in words."""


# --- the split ----------------------------------------------------------------------------------


def explain_item(
    recommender: Recommender,
    item_id: str | None = None,
    users: Sequence[str] = (),
    *,
    aspects: Sequence[str] | None = None,
) -> Explanation:
    """Compares an item with users, given by their ids, aspect by aspect, and splits its scores.

    `choose_case` picks the item or the users where they are not given. `aspects` are shown one by one and the others as
    one sum; None shows all. ValueError for unknown ids and aspects, for a model without scores of its own items on
    1..10, and for an item or a user without values or without a history.
    """
    config = recommender.config
    check_sources(recommender.run, config)
    check_known([] if item_id is None else [item_id], recommender.index_of_item, "item", config.data)
    check_known(users, recommender.index_of_user, "user", config.data)
    found = read_interactions(config.data)
    if len(recommender.item_ids_I) > found.items:
        raise ValueError(f"{config.data} does not hold the new items of this recommender: explain one without them")
    values = read_values(recommender, found)
    columns = shown_columns(values.aspects, aspects)
    item = None if item_id is None else recommender.index_of_item[item_id]
    if item is not None and not values.scored_I[item - 1]:
        raise ValueError(f"item {item_id} lacks a score in {config.item_scores}: the mean of all would be explained")
    given = [recommender.index_of_user[one] for one in dict.fromkeys(users)]
    case = choose_case(found, item, given, scored_I=values.scored_I, valued_U=values.valued_U)
    item_id = str(recommender.item_ids_I[case.item - 1])
    filesystem, inner = files.filesystem_of(files.join(config.data, ITEMS))
    is_item = pc.field("item_index") == case.item
    title = pq.read_table(inner, columns=["title"], filters=is_item, filesystem=filesystem)["title"][0].as_py()
    return Explanation(
        item_id=item_id,
        title=title or item_id,
        chosen=case.chosen,
        user_values=values.meaning,
        user_side=recommender.model.embedding.has_user_side or recommender.model.embedding.state is not None,
        users=tuple(
            explain_user(recommender, values, found, item=case.item, user=user, columns=columns) for user in case.users
        ),
    )


def explain_user(
    recommender: Recommender, values: Values, found: Interactions, *, item: int, user: int, columns: Sequence[int]
) -> UserExplanation:
    """The explanation of item_index `item` for user_index `user`; `columns` are the aspects shown one by one."""
    user_id, item_id = str(recommender.user_ids_U[user]), str(recommender.item_ids_I[item - 1])
    value_A, item_A = user_values(values, found, user, item), values.items_IA[item - 1]
    if np.isnan(value_A).any():
        raise ValueError(f"user {user_id} has no values to compare with item {item_id}: they would be {values.meaning}")
    first, end = np.searchsorted(found.user_N, [user, user + 1])
    # the last interaction with the item, where items are bought repeatedly
    at = next(reversed(first + np.flatnonzero(found.item_N[first:end] == item)), None)
    histories = recommender.up_to(np.array([user]), np.array([end if at is None else at]))
    history = int(histories.length_B[0])
    if not history:
        raise ValueError(f"item {item_id} is the first of user {user_id}: there is no history to score it after")
    score_1, rank_1, spread_1 = recommender.score_and_rank(histories, item)
    parts = recommender.split_scores(histories, torch.tensor([item]))
    state_1A = recommender.encoded(histories).guided_BA if recommender.model.embedding.state else None
    looks_for_A = [0.0] * len(values.aspects) if state_1A is None else state_1A[0].tolist()
    encoder_A, user_A = parts.encoder_BCA[0, 0].tolist(), parts.user_BCA[0, 0].tolist()
    average_A = recommender.average_terms(histories)[0].tolist()
    at_mean_1I, as_is_1I = recommender.base_parts(histories)
    others = [a for a in range(len(values.aspects)) if a not in columns]
    return UserExplanation(
        user_id=user_id,
        part=None if at is None else str(found.split_N[at]),
        rating=None if at is None or np.isnan(found.rating_N[at]) else float(found.rating_N[at]),
        history=history,
        score=float(score_1),
        rank=float(rank_1),
        ranked=len(recommender.item_ids_I) - (0 if found.repeats else history),
        spread=float(spread_1),
        base_part=float(parts.base_BC),
        base_part_at_mean=float(at_mean_1I[0, item - 1]),
        base_moved=relative_change(at_mean_1I, as_is_1I),
        terms=tuple(
            AspectTerm(
                aspect=values.aspects[a],
                item_value=float(item_A[a]),
                user_value=float(value_A[a]),
                gap=float(item_A[a] - value_A[a]),
                level=level_word(value_A[a]),
                looks_for=looks_for_A[a],
                encoder_term=encoder_A[a],
                user_term=user_A[a],
                average_term=average_A[a],
            )
            for a in columns
        ),
        other_aspects=len(others),
        other_encoder_terms=sum(encoder_A[a] for a in others),
        other_user_terms=sum(user_A[a] for a in others),
        other_average_terms=sum(average_A[a] for a in others),
    )


def shown_columns(names: Sequence[str], aspects: Sequence[str] | None) -> list[int]:
    """The columns of `aspects`, in their order; all columns for None."""
    wanted = list(names if aspects is None else dict.fromkeys(aspects))
    absent = [name for name in wanted if name not in names]
    if absent or not wanted:
        raise ValueError(f"no aspect {', '.join(absent)}; the model has: {', '.join(names)}")
    return [list(names).index(name) for name in wanted]


# --- values on 1..10 ----------------------------------------------------------------------------


def read_values(recommender: Recommender, found: Interactions) -> Values:
    """ValueError for a model without scores of its own items on 1..10."""
    config = recommender.config
    scores = explainable_scores(config)
    scored_I = ~np.isnan(scores.scores_IA).any(axis=1)
    if config.user_score_run:
        source, column = config.user_score_run, config.score_column
        table = read_vectors(source, subjects="users", column=column, aspects=scores.aspects)
        users_UA = rows_by_id(table, recommender.user_ids_U)[0]
        valued_U = ~np.isnan(users_UA).any(axis=1)
        return Values(scores.aspects, scores.scores_IA, scored_I, users_UA, valued_U, LLM)
    # two train items, so that one is left without the explained one
    train_count_U = np.bincount(found.user_N[found.split_N == TRAIN], minlength=found.users)
    meaning = LIKED + (PROFILE if config.user_scores == "profile" else "")
    return Values(scores.aspects, scores.scores_IA, scored_I, None, train_count_U >= 2, meaning)


def explainable_scores(config: TrainConfig) -> AlignedScores:
    scores = read_item_scores(config)
    if scores is None:
        raise ValueError(f"{config.output} is a base model without aspects: give a run trained with item_scores")
    if config.control != "none":
        raise ValueError(f"{config.output} is a control arm ({config.control}): its scores are not those of its items")
    if config.user_control != "none":
        raise ValueError(f"{config.output} is a control arm: its user vectors are not those of its users")
    low, high = np.nanmin(scores.scores_IA), np.nanmax(scores.scores_IA)
    if low < 1 or high > LEVELS:
        raise ValueError(
            f"{config.item_scores} has values from {low:g} to {high:g}: only scores on 1..10 are explained"
        )
    return scores


def user_values(values: Values, found: Interactions, user: int, item: int) -> np.ndarray:
    """The user's values, (A,), computed without item_index `item`; NaN where there are none."""
    if values.users_UA is not None:
        return values.users_UA[user]
    first, end = np.searchsorted(found.user_N, [user, user + 1])
    other_N = (found.split_N[first:end] == TRAIN) & (found.item_N[first:end] != item)
    items_N, rating_N = found.item_N[first:end][other_N], found.rating_N[first:end][other_N]
    if not len(items_N):
        return np.full(len(values.aspects), np.nan)
    is_rated_N = ~np.isnan(rating_N)
    liked_N = rating_N >= rating_N[is_rated_N].mean() if is_rated_N.any() else ~is_rated_N
    liked_NA = values.items_IA[items_N[liked_N] - 1]
    return liked_NA[~np.isnan(liked_NA).any(axis=1)].mean(axis=0)
