"""Settings of `raygr export`."""

from pydantic.dataclasses import dataclass

from raygr.config import STRICT, ItemVectors, Place, TrainRun


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExportConfig:
    """A train run -> refined item vectors and user vectors, whose products are the model's scores."""

    output: Place
    """Folder of the run, local or any fsspec URI."""
    train_run: TrainRun
    """A train run; its folder is enough, wherever it is."""
    new_item_scores: ItemVectors | None = None
    """Items that nobody has bought yet, to be exported too: a score run, or CSV or Parquet with the item id in the
    first column and one column per aspect of the train run."""
    new_item_offset: float | None = None
    """What is added to the scores of items that training did not know: null takes what training calibrated, 0 adds
    nothing."""
    use_gpu: bool | None = None
    """null uses a GPU where this machine has one."""
