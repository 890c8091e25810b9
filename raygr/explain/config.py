"""Settings of `raygr explain`."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Id, Ids, Place, TrainRun


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExplainConfig:
    """A refined train run -> why an item suits some users or not: figure, JSON and sentences (Figure 5)."""

    output: Place
    """Folder of the run, local or any fsspec URI."""
    train_run: TrainRun
    """A train run with item scores on 1..10; its data and scores must be where they were."""
    item: Id | None = None
    """An item id; null picks one that one user rated high and another low."""
    users: Ids = Field(default=(), max_length=4)
    """User ids; an empty list picks the two users who rated the item highest and lowest."""
    aspect_names: tuple[str, ...] | None = None
    """Aspects shown one by one; the others are shown as one sum. null shows all one by one."""
