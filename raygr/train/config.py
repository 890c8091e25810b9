"""Settings of `raygr train`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, InputFile, ItemVectors, Logger, Place, PrepareRun, RayUse, UserScoreRun, refuse

USER_FIELDS = ("user_side", "user_control", "user_guided_train", "train_user_guided", "prompt_fraction")
GUIDED_FIELDS = (
    "fusion", "add_map", "linear_map", "guided_weight", "control", "aspect_names", "user_scores", "user_score_run",
    "user_table", "item_dropout",
)  # fmt: skip
MODEL_FIELDS = {
    ("gru4rec",): ("hidden_width", "input_dropout", "session_parallel"),
    ("bert4rec",): ("mask_rate", "mask_last_rate"),
    ("sasrec", "bert4rec"): ("blocks", "heads"),
}
UserSide = Literal["learned", "add", "concat", "off"]
UserScores = Literal["none", "llm", "profile", "table", "history"]


def off_for_false(value: object) -> object:
    """For a field that takes "off": YAML 1.1 reads a bare off as false."""
    return "off" if value is False else value


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """Interactions (and scores) -> a recommender, its metrics and per-user ranks (9, 10)."""

    SPEED: ClassVar = frozenset({"loggers", "ray", "threads"})

    output: Place
    """Folder of the run, local or any fsspec URI."""
    data: PrepareRun
    """A prepare run."""
    item_scores: ItemVectors | None = None
    """A score run, or a Parquet/CSV of id -> vector (first column the item id); null trains the base model."""
    score_column: Literal["expected", "ratings"] = "expected"
    """Column of a score run: the expected rating, or the whole-number rating."""
    aspect_names: tuple[str, ...] | None = None
    """Names of the score columns to use, in this order; null uses all."""
    control: Literal["none", "shuffled", "random"] = "none"
    """Control arm: the scores shuffled over items, or standard normal vectors of the same width."""
    missing_scores: Literal["mean", "refuse"] = "mean"
    """Items without scores get the mean of the others, or the run is refused."""
    user_scores: UserScores = "history"
    """Guided vectors of users. `history`: the guided user state, learned from the item scores of the history before a
    target; `llm`: one vector a user, of `user_score_run`; `profile`: the rating-weighted mean of the user's items;
    `table`: one vector a user, of `user_table`."""
    user_score_run: UserScoreRun | None = None
    """The score run of `llm`; with `history` its vectors are one more part of the state."""
    user_table: InputFile | None = None
    """The Parquet/CSV of id -> vector of `table`, with a column per aspect; with `history` its vectors are one more
    part of the state. Nobody checks what such vectors know of the targets, and the run warns of it."""
    user_control: Literal["none", "shuffled"] = "none"
    """Control arm: the users' vectors shuffled over users."""
    fusion: Literal["concat", "add", "none"] = "none"
    """`concat`: (9a), the guided part frozen beside the learned one; `add`: learned maps of the scores added; `none`:
    item rows are learned alone, and scores enter with the users' vectors only."""
    add_map: Literal["levels", "linear"] = "levels"
    """fusion `add`: learned vectors for the ten levels of a score, or one vector times the score."""
    linear_map: bool = False
    """Map guided scores by the learned W g + b of (8a, 8b) instead of A.5's scaling alone."""
    user_side: Annotated[UserSide, BeforeValidator(off_for_false, json_schema_input_type=UserSide | Literal[False])] = (
        "learned"
    )
    """How users' vectors enter a score: `learned` maps them to weights of the standardised item scores; (9b) and lambda
    `add` them to the encoder's state, or `concat` puts them in place of its guided dimensions."""
    user_guided_train: Literal["all", "after_prompt"] = "all"
    """Positions that use the user's vector in training: all (the paper), or only those after the prompt."""
    train_user_guided: bool = False
    """Train the users' vectors too, starting at the scores; false keeps them as they are (frozen)."""
    prompt_fraction: float = Field(default=0.5, gt=0, lt=1)
    """`after_prompt` with `profile`: the first part of the history that makes the vector in training."""
    guided_weight: float = Field(default=1.0, ge=0)
    """lambda of (9a, 9b)."""
    base_width: int = Field(default=60, ge=1)
    """Learned dimensions; `concat` adds one per aspect to it, `add` does not."""
    item_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the items whose learned row is 0 in a training batch, drawn anew for each. The guided part then learns
    to stand for an item alone, which new items need."""

    model: Literal["gru4rec", "sasrec", "bert4rec"] = "sasrec"
    """GRU4Rec+ is gru4rec with `loss: bpr_max` and additional `negatives`."""
    blocks: int = Field(default=2, ge=1)
    """sasrec and bert4rec: number of Transformer blocks."""
    heads: int = Field(default=2, ge=1)
    """sasrec and bert4rec: attention heads of each block."""
    hidden_width: int | None = Field(default=None, ge=1)
    """gru4rec: units of the GRU; null is the item table's width."""
    dropout: float = Field(default=0.4, ge=0, lt=1)
    """Dropout rate inside the model."""
    input_dropout: float | None = Field(default=None, ge=0, lt=1)
    """gru4rec: dropout of the item rows before the GRU; null is `dropout`."""
    session_parallel: bool = False
    """gru4rec: a batch is the next step of `batch_size` sessions side by side (published); for short histories."""
    max_history: int = Field(default=80, ge=2)
    """Length of the input sequence; for bert4rec including the [MASK] token."""
    windows: Literal["all", "last"] = "all"
    """Which parts of a history longer than `max_history` are trained on: windows that cover every target, or the newest
    window alone (as published for sasrec)."""
    mask_rate: float = Field(default=0.2, gt=0, lt=1)
    """bert4rec: share of a history that is masked; the published 0.2 for ML-1M, 0.6 for sparse Amazon data."""
    mask_last_rate: float = Field(default=0.1, ge=0, le=1)
    """bert4rec: share of histories in which only the last interaction is masked; the published value is 1 in 11."""

    loss: Literal["cross_entropy", "sampled_cross_entropy", "bce", "top1", "bpr", "bpr_max"] = "cross_entropy"
    """top1, bpr and bpr_max take the other histories' targets at the same step as negatives."""
    negatives: int = Field(default=0, ge=0)
    """Negative items drawn once per batch and shared by its histories: all negatives of sampled_cross_entropy,
    additional ones of top1, bpr and bpr_max. A user's own train items are never negatives of that user; in data that
    keep repeat purchases only the target is excluded."""
    negative_alpha: float = Field(default=0.0, ge=0)
    """Negatives are drawn in proportion to their train interactions to this power: 0 is uniform, 1 by popularity.
    sampled_cross_entropy corrects for it: it weighs each negative by one over its expected count in the draw."""
    score_penalty: float = Field(default=0.0, ge=0)
    """bpr_max: weight of the squared negative scores (bpreg)."""
    final_activation: Literal["linear", "tanh", "elu-0.5"] = "linear"
    """top1, bpr and bpr_max: activation of the scores inside the loss; items are ranked by the scores before it."""
    optimizer: Literal["adam", "sparse_adam", "adagrad"] = "adam"
    """`sparse_adam` updates only the item rows of a batch; for losses with negatives and large catalogues."""
    weight_decay: float = Field(default=0.0, ge=0)
    """adam: decoupled weight decay, applied to matrices only."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients with a larger norm are scaled down to this one; null never scales."""
    schedule: Literal["constant", "linear"] = "constant"
    """Course of the learning rate after the warm-up; `linear` lets it fall to 0 at the end of the last epoch."""
    warmup_steps: int = Field(default=0, ge=0)
    """Batches in which the learning rate rises linearly."""
    epochs: int = Field(default=100, ge=1)
    """Largest number of passes over the train interactions."""
    patience: int = Field(default=10, ge=1)
    """Evaluations without a better validation NDCG@10 before training stops."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between two evaluations."""
    batch_size: int = Field(default=128, ge=1)
    """Histories per optimizer step, of all workers together."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate."""
    workers: int = Field(default=1, ge=1)
    """Training processes, which share each batch."""
    threads: int | None = Field(default=None, ge=1)
    """torch threads of each worker, which reserves as many CPUs; null divides a node's CPUs among its workers."""
    use_gpu: bool | None = None
    """null uses one GPU per worker where the cluster has GPUs, and refuses more workers than GPUs."""
    loggers: tuple[Logger, ...] = ("tensorboard",)
    """Where the curves go, too: tensorboard (a file of the run), mlflow and wandb, which read their own environment
    variables, such as MLFLOW_TRACKING_URI and WANDB_PROJECT, and need `pip install 'raygr[mlflow]'` or `[wandb]`."""
    ray: RayUse = "auto"
    """`auto` trains a small run of one worker in the calling process, outside a cluster; the results are the same."""

    candidates: tuple[Literal["full", "uniform-100", "popularity-100"], ...] = Field(default=("full",), min_length=1)
    """The candidate sets that test and validation targets are ranked in, all in one pass over the scores."""
    candidate_seed: int = 0
    """Seed of the sampled candidate sets, which are stored in candidates.parquet; `seed` does not affect them."""
    targets: tuple[Literal["last", "every"], ...] = Field(default=("last",), min_length=1)
    """Test targets: each user's last test interaction, or every one, predicted from all interactions before it. Early
    stopping uses the last validation interaction in either case."""
    cold_below: int = Field(default=10, ge=1)
    """Test targets whose item has fewer train interactions are also reported separately, as cold-start targets."""
    list_length: int = Field(default=10, ge=1)
    """Length of the recommended lists whose diversity is reported."""
    mmr_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of relevance in maximal marginal relevance, the lists' metric and their re-ranking: 1 is relevance
    alone, 0 diversity alone."""
    list_scores: ItemVectors | None = None
    """A score run, or a file of id -> vectors, that measures how similar the items of a list are; null takes the
    model's own refined vectors, which differ from arm to arm."""
    seed: int = 0
    """Seed of the model's start, dropout, batches and negatives."""

    @model_validator(mode="after")
    def check(self) -> Self:
        refuse(self, without_effect(self), contradictions(self))
        return self


