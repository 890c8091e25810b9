"""Explains why an item suits some users and not others (the paper's Figure 5), without an LLM call or Ray.

    recommender = load_recommender("outputs/quickstart/train/shipped")
    print(explain_item(recommender, "F0182", ["S00288", "S00358"]).sentences())

The score of an item is split exactly into a base part and terms of the aspects. The split is of the last product, not
of causes: the encoder reads the aspects of a history, so the base part depends on aspects, too. How far it does is
measured with every aspect of the history at the catalogue's mean.

Scores are forecasts where possible: an item that a user has interacted with is scored after the history before that
interaction, an unseen item after the whole history.

Shape letters: `N` interactions, `U` users, `I` items, `A` aspects, `C` candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from raygr import files
from raygr.data.interactions import Interactions, read_interactions
from raygr.data.vector_tables import AlignedScores, read_vectors, rows_by_id
from raygr.models.embeddings import LEVELS
from raygr.models.inference import relative_change
from raygr.recommend.recommender import Histories, Recommender, check_known
from raygr.schema import ITEMS, TRAIN
from raygr.train.config import TrainConfig
from raygr.train.inputs import read_item_scores
from raygr.train.serving import check_sources

ITEMS_AT_ONCE = 1024
NEAR = 1.0  # an item within this many levels of a user's value suits the user in that aspect
LOW_BELOW, HIGH_ABOVE = 4.0, 7.0  # thirds of 1..10
LIKED = "mean score of the train items that the user rated at or above their own mean rating, the item itself left out"
PROFILE = "; the model itself is given the rating-centred profile of all train items"
LLM = "the LLM's scores of the prompt of the user's train interactions"


# --- the record ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AspectTerm:
    """One aspect of an item for one user. Terms are parts of the score and have its unit."""

    aspect: str
    item_value: float
    """1..10, as the model reads it."""
    user_value: float
    """1..10; see Explanation.user_values."""
    gap: float
    """`item_value - user_value`."""
    level: Literal["low", "moderate", "high"]
    """The user's value in words: the level to recommend to the user."""
    looks_for: float
    """What the user looks for now: the guided user state, which adds `looks_for` times the item's standardised score;
    0 where the model has none."""
    encoder_term: float
    """The encoder's state times the aspect's part of the item embedding."""
    user_term: float
    """The guided user state times the item's standardised score, or the aspect's part of (9b) times the item embedding;
    0 where the model has neither."""
    average_term: float
    """`encoder_term + user_term`, averaged over all items of the catalogue: no ranking depends on it."""

    def lift(self) -> float:
        """How much the aspect raises the score above what it adds to the score of an average item."""
        return self.encoder_term + self.user_term - self.average_term


@dataclass(frozen=True)
class UserExplanation:
    """An item's score for one user: `base_part`, all terms, and the `other_*_terms` without the average add up to it.

    The terms are parts of the score's last product, not its causes: the encoder has read the history's aspects.
    """

    user_id: str
    part: str | None
    """The split's part of the user's interaction with the item; None where the user has not seen the item."""
    rating: float | None
    """The user's rating of the item; None where it is unseen, or where the data has no rating."""
    history: int
    """Interactions that the score is based on: those before the one with the item, or all where the item is unseen."""
    score: float
    """<state, item>, before any final activation; comparable between the items of one user only."""
    rank: float
    """Rank among the items that are not in that history: 1 is best, ties share the mean rank."""
    ranked: int
    """Number of items in that ranking."""
    base_part: float
    """The encoder's state times the learned part of the item embedding, and biases."""
    base_part_at_mean: float
    """`base_part` where the encoder reads the history with every aspect at the catalogue's mean."""
    base_moved: float
    """Change of all items' base parts between the two, as a fraction of their spread: 0 is none, it may exceed 1."""
    terms: tuple[AspectTerm, ...]
    other_aspects: int
    """Number of aspects that are not in `terms`."""
    other_encoder_terms: float
    """Sum over these aspects, as are the next two."""
    other_user_terms: float
    other_average_terms: float

    def aspect_part(self) -> float:
        """The score without its base part."""
        return sum(t.encoder_term + t.user_term for t in self.terms) + self.other_encoder_terms + self.other_user_terms


