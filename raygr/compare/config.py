"""Settings of `raygr compare`."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Place, SimulateRun, TrainRun


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CompareConfig:
    """Train runs -> metrics per arm, paired intervals and corrected p-values, tables as Markdown, CSV and LaTeX."""

    output: Place
    """Folder of the run, local or any fsspec URI."""
    arms: Mapping[str, tuple[TrainRun, ...]]
    """Arm name -> its runs, one per seed."""
    base: str = "base"
    """The arm that the others are compared with."""
    bases: Mapping[str, str] = Field(default_factory=dict)
    """Arm -> the arm that it is compared with in place of `base`, such as each model's own; both must have been
    evaluated under one protocol, but two pairs may differ."""
    shown: tuple[str, ...] | None = None
    """Arms with columns Base, Refined, Improvement in the tables like the paper's; null shows all that have a base."""
    truth: SimulateRun | None = None
    """For data of simulated shoppers: the simulate run. Adds the shoppers' own choice model as the best possible
    ranking, the same without their tastes, and each arm's share of the way from its base to the truth."""
    classic: tuple[Literal["item-kNN", "EASE", "ALS"], ...] = ()
    """Recommenders without order and aspects, which are fitted here and ranked as the arms are, with hyperparameters
    chosen on validation. item-kNN and ALS need `pip install 'raygr[classic]'`."""
    cold_below: int = Field(default=10, ge=1)
    """Targets whose item has fewer train interactions are also compared separately."""
    primary_metric: Literal[
        "mrr", "recall_at_1", "recall_at_5", "recall_at_10", "recall_at_20", "ndcg_at_5", "ndcg_at_10", "ndcg_at_20"
    ] = "ndcg_at_10"
    """The metric whose p-values are corrected over the arms of a table, by Holm's method; others are not corrected."""
