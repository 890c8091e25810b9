"""The choice model of a simulated shop: what the shoppers draw from, and the best that a recommender can know.

The weight of a film is the softmax of popularity + TASTE_WEIGHT * taste fit + NEARNESS_WEIGHT * nearness to the last
two films. Shapes: U shoppers, F films of the catalogue, I items of the data, A aspects, B targets, K recent films.
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

    levels_FA: np.ndarray
    """Standardised scores of all films."""
    popularity_F: np.ndarray
    """Log weights."""
    tastes_UA: np.ndarray
    film_I: np.ndarray
    """The film that each item is: a row of `levels_FA`."""


def check_truth(shop: str, data: str) -> None:
    """ConfigError unless `data` was prepared from the reviews of the simulate run `shop`, which holds its truth."""
    if not files.exists(files.join(shop, POPULARITY)):
        raise ConfigError(f"truth: {shop} holds no {POPULARITY}: an earlier version made it; simulate again")
    if files.fingerprint(files.join(shop, REVIEWS)) not in runs.read_run(data, job="prepare").inputs.values():
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
    popularity_F1, _ = rows_by_id(popularity, items.ids_S)
    film_I = np.array([row_of[item] for item in item_ids_I.tolist()])
    return ShopTruth(standardise(items.values_SA)[0], popularity_F1[:, 0], tastes_UA, film_I)


def true_logits(truth: ShopTruth, user_B: np.ndarray, recent_BK: np.ndarray, *, tastes: bool = True) -> np.ndarray:
    """(B, I) logits of each item as the next one of the shopper; without the taste term where `tastes` is false.

    `recent_BK` holds the item_index of the last K interactions; `user_B` is user_index.
    """
    fit_BF = truth.tastes_UA[user_B] @ truth.levels_FA.T
    fixed_BF = truth.popularity_F + (TASTE_WEIGHT * fit_BF if tastes else np.zeros_like(fit_BF))
    logits_BF = choice_logits(fixed_BF, truth.levels_FA, truth.film_I[recent_BK - 1])
    return logits_BF[:, truth.film_I]


def choice_logits(fixed_UF: np.ndarray, levels_FA: np.ndarray, recent_UK: np.ndarray) -> np.ndarray:
    """(U, F) logits of the next film: the terms that no purchase changes, and nearness to the recent films."""
    return fixed_UF + NEARNESS_WEIGHT * nearness(levels_FA, recent_UK)


def nearness(levels_FA: np.ndarray, recent_UK: np.ndarray) -> np.ndarray:
    """(U, F) closeness of each film to the mean of the last K (0 to 2) films, standardised per shopper; 0 if K is 0."""
    if recent_UK.shape[1] == 0:
        return np.zeros((len(recent_UK), len(levels_FA)))
    centre_UA = levels_FA[recent_UK].mean(axis=1)
    # The negative squared distance without the term that is constant per shopper, which does not change a softmax.
    closeness_UF = 2 * centre_UA @ levels_FA.T - (levels_FA**2).sum(axis=1)
    return standardise(closeness_UF.T)[0].T
