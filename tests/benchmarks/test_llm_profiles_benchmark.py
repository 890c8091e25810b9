"""The split and the figures of benchmarks/llm_profiles.py. No test runs RePlay."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from raygr.data.interactions import Interactions

FILE = Path(__file__).parents[2] / "benchmarks" / "llm_profiles.py"
spec = importlib.util.spec_from_file_location("benchmark_of_llm_profiles", FILE)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def interactions(splits: list[str]) -> Interactions:
    """The items 1, 2, ... of two users, four of the first."""
    items = len(splits)
    user_N = np.array([0] * 4 + [1] * (items - 4))
    return Interactions(user_N, np.arange(1, items + 1), np.full(items, np.nan), np.array(splits), users=2, items=items)


def test_histories_hold_all_before_the_target_and_nothing_after():
    found = benchmark.histories_and_targets(
        interactions(["train", "train", "validation", "test", "train", "validation", "test"])
    )
    assert found["histories"] == {"train": [[1, 2], [5]], "validation": [[1, 2], [5]], "test": [[1, 2, 3], [5, 6]]}
    assert found["targets"] == {"validation": [3, 6], "test": [4, 7]}


@pytest.mark.parametrize("last", ["validation", "train"])  # two validation interactions, and no test one
def test_a_split_that_is_no_leave_one_out_is_refused(last):
    with pytest.raises(SystemExit, match="one validation and one test"):
        benchmark.histories_and_targets(interactions(["train", "train", "validation", "test", "train", last, last]))


def test_an_arm_is_compared_with_the_base_of_its_own_program():
    found = {
        "raygr, base": [benchmark.Trained(np.array([1.0, 1.0]), 4)],
        "RePlay, base": [benchmark.Trained(np.array([3.0, 20.0]), 8)],
        "RePlay, profiles as for Beauty": [benchmark.Trained(np.array([1.0, 3.0]), 12)],
    }
    record = benchmark.arm_record("RePlay, profiles as for Beauty", found)
    assert record["mean"]["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(4)) / 2)
    assert list(record["against"]) == ["RePlay, base"]
    assert record["against"]["RePlay, base"]["ndcg_at_10"].relative == pytest.approx(100 * (1.5 / 0.5 - 1))
    rows = benchmark.table({"RePlay, profiles as for Beauty": record}).splitlines()
    assert rows[2].startswith("| RePlay, profiles as for Beauty | 0.7500 | +200.0% [")
    assert benchmark.arm_record("RePlay, base", found)["against"] == {}
