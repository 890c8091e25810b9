"""The engine with a stand-in for vLLM whose tokens are characters: its requests, and how answers are read."""

import math
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_data import hashes, sha256, walks, write_prepared

from raygr.config import ConfigError
from raygr.ray_setup import Node
from raygr.score import engine, stage
from raygr.score.actors import check_room
from raygr.score.answer_format import RatingTokens
from raygr.score.config import ScoreConfig
from raygr.score.engine import EngineSettings, ScoringEngine, TokenCounts, request_seed
from raygr.score.store import ScoreStore

ASPECTS = str(Path(__file__).parents[2] / "configs" / "aspects" / "movies.yaml")
PROMPT = [ord(character) for character in "Rate it."]
RATING_IDS = [ord(digit) for digit in "1234567890"]  # the last is the `0` of a split ten


class StandIn:
    """Answers long requests with `completion`; P('1'), P('7') and P('0' | '1') are 0.5."""

    completion = ""
    finish_reason = "stop"
    longest = 99  # tokens of the longest prompt that it accepts

    def __init__(self, **arguments):
        self.asked: list[tuple[str, SimpleNamespace]] = []

    def get_tokenizer(self):
        return SimpleNamespace(batch_decode=lambda rows, **settings: ["".join(map(chr, ids)) for ids in rows])

    def generate(self, inputs, sampling, *, use_tqdm, lora_request):
        longest = max(len(one["prompt_token_ids"]) for one in inputs)
        if longest > self.longest:
            raise Refused(f"The decoder prompt (length {longest}) is longer\nthan {self.longest}")
        return [self.answer(one["prompt_token_ids"], how) for one, how in zip(inputs, sampling, strict=True)]

    def answer(self, prompt: list[int], sampling: SimpleNamespace) -> SimpleNamespace:
        self.asked.append(("".join(map(chr, prompt)), sampling))
        text = self.completion if sampling.max_tokens > 1 else "0"
        likely = "17" if sampling.max_tokens > 1 else "02"
        position = {token: SimpleNamespace(logprob=-math.inf) for token in RATING_IDS}
        position |= {ord(digit): SimpleNamespace(logprob=math.log(0.5)) for digit in likely}
        output = SimpleNamespace(
            text=text,
            token_ids=[ord(c) for c in text],
            logprobs=[position] * len(text),
            finish_reason=self.finish_reason,
        )
        return SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=0, outputs=[output])


class Refused(Exception):
    """vLLM's error for a refused request, which is no ValueError since 0.32."""


@pytest.fixture
def vllm(monkeypatch):
    """Replace the parts of vLLM that the engine uses by stand-ins that keep their arguments."""
    parameters = ModuleType("vllm.sampling_params")
    parameters.StructuredOutputsParams = SimpleNamespace
    exceptions = ModuleType("vllm.exceptions")
    exceptions.VLLMClientError = Refused
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams, fake.sampling_params = StandIn, SimpleNamespace, parameters
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)


def engine_settings(**changes: Any) -> EngineSettings:
    settings = EngineSettings(
        model="stand-in",
        adapter=None,
        mode="generate",
        temperature=0.7,
        names=("pace", "wit"),
        tails=((1,), (2,)),
        rating_tokens=RatingTokens(digits=tuple(RATING_IDS[:9]), ten=(ord("1"), ord("0"))),
        answer_regex="the format",
        max_completion_tokens=40,
        shared_ids=(),
        max_model_len=99,
        tensor_parallel_size=1,
        on_gpu=False,
        engine_kwargs={},
        seed=3,
    )
    return replace(settings, **changes)


def answered(tmp_path, mode: str, completion: str) -> tuple[dict, list[tuple[str, SimpleNamespace]]]:
    """The row that the engine stores for one prompt, and the requests that the stand-in got."""
    settings = engine_settings(mode=mode)
    actor = ScoringEngine(settings, ScoreStore(str(tmp_path / "store")))
    actor.llm.completion = completion
    counts = actor({"prompt_ids": np.array([PROMPT]), "prompt_sha256": np.array(["abc"])})
    assert counts["subjects"].tolist() == [1]
    (row,) = actor.store.read().to_pylist()
    return row, actor.llm.asked


