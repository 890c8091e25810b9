"""How well predicted scores agree with a teacher's, per aspect, or with users' ratings.

Shape letters: `S` subjects, `A` aspects, `E` targets, `U` users.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 2000


class AspectAgreement(NamedTuple):
    """Predicted and teacher's scores of the same subjects on one aspect; None where there is no value."""

    spearman: float | None
    """Spearman's correlation, -1 to 1; 0 where the predicted scores are all alike, None where the teacher's are."""
    mean_absolute_error: float
    """In points of the scale, as are the next two."""
    mean_guess_error: float
    """Mean absolute error of one guess for all subjects: the teacher's mean over the subjects that were taught."""
    bias: float
    """Mean predicted minus mean teacher's score; 0 is calibrated."""
    slope: float | None
    """Slope of the teacher's scores on the predicted ones: 1 is calibrated, below 1 the predicted ones differ too much
    from each other, above 1 too little. None where the predicted ones are all alike."""


def spearman(left: np.ndarray, right: np.ndarray) -> float | None:
    """Correlation of the ranks, where ties share their mean rank; None below two values or without spread."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(np.corrcoef(rankdata(left), rankdata(right))[0, 1])


def spearman_interval(left_E: np.ndarray, right_E: np.ndarray, user_E: np.ndarray) -> tuple[float, float] | None:
    """The 95% interval of `spearman` over users: a bootstrap of users with all their values; None where it has none.

    Ranks are those in all values, so that a resample only weights the users' sums.
    """
    if spearman(left_E, right_E) is None or len(np.unique(user_E)) < 2:
        return None
    x_E, y_E = (rankdata(one) - (len(one) + 1) / 2 for one in (left_E, right_E))
    _, user_E = np.unique(user_E, return_inverse=True)
    columns = (np.ones_like(x_E), x_E, y_E, x_E**2, y_E**2, x_E * y_E)
    sums_XU = np.stack([np.bincount(user_E, weights=column) for column in columns])
    users = sums_XU.shape[1]
    weights_UX = np.random.default_rng(0).multinomial(users, np.full(users, 1 / users), size=RESAMPLES).T
    count, x, y, xx, yy, xy = sums_XU @ weights_UX
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may have no spread
        found = (xy - x * y / count) / np.sqrt((xx - x * x / count) * (yy - y * y / count))
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(low), float(high)


def agreement(predicted_SA: np.ndarray, teacher_SA: np.ndarray, guess_A: np.ndarray) -> list[AspectAgreement]:
    """The agreement on each aspect. `guess_A`: the teacher's mean over the subjects that were taught."""
    found = []
    for predicted_S, teacher_S, guess in zip(predicted_SA.T, teacher_SA.T, guess_A, strict=True):
        order = spearman(predicted_S, teacher_S)
        variance = float(np.var(predicted_S))
        covariance = float(np.mean((predicted_S - predicted_S.mean()) * (teacher_S - teacher_S.mean())))
        found.append(
            AspectAgreement(
                spearman=0.0 if order is None and np.ptp(teacher_S) > 0 else order,
                mean_absolute_error=float(np.abs(predicted_S - teacher_S).mean()),
                mean_guess_error=float(np.abs(guess - teacher_S).mean()),
                bias=float(predicted_S.mean() - teacher_S.mean()),
                slope=covariance / variance if variance > 0 else None,
            )
        )
    return found


def mean_agreement(aspects: list[AspectAgreement]) -> dict[str, float]:
    """The mean of each figure over the aspects that have a value; 0 where none has."""
    known = {
        name: [value for one in aspects if (value := one._asdict()[name]) is not None] for name in aspects[0]._fields
    }
    return {name: float(np.mean(values)) if values else 0.0 for name, values in known.items()}
