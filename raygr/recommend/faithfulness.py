"""How true explanations are: aspects removed from a score, agreement with ratings, and stability over training runs.

An explanation names the aspects with the largest lifts. An aspect's lift is its term of an item's score less its
average term over all items: no ranking depends on the average. A column of `X` is a number of removed aspects, from 0
to all. Shape letters: `U` users, `B` histories, `E` targets, `I` items, `A` aspects.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.data.interactions import Interactions
from raygr.recommend.recommender import Histories, Recommender
from raygr.schema import TRAIN

SPEAKS = 0.05  # an aspect that moves a score by less than this share of the spread of the user's scores is not named
USERS_AT_ONCE = 128
RANDOM_ORDERS = 20  # random orders of the aspects for each user
MOST_NAMED = 3  # aspects


class Deletion(NamedTuple):
    """The rank of each user's best item, in the user's own list, after aspects lose their lifts one after another."""

    strongest_UX: np.ndarray
    """The aspect with the largest lift first."""
    random_UX: np.ndarray
    """In random order: the mean over RANDOM_ORDERS orders."""


class RatedTargets(NamedTuple):
    """Held-out ratings, and the parts of the scores of the rated items after the histories before them."""

    user_E: np.ndarray
    rating_E: np.ndarray
    """Less the mean of the user's earlier ratings, as scores are less the user's mean over all items."""
    aspects_E: np.ndarray
    """The sum of the lifts."""
    base_E: np.ndarray
    score_E: np.ndarray


class Stability(NamedTuple):
    """The lifts of one item for one user in two training runs: means over all pairs of runs."""

    correlation_U: np.ndarray
    """Pearson's, over the aspects; NaN where all lifts are alike."""
    other_user_U: np.ndarray
    """The same of one run's lifts for the user and the other run's for another user: what the item alone explains."""
    shared_U: np.ndarray
    """The share of the strongest aspects that both runs name."""
    named: int
    """How many aspects count as the strongest."""


def deletion(recommender: Recommender, user_U: np.ndarray) -> Deletion:
    """Removes aspects from the score of each user's best item; the scores of the other items stay."""
    generator, found = torch.Generator().manual_seed(0), []
    for user_B in in_batches(user_U):
        histories = whole_histories(recommender, user_B)
        scores_BI = ranked_scores(recommender, histories)
        score_B, place_B = scores_BI.max(dim=1)
        lift_BA = lifts(recommender, histories, place_B + 1)
        sorted_BI = scores_BI.scatter(1, place_B[:, None], -torch.inf).sort(dim=1).values
        strongest_BX = ranks_without(score_B, lift_BA.sort(dim=1, descending=True).values, sorted_BI)
        random_BX = torch.zeros_like(strongest_BX)
        for _ in range(RANDOM_ORDERS):
            order_BA = torch.rand(lift_BA.shape, generator=generator).argsort(dim=1)
            random_BX += ranks_without(score_B, lift_BA.gather(1, order_BA), sorted_BI) / RANDOM_ORDERS
        found.append((strongest_BX.numpy(), random_BX.numpy()))
    return Deletion(*(np.concatenate(column) for column in zip(*found, strict=True)))


def ranks_without(score_B: Tensor, lift_BA: Tensor, sorted_BI: Tensor) -> Tensor:
    """Ranks, (B, X), after the first lifts are taken from the score; `sorted_BI` are the other scores, ascending."""
    left_BX = score_B[:, None] - torch.nn.functional.pad(lift_BA.cumsum(dim=1), (1, 0)).to(score_B.dtype)
    below_BX, not_above_BX = (torch.searchsorted(sorted_BI, left_BX, right=right) for right in (False, True))
    return 1 + sorted_BI.shape[1] - not_above_BX + (not_above_BX - below_BX).double() / 2