def without_effect(config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """Return the fields that have no effect on this run, by the reason."""
    pairwise, sampled = config.loss in ("top1", "bpr", "bpr_max"), config.loss == "sampled_cross_entropy"
    guided, user_scores = config.item_scores is not None, config.user_scores
    # user_side: off says no more than that there are no user vectors
    users = [name for name in USER_FIELDS if (name, config.user_side) != ("user_side", "off")]
    by_profile = user_scores == "profile" and config.user_guided_train == "after_prompt"
    is_unused = {
        f"on model: {config.model}": {
            name: config.model not in models for models, names in MODEL_FIELDS.items() for name in names
        },
        "without item_scores": dict.fromkeys([*GUIDED_FIELDS, *users], not guided),
        "without item_scores or list_scores": dict.fromkeys(
            ("score_column", "missing_scores"), not guided and config.list_scores is None
        ),
        f"on fusion: {config.fusion}": {
            "linear_map": guided and config.fusion != "concat",
            "add_map": guided and config.fusion != "add",
        },
        "without user_scores": dict.fromkeys(users, guided and user_scores == "none"),
        "on user_scores: history without user_score_run or user_table": dict.fromkeys(
            ("user_control", "user_guided_train", "prompt_fraction"),
            guided and user_scores == "history" and config.user_score_run is None and config.user_table is None,
        ),
        f"on user_scores: {user_scores} with user_guided_train: {config.user_guided_train}": {
            "prompt_fraction": user_scores not in ("none", "history") and not by_profile
        },
        f"on loss: {config.loss}": {
            "negatives": not (pairwise or sampled),
            "final_activation": not pairwise,
            "score_penalty": config.loss != "bpr_max",
        },
        "without negatives": {"negative_alpha": not config.negatives},
        f"on optimizer: {config.optimizer}": {"weight_decay": config.optimizer != "adam"},
        "on candidates: full alone": {"candidate_seed": set(config.candidates) == {"full"}},
    }
    return {reason: tuple(name for name, holds in names.items() if holds) for reason, names in is_unused.items()}


def contradictions(config: TrainConfig) -> dict[str, bool]:
    """Return what may be wrong with settings that exclude each other, and whether it is."""
    pairwise, guided = config.loss in ("top1", "bpr", "bpr_max"), config.item_scores is not None
    has_users = guided and config.user_scores != "none"
    return {
        f"user_scores: {config.user_scores} has no effect on user_side: off": has_users and config.user_side == "off",
        f"user_scores: history needs user_side: learned, not {config.user_side}": (
            config.user_scores == "history" and guided and config.user_side not in ("learned", "off")
        ),
        "user_scores: history needs whole histories, not session_parallel: set user_scores: none or llm": (
            config.user_scores == "history" and guided and config.session_parallel
        ),
        "train_user_guided is for (9b); user_side: learned trains the maps instead: set user_side: add": (
            has_users and config.train_user_guided and config.user_side == "learned"
        ),
        f"user_side: {config.user_side} is (9b), which joins (9a): set fusion: add or concat": (
            has_users and config.fusion == "none" and config.user_side in ("add", "concat")
        ),
        "fusion: none without user_scores would leave the item scores out": (
            guided and config.fusion == "none" and not has_users
        ),
        "user_side: concat needs fusion: concat, because fusion: add has no guided dimensions": (
            has_users and config.user_side == "concat" and config.fusion == "add"
        ),
        "user_scores: llm and user_score_run belong together": (
            config.user_scores == "llm" and config.user_score_run is None
        ),
        f"user_scores: {config.user_scores} reads no user_score_run": (
            config.user_score_run is not None and config.user_scores in ("none", "profile", "table")
        ),
        "user_scores: table and user_table belong together": (
            config.user_scores == "table" and config.user_table is None
        ),
        f"user_scores: {config.user_scores} reads no user_table": (
            config.user_table is not None and config.user_scores in ("none", "profile", "llm")
        ),
        "user_score_run and user_table are two sources of users' vectors: set one of them": (
            config.user_score_run is not None and config.user_table is not None
        ),
        "user_guided_train: after_prompt needs prompts, and a user_table has none: set user_guided_train: all": (
            config.user_table is not None and config.user_guided_train == "after_prompt"
        ),
        f"loss: {config.loss} needs every position's target, so it is not for model: bert4rec": (
            pairwise and config.model == "bert4rec"
        ),
        "loss: sampled_cross_entropy needs negatives: 1 or more": (
            config.loss == "sampled_cross_entropy" and not config.negatives
        ),
        f"loss: {config.loss} has no negatives in a batch of one history: raise batch_size, or set negatives": (
            pairwise and config.batch_size == 1 and not config.negatives
        ),
        "ray: never trains in the calling process, which is one worker: set workers: 1": (
            config.ray == "never" and config.workers > 1
        ),
        "optimizer: sparse_adam is for losses that touch few items, not for cross_entropy": (
            config.optimizer == "sparse_adam" and config.loss == "cross_entropy"
        ),
    }


def fitting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return merged settings without those that their model, a base model or a run without user vectors cannot use.

    For sweeps and reproductions, whose runs share settings; a run that is configured by itself refuses them.
    """
    model = settings.get("model", TrainConfig.model)
    unused = {name for models, names in MODEL_FIELDS.items() if model not in models for name in names}
    if settings.get("item_scores") is None:
        unused |= {*GUIDED_FIELDS, *USER_FIELDS}
    elif settings.get("user_scores", TrainConfig.user_scores) == "none":
        unused |= {"user_score_run", "user_table", *USER_FIELDS}
    return {name: value for name, value in settings.items() if name not in unused}
