"""The vLLM actor: token ids of prompts in, P(1..10) of each aspect or a completion out.

A plain class for `Dataset.map_batches`: `__init__` loads the model; `__call__` answers one batch of PROMPT columns,
writes the answers to the score store as one file, and returns counters.

probe     The prompt (system prompt, subject, start of the answer) is prefilled once; one short tail per aspect
          (`tension level: `) then asks for its rating. Where `10` is two tokens, the engine is forced to answer `1`, so
          that one more decoding step yields P('0' | '1') and P(10) is exact. The prefix cache holds whole blocks of
          tokens, so each tail computes the last, partial block of its prompt again: padding the block with blanks or
          line breaks moves ratings, and cutting it loses text.
generate  One completion per prompt, free or forced into the format, with log-probabilities of the ratings at every
          position. Where `10` is two tokens, a second request asks for P('0' | '1').

vLLM runs inside the actor's process, so a killed actor leaves no engine process behind; with `tensor_parallel_size`
above one it needs processes of its own. Shape letters: `S` subjects, `A` aspects, `T` tokens of a completion,
`Q` levels 1..10.
"""

import dataclasses
import hashlib
import importlib.util
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raygr import files
from raygr.config import ConfigError
from raygr.execution.console import log_to_driver
from raygr.score.adapters import adapter_rank, copied_adapter, merged_model
from raygr.score.answer_format import ParsedRatings, RatingTokens, parse_ratings, token_ends
from raygr.score.config import ScoreConfig
from raygr.score.prompts import prompt_sha256
from raygr.score.store import CPU_DTYPE, LOGPROBS_MODE, REFUSED_BY_ENGINE, ScoreStore, StoredScore

logger = logging.getLogger(__name__)