def test_free_text_is_asked_without_a_format_and_read_by_the_rules(vllm, tmp_path):
    completion = "Sure! Wit: 11 of them.\nPace: I say 7/10."
    row, asked = answered(tmp_path, "generate-free", completion)
    assert (row["ratings"], row["reason"], row["completion"]) == ([7, None], "out_of_range", completion)
    # P(1) = .5 (1 - .5), P(7) = .5, P(10) = .5 * .5
    assert row["expected"] == [pytest.approx(0.25 * 1 + 0.5 * 7 + 0.25 * 10), None]
    (prompt, sampling), (follow_up, one_more) = asked
    assert (prompt, sampling.structured_outputs, sampling.detokenize) == ("Rate it.", None, True)
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.7, request_seed(3, PROMPT), 40)
    # the follow-up for P('0' | '1') has everything before the 7
    assert (follow_up, one_more.max_tokens) == ("Rate it.Sure! Wit: 11 of them.\nPace: I say 1", 1)


@pytest.mark.parametrize("mode", ["generate", "generate-free"])
def test_every_prompt_draws_for_itself_whatever_its_batch_and_place(vllm, tmp_path, mode):
    """An earlier version used one seed for all requests, so every subject had the same draw."""

    def seeds(prompts: list[str], seed: int = 3) -> dict[str, int]:
        engine = ScoringEngine(engine_settings(mode=mode, seed=seed), ScoreStore(str(tmp_path)))
        engine.generate([[ord(character) for character in prompt] for prompt in prompts], TokenCounts())
        return {prompt: sampling.seed for prompt, sampling in engine.llm.asked}

    together = seeds(["Heat", "Alien", "Glory"])
    assert len(set(together.values())) == 3
    assert seeds(["Glory", "Heat"]) == {"Glory": together["Glory"], "Heat": together["Heat"]}
    assert set(seeds(["Heat", "Alien", "Glory"], seed=4).values()).isdisjoint(together.values())
    assert all(0 <= seed < 2**32 for seed in together.values())


def test_free_text_without_a_rating_asks_nothing_more(vllm, tmp_path):
    row, asked = answered(tmp_path, "generate-free", "I cannot rate movies.")
    assert (row["ratings"], row["expected"], row["reason"]) == ([None, None], [None, None], "no_aspect_read")
    assert len(asked) == 1


def test_the_format_is_forced_unless_the_text_is_free(vllm, tmp_path):
    row, asked = answered(tmp_path, "generate", "pace: 7\nwit: 7")
    assert asked[0][1].structured_outputs.regex == "the format"
    assert (row["ratings"], row["reason"]) == ([7, 7], "ok")


def test_a_completion_that_was_cut_off_says_so(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "finish_reason", "length")
    row, _ = answered(tmp_path, "generate-free", "Pace: 7\nWit: 1")
    assert (row["ratings"], row["reason"]) == ([7, None], "length")
    assert len(row["expected"]) == 2 and row["expected"][1] is None


def test_a_prompt_that_the_engine_refuses_fails_alone(vllm, tmp_path):
    actor = ScoringEngine(engine_settings(), ScoreStore(str(tmp_path / "store")))
    actor.llm.completion = "pace: 7\nwit: 7"
    prompts = np.empty(5, dtype=object)
    prompts[:] = [PROMPT, PROMPT, PROMPT * 20, PROMPT, PROMPT * 30]
    batch = {"prompt_ids": prompts, "prompt_sha256": np.array([sha256(name) for name in "abcde"])}
    assert actor(batch)["subjects"].tolist() == [5]
    found = {row["prompt_sha256"]: row for row in actor.store.read().to_pylist()}
    rows = {name: found[sha256(name)] for name in "abcde"}
    assert {digest: row["reason"] for digest, row in rows.items()} == {
        "a": "ok", "b": "ok", "c": "refused_by_engine", "d": "ok", "e": "refused_by_engine"
    }  # fmt: skip
    assert rows["c"]["completion"] == "The decoder prompt (length 160) is longer than 99"
    assert rows["c"]["ratings"] == [None, None] and rows["a"]["ratings"] == [7, 7]
    # the next run asks the other prompts again
    assert actor.store.answered(hashes(*"abcde")).tolist() == [True, True, False, True, False]


