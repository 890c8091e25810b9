"""Settings of `raygr reproduce`."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, ItemVectors, Place, PrepareRun, SettingsOf, Shipped, UserScoreRun
from raygr.train.config import TrainConfig, UserScores

ExperimentName = Literal["table-2", "table-3", "table-4", "table-5", "figure-3", "figure-4", "figure-6"]
EXPERIMENTS: tuple[str, ...] = get_args(ExperimentName)
TABLES = tuple(name for name in EXPERIMENTS if name.startswith("table"))
BASE, REFINED = "base", "refined"  # the arms of the paper's tables

Candidates = Literal["full", "uniform-100", "popularity-100"]
Source = Literal["prepare", "item_scores", "teacher", "finetune", "user_scores"]
TrainSettings = Annotated[Mapping[str, Any], SettingsOf(TrainConfig)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReproduceConfig:
    """One experiment of the paper -> its table or figure, with the paper's numbers beside the measured ones."""

    SPEED: ClassVar = frozenset({"at_once", "gpu_share"})

    experiment: ExperimentName
    """The table or figure of the paper."""
    output: Place
    """Folder of the run, local or any fsspec URI."""
    runs: Place
    """Folder of the stages' and train runs. Experiments on the same data share it: finished runs are skipped."""

    data: PrepareRun | None = None
    """A prepare run; null makes one by `stage_files`."""
    item_scores: ItemVectors | None = None
    """A score run, or a Parquet/CSV of id -> vector; null makes a score run by `stage_files`."""
    user_scores: UserScores = "llm"
    """As in `raygr train`; `table` takes `user_table` from `refined`. table-5 compares two runs of `llm`."""
    user_score_run: UserScoreRun | None = None
    """The score run of `user_scores: llm`; null tunes an adapter and scores users with it, by `stage_files`."""
    classification_scores: UserScoreRun | None = None
    """table-5: user scores of the adapter tuned on the classification task; null makes them by `stage_files`."""
    stage_files: Mapping[Source, Shipped | None] = Field(default_factory=dict)
    """YAML of each stage that makes data or scores. `reproduce` sets its inputs and its output, which lies in `runs`.
    Without a `teacher` the finetune file keeps its own."""

    recommenders: Mapping[str, Shipped] = Field(min_length=1)
    """Name in the paper -> YAML of its base train run; `reproduce` sets data, output, seed and candidates."""
    protocol: Mapping[str, Candidates]
    """Recommender -> the candidates that the paper ranks with it. Every run ranks all candidate sets named here, so
    the same table exists under each single one of them."""
    train: TrainSettings = Field(default_factory=dict)
    """Train settings of all runs; they override those of the recommenders' files."""
    refined: TrainSettings
    """Train settings of the refined runs; they override `train`. The paper's base_width is 48, beside twelve scores."""
    extra_arms: Mapping[str, TrainSettings] = Field(default_factory=dict)
    """table-2 to table-5: further arms by name, such as controls; their train settings override those of `refined`."""
    twins: Mapping[str, str] = Field(default_factory=dict)
    """Arm (`refined`, in table-5 `refined (base)` or `refined (cls)`, or one of `extra_arms`) -> one of `extra_arms`,
    with which it is compared besides the base, such as the same arm with shuffled scores."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    """Seeds of the train runs: each arm is trained once per seed."""

    at_once: int = Field(default=1, ge=1)
    """Train runs at a time; they share the machine's cores, unless `train` sets their `threads`."""
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU for each training worker, where there is one; 0.1 lets ten workers share it."""

    guided_widths: tuple[int, ...] = Field(default=(3, 6, 9, 12), min_length=1)
    """figure-3: how many of the first scores the guided embedding has."""
    base_widths: tuple[int, ...] = Field(default=(10, 20, 40, 48, 60, 120, 180, 240), min_length=1)
    """figure-4: widths of the base embedding."""
    guided_weights: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0, 2.0, 4.0), min_length=1)
    """figure-6: values of lambda of (9a, 9b)."""

    paper: Shipped
    """CSV of the paper's numbers: recommender, arm, metric, base, refined, improvement in percent."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """ValueError for contradictory settings."""
        unknown = [name for name in self.recommenders if name not in self.protocol]
        if unknown:
            raise ValueError(f"protocol names no candidates for {', '.join(unknown)}")
        if self.experiment == "table-5" and self.user_scores != "llm":
            raise ValueError("table-5 compares the user scores of two adapters: it needs user_scores llm")
        if self.extra_arms and self.experiment not in TABLES:
            raise ValueError(f"extra_arms are for {', '.join(TABLES)}, not for {self.experiment}")
        folders = Counter(map(folder_name, self.extra_arms))
        for name in self.extra_arms:
            if folder_name(name).split("-")[0] in (BASE, REFINED):
                raise ValueError(f"extra_arms: {name}: names that begin with {BASE} or {REFINED} are the paper's arms")
            if folders[folder_name(name)] > 1:
                raise ValueError(f"extra_arms: {name}: another arm would have the same folders, rename one of them")
        arms = [*refined_labels(self), *self.extra_arms]
        for arm, twin in self.twins.items():
            if arm not in arms or twin not in self.extra_arms or arm == twin:
                raise ValueError(f"twins: {arm} and {twin} must be two of {', '.join(arms)}")
        return self


def refined_labels(config: ReproduceConfig) -> tuple[str, ...]:
    """The refined arms, as the paper's numbers name them."""
    return (f"{REFINED} (base)", f"{REFINED} (cls)") if config.experiment == "table-5" else (REFINED,)


def folder_name(name: str) -> str:
    """The name as a part of a run folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", " plus")).strip("-")
