"""Comparison of hand-made train runs: gains, refusals, tables."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raygr import runs
from raygr.compare import compare
from raygr.config import CompareConfig, ConfigError, TrainConfig
from raygr.schema import METRICS, RANK_SCHEMA, RANKS

PROTOCOL = {"split": "leave_one_out", "candidates": ["full"], "seen": "filtered", "ties": "mean rank", "data": "abc"}


def write_train_run(folder: Path, ranks: list[float], *, protocol: dict[str, Any] = PROTOCOL, **changes: Any) -> str:
    """A finished train run whose test ranks are `ranks`, with a validation row that must not count."""
    config = TrainConfig(output=str(folder), data="prepare", **changes)
    run = runs.start_run(str(folder), job="train", config=config)
    users = len(ranks)
    columns = {
        "user_index": [*range(users), 0],
        "position": [9] * users + [8],
        "last": [True] * (users + 1),
        "part": ["test"] * users + ["validation"],
        "candidates": ["full"] * (users + 1),
        "target": [1] * (users + 1),
        "rank": [*ranks, 999.0],
        "target_train_count": [5] * (users + 1),
    }
    runs.write_table(pa.table(columns).cast(RANK_SCHEMA), run.file(RANKS))
    shares = {"base": 0.9, "encoder_guided": 0.1, "user_guided": 0.0} if config.item_scores else None
    runs.write_json({"protocol": protocol, "shares": shares, "parameters": 100}, run.file(METRICS))
    runs.finish_run(run, inputs=[], counts={})
    return str(folder)


def settings(folder: Path, **arms: list[str]) -> CompareConfig:
    return CompareConfig(output=str(folder / "compare"), arms={name: tuple(paths) for name, paths in arms.items()})


@pytest.fixture
def two_arms(tmp_path: Path) -> CompareConfig:
    """Base: ranks 2 and 4 of user 0, user 1. Refined: 1 and 4 under both seeds."""
    base = [write_train_run(tmp_path / f"base-{seed}", [2, 4], seed=seed) for seed in (0, 1)]
    refined = [
        write_train_run(tmp_path / f"refined-{s}", [1, 4], seed=s, item_scores="s", base_width=48) for s in (0, 1)
    ]
    return settings(tmp_path, base=base, refined=refined)


def test_gain_by_hand(two_arms: CompareConfig):
    """MRR (1/2 + 1/4) / 2 against (1 + 1/4) / 2: + 0.25, + 66.7%."""
    run = compare(two_arms)
    found = runs.read_json(run.file("comparison.json"))
    assert found["protocol"] == PROTOCOL and found["base"] == "base"
    base, refined = found["arms"]["base"], found["arms"]["refined"]
    assert base["against_base"] is None and base["shares"] is None
    assert base["metrics"]["full"]["mrr"] == {"mean": 0.375, "per_run": [0.375, 0.375]}
    gain = refined["against_base"]["full"]["mrr"]
    assert gain["difference"] == pytest.approx(0.25)
    assert gain["relative"] == pytest.approx(100 * 0.25 / 0.375)
    assert (gain["low"], gain["high"]) == pytest.approx((0.0, 0.5))  # samples of user 1 alone, of user 0 alone
    ndcg = refined["metrics"]["full"]["ndcg_at_10"]["mean"]
    assert ndcg == pytest.approx((1 + 1 / math.log2(5)) / 2)
    assert refined["settings"] == {
        "model": "sasrec",
        "fusion": "add",
        "control": "none",
        "user_scores": "none",
        "base_width": 48,
        "loss": "cross_entropy",
    }
    assert refined["shares"] == {"base": 0.9, "encoder_guided": 0.1, "user_guided": 0.0}
    assert runs.read_run(run.path, job="compare")["counts"] == {"arms": 2, "runs": 4, "users": {"full": 2}}


def test_tables_hold_the_same_numbers(two_arms: CompareConfig):
    run = compare(two_arms)
    markdown = Path(run.file("table.md")).read_text(encoding="utf-8")
    assert "| base | 2 | 100 |" in markdown and "+66.7%" in markdown
    lines = list(csv.DictReader(Path(run.file("table.csv")).read_text(encoding="utf-8").splitlines()))
    [refined] = [line for line in lines if line["arm"] == "refined" and line["metric"] == "mrr"]
    assert float(refined["relative"]) == pytest.approx(100 * 0.25 / 0.375, rel=1e-12)


def test_users_are_paired_by_index_and_not_by_row(tmp_path: Path):
    """Equal ranks per user give a gain of exactly 0 in every sample, whatever the order of rows."""
    base = write_train_run(tmp_path / "base", [1, 2, 3, 50])
    other = write_train_run(tmp_path / "other", [1, 2, 3, 50])
    table = runs.read_table(f"{other}/{RANKS}")
    runs.write_table(table.take(np.arange(table.num_rows)[::-1]), f"{other}/{RANKS}")
    found = runs.read_json(compare(settings(tmp_path, base=[base], other=[other])).file("comparison.json"))
    gain = found["arms"]["other"]["against_base"]["full"]["ndcg_at_10"]
    assert set(gain.values()) == {0.0}


def test_unlike_protocols_are_refused(tmp_path: Path):
    base = write_train_run(tmp_path / "base", [1, 2])
    other = write_train_run(tmp_path / "other", [1, 2], protocol=PROTOCOL | {"data": "xyz"})
    with pytest.raises(ConfigError, match=r"unlike protocols: data \(abc / xyz\)"):
        compare(settings(tmp_path, base=[base], other=[other]))
    assert not (tmp_path / "compare").exists()


def test_arms_that_are_no_arms_are_refused(tmp_path: Path):
    first = write_train_run(tmp_path / "a", [1, 2])
    wider = write_train_run(tmp_path / "b", [1, 2], seed=1, base_width=64)
    same_seed = write_train_run(tmp_path / "c", [1, 2])
    fewer = write_train_run(tmp_path / "d", [1])
    for arms, message in [
        ({"other": [first]}, "no arm is called 'base'"),
        ({"base": [first], "other": []}, "arm other has no runs"),
        ({"base": [first, wider]}, "differ in base_width"),
        ({"base": [first, same_seed]}, "the same seed"),
        ({"base": [first], "other": [fewer]}, "ranked different targets"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compare(settings(tmp_path, **arms))


def test_an_unfinished_run_is_refused(tmp_path: Path):
    path = write_train_run(tmp_path / "a", [1, 2])
    Path(path, "run.json").unlink()
    with pytest.raises(runs.RunError, match="did not finish"):
        compare(settings(tmp_path, base=[path]))
