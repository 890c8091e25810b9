"""Generating with a stand-in for vLLM whose tokens are characters: what it is asked, and what is read from it."""

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raygr.aspects.answers import RatingTokens
from raygr.aspects.engine import EngineSettings, ScoringEngine
from raygr.aspects.merging import Merged
from raygr.aspects.store import ScoreStore

PROMPT = [ord(character) for character in "Rate it."]
RATING_IDS = [ord(digit) for digit in "1234567890"]  # the last is the `0` of a split ten


class StandIn:
    """Says `completion` to whatever it is asked to answer at length; P('1'), P('7'), P('0' | '1') are a half each."""

    completion = ""

    def __init__(self, **arguments):
        self.asked: list[tuple[str, SimpleNamespace]] = []

    def get_tokenizer(self):
        return SimpleNamespace(batch_decode=lambda rows, **settings: ["".join(map(chr, ids)) for ids in rows])

    def generate(self, inputs, sampling, *, use_tqdm, lora_request):
        return [self.answer(one["prompt_token_ids"], how) for one, how in zip(inputs, sampling, strict=True)]

    def answer(self, prompt: list[int], sampling: SimpleNamespace) -> SimpleNamespace:
        self.asked.append(("".join(map(chr, prompt)), sampling))
        text = self.completion if sampling.max_tokens > 1 else "0"
        likely = "17" if sampling.max_tokens > 1 else "02"
        position = {token: SimpleNamespace(logprob=-math.inf) for token in RATING_IDS}
        position |= {ord(digit): SimpleNamespace(logprob=math.log(0.5)) for digit in likely}
        output = SimpleNamespace(text=text, token_ids=[ord(c) for c in text], logprobs=[position] * len(text))
        return SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=0, outputs=[output])


@pytest.fixture
def vllm(monkeypatch):
    """The parts of vLLM that the engine takes, each keeping what it was given."""
    parameters = ModuleType("vllm.sampling_params")
    parameters.StructuredOutputsParams = SimpleNamespace
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams, fake.sampling_params = StandIn, SimpleNamespace, parameters
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


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
    """The row that the engine files for one prompt, and what the stand-in was asked."""
    settings = engine_settings(mode=mode)
    engine = ScoringEngine(settings, ScoreStore(str(tmp_path / "store")))
    engine.llm.completion = completion
    counts = engine({"prompt_ids": np.array([PROMPT]), "prompt_sha256": np.array(["abc"])})
    assert counts["subjects"].tolist() == [1]
    (row,) = engine.store.read().to_pylist()
    return row, engine.llm.asked


def test_free_text_is_asked_without_a_format_and_read_by_the_rules(vllm, tmp_path):
    completion = "Sure! Wit: 11 of them.\nPace: I say 7/10."
    row, asked = answered(tmp_path, "generate-free", completion)
    assert (row["ratings"], row["reason"], row["completion"]) == ([7, None], "out_of_range", completion)
    # P(1) = .5 (1 - .5), P(7) = .5, P(10) = .5 * .5
    assert row["expected"] == [pytest.approx(0.25 * 1 + 0.5 * 7 + 0.25 * 10), None]
    (prompt, sampling), (follow_up, one_more) = asked
    assert (prompt, sampling.structured_outputs, sampling.detokenize) == ("Rate it.", None, True)
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.7, 3, 40)
    # asked for P('0' | '1') with everything before the 7
    assert (follow_up, one_more.max_tokens) == ("Rate it.Sure! Wit: 11 of them.\nPace: I say 1", 1)


def test_free_text_without_a_rating_asks_nothing_more(vllm, tmp_path):
    row, asked = answered(tmp_path, "generate-free", "I cannot rate movies.")
    assert (row["ratings"], row["expected"], row["reason"]) == ([None, None], [None, None], "no_aspect_read")
    assert len(asked) == 1


def test_the_format_is_forced_unless_the_text_is_free(vllm, tmp_path):
    row, asked = answered(tmp_path, "generate", "pace: 7\nwit: 7")
    assert asked[0][1].structured_outputs.regex == "the format"
    assert (row["ratings"], row["reason"]) == ([7, 7], "ok")


def test_a_merged_model_is_gone_once_it_is_loaded(vllm, tmp_path, monkeypatch):
    """A killed actor would leave it in /tmp, half a gigabyte each time."""
    folder = tempfile.TemporaryDirectory(dir=tmp_path)
    read = []

    class Loaded(StandIn):
        def __init__(self, *, model: str, **arguments):
            super().__init__()
            read.append(Path(model).is_dir())

    monkeypatch.setattr(sys.modules["vllm"], "LLM", Loaded)
    answers_R = np.zeros(10)
    monkeypatch.setattr(
        "raygr.aspects.engine.merged_model", lambda *arguments: Merged(folder, answers_R, answers_R - 1.0)
    )
    monkeypatch.setattr(ScoringEngine, "check_logprobs", lambda self, lora: answers_R)
    engine = ScoringEngine(engine_settings(adapter="outputs/tuned/adapter"), ScoreStore(str(tmp_path / "store")))
    assert read == [True] and not Path(folder.name).exists()
    engine.llm.completion = "pace: 7\nwit: 7"
    assert engine({"prompt_ids": np.array([PROMPT]), "prompt_sha256": np.array(["abc"])})["subjects"].tolist() == [1]