@dataclass(frozen=True)
class Explanation:
    """One item's scores for one or more users, made by `explain_item`."""

    item_id: str
    title: str
    """The item's id where the data has no title."""
    chosen: str
    """How the item and the users were chosen."""
    user_values: str
    """What the users' values are."""
    user_side: bool
    """False: the model does not see the users' values, and all user terms are 0."""
    users: tuple[UserExplanation, ...]

    def sentences(self) -> list[str]:
        """One text per user."""
        return [sentence(self.title, user) for user in self.users]


class Case(NamedTuple):
    """The item and the users of an explanation."""

    item: int
    """item_index."""
    users: list[int]
    """user_index."""
    chosen: str
    """How they were chosen, in words."""


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
    score_1, rank_1 = recommender.score_and_rank(histories, item)
    parts = recommender.split_scores(histories, torch.tensor([item]))
    state_1A = recommender.encoded(histories).guided_BA if recommender.model.embedding.state else None
    looks_for_A = [0.0] * len(values.aspects) if state_1A is None else state_1A[0].tolist()
    encoder_A, user_A = parts.encoder_BCA[0, 0].tolist(), parts.user_BCA[0, 0].tolist()
    average_A = average_terms(recommender, histories)
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


def average_terms(recommender: Recommender, histories: Histories) -> list[float]:
    """Each aspect's encoder and user term together after one history, averaged over all items."""
    items = len(recommender.item_ids_I)
    total_A = torch.zeros(recommender.model.embedding.aspects, dtype=torch.float64)
    for item_C in torch.arange(1, items + 1).split(ITEMS_AT_ONCE):
        parts = recommender.split_scores(histories, item_C)
        total_A += (parts.encoder_BCA + parts.user_BCA)[0].double().sum(0).cpu()
    return (total_A / items).tolist()


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


# --- the choice of item and users ---------------------------------------------------------------


def choose_case(
    found: Interactions, item: int | None, users: Sequence[int], *, scored_I: np.ndarray, valued_U: np.ndarray
) -> Case:
    """Completes the given item and users by ratings alone, so that no case is picked for a good explanation.

    The item is the one with the widest span of ratings, then the one with the most ratings, then the first in the data.
    The users are the first in the data who rated the item highest and lowest. Held-out interactions are preferred,
    because neither the training nor a user's values know their ratings. Only items with scores, users with values, and
    interactions with a history before them count. ValueError where nothing is left.
    """
    if item is not None and users:
        return Case(item, list(users), "item and users as given")
    has_history_N = np.diff(found.user_N, prepend=-1) == 0
    usable_N = has_history_N & ~np.isnan(found.rating_N) & scored_I[found.item_N - 1] & valued_U[found.user_N]
    if item is not None:
        usable_N &= found.item_N == item
    if users:
        usable_N &= np.isin(found.user_N, users)
    what = " and ".join(name for name, given in (("item", item is not None), ("users", users)) if not given)
    for allowed_N, words in ((usable_N & (found.split_N != TRAIN), "held-out ratings"), (usable_N, "ratings")):
        widest, span = widest_item(found, allowed_N)
        if span > 0 or (item is not None and allowed_N is usable_N and usable_N.any()):
            return picked_case(found, allowed_N, widest, users, chosen=f"{what} picked by the widest span of {words}")
    if item is None:
        raise ValueError("no item has two different ratings to pick it by: set item")
    raise ValueError("no user with values has rated the item after another one: set users")


def widest_item(found: Interactions, allowed_N: np.ndarray) -> tuple[int, float]:
    """item_index and span of the widest allowed ratings; ties go to the most rated item, then to the first."""
    low_I, high_I = np.full(found.items, np.nan), np.full(found.items, np.nan)
    np.fmin.at(low_I, found.item_N[allowed_N] - 1, found.rating_N[allowed_N])
    np.fmax.at(high_I, found.item_N[allowed_N] - 1, found.rating_N[allowed_N])
    span_I = np.nan_to_num(high_I - low_I, nan=-1.0)
    count_I = np.bincount(found.item_N[allowed_N] - 1, minlength=found.items)
    place = np.lexsort((-count_I, -span_I))[0]
    return int(place) + 1, float(span_I[place])


