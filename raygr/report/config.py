"""Settings of `raygr report`."""

from typing import Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from raygr.config import (
    STRICT,
    CompareRun,
    FinetuneRun,
    ItemScoreRun,
    ItemVectors,
    Place,
    PrepareRun,
    UserScoreRun,
    refuse,
)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReportConfig:
    """Finished runs -> one self-contained HTML page and the same tables as Markdown."""

    output: Place
    title: str
    data: PrepareRun
    comparison: CompareRun | None = None
    item_score_run: ItemScoreRun | None = None
    """Score run whose quality is shown and whose items are drawn."""
    taught_score_run: ItemScoreRun | None = None
    """Score run of an LLM that was taught: its agreement with `reference_scores` is shown after that of
    `item_score_run`, both over the items whose scores it was not taught."""
    user_score_run: UserScoreRun | None = None
    reference_scores: ItemVectors | None = None
    """CSV/Parquet of another model's item scores: agreement is shown per aspect."""
    finetune: tuple[FinetuneRun, ...] = ()
    """Finetune runs, such as one per task: held-out users before and after, and the curves of the steps."""
    notice: str = ""
    """A sentence printed at the top, such as what the data can and cannot show."""

    @model_validator(mode="after")
    def check(self) -> Self:
        alone = self.taught_score_run is not None and not (self.item_score_run and self.reference_scores)
        refuse(self, {}, {"taught_score_run needs an item_score_run and reference_scores to compare it with": alone})
        return self
