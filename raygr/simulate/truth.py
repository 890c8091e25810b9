"""The choice model of a simulated shop: what the shoppers draw from, and the best that a recommender can know.

The weight of a film is the softmax of popularity + TASTE_WEIGHT * taste fit + NEARNESS_WEIGHT * nearness to the last
two films. X are the films of the shop, of which the data may hold fewer. Shape letters: `U` users, `I` items, `A`
aspects, `B` targets, `L` steps of a history.
"""

from typing import NamedTuple

import numpy as np

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.vector_tables import read_vector_file, rows_by_id
from raygr.metrics.z_scores import standardise

# Weights in the exponent of the softmax, of terms with standard deviation 1. With these weights a recommender that
# learns from the ids of 1,000 shoppers reaches two thirds of the true model's NDCG@10 (.16 of .25; popularity .06), so
# aspects can still help.
TASTE_WEIGHT, NEARNESS_WEIGHT = 1.6, 1.6
RECENT = 2  # number of last films that the next one is near to
REVIEWS, ITEM_SCORES, TASTES, POPULARITY = "reviews.jsonl.gz", "item_scores.csv", "tastes.csv", "popularity.csv"


class ShopTruth(NamedTuple):
    """What a simulated shop knows about its shoppers, in the order of the data's user_index and item_index."""

    levels_XA: np.ndarray
    """Standardised scores of all films."""
    popularity_X: np.ndarray
    """Log weights."""
    tastes_UA: np.ndarray
    film_I: np.ndarray
    """The film that each item is: a row of `levels_XA`."""


def check_truth(shop: str, data: str) -> None:
    """ConfigError unless `data` was prepared from the reviews of the simulate run `shop`, which holds its truth."""
    if not files.exists(files.join(shop, POPULARITY)):
        raise ConfigError(f"truth: {shop} holds no {POPULARITY}: an earlier version made it; simulate again")
    prepared = runs.read_run(data, job="prepare")
    if prepared.config.get("new_items"):
        raise ConfigError(f"truth: {data} keeps new items out of histories, which the truth needs whole")
    if files.fingerprint(files.join(shop, REVIEWS)) not in prepared.inputs.values():
        raise ConfigError(f"truth: {data} was not prepared from the {REVIEWS} of {shop}: name the shop of this data")


def read_truth(shop: str, *, user_ids_U: np.ndarray, item_ids_I: np.ndarray) -> ShopTruth:
    """Reads the truth of the simulate run `shop`; ConfigError where the data has users or items that it lacks."""
    items, popularity, tastes = (read_vector_file(files.join(shop, name)) for name in (ITEM_SCORES, POPULARITY, TASTES))
    row_of = {film: row for row, film in enumerate(items.ids_S.tolist())}
    absent = [item for item in item_ids_I.tolist() if item not in row_of]
    tastes_UA, _ = rows_by_id(tastes, user_ids_U)
    absent += user_ids_U[np.isnan(tastes_UA).any(axis=1)].tolist()
    if absent:
        raise ConfigError(f"truth: {shop} does not hold {files.some(absent)}: name the shop of this data")
    popularity_X1, _ = rows_by_id(popularity, items.ids_S)
    film_I = np.array([row_of[item] for item in item_ids_I.tolist()])
    return ShopTruth(standardise(items.values_SA)[0], popularity_X1[:, 0], tastes_UA, film_I)


def true_logits(truth: ShopTruth, user_B: np.ndarray, recent_BL: np.ndarray, *, tastes: bool = True) -> np.ndarray:
    """(B, I) logits of each item as the next one of the shopper; without the taste term where `tastes` is false.

    `recent_BL` holds the item_index of the last L interactions; `user_B` is user_index.
    """
    fit_BX = truth.tastes_UA[user_B] @ truth.levels_XA.T
    fixed_BX = truth.popularity_X + (TASTE_WEIGHT * fit_BX if tastes else np.zeros_like(fit_BX))
    logits_BX = choice_logits(fixed_BX, truth.levels_XA, truth.film_I[recent_BL - 1])
    return logits_BX[:, truth.film_I]


def choice_logits(fixed_UX: np.ndarray, levels_XA: np.ndarray, recent_UL: np.ndarray) -> np.ndarray:
    """(U, X) logits of the next film: the terms that no purchase changes, and nearness to the recent films."""
    return fixed_UX + NEARNESS_WEIGHT * nearness(levels_XA, recent_UL)


def nearness(levels_XA: np.ndarray, recent_UL: np.ndarray) -> np.ndarray:
    """(U, X) closeness of each film to the mean of the last L (0 to 2) films, standardised per shopper; 0 if L is 0."""
    if recent_UL.shape[1] == 0:
        return np.zeros((len(recent_UL), len(levels_XA)))
    centre_UA = levels_XA[recent_UL].mean(axis=1)
    # The negative squared distance without the term that is constant per shopper, which does not change a softmax.
    closeness_UX = 2 * centre_UA @ levels_XA.T - (levels_XA**2).sum(axis=1)
    return standardise(closeness_UX.T)[0].T
