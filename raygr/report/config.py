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
    TrainRun,
    UserScoreRun,
    refuse,
)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReportConfig:
    """Finished runs -> one self-contained HTML page and the same tables as Markdown."""

    output: Place
    """Folder of the run, local or any fsspec URI."""
    title: str
    """Heading of the page."""
    data: PrepareRun
    """The prepare run that the other runs are of."""
    comparison: CompareRun | None = None
    """Compare run whose tables and gains are shown."""
    item_score_run: ItemScoreRun | None = None
    """Score run whose quality is shown and whose items are drawn."""
    taught_score_run: ItemScoreRun | None = None
    """Score run of an LLM that was taught: its agreement with `reference_scores` is shown after that of
    `item_score_run`, both over the items whose scores it was not taught."""
    user_score_run: UserScoreRun | None = None
    """Score run of users whose quality is shown."""
    reference_scores: ItemVectors | None = None
    """CSV/Parquet of another model's item scores: agreement is shown per aspect."""
    train_run: TrainRun | None = None
    """Train run with a guided user state, whose lists the page steers; None takes the comparison's first arm."""
    finetune: tuple[FinetuneRun, ...] = ()
    """Finetune runs, such as one per task: held-out users before and after, and the curves of the steps."""
    notice: str = ""
    """A sentence printed at the top, such as what the data can and cannot show."""

    @model_validator(mode="after")
    def check(self) -> Self:
        alone = self.taught_score_run is not None and not (self.item_score_run and self.reference_scores)
        refuse(self, {}, {"taught_score_run needs an item_score_run and reference_scores to compare it with": alone})
        return self
