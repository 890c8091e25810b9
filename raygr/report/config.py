"""Settings of `raygr report`."""

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
