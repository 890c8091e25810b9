"""Quality of a score run: valid share by reason, spread of each aspect, dead aspects, effective rank."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from raygr.data.vector_tables import score_values

logger = logging.getLogger(__name__)

DEAD_SPREAD = 0.05  # standard deviation on the scale of 1 to 10
DEAD_SHARE = 0.99  # share of equal integer ratings
NO_SPREAD = 1e-3  # aspects with a smaller standard deviation count as constant
SHIFT = 5.5  # the middle of the scale, around which sums of squares lose no digits


@dataclasses.dataclass(frozen=True)
class AspectQuality:
    """One aspect over all subjects with a rating."""

    mean: float | None  # mean expected rating, 1 to 10
    spread: float | None  # standard deviation of the expected ratings
    identical_share: float | None  # share of the most frequent integer rating
    dead: bool  # does not tell subjects apart: spread < DEAD_SPREAD, or identical_share >= DEAD_SHARE


class Moments:
    """Count, mean and products of rows of A values that are added part by part."""

    def __init__(self, aspects: int) -> None:
        self.count_A, self.sum_A, self.product_AA = np.zeros(aspects), np.zeros(aspects), np.zeros((aspects, aspects))

    def add(self, rows_SA: np.ndarray) -> None:
        """NaN is a missing value, which counts as none."""
        there_SA = ~np.isnan(rows_SA)
        shifted_SA = np.where(there_SA, rows_SA - SHIFT, 0.0)
        self.count_A += there_SA.sum(0)
        self.sum_A += shifted_SA.sum(0)
        self.product_AA += shifted_SA.T @ shifted_SA

    def mean(self) -> np.ndarray:
        return SHIFT + self.sum_A / np.maximum(1, self.count_A)

    def covariance(self) -> np.ndarray:
        """Of rows without NaN; the diagonal holds the variances whatever was missing."""
        count_A = np.maximum(1, self.count_A)
        mean_A = self.sum_A / count_A
        return self.product_AA / count_A - np.outer(mean_A, mean_A)


def score_quality(parts: Iterable[pa.RecordBatch], names: tuple[str, ...]) -> dict[str, Any]:
    """Summarise SCORE rows, held part by part; `aspects` maps each name to the fields of its AspectQuality."""
    reasons, rated = Counter[str](), [Counter[float]() for _ in names]
    known, complete = Moments(len(names)), Moments(len(names))
    for part in parts:
        scores = pa.Table.from_batches([part])
        reasons.update({entry["values"]: entry["counts"] for entry in scores["reason"].value_counts().to_pylist()})
        expected_SA, ratings_SA = (score_values(scores[name], len(names), name) for name in ("expected", "ratings"))
        known.add(expected_SA)
        complete.add(expected_SA[~np.isnan(expected_SA).any(axis=1)])
        for aspect, ratings_S in zip(rated, ratings_SA.T, strict=True):
            values, counts = np.unique(ratings_S[~np.isnan(ratings_S)], return_counts=True)
            aspect.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    subjects = reasons.total()
    mean_A, spread_A = known.mean(), np.sqrt(np.maximum(0, known.covariance().diagonal()))
    of_aspects = zip(names, known.count_A, mean_A, spread_A, rated, strict=True)
    return {
        "subjects": subjects,
        "by_reason": dict(reasons.most_common()),
        "valid_share": reasons["ok"] / subjects if subjects else 0.0,
        "aspects": {
            name: dataclasses.asdict(aspect_quality(float(mean), float(spread), ratings if count else Counter()))
            for name, count, mean, spread, ratings in of_aspects
        },
        "effective_rank": effective_rank(complete.covariance()) if complete.count_A.max() > 1 else None,
    }


def aspect_quality(mean: float, spread: float, rated: Counter[float]) -> AspectQuality:
    """`rated` counts the subjects by their integer rating; an empty one says that there are no scores."""
    if not rated:
        return AspectQuality(mean=None, spread=None, identical_share=None, dead=True)
    identical = max(rated.values()) / rated.total()
    return AspectQuality(
        mean=mean,
        spread=spread,
        identical_share=identical,
        dead=spread < DEAD_SPREAD or identical >= DEAD_SHARE,
    )


def effective_rank(covariance_AA: np.ndarray) -> float:
    """Effective rank of the standardised aspects: exp of the entropy of their normalised singular values.

    1 means that all aspects say the same, A that each says something of its own (Roy and Vetterli, 2007).
    """
    (kept,) = np.nonzero(covariance_AA.diagonal() >= NO_SPREAD**2)
    if not len(kept):
        return 0.0
    spread = np.sqrt(covariance_AA.diagonal()[kept])
    correlation = covariance_AA[np.ix_(kept, kept)] / np.outer(spread, spread)
    singular = np.sqrt(np.maximum(0, np.linalg.eigvalsh(correlation)))
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def log_quality(quality: dict[str, Any]) -> None:
    """Log the summary of `score_quality` in one line."""
    dead = [name for name, aspect in quality["aspects"].items() if aspect["dead"]]
    logger.info(
        "score: %.1f%% valid %s, effective rank %s%s",
        100 * quality["valid_share"],
        json.dumps(quality["by_reason"]),
        quality["effective_rank"] and round(quality["effective_rank"], 1),
        f", dead aspects: {', '.join(dead)}" if dead else "",
    )
