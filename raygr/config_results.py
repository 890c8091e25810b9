"""The dataclasses of the jobs that read trained recommenders; config.py holds the others, and reads them all."""

from collections.abc import Mapping

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CompareConfig:
    """Train runs -> metrics per arm, paired intervals and corrected p-values, tables as Markdown, CSV and LaTeX."""

    output: str
    arms: Mapping[str, tuple[str, ...]]
    """Arm name -> its runs, one per seed."""
    base: str = "base"
    """The arm that the others are compared with."""
    bases: Mapping[str, str] = Field(default_factory=dict)
    """Arm -> the arm that it is compared with in place of `base`, such as each model's own; both must have been
    evaluated under one protocol, but two pairs may differ."""
    shown: tuple[str, ...] | None = None
    """Arms with columns Base, Refined, Improvement in the tables like the paper's; null shows all that have a base."""
    cold_below: int = Field(default=10, ge=1)
    """Targets with fewer train interactions are compared apart, too."""
    bootstrap_samples: int = Field(default=10_000, ge=100)
    """The smallest p-value is 2 / (samples + 1); Holm's correction multiplies it by the number of gains in a table."""
    seed: int = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReportConfig:
    """Finished runs -> one self-contained HTML page and the same tables as Markdown."""

    output: str
    title: str
    data: str
    comparison: str | None = None
    item_scores: str | None = None
    """Score run whose quality is shown and whose items are drawn."""
    user_scores: str | None = None
    reference_scores: str | None = None
    """CSV/Parquet of another model's item scores: agreement is shown per aspect."""
    finetune: tuple[str, ...] = ()
    """Finetune runs, such as one per task: held-out users before and after, and the curves of the steps."""
    notice: str = ""
    """A sentence printed at the top, such as what the data can and cannot show."""
