"""Settings of `raygr sweep`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Place, RayUse, SettingsOf, refuse
from raygr.train.config import TrainConfig

Value = bool | int | float | str | None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ValueRange:
    """Numbers from `low` to `high`: whole ones where both are written without a point."""

    low: int | float
    """Lowest value."""
    high: int | float
    """Highest value."""
    log: bool = False
    """Search on a logarithmic scale."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RandomSubsets:
    """A guided dimension of aspects drawn at random."""

    random: int = Field(ge=1)
    """Aspects of each subset."""
    subsets: int = Field(ge=1)
    """Number of subsets drawn."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SweepConfig:
    """One train run per point of a search space -> their metrics, the best by validation, a figure."""

    SPEED: ClassVar = frozenset({"gpu_share", "max_failures", "ray"})

    output: Place
    """Folder of the run, local or any fsspec URI."""
    train: Annotated[Mapping[str, Any], SettingsOf(TrainConfig)]
    """What all trials share: fields of `raygr train`, but `output`. Where `threads` is not named it is 1. `loggers` log
    each trial as a run of its own."""
    space: Annotated[
        Mapping[str, ValueRange | tuple[Value | RandomSubsets | tuple[str, ...], ...]],
        SettingsOf(TrainConfig, listed=True),
    ]
    """Name -> its values. Names are fields of `raygr train` and two more. guided_dimension: 0 is the base model, k the
    first k aspects, a list the aspects that it names, {random: 6, subsets: 3} three draws of six. total_width:
    sets base_width so that `concat` has this width in all; null leaves base_width as it is."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """Every point; points drawn at random, none twice; or Optuna's TPE, which needs `pip install 'raygr[optuna]'`."""
    trials: int | None = Field(default=None, ge=1)
    """Number of points that random and tpe try."""
    stop_early: bool = False
    """ASHA: at `grace_epochs`, and at each `reduction_factor` times as many, a trial goes on only if its best
    validation NDCG@10 is among the best 1 in `reduction_factor` seen there."""
    grace_epochs: int = Field(default=10, ge=1)
    """Epochs that a trial trains at least before `stop_early` may end it."""
    reduction_factor: float = Field(default=3.0, gt=1)
    """One in so many trials goes on at each check of `stop_early`."""
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """At most as many as fit: a trial takes `threads` CPUs."""
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU that each trial takes, where trials run on GPUs."""
    max_failures: int = Field(default=1, ge=0)
    """Times that a failed trial is tried again, from its last checkpoint."""
    seed: int = 0
    """Seed of random search, tpe and random subsets; the seed of the trials is a field of `raygr train`."""
    ray: RayUse = "auto"
    """`auto` trains the trials of a small grid or random search one after the other in the calling process, outside a
    cluster, unless they need Ray Tune; the results are the same."""

    @model_validator(mode="after")
    def check(self) -> Self:
        needing = needs_ray(self)
        contradictions = {
            f"ray: never, but {', '.join(needing)} need Ray": self.ray == "never" and bool(needing),
            "train.ray: the sweep's own ray decides for all trials": "ray" in self.train,
            "train.workers: trials train side by side, each in one worker: leave it out": (
                self.train.get("workers", 1) != 1
            ),
        }
        refuse(self, {}, contradictions)
        return self


def needs_ray(config: SweepConfig) -> list[str]:
    """Return the settings that need Ray Tune."""
    reasons = {"search: tpe": config.search == "tpe", "stop_early": config.stop_early}
    return [name for name, holds in reasons.items() if holds]
