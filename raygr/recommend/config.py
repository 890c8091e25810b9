"""Settings of `raygr recommend`."""

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Ids, InputFile, ItemVectors, Place, RayUse, TrainRun, refuse


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RecommendConfig:
    """A train run -> the best items of its users, or after given histories, as Parquet."""

    SPEED: ClassVar = frozenset({"batch_size", "ray", "threads", "workers"})

    output: Place
    """Folder of the run, local or any fsspec URI."""
    train_run: TrainRun
    """A train run; its folder is enough, wherever it is."""
    users: Ids | None = None
    """User ids (in YAML in quotes where they start with a zero); null recommends to all. Their whole histories count,
    test part too."""
    users_file: InputFile | None = None
    """In place of users: a file of one id per line."""
    histories: InputFile | None = None
    """In place of both: Parquet or JSON lines of history_id and item_ids (a list, oldest first)."""
    n: int = Field(default=10, ge=1)
    """Length of each list. It never holds items of the history, unless the data keep repeat purchases."""
    mmr_weight: float | None = Field(default=None, ge=0, le=1)
    """Re-ranks by maximal marginal relevance with this weight of relevance; null keeps the recommender's order."""
    mmr_scores: ItemVectors | None = None
    """A score run, or id -> vectors, in which re-ranked lists are diverse; null takes the refined item vectors."""
    steer: Mapping[str, float] = Field(default_factory=dict)
    """Aspect -> how far to move what every user looks for, as in `--steer "pace=+1"`. 1 adds to an item's score one for
    each standard deviation of the aspect. It needs a train run with `user_scores: history`."""
    new_item_scores: ItemVectors | None = None
    """Items that nobody has bought yet, as in `--new-items FILE`: a score run, or CSV or Parquet with the item id in
    the first column and one column per aspect of the train run. Lists and given histories may hold them."""
    new_item_offset: float | None = None
    """What is added to the scores of items that training did not know: null takes what training calibrated, 0 adds
    nothing."""
    batch_size: int = Field(default=256, ge=1)
    """Histories scored at once, and in one file."""
    workers: int = Field(default=1, ge=1)
    """Actors, each with the model and `threads` CPUs."""
    threads: int = Field(default=1, ge=1)
    """torch threads of an actor, which reserves as many CPUs."""
    use_gpu: bool | None = None
    """null uses one GPU per actor where the cluster has GPUs, and refuses more actors than GPUs."""
    ray: RayUse = "auto"
    """`auto` recommends in the calling process where `workers` is 1, outside a cluster; the lists are the same."""

    @model_validator(mode="after")
    def check(self) -> Self:
        named = [one for one in (self.users, self.users_file, self.histories) if one is not None]
        contradictions = {
            "users, users_file and histories are three ways to say for whom: set one of them": len(named) > 1,
            "users: nobody is in it to recommend to": self.users == (),
            "ray: never recommends in the calling process, which is one worker: set workers: 1": (
                self.ray == "never" and self.workers > 1
            ),
        }
        refuse(self, {"without mmr_weight": ("mmr_scores",) if self.mmr_weight is None else ()}, contradictions)
        return self
