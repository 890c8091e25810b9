"""Settings of `raygr simulate`."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Place


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SimulateConfig:
    """The packaged film catalogue -> raw reviews and metadata of shoppers with known tastes."""

    output: Place
    """Folder of the run, local or any fsspec URI."""
    shoppers: int = Field(default=1000, ge=1)
    """Number of shoppers who buy and review films."""
    aspect_names: tuple[str, ...] | None = None
    """Aspects of the catalogue that tastes and reviews are about; null takes all twelve."""
    seed: int = 0
    """Seed of the tastes, the reviews and all other draws."""
