"""metrics.json of a train run, as the stages after it read it; `outputs` writes it."""

from dataclasses import dataclass
from typing import Any

import msgspec

from raygr.files import join, read_json
from raygr.runs import RunError
from raygr.schema import METRICS


@dataclass
class ListFigures:
    """Accuracy and diversity of recommended lists, means over users."""

    length: int
    mmr_weight: float
    scores: str | None
    """File or run of the vectors that measure how alike two items are; None: the model's own item vectors."""
    ranked: dict[str, float]
    """Of the lists as the model ranks them."""
    reranked: dict[str, float]
    """Of the lists after maximal marginal relevance (MMR)."""


@dataclass
class RunMetrics:
    """The part of metrics.json that later stages need; `outputs.py` writes more."""

    protocol: dict[str, Any]
    shares: dict[str, float] | None
    """Shares of the scores' spread: base part, encoder and user side; None for base models."""
    best_epoch: int
    epochs: int
    """Trained epochs."""
    parameters: int
    lists: ListFigures
    test: dict[str, dict[str, float]]
    """By ranking: means over users of the test targets."""
    base_moved: float | None = None
    """None for base models, and for runs of versions that did not measure it."""


def read_metrics(run: str) -> RunMetrics:
    """RunError for a file that an earlier version wrote with other fields."""
    try:
        return msgspec.convert(read_json(join(run, METRICS)), RunMetrics)
    except msgspec.ValidationError as error:
        raise RunError(f"{run}: {METRICS} is of an earlier version, train again ({error})") from None
