"""Quality of a score run: valid share by reason, spread of each aspect, dead aspects, effective rank."""

import dataclasses
import json
import logging
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from raygr.data.vector_tables import score_values
from raygr.metrics.z_scores import standardise

logger = logging.getLogger(__name__)

DEAD_SPREAD = 0.05  # standard deviation on the scale of 1 to 10
DEAD_SHARE = 0.99  # share of equal integer ratings
NO_SPREAD = 1e-3  # aspects with a smaller standard deviation count as constant


@dataclasses.dataclass(frozen=True)
class AspectQuality:
    """One aspect over all subjects with a rating."""

    mean: float | None  # mean expected rating, 1 to 10
    spread: float | None  # standard deviation of the expected ratings
    identical_share: float | None  # share of the most frequent integer rating
    dead: bool  # does not tell subjects apart: spread < DEAD_SPREAD, or identical_share >= DEAD_SHARE


def score_quality(scores: pa.Table, names: tuple[str, ...]) -> dict[str, Any]:
    """Summarise SCORE rows; `aspects` maps each name to the fields of its AspectQuality."""
    reasons = Counter({entry["values"]: entry["counts"] for entry in scores["reason"].value_counts().to_pylist()})
    expected_SA, ratings_SA = (score_values(scores[name], len(names), name) for name in ("expected", "ratings"))
    return {
        "subjects": len(scores),
        "by_reason": dict(reasons.most_common()),
        "valid_share": reasons["ok"] / len(scores) if len(scores) else 0.0,
        "aspects": {
            name: dataclasses.asdict(aspect_quality(expected_SA[:, a], ratings_SA[:, a]))
            for a, name in enumerate(names)
        },
        "effective_rank": effective_rank(expected_SA),
    }


def aspect_quality(expected_S: np.ndarray, ratings_S: np.ndarray) -> AspectQuality:
    expected, ratings = expected_S[~np.isnan(expected_S)], ratings_S[~np.isnan(ratings_S)]
    if not len(expected) or not len(ratings):
        return AspectQuality(mean=None, spread=None, identical_share=None, dead=True)
    counts = np.unique(ratings, return_counts=True)[1]
    spread, identical = float(expected.std()), float(counts.max() / len(ratings))
    return AspectQuality(
        mean=float(expected.mean()),
        spread=spread,
        identical_share=identical,
        dead=spread < DEAD_SPREAD or identical >= DEAD_SHARE,
    )


def effective_rank(expected_SA: np.ndarray) -> float | None:
    """Effective rank of the standardised aspects: exp of the entropy of their normalised singular values.

    1 means that all aspects say the same, A that each says something of its own (Roy and Vetterli, 2007). None with
    fewer than two rows without NaN.
    """
    full = expected_SA[~np.isnan(expected_SA).any(axis=1)]
    if len(full) < 2:
        return None
    singular = np.linalg.svd(standardise(full, least_spread=NO_SPREAD)[0], compute_uv=False)
    if singular.sum() == 0:
        return 0.0
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
