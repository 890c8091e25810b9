"""Settings of `raygr reproduce`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, ItemVectors, Place, PrepareRun, SettingsOf, Shipped, UserScoreRun
from raygr.train.config import TrainConfig

ExperimentName = Literal["table-2", "table-3", "table-4", "table-5", "figure-3", "figure-4", "figure-6"]


EXPERIMENTS: tuple[str, ...] = get_args(ExperimentName)


Candidates = Literal["full", "uniform-100", "popularity-100"]


Source = Literal["prepare", "item_scores", "teacher", "finetune", "user_scores"]

TrainSettings = Annotated[Mapping[str, Any], SettingsOf(TrainConfig)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReproduceConfig:
    """The stages and train runs of one of the paper's experiments -> its table or figure beside the paper's numbers."""

    SPEED: ClassVar = frozenset({"at_once", "gpu_share"})

    experiment: ExperimentName
    output: Place
    runs: Place
    """Folder of the stages' and train runs. Experiments on the same data share it: finished runs are skipped."""

    data: PrepareRun | None = None
    """A prepare run; null makes one by `stage_files`."""
    item_scores: ItemVectors | None = None
    """A score run, or a Parquet/CSV of id -> vector; null makes a score run by `stage_files`."""
    user_scores: Literal["none", "llm", "profile"] = "llm"
    """As in `raygr train`."""
    user_score_run: UserScoreRun | None = None
    """The score run of `user_scores: llm`; null tunes an adapter and scores users with it, by `stage_files`."""
    classification_scores: UserScoreRun | None = None
    """table-5: the user scores of the adapter tuned on the classification task; null makes them by `stage_files`."""
    stage_files: Mapping[Source, Shipped | None] = Field(default_factory=dict)
    """YAML of each stage that makes data or scores; where it reads and writes is set here, under `runs`. Without a
    `teacher` the finetune file's own stays."""

    recommenders: Mapping[str, Shipped] = Field(min_length=1)
    """Name in the paper -> YAML of its base train run; data, output, seed and candidates are set here."""
    protocol: Mapping[str, Candidates]
    """Recommender -> the candidates that the paper ranks with it. Every run ranks all sets that are named here, so
    that the same table exists under each single one of them."""
    train: TrainSettings = Field(default_factory=dict)
    """Train settings of all runs, over those of the recommenders' files."""
    refined: TrainSettings
    """Train settings of the refined runs, over `train`: the paper's base_width is 48, beside twelve scores."""
    extra_arms: Mapping[str, TrainSettings] = Field(default_factory=dict)
    """table-2 to table-5: further arms by name, such as controls; train settings over those of `refined`."""
    twins: Mapping[str, str] = Field(default_factory=dict)
    """Arm (`refined`, in table-5 `refined (base)` or `refined (cls)`, or one of `extra_arms`) -> one of `extra_arms`
    that it is compared with besides the base, such as the same with shuffled scores."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)

    at_once: int = Field(default=1, ge=1)
    """Train runs at a time; they share the machine's cores, unless `train` sets their `threads`."""
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """Of a GPU, for each training worker, where there is one; 0.1 lets ten share it."""

    guided_widths: tuple[int, ...] = Field(default=(3, 6, 9, 12), min_length=1)
    """figure-3: so many of the first scores."""
    base_widths: tuple[int, ...] = Field(default=(10, 20, 40, 48, 60, 120, 180, 240), min_length=1)
    """figure-4."""
    guided_weights: tuple[float, ...] = Field(default=(0.25, 0.5, 1.0, 2.0, 4.0), min_length=1)
    """figure-6: lambda of (9a, 9b)."""

    paper: Shipped
    """CSV of the paper's numbers: recommender, arm, metric, base, refined, improvement in percent."""
