"""Item-kNN, EASE and ALS as references of a comparison: fitted on train interactions, ranked as the arms are.

They see which items a user had before a target, as the recommenders do, but no order, rating or aspect. Their
hyperparameters are the best of a small grid by NDCG@10 of the last validation target of each user in the full
catalogue. Item-kNN and ALS are those of the library implicit; RecTools, which has EASE, needs numpy below 2 on
Python 3.11 and 3.12, so EASE's closed form (Steck 2019, equation 8) stands here. Shape letters: `E` targets, `B`
targets of a batch, `I` items, `D` width, `N` interactions.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from raygr.config import ConfigError
from raygr.data.interactions import Interactions, NewTargets
from raygr.metrics.ranking import metric_values
from raygr.schema import TRAIN, VALIDATION
from raygr.train.batches import Targets, evaluation_targets, seen_pairs

ITEM_KNN, EASE, ALS = "item-kNN", "EASE", "ALS"
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    ITEM_KNN: {"neighbours": (20, 50, 100, 200, 500)},
    EASE: {"regularization": (10.0, 50.0, 250.0, 1000.0)},
    ALS: {"factors": (32, 64, 128), "regularization": (0.1, 1.0, 10.0, 100.0), "alpha": (1.0, 10.0)},
}
LARGEST_EASE = 20_000  # items; its matrix of items x items takes 8 bytes each
ALS_ITERATIONS, SEED = 15, 0

Scorer = Callable[[csr_matrix], np.ndarray]
"""Histories as a matrix of ones (B, I) -> the scores of all items (B, I)."""
Ranker = Callable[[Scorer, Targets], np.ndarray]
"""Ranks targets under one protocol, (E,)."""


class Chosen(NamedTuple):
    """A fitted model with the settings that validation chose."""

    scorer: Scorer
    settings: dict[str, float]


def check_implicit(names: Sequence[str]) -> None:
    """ConfigError where the library of these models is missing."""
    wanted = [name for name in names if name != EASE]
    if wanted:
        try:
            import implicit  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"classic: {' and '.join(wanted)} need the library implicit: pip install 'raygr[classic]'"
            ) from None


def chosen_model(name: str, found: Interactions, ranker: Ranker) -> Chosen:
    """The model of a grid that ranks the validation targets best; the first one where there are none."""
    is_train_N = found.split_N == TRAIN
    train_UI = ones(found.user_N[is_train_N], found.item_N[is_train_N], (found.users, found.items))
    targets = evaluation_targets(found.user_N, found.split_N == VALIDATION, max_history=1)
    grid = GRIDS[name]
    best, best_value = None, -1.0
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        scorer = fitted(name, train_UI, settings)
        value = metric_values("ndcg_at_10", ranker(scorer, targets)).mean() if len(targets.user_E) else 0.0
        if value > best_value:
            best, best_value = Chosen(scorer, settings), value
    assert best is not None
    return best


def fitted(name: str, train_UI: csr_matrix, settings: dict[str, Any]) -> Scorer:
    match name:
        case "item-kNN":
            from implicit.nearest_neighbours import CosineRecommender
            from implicit.utils import ParameterWarning

            model = CosineRecommender(K=int(settings["neighbours"]), num_threads=1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ParameterWarning)  # of a matrix that implicit makes itself
                model.fit(train_UI, show_progress=False)
            return lambda history_BI: (history_BI @ model.similarity).toarray()
        case "EASE":
            weights_II = ease_weights(train_UI, settings["regularization"])
            return lambda history_BI: history_BI @ weights_II
        case _:
            return fitted_als(train_UI, settings)


def ease_weights(train_UI: csr_matrix, regularization: float) -> np.ndarray:
    """The item-item weights (I, I) of ridge regressions of each item on all others, with a zero diagonal."""
    gram_II = (train_UI.T @ train_UI).toarray().astype(np.float64)
    gram_II[np.diag_indices_from(gram_II)] += regularization
    inverse_II = np.linalg.inv(gram_II)
    weights_II = inverse_II / -np.diag(inverse_II)
    np.fill_diagonal(weights_II, 0.0)
    return weights_II


def fitted_als(train_UI: csr_matrix, settings: dict[str, Any]) -> Scorer:
    """Factors of items from training; a user's are solved from the history before the target."""
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(
        factors=int(settings["factors"]),
        regularization=settings["regularization"],
        alpha=settings["alpha"],
        iterations=ALS_ITERATIONS,
        num_threads=1,
        random_state=SEED,
    )
    model.fit(train_UI, show_progress=False)

    def scores(history_BI: csr_matrix) -> np.ndarray:
        users_BD = model.recalculate_user(np.arange(history_BI.shape[0]), history_BI)
        return users_BD @ model.item_factors.T

    return scores


def scores_after(
    scorer: Scorer, found: Interactions, targets: Targets, example_B: Tensor, new: NewTargets | None
) -> Tensor:
    """The scores of all items after the items before each target, (B, I); new items share the least score."""
    row_N, item_N = seen_pairs(torch.from_numpy(found.item_N), targets, example_B, new)
    history_BI = ones(row_N.numpy(), item_N.numpy(), (len(example_B), found.items))
    scores_BI = torch.from_numpy(np.ascontiguousarray(scorer(history_BI), dtype=np.float64))
    if found.new_items:
        scores_BI[:, found.items - found.new_items :] = scores_BI.min() - 1
    return scores_BI


def ones(row_N: np.ndarray, item_N: np.ndarray, shape: tuple[int, int]) -> csr_matrix:
    """A matrix with a 1 for each pair of a row and an item_index, however often the pair occurs."""
    found = csr_matrix((np.ones(len(row_N), np.float32), (row_N, item_N - 1)), shape=shape)
    found.data[:] = 1.0
    return found
