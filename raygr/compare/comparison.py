"""The records of comparison.json, which a compare run writes, and their reader and writer.

Dictionaries of gains and metrics go by the names in metrics/ranking.py, those around them by the ranking's name, such
as `full` or `uniform-100, every target`.
"""

from dataclasses import dataclass, field
from typing import Any

import msgspec

from raygr.files import join, read_json
from raygr.metrics.gains import Gain, WayShare
from raygr.runs import RunError
from raygr.schema import COMPARISON
from raygr.train.run_metrics import ListFigures

Protocol = dict[str, Any]
"""The protocol of an evaluation, as a train run records it: two runs are comparable if theirs are equal."""


@dataclass
class MetricMeans:
    """A metric's mean over users, of all runs of an arm together and of each run."""

    mean: float
    per_run: list[float]


@dataclass
class ArmGain(Gain):
    """The gain of an arm over its base arm in one metric."""

    p_holm: float | None
    """`p` after Holm's correction over the arms of a table; None for all metrics but the primary one."""
    per_run: list[float | None]
    """Each run's gain in percent of the base's run with the same seed, or of the base's mean; None over a base of 0."""


Metrics = dict[str, MetricMeans]
Gains = dict[str, ArmGain]


@dataclass
class TargetResults:
    """Results on some of the test targets; without any target there are neither metrics nor gains."""

    targets: int
    users: int
    metrics: Metrics | None
    against_base: Gains | None


@dataclass
class CountGain:
    """The gain over the base arm in the primary metric, of targets that were bought about equally often."""

    least: int
    """Least and greatest number of train interactions with the target item."""
    most: int
    targets: int
    users: int
    base: float
    """The base arm's mean of the metric."""
    gain: Gain


@dataclass
class ArmRecord:
    """What a comparison found for one arm, or for a reference such as popularity."""

    metrics: dict[str, Metrics]
    against_base: dict[str, Gains] | None
    """None for an arm that has no base arm."""
    cold: dict[str, TargetResults]
    """Of the cold-start targets."""
    runs: list[str]
    base: str | None
    """Name of the arm that this one is compared with."""
    is_reference: bool
    """Whether this is popularity, chance, a classic recommender or a truth, which have no train runs."""
    against_references: dict[str, dict[str, Gain]]
    """`popularity` and `chance` -> ranking -> gain over it in the primary metric."""
    protocol: Protocol
    settings: dict[str, Any]
    """Train settings that tell arms apart."""
    lists: ListFigures | None
    shares: dict[str, float] | None
    """Shares of the scores' spread, as in metrics.json: means over runs. None for base models."""
    base_moved: float | None
    """Mean over runs; None for base models and for runs of versions that did not measure it."""
    parameters: int
    by_train_count: dict[str, list[CountGain]] = field(default_factory=dict)
    """By ranking, from rarely bought targets to popular ones; empty for references and for arms without a base."""
    way_to_truth: dict[str, dict[str, WayShare | None]] = field(default_factory=dict)
    """Ranking -> metric -> the share of the way from the base to the truth; empty without one."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Hyperparameters of a classic recommender, chosen on validation; empty for all others."""


@dataclass
class Comparison:
    """comparison.json."""

    protocol: Protocol | None
    """None where the arms have several; each arm has its own."""
    base: str
    cold_below: int
    """Cold-start targets have fewer train interactions than this."""
    primary_metric: str
    shown: list[str]
    """Arms that the tables show in the paper's layout, each beside its base."""
    arms: dict[str, ArmRecord]
    remarks: list[str]
    """Sentences about arms that are no better than chance or popularity, and about missing references."""


def read_comparison(run: str) -> Comparison:
    """The comparison of a finished compare run; RunError for one that an earlier version wrote."""
    try:
        return msgspec.convert(read_json(join(run, COMPARISON)), Comparison)
    except msgspec.ValidationError as error:
        raise RunError(f"{run} was compared by an earlier version: delete it and compare again ({error})") from None
