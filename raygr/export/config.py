"""Settings of `raygr export`."""

from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Place, TrainRun


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExportConfig:
    """A train run -> refined item vectors and user vectors, whose products are the model's scores."""

    output: Place
    train_run: TrainRun
    """A train run; its folder is enough, wherever it is."""
