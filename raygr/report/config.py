"""Settings of `raygr report`."""

from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Place


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReportConfig:
    """Finished runs -> one self-contained HTML page and the same tables as Markdown."""

    output: Place
    title: str
    data: Place
    comparison: Place | None = None
    item_score_run: Place | None = None
    """Score run whose quality is shown and whose items are drawn."""
    user_score_run: Place | None = None
    reference_scores: Place | None = None
    """CSV/Parquet of another model's item scores: agreement is shown per aspect."""
    finetune: tuple[Place, ...] = ()
    """Finetune runs, such as one per task: held-out users before and after, and the curves of the steps."""
    notice: str = ""
    """A sentence printed at the top, such as what the data can and cannot show."""
