"""metrics.json of a train run: its fields and its reader; `outputs` writes it."""

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
class NewItemFigures:
    """Metrics of the targets with new items."""

    items: int
    targets: int
    users: int
    offset: float
    """What the candidate set `whole-calibrated` adds to the scores of new items."""
    metrics: dict[str, dict[str, float]]
    """By candidate set: means over users."""


@dataclass(kw_only=True)
class RunMetrics:
    """metrics.json; its keys have the order of these fields."""

    protocol: dict[str, Any]
    shares: dict[str, float] | None
    """Shares of the scores' spread: base part, encoder and user side; None for base models."""
    base_moved: float | None = None
    """None for base models, and for runs of versions that did not measure it."""
    best_epoch: int
    epochs: int
    """Trained epochs."""
    parameters: int
    seconds_per_epoch: float
    warnings: list[str]
    validation: dict[str, dict[str, float] | None]
    """By ranking: means over users of the validation targets; None without targets."""
    test: dict[str, dict[str, float]]
    cold: dict[str, Any]
    """`below`: the number of train interactions that cold-start targets stay below; and by ranking their metrics."""
    lists: ListFigures
    new: NewItemFigures | None = None
    """None on data without new items."""


def read_metrics(run: str) -> RunMetrics:
    """RunError for a file that an earlier version wrote with other fields."""
    try:
        return msgspec.convert(read_json(join(run, METRICS)), RunMetrics)
    except msgspec.ValidationError as error:
        raise RunError(f"{run}: {METRICS} is of an earlier version, train again ({error})") from None