BLOCK_SIZE = 32  # tokens, the least that vLLM's CPU kernels take: tails compute a prompt's partial block again
CPU_KV_CACHE_BYTES = 1 << 30  # bounded, so that a restarted actor fits into memory beside what is there


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Settings of an actor, which travel to it by pickling."""

    model: str  # a folder or hub name
    adapter: str | None
    mode: str  # probe, generate or generate-free
    temperature: float
    names: tuple[str, ...]  # the A aspects
    tails: tuple[tuple[int, ...], ...]  # token ids of `tension level: `, one tail per aspect
    rating_tokens: RatingTokens
    answer_regex: str
    max_completion_tokens: int
    shared_ids: tuple[int, ...]  # the tokens that all prompts start with: the system prompt
    max_model_len: int
    tensor_parallel_size: int
    on_gpu: bool
    engine_kwargs: Mapping[str, Any]
    seed: int


@dataclasses.dataclass
class TokenCounts:
    """Tokens that the engine was given, and tokens that it computed (prefill and decode)."""

    given: int = 0
    computed: int = 0

    def add(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            generated = len(output.outputs[0].token_ids)
            length = len(output.prompt_token_ids)
            self.given += length + generated
            # the last generated token is never fed back
            self.computed += length - (output.num_cached_tokens or 0) + generated - 1


class ScoringActor:
    """Answers batches of prompts and writes the answers to the score store."""

    def __init__(self, settings: EngineSettings, store: ScoreStore) -> None:
        if not logging.getLogger("raygr").hasHandlers():  # in an actor
            log_to_driver()
        self.settings = settings
        self.store = store

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        counts = TokenCounts()
        prompts = [[int(token) for token in ids] for ids in batch["prompt_ids"]]
        self.store.write(list(batch["prompt_sha256"]), self.answer(prompts, counts))
        return {
            "subjects": np.array([len(prompts)]),
            "tokens_given": np.array([counts.given]),
            "tokens_computed": np.array([counts.computed]),
            "engine_seconds": np.array([time.perf_counter() - started]),
        }

    def answer(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """One answer per prompt; the tokens are added to `counts`."""
        raise NotImplementedError


class ScoringEngine(ScoringActor):
    """Answers batches of prompts with one vLLM engine."""

    def __init__(self, settings: EngineSettings, store: ScoreStore) -> None:
        import vllm

        started = time.perf_counter()
        self.adapter_copy = copied_adapter(settings.adapter)  # kept as long as the engine, which may read it late
        if self.adapter_copy:
            settings = dataclasses.replace(settings, adapter=self.adapter_copy.name)
        super().__init__(settings, store)
        tokens = settings.rating_tokens
        self.rating_ids = [*tokens.digits, tokens.ten[-1]]  # ten ids; the last is `10`, or the `0` of a split ten
        self.lora = lora_request(settings.adapter) if settings.adapter and settings.on_gpu else None
        merged = merged_model(settings.model, settings.adapter) if settings.adapter and not self.lora else None
        self.llm = vllm.LLM(**engine_arguments(settings, merged))
        if merged:
            merged.cleanup()  # vLLM has read the folder, which a killed actor would leave behind
        self.tokenizer: Any = self.llm.get_tokenizer()
        if settings.shared_ids:  # fills the prefix cache with the system prompt before other requests need it
            self.run([list(settings.shared_ids)], [self.sampling(max_tokens=1)])
        logger.info("vLLM is ready after %.0f s", time.perf_counter() - started)

    def answer(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """One answer per prompt; a prompt that vLLM refuses, such as one too long, has its error as text."""
        from vllm.exceptions import VLLMClientError

        ask = self.probe if self.settings.mode == "probe" else self.generate
        try:
            return ask(prompts, counts)
        except (VLLMClientError, ValueError) as error:
            if len(prompts) == 1:
                logger.warning("vLLM refused a prompt of %d tokens: %s", len(prompts[0]), error)
                nothing = (None,) * len(self.settings.names)
                return [StoredScore(nothing, nothing, REFUSED_BY_ENGINE, " ".join(str(error).split()))]
        half = len(prompts) // 2  # one refused prompt makes vLLM answer none of its call
        return self.answer(prompts[:half], counts) + self.answer(prompts[half:], counts)

    # --- probe ---------------------------------------------------------------------------------

    def probe(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """Most probable and expected rating of every aspect from P(1..10), without free text."""
        tails = self.settings.tails
        requests = [[*prompt, *tail] for prompt in prompts for tail in tails]
        if self.settings.rating_tokens.ten_is_split:
            one = self.settings.rating_tokens.digits[0]
            sampling = self.sampling(max_tokens=2, allowed_token_ids=[one], logprob_token_ids=self.rating_ids)
        else:
            sampling = self.sampling(max_tokens=1, logprob_token_ids=self.rating_ids)
        outputs = self.run(requests, [sampling] * len(requests))
        counts.add(outputs)
        logprobs_XTQ = np.array([self.rating_logprobs(output) for output in outputs])
        probabilities_XQ = rating_probabilities(logprobs_XTQ[:, 0], self.zero_after_one(logprobs_XTQ[:, -1]))
        probabilities_SAQ = probabilities_XQ.reshape(len(prompts), len(tails), 10)
        return [StoredScore.from_probabilities(probabilities_AQ) for probabilities_AQ in probabilities_SAQ]

    def zero_after_one(self, logprobs_XQ: np.ndarray) -> np.ndarray | None:
        """log P('0' | '1') at positions behind a `1`; None where `10` is one token."""
        return logprobs_XQ[:, 9] if self.settings.rating_tokens.ten_is_split else None

    # --- generate ------------------------------------------------------------------------------

    def generate(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """Ratings read from one completion per prompt, and the expected rating at each rating's token."""
        structured = None
        if self.settings.mode == "generate":
            from vllm.sampling_params import StructuredOutputsParams

            structured = StructuredOutputsParams(regex=self.settings.answer_regex)
        sampling = [
            self.sampling(
                max_tokens=self.settings.max_completion_tokens,
                logprob_token_ids=self.rating_ids,
                structured_outputs=structured,
                temperature=self.settings.temperature,
                seed=request_seed(self.settings.seed, prompt),
            )
            for prompt in prompts
        ]
        outputs = self.run(prompts, sampling)
        counts.add(outputs)
        parsed = [
            parse_ratings(o.outputs[0].text, self.settings.names, is_cut=o.outputs[0].finish_reason == "length")
            for o in outputs
        ]
        expected = self.expected_of_completions(prompts, outputs, parsed, counts)
        return [
            StoredScore(ratings=p.ratings, expected=e, reason=p.reason, completion=o.outputs[0].text)
            for p, e, o in zip(parsed, expected, outputs, strict=True)
        ]

    def expected_of_completions(
        self, prompts: list[list[int]], outputs: Sequence[Any], parsed: list[ParsedRatings], counts: TokenCounts
    ) -> list[tuple[float | None, ...]]:
        """The expected rating at each token where a rating was read; None for the other aspects."""
        expected: list[list[float | None]] = [[None] * len(self.settings.names) for _ in prompts]
        slots = [
            (subject, aspect, token)
            for subject, (output, ratings) in enumerate(zip(outputs, parsed, strict=True))
            for aspect, token in self.rating_positions(output.outputs[0], ratings)
        ]
        if slots:
            logprobs = [self.rating_logprobs(output) for output in outputs]
            at_slots_XQ = np.array([logprobs[subject][token] for subject, _, token in slots])
            zero_X = self.follow_up(prompts, outputs, slots, counts)
            means_X = rating_probabilities(at_slots_XQ, zero_X) @ np.arange(1, 11)
            for (subject, aspect, _), mean in zip(slots, means_X, strict=True):
                expected[subject][aspect] = float(mean)
        return [tuple(row) for row in expected]

    def follow_up(
        self, prompts: list[list[int]], outputs: Sequence[Any], slots: list[tuple[int, int, int]], counts: TokenCounts
    ) -> np.ndarray | None:
        """log P('0' | '1') at each slot, from requests with everything before the slot and a `1`."""
        if not self.settings.rating_tokens.ten_is_split:
            return None
        one = self.settings.rating_tokens.digits[0]
        requests = [[*prompts[s], *outputs[s].outputs[0].token_ids[:token], one] for s, _, token in slots]
        sampling = self.sampling(max_tokens=1, logprob_token_ids=self.rating_ids)
        after_one = self.run(requests, [sampling] * len(requests))
        counts.add(after_one)
        return self.zero_after_one(np.array([self.rating_logprobs(output)[0] for output in after_one]))

    def rating_positions(self, output: Any, parsed: ParsedRatings) -> list[tuple[int, int]]:
        """Find (aspect, position of the rating's first token) of each rating that has a token of its own.

        A tokenizer may join a rating with its neighbour, such as a bracket, in one token.
        """
        ends = token_ends(self.tokenizer, output.token_ids, output.text)
        starts = [(aspect, start) for aspect, start in enumerate(parsed.starts) if start is not None]
        places = [(aspect, int(np.searchsorted(ends, start, side="right"))) for aspect, start in starts]
        return [(aspect, place) for aspect, place in places if output.token_ids[place] in self.rating_ids]

    # --- vLLM ----------------------------------------------------------------------------------

    def rating_logprobs(self, output: Any) -> list[list[float]]:
        """Log-probabilities of `rating_ids` at each generated token, before masks and temperature."""
        positions = output.outputs[0].logprobs
        return [[position[token].logprob for token in self.rating_ids] for position in positions]

    def sampling(self, **parameters: Any) -> Any:
        """vLLM's SamplingParams, greedy by default (a mapping passed whole to vLLM)."""
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 0.0, "detokenize": "structured_outputs" in parameters, **parameters})

    def run(self, prompts: list[list[int]], sampling: list[Any]) -> Sequence[Any]:
        inputs: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=False, lora_request=self.lora)


