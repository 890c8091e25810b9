"""The arithmetic of benchmarks/finetune.py. No test runs the compared programs."""

import argparse
import importlib.util
from pathlib import Path

import pytest
from tiny_policy import SPLIT, template

from raygr.finetune import sampling

FILE = Path(__file__).parents[2] / "benchmarks" / "finetune.py"
spec = importlib.util.spec_from_file_location("benchmark_of_finetune", FILE)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def steps(seconds: list[float], tokens: int) -> list[dict]:
    return [
        {"seconds": one, "tokens": tokens, "peak_bytes": 100 + place, "threads": 2, "reward": 0.5}
        for place, one in enumerate(seconds)
    ]


def record(side: str, seconds: list[float], tokens: int) -> dict:
    return benchmark.side_record(benchmark.read_side(side), steps(seconds, tokens), completions=4)


def test_a_side_is_rated_over_all_its_rounds():
    own = record("slots:4", [1.0, 3.0], tokens=40)
    assert own["completions_per_second"] == 2.0  # 8 in 4 seconds
    assert own["tokens_per_second"] == 20.0
    assert own["tokens_per_completion"] == 10.0
    assert own["peak_bytes"] == 101


def test_raygr_is_compared_with_the_fastest_of_trl_as_it_is_and_of_the_compact_ones():
    sides = [
        record("slots:4", [1.0, 3.0], tokens=44),
        record("trl:2", [9.0, 9.0], tokens=40),
        record("free:4", [2.0, 2.0], tokens=40),
        record("trl-paged:4", [4.0, 6.0], tokens=40),
        record("trl-compact:2", [2.0, 2.0], tokens=40),
    ]
    found = {(one["side"], one["beside"]): one for one in benchmark.ratios(sides)}
    assert set(found) == {(own, other) for own in ("slots:4", "free:4") for other in ("trl-paged:4", "trl-compact:2")}
    slots = found["slots:4", "trl-paged:4"]
    assert slots["times"] == pytest.approx(2.5)  # 10 s beside 4 s
    assert (slots["lowest"], slots["highest"]) == (2.0, 4.0)  # 6 / 3 and 4 / 1
    assert slots["times_per_token"] == pytest.approx(2.75)
    assert found["free:4", "trl-compact:2"]["times"] == pytest.approx(1.0)


@pytest.mark.parametrize("answer", [SPLIT, template()], ids=["split", "smollm2"])
def test_free_rollouts_get_room_for_exactly_the_wanted_tokens(answer, monkeypatch):
    least = 2 * len(answer.pieces)
    for tokens in range(least, least + 300):
        monkeypatch.setattr(sampling, "FREE_ROOM", benchmark.free_room(answer, tokens))
        assert sampling.free_places(answer) == tokens


def test_a_completion_is_as_long_as_an_answer_of_one_token_ratings():
    answer = template()
    expected = len(sampling.answer_ids(answer, [7] * len(answer.pieces))) + 1  # the end of turn
    assert benchmark.answer_tokens(answer) == expected
    assert len(sampling.answer_ids(answer, [10] * len(answer.pieces))) + 1 > expected


@pytest.mark.parametrize("side", ["slots", "grpo:4", "trl:0", "free:-1"])
def test_a_side_that_is_none_is_refused(side):
    with pytest.raises(argparse.ArgumentTypeError, match=side):
        benchmark.read_side(side)


@pytest.mark.parametrize(("side", "tokens"), [("free:4", 159), ("trl:4", 161), ("slots:4", 159)])
def test_unequal_completions_end_the_run(side, tokens):
    job = {"users": 4, "completions": 4, "tokens": 10}
    with pytest.raises(SystemExit, match=str(tokens)):
        benchmark.check_tokens(benchmark.read_side(side), tokens, job)
    benchmark.check_tokens(benchmark.read_side(side), 160, job)
    benchmark.check_tokens(benchmark.read_side("slots:4"), 170, job)  # some ratings are a 10
