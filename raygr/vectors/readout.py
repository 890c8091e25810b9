"""The readout: ridge regression from an LLM's mean hidden states to item scores, and how well it does.

Shape letters: `S` subjects, `A` aspects. `X` is a number of features.
"""

from typing import NamedTuple

import numpy as np

from raygr.metrics.agreement import AspectAgreement, agreement
from raygr.metrics.z_scores import LEAST_SPREAD

PENALTIES = np.logspace(-4, 2, 25)  # in units of the mean squared length of an item's standardised features
FOLDS = 5
LOWEST, HIGHEST = 1.0, 10.0


class Readout(NamedTuple):
    """A fitted ridge regression: scores are `offset_A` plus features times `weights_XA`."""

    weights_XA: np.ndarray
    offset_A: np.ndarray
    penalty: float
    """The chosen one of PENALTIES."""

    def scores(self, features_SX: np.ndarray) -> np.ndarray:
        """Scores of items, (S, A), clipped to 1..10."""
        return np.clip(self.offset_A + features_SX @ self.weights_XA, LOWEST, HIGHEST)


def fit_readout(features_SX: np.ndarray, scores_SA: np.ndarray) -> Readout:
    """Fit the scores, without NaN, of taught items on their features, each feature standardised over these items.

    One penalty serves all aspects: the one with the smallest squared leave-one-out error, as a share of each aspect's
    variance. Its closed form needs one eigendecomposition of the (S, S) products of the items.
    """
    mean_X, spread_X = features_SX.mean(axis=0, dtype=np.float64), features_SX.std(axis=0, dtype=np.float64)
    scale_X = np.divide(1, spread_X, out=np.zeros_like(spread_X), where=spread_X > LEAST_SPREAD)
    standard_SX = (features_SX - mean_X) * scale_X
    mean_A = scores_SA.mean(axis=0)
    centred_SA = scores_SA - mean_A
    variance_A = np.var(scores_SA, axis=0)
    values_S, axes_SS = np.linalg.eigh(standard_SX @ standard_SX.T)
    values_S, turned_SA = np.maximum(values_S, 0), axes_SS.T @ centred_SA
    penalties, errors = PENALTIES * values_S.mean(), []
    for penalty in penalties:
        kept_S = values_S / (values_S + penalty)
        # an item's own weight in its fitted score; the mean, which is fitted too, adds 1/S
        own_S = axes_SS**2 @ kept_S + 1 / len(values_S)
        left_out_SA = (centred_SA - axes_SS @ (kept_S[:, None] * turned_SA)) / (1 - own_S)[:, None]
        errors.append(((left_out_SA**2).mean(axis=0)[variance_A > 0] / variance_A[variance_A > 0]).sum())
    best = int(np.argmin(errors))
    dual_SA = axes_SS @ (turned_SA / (values_S + penalties[best])[:, None])
    weights_XA = scale_X[:, None] * (standard_SX.T @ dual_SA)
    return Readout(weights_XA, mean_A - mean_X @ weights_XA, float(PENALTIES[best]))


def readout_agreement(features_SX: np.ndarray, scores_SA: np.ndarray, *, seed: int) -> list[AspectAgreement]:
    """Agreement per aspect of taught items with their scores, each read out by a fit of the other FOLDS - 1 parts."""
    predicted_SA = np.empty_like(scores_SA)
    fold_S = np.random.default_rng(seed).permutation(len(scores_SA)) % FOLDS
    for fold in range(FOLDS):
        is_out_S = fold_S == fold
        predicted_SA[is_out_S] = fit_readout(features_SX[~is_out_S], scores_SA[~is_out_S]).scores(features_SX[is_out_S])
    return agreement(predicted_SA, scores_SA, scores_SA.mean(axis=0))