def rating_probabilities(logprobs_XQ: np.ndarray, zero_after_one_X: np.ndarray | None) -> np.ndarray:
    """P(1..10), shape (X, 10), from the log-probabilities of ten rating tokens.

    Where `10` is one token, the columns are the ratings 1..10. Where the tokenizer splits it, `zero_after_one_X` holds
    log P('0' | '1'), the tenth column is not used, and P(1) = P('1') (1 - P('0' | '1')), P(10) = P('1') P('0' | '1').
    Probabilities are normalised over the ten ratings; NaN where the log-probabilities are NaN.
    """
    logprobs = np.array(logprobs_XQ, dtype=np.float64)
    if zero_after_one_X is not None:
        zero = np.minimum(np.asarray(zero_after_one_X, dtype=np.float64), 0.0)
        logprobs[:, 9] = logprobs[:, 0] + zero  # log P(10)
        with np.errstate(divide="ignore"):  # P('0' | '1') = 1 leaves nothing for the rating 1
            logprobs[:, 0] += np.log(-np.expm1(zero))
    largest = logprobs.max(axis=1, keepdims=True)
    shares = np.exp(logprobs - largest)
    return shares / shares.sum(axis=1, keepdims=True)


def require_vllm() -> None:
    """ConfigError where vLLM is not installed, raised before Ray starts rather than by an actor."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "model: scoring needs vLLM: pip install 'raygr[gpu]', on a machine without a GPU 'raygr[cpu]' "
            "(README, Installation), or let another LLM answer (answered_by)"
        )


def request_seed(seed: int, prompt: Sequence[int]) -> int:
    """The seed of one prompt's sampling, below 2**32; it depends on no batch, order or actor."""
    digest = hashlib.sha256(f"{seed} {prompt_sha256(prompt)}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def engine_arguments(settings: EngineSettings, merged: tempfile.TemporaryDirectory | None) -> dict[str, Any]:
    """Arguments of vllm.LLM; the configuration's `engine_kwargs` override them."""
    chosen: dict[str, Any] = {
        "model": merged.name if merged else settings.model,
        "max_model_len": settings.max_model_len,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": True,
        "seed": settings.seed,
        "logprobs_mode": LOGPROBS_MODE,
        "disable_log_stats": True,
    }
    if settings.adapter and not merged:
        chosen |= {"enable_lora": True, "max_lora_rank": adapter_rank(settings.adapter)}
    if not settings.on_gpu:
        chosen |= {
            "dtype": CPU_DTYPE,
            "enforce_eager": True,  # needs no C++ compiler
            "block_size": BLOCK_SIZE,
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
        }
    return chosen | dict(settings.engine_kwargs)


def actor_resources(config: ScoreConfig, cpus_of_nodes: Sequence[float], *, on_gpu: bool) -> dict[str, Any]:
    """GPUs or cores of one actor, and the environment variables that its process starts with."""
    if len(cpus_of_nodes) == 1:
        cores = sorted(os.sched_getaffinity(0))[: max(1, int(cpus_of_nodes[0]))]
        threads = cores[: max(1, len(cores) // config.actors)]
    else:  # this machine's core numbers mean nothing on other nodes: the smallest node says how many cores there are
        actors_of_node = math.ceil(config.actors / len(cpus_of_nodes))
        threads = list(range(max(1, int(min(cpus_of_nodes)) // actors_of_node)))
    environment = engine_environment(
        threads=threads,
        bind=len(cpus_of_nodes) == 1 and config.actors == 1,
        on_gpu=on_gpu,
        tensor_parallel_size=config.tensor_parallel_size,
    )
    return {
        "num_cpus": 1,  # never all of them: the tasks that feed the actors need one
        "num_gpus": config.tensor_parallel_size if on_gpu else 0,
        "runtime_env": {"env_vars": environment},
    }


def engine_environment(
    *, threads: Sequence[int], bind: bool, on_gpu: bool, tensor_parallel_size: int
) -> dict[str, str]:
    """Environment variables of an actor's process, which torch and vLLM read when they are imported.

    `threads` are core numbers: `bind` ties the process to these cores; without it only their number is used.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if tensor_parallel_size == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not on_gpu:
        cores = ",".join(map(str, threads)) if bind else "nobind"
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(len(threads))}
    return environment


def lora_request(adapter: str) -> Any:
    """A LoRA request whose name and id depend on the adapter's content: vLLM reloads an adapter under a new id only."""
    from vllm.lora.request import LoRARequest

    digest = files.fingerprint(adapter)
    return LoRARequest(f"adapter-{digest[:16]}", 1 + int(digest[:7], 16), adapter)
