"""The transformers engine on a tiny random model: its answers are those of whole passes, one per prompt and aspect."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import engine_settings
from tiny_policy import (
    NAMES,
    PROMPTS,
    SMALL_VOCABULARY,
    SPLIT,
    naive_rating_log_probs,
    save_tiny_llama,
    tiny_llama,
    tiny_policy,
)

from raygr.config import ConfigError
from raygr.score import transformers_engine
from raygr.score.config import ScoreConfig
from raygr.score.store import ScoreStore
from raygr.score.transformers_engine import TransformersEngine, passes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), vocabulary=SMALL_VOCABULARY)


def engine_of(folder: str, store: Path, **changes) -> TransformersEngine:
    settings = engine_settings(mode="probe", model=folder, names=NAMES, tails=SPLIT.pieces, rating_tokens=SPLIT.ratings)
    changes = {"shared_ids": (5, 6, 7)} | changes
    return TransformersEngine(settings.__class__(**(vars(settings) | changes)), ScoreStore(str(store)))


def asked(engine: TransformersEngine, prompts: list[tuple[int, ...]]) -> dict[str, dict]:
    """The rows that the engine stores, by the number of the prompt."""
    ids = np.empty(len(prompts), dtype=object)
    ids[:] = [np.array(prompt) for prompt in prompts]
    engine({"prompt_ids": ids, "prompt_sha256": np.array([str(number) for number in range(len(prompts))])})
    return {row["prompt_sha256"]: row for row in engine.store.read().to_pylist()}


@pytest.mark.parametrize("shared_ids", [(5, 6, 7), (5,), ()])
@pytest.mark.parametrize("pass_tokens", [1, 24, 4096])
def test_every_answer_is_that_of_whole_passes(folder, tmp_path, monkeypatch, shared_ids, pass_tokens):
    monkeypatch.setattr(transformers_engine, "PASS_TOKENS", pass_tokens)
    rows = asked(engine_of(folder, tmp_path, shared_ids=shared_ids), PROMPTS)
    model = tiny_llama(vocabulary=SMALL_VOCABULARY)
    for number, prompt in enumerate(PROMPTS):
        for aspect, piece in enumerate(SPLIT.pieces):
            alone = SPLIT._replace(pieces=(piece,))  # no aspect sees the line of another
            shares_Q = np.exp(np.array(naive_rating_log_probs(model, prompt, alone, ()), dtype=float))
            row = rows[str(number)]
            assert row["expected"][aspect] == pytest.approx(shares_Q / shares_Q.sum() @ np.arange(1, 11), abs=1e-4)
            assert row["ratings"][aspect] == shares_Q.argmax() + 1


def test_every_token_is_computed_once(folder, tmp_path):
    engine = engine_of(folder, tmp_path)
    ids = np.empty(len(PROMPTS), dtype=object)
    ids[:] = [np.array(prompt) for prompt in PROMPTS]
    counts = engine({"prompt_ids": ids, "prompt_sha256": np.array(["a", "b", "c"])})
    tails = sum(len(piece) + 1 for piece in SPLIT.pieces)  # a `1` behind each asks for P('0' | '1')
    assert counts["tokens_computed"] == [3 + sum(len(prompt) - 3 + tails for prompt in PROMPTS)]
    assert counts["tokens_given"] == [sum(len(SPLIT.pieces) * len(prompt) + tails for prompt in PROMPTS)]


def test_an_adapter_is_merged(tmp_path):
    whole = save_tiny_llama(tmp_path / "tiny")
    policy = tiny_policy()
    policy.save_pretrained(tmp_path / "adapter")
    rows = asked(engine_of(whole, tmp_path / "store", adapter=str(tmp_path / "adapter")), PROMPTS[:1])
    bare = asked(engine_of(whole, tmp_path / "bare"), PROMPTS[:1])
    shares_Q = np.exp(np.array(naive_rating_log_probs(policy, PROMPTS[0], SPLIT, ()), dtype=float))
    assert rows["0"]["expected"][0] == pytest.approx(shares_Q / shares_Q.sum() @ np.arange(1, 11), abs=1e-4)
    assert abs(rows["0"]["expected"][0] - bare["0"]["expected"][0]) > 1e-2


def test_a_model_whose_passes_cannot_share_a_prompt_is_refused(folder, tmp_path):
    engine = engine_of(folder, tmp_path)
    engine.model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        asked(engine, PROMPTS[1:2])


def test_logits_that_are_not_numbers_are_no_ratings(folder, tmp_path):
    engine = engine_of(folder, tmp_path)
    asked(engine, PROMPTS[1:2])  # the model is checked
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(torch.nan)
    engine.store = ScoreStore(str(tmp_path / "later"))
    assert asked(engine, PROMPTS[1:2])["0"]["reason"] == "not_finite"


def test_passes_hold_prompts_of_like_length_within_their_size(monkeypatch):
    monkeypatch.setattr(transformers_engine, "PASS_TOKENS", 100)
    tokens = np.random.default_rng(0).integers(1, 150, 60).tolist()
    chosen = list(passes(tokens))
    assert sorted(place for places in chosen for place in places) == list(range(60))
    for places in chosen:
        longest = max(tokens[place] for place in places)
        assert len(places) == 1 or longest * len(places) <= 100
    ends = [(min(tokens[place] for place in places), max(tokens[place] for place in places)) for places in chosen]
    assert all(least >= most for (least, _), (_, most) in pairwise(ends))


def test_only_probe_mode_is_taken():
    given = {"output": "out", "data": "data", "subjects": "items", "aspects": "aspects.yaml"}
    assert ScoreConfig(**given, engine="transformers").mode == "probe"
    with pytest.raises(ValueError, match="engine: transformers only probes"):
        ScoreConfig(**given, engine="transformers", mode="generate")
    with pytest.raises(ValueError, match="engine_kwargs"):
        ScoreConfig(**given, engine="transformers", engine_kwargs={"max_num_seqs": 4})
