"""How well predicted scores agree with a teacher's, per aspect.

Shape letters: `S` subjects, `A` aspects.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata


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