def picked_case(found: Interactions, allowed_N: np.ndarray, item: int, users: Sequence[int], *, chosen: str) -> Case:
    """The item with the given users, or with those who rated it highest and lowest."""
    at_N = np.flatnonzero(allowed_N & (found.item_N == item))
    rating_N = found.rating_N[at_N]
    high = int(rating_N.argmax())
    low = int(rating_N.argmin()) if np.ptp(rating_N) > 0 else len(at_N) - 1
    raters = list(dict.fromkeys(found.user_N[at_N[[high, low]]].tolist()))
    return Case(item, list(users) or raters, f"{chosen} ({rating_N[high]:g} and {rating_N[low]:g})")


# --- words --------------------------------------------------------------------------------------


def level_word(value: float) -> Literal["low", "moderate", "high"]:
    """The level of a value on 1..10."""
    if value < LOW_BELOW:
        return "low"
    return "high" if value > HIGH_ABOVE else "moderate"


def sentence(title: str, user: UserExplanation) -> str:
    """The explanation for one user: outcome, rank, fit, strongest terms, levels to recommend, and the base part."""
    act = "has not seen" if user.part is None else "chose" if user.rating is None else "rated"
    rating = "" if user.rating is None else f" {user.rating:g}"
    return (
        f"{user.user_id} {act} “{title}”{rating}, and the model ranks it {user.rank:g} of {user.ranked} for this user: "
        f"{fit_words(user.terms)}; {lift_words(user.terms)}; {looking_words(user.terms)}{level_words(user.terms)}. "
        f"{base_words(user)}."
    )


def base_words(user: UserExplanation) -> str:
    if user.base_moved == 0:  # item rows without a guided part
        return "The base part depends on no aspect"
    return (
        "The base part depends on aspects too, because the encoder reads those of the history: with all of them at the "
        f"catalogue's mean it would be {user.base_part_at_mean:.2f} instead of {user.base_part:.2f} for this item, and "
        f"over all items it would change by {user.base_moved:.0%} of its spread"
    )


def looking_words(terms: tuple[AspectTerm, ...]) -> str:
    """What the guided user state looks for most and avoids most; nothing for a model without one."""
    most, least = max(terms, key=lambda term: term.looks_for), min(terms, key=lambda term: term.looks_for)
    found = [f"looks for {most.aspect} most ({most.looks_for:+.2f} a deviation)"] if most.looks_for > 0 else []
    found += [f"avoids {least.aspect} most ({least.looks_for:+.2f})"] if least.looks_for < 0 else []
    return f"just before, the user {' and '.join(found)}; " if found else ""


def fit_words(terms: tuple[AspectTerm, ...]) -> str:
    near = sum(abs(term.gap) <= NEAR for term in terms)
    far = max(terms, key=lambda term: abs(term.gap))
    text = f"it is within one level of the user's value in {near or 'none'} of {len(terms)} aspects"
    if abs(far.gap) <= NEAR:
        return text
    return f"{text} and furthest from it in {far.aspect} ({far.item_value:.1f} against {far.user_value:.1f})"


def lift_words(terms: tuple[AspectTerm, ...]) -> str:
    best, worst = max(terms, key=AspectTerm.lift), min(terms, key=AspectTerm.lift)
    found = []
    if best.lift() > 0:
        found.append(f"{best.aspect} lifts the score most ({best.lift():+z.2f})")
    if worst.lift() < 0:
        found.append(f"{worst.aspect} lowers it most ({worst.lift():+z.2f})")
    return (
        f"against the average item, {' and '.join(found)}" if found else "no aspect sets it off from the average item"
    )


def level_words(terms: tuple[AspectTerm, ...]) -> str:
    marked = [f"{term.level} {term.aspect} ({term.user_value:.1f})" for term in terms if term.level != "moderate"]
    if not marked:
        return "recommend items of moderate levels"
    rest = "" if len(marked) == len(terms) else ", moderate in the rest"
    return f"recommend items of {' and '.join([', '.join(marked[:-1]), marked[-1]] if marked[:-1] else marked)}{rest}"
