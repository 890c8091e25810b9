"""Settings of `raygr explain`."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Id, Place


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExplainConfig:
    """A refined train run -> why an item suits some users or not: figure, JSON and sentences (Figure 5)."""

    output: Place
    train: Place
    """A train run with item scores on 1..10; its data and scores must be where they were."""
    item: Id | None = None
    """An item id; null picks one that one user rated high and another low."""
    users: tuple[Id, ...] = Field(default=(), max_length=4)
    """User ids; none picks two who rated the item highest and lowest."""
    aspects: tuple[str, ...] | None = None
    """Those shown one by one, the others as one sum; null shows all."""