def test_without_vllm_scoring_says_so_before_ray_starts(tmp_path, monkeypatch, tokenizer):
    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(stage, "room_on_ray", lambda config: pytest.fail("Ray was started"))
    config = ScoreConfig(output=str(tmp_path / "s"), data=data, subjects="items", aspects=ASPECTS)
    with pytest.raises(ConfigError, match="scoring needs vLLM"):
        stage.score(config)
    assert not (tmp_path / "s").exists()


def test_a_merged_model_is_gone_once_it_is_loaded(vllm, tmp_path, monkeypatch):
    """A model that stays would leave half a gigabyte in /tmp after a killed actor."""
    folder = tempfile.TemporaryDirectory(dir=tmp_path)
    read = []

    class Loaded(StandIn):
        def __init__(self, *, model: str, **arguments):
            super().__init__()
            read.append(Path(model).is_dir())

    monkeypatch.setattr(sys.modules["vllm"], "LLM", Loaded)
    monkeypatch.setattr(engine, "merged_model", lambda model, adapter: folder)
    actor = ScoringEngine(engine_settings(adapter="outputs/tuned/adapter"), ScoreStore(str(tmp_path / "store")))
    assert read == [True] and not Path(folder.name).exists()
    actor.llm.completion = "pace: 7\nwit: 7"
    assert actor({"prompt_ids": np.array([PROMPT]), "prompt_sha256": np.array(["abc"])})["subjects"].tolist() == [1]


@pytest.mark.parametrize(
    ("nodes", "asked", "words"),
    [
        ([(2, 0)], {"actors": 2}, "actors: 2 and one CPU to feed them need 3 CPUs, Ray has 2"),
        ([(1, 0)], {}, "actors: 1 and one CPU to feed them need 2 CPUs, Ray has 1"),
        ([(2, 0)], {"tensor_parallel_size": 2}, "tensor_parallel_size: 2 GPUs for each actor, Ray has none"),
        ([(8, 1)], {"tensor_parallel_size": 2}, "1 actors of 2 GPUs, each on one node, need 2 GPUs, Ray has 1:"),
        ([(8, 1), (8, 1)], {"tensor_parallel_size": 2}, r"need 2 GPUs, Ray has 1 \+ 1:"),
        ([(8, 4)], {"tensor_parallel_size": 2, "actors": 3}, "3 actors of 2 GPUs, .* need 6 GPUs, Ray has 4:"),
        ([(8, 1)], {"actors": 2}, "actors: 2 actors of 1 GPUs, each on one node, need 2 GPUs, Ray has 1:"),
    ],
)
def test_actors_that_would_wait_for_ever_are_refused_with_the_numbers(nodes, asked, words):
    config = ScoreConfig(output="o", data="d", subjects="items", aspects="a", **asked)
    on_gpu = any(gpus for _, gpus in nodes)
    with pytest.raises(ConfigError, match=words):
        check_room(config, [Node(*node) for node in nodes], on_gpu=on_gpu)


def test_actors_that_fit_are_not_refused():
    """Nodes with 4 and 2 GPUs have room for three actors of 2 GPUs."""
    config = ScoreConfig(output="o", data="d", subjects="items", aspects="a", tensor_parallel_size=2)
    accepted = []
    for actors in (1, 2, 3, 4):
        with suppress(ConfigError):
            check_room(replace(config, actors=actors), [Node(3, 4), Node(2, 2)], on_gpu=True)
            accepted.append(actors)
    assert accepted == [1, 2, 3]