def rated_targets(recommender: Recommender, found: Interactions, user_U: np.ndarray) -> RatedTargets | None:
    """The validation and test items that these users rated after an earlier rating; None without two of them.

    `found` are the recommender's own interactions.
    """
    is_rated_N = ~np.isnan(found.rating_N)
    before_N, sum_N = (
        np.concatenate([[0.0], np.cumsum(column)]) for column in (is_rated_N, np.nan_to_num(found.rating_N))
    )
    first_N = recommender.first_U[found.user_N]
    earlier_N = before_N[:-1] - before_N[first_N]
    at_E = np.flatnonzero((found.split_N != TRAIN) & is_rated_N & (earlier_N > 0) & np.isin(found.user_N, user_U))
    if len(at_E) < 2:
        return None
    parts = []
    for at_B in in_batches(at_E):
        histories, item_B = recommender.up_to(found.user_N[at_B], at_B), torch.from_numpy(found.item_N[at_B])
        scores_BI = recommender.scores(recommender.encoded(histories)).double()
        score_B = scores_BI.gather(1, item_B[:, None] - 1)[:, 0] - scores_BI.mean(dim=1)
        aspects_B = lifts(recommender, histories, item_B).sum(dim=1)
        parts.append([one.numpy() for one in (aspects_B, score_B - aspects_B, score_B)])
    mean_E = (sum_N[at_E] - sum_N[first_N[at_E]]) / earlier_N[at_E]
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return RatedTargets(found.user_N[at_E], found.rating_N[at_E] - mean_E, *columns)


def stability(recommenders: Sequence[Recommender], user_U: np.ndarray) -> Stability:
    """Compares the explanations of the first run's best items in two or more runs of the same data and aspects."""
    named = max(1, min(MOST_NAMED, len(recommenders[0].aspects) // 2))
    found = []
    # of one batch to the next, users are neighbours in the data; another user is the next one of the batch
    for user_B in in_batches(user_U):
        item_B = ranked_scores(recommenders[0], whole_histories(recommenders[0], user_B)).argmax(dim=1) + 1
        own, others = (
            [lifts(one, whole_histories(one, some_B), item_B).numpy() for one in recommenders]
            for some_B in (user_B, np.roll(user_B, 1))
        )
        pairs = list(itertools.permutations(range(len(recommenders)), 2))
        found.append(
            (
                np.mean([row_correlations(own[left], own[right]) for left, right in pairs], axis=0),
                np.mean([row_correlations(own[left], others[right]) for left, right in pairs], axis=0),
                np.mean([shared_strongest(own[left], own[right], named) for left, right in pairs], axis=0),
            )
        )
    own_U, other_U, shared_U = (np.concatenate(column) for column in zip(*found, strict=True))
    return Stability(own_U, other_U, shared_U, named)


def lifts(recommender: Recommender, histories: Histories, item_B: Tensor) -> Tensor:
    """(B, A): what each aspect adds to the score of one item after each history, above what it adds on average."""
    parts = recommender.split_scores(histories, item_B)
    terms_AB = (parts.encoder_BCA + parts.user_BCA).double().diagonal(dim1=0, dim2=1).cpu()
    return terms_AB.T - recommender.average_terms(histories)


def row_correlations(left_UA: np.ndarray, right_UA: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each pair of rows, (U,); NaN where a row has no spread."""
    left_UA, right_UA = (one - one.mean(axis=1, keepdims=True) for one in (left_UA, right_UA))
    norm_U = np.sqrt((left_UA**2).sum(axis=1) * (right_UA**2).sum(axis=1))
    return (left_UA * right_UA).sum(axis=1) / np.where(norm_U > 0, norm_U, np.nan)


def shared_strongest(left_UA: np.ndarray, right_UA: np.ndarray, named: int) -> np.ndarray:
    """The share of the `named` largest entries of each row that are among those of the other row, (U,)."""
    left_UX, right_UX = (np.argsort(-one, axis=1)[:, :named] for one in (left_UA, right_UA))
    return (left_UX[:, :, None] == right_UX[:, None]).any(axis=2).mean(axis=1)


def whole_histories(recommender: Recommender, user_B: np.ndarray) -> Histories:
    return recommender.up_to(user_B, recommender.first_U[user_B + 1])


def ranked_scores(recommender: Recommender, histories: Histories) -> Tensor:
    """The scores of all items, (B, I), -inf for those that no list may hold."""
    scores_BI = recommender.scores(recommender.encoded(histories)).clone().cpu()
    row_N, item_N = recommender.left_out(histories)
    scores_BI[row_N, item_N - 1] = -torch.inf
    return scores_BI


def in_batches(places_U: np.ndarray) -> list[np.ndarray]:
    return np.array_split(places_U, -(-len(places_U) // USERS_AT_ONCE))
