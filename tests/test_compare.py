"""Comparison of hand-made train runs: gains, refusals, tables."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from toy_data import LISTS

from raygr import runs
from raygr.compare import compare
from raygr.config import ConfigError, TrainConfig
from raygr.config_results import CompareConfig
from raygr.schema import METRICS, RANK_SCHEMA, RANKS

PROTOCOL = {"split": "leave_one_out", "candidates": ["full"], "seen": "filtered", "ties": "mean rank", "data": "abc"}


def write_train_run(
    folder: Path,
    ranks: list[float],
    *,
    protocol: dict[str, Any] = PROTOCOL,
    counts: list[int] | None = None,
    **changes: Any,
) -> str:
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
        "target_train_count": [*(counts or [50] * users), 0],
    }
    runs.write_table(pa.table(columns).cast(RANK_SCHEMA), run.file(RANKS))
    shares = {"base": 0.9, "encoder_guided": 0.1, "user_guided": 0.0} if config.item_scores else None
    record = {"protocol": protocol, "shares": shares, "parameters": 100, "lists": LISTS}
    runs.write_json(record, run.file(METRICS))
    runs.finish_run(run, inputs=[], counts={})
    return str(folder)


def settings(folder: Path, changes: dict[str, Any] | None = None, **arms: list[str]) -> CompareConfig:
    paths = {name: tuple(found) for name, found in arms.items()}
    return CompareConfig(output=str(folder / "compare"), arms=paths, bootstrap_samples=2000, **(changes or {}))


def compared(config: CompareConfig) -> dict[str, Any]:
    return runs.read_json(compare(config).file("comparison.json"))


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
    assert "| base |  | 2 | 100 |" in markdown and "+66.7%" in markdown
    lines = list(csv.DictReader(Path(run.file("table.csv")).read_text(encoding="utf-8").splitlines()))
    [refined] = [line for line in lines if line["arm"] == "refined" and line["metric"] == "mrr"]
    assert float(refined["relative"]) == pytest.approx(100 * 0.25 / 0.375, rel=1e-12)
    assert (refined["base"], refined["targets"], refined["base_mean"]) == ("base", "all", "0.375")
    assert [float(one) for one in refined["each_run"].split()] == pytest.approx([100 * 0.25 / 0.375] * 2)


def test_users_are_paired_by_index_and_not_by_row(tmp_path: Path):
    """Equal ranks per user give a gain of exactly 0 in every sample, whatever the order of rows."""
    base = write_train_run(tmp_path / "base", [1, 2, 3, 50])
    other = write_train_run(tmp_path / "other", [1, 2, 3, 50])
    table = runs.read_table(f"{other}/{RANKS}")
    runs.write_table(table.take(np.arange(table.num_rows)[::-1]), f"{other}/{RANKS}")
    found = runs.read_json(compare(settings(tmp_path, base=[base], other=[other])).file("comparison.json"))
    gain = found["arms"]["other"]["against_base"]["full"]["ndcg_at_10"]
    assert (gain.pop("p"), gain.pop("p_holm"), gain.pop("per_run")) == (1.0, 1.0, [0.0])
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
        ({"other": [first]}, "arm 'other' needs a base: no arm is called 'base'"),
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


def test_each_runs_own_gain_is_beside_the_run_of_its_seed(tmp_path: Path):
    """The base's runs are given in the other order; MRR 1/2 -> 1 under seed 0, 1/4 -> 1/5 under seed 1."""
    base = [write_train_run(tmp_path / f"base-{s}", [rank], seed=s) for s, rank in ((1, 4), (0, 2))]
    other = [write_train_run(tmp_path / f"other-{s}", [rank], seed=s) for s, rank in ((0, 1), (1, 5))]
    gain = compared(settings(tmp_path, base=base, other=other))["arms"]["other"]["against_base"]["full"]["mrr"]
    assert gain["per_run"] == pytest.approx([100.0, -20.0])
    half_width = math.sqrt(2) * (0.5 - (0.2 - 0.25)) / 2  # two runs: see evaluation.drawn_run_means
    assert (gain["low"], gain["high"]) == pytest.approx(
        (gain["difference"] - half_width, gain["difference"] + half_width)
    )


def test_a_gain_over_nothing_is_no_percentage(tmp_path: Path):
    """Recall@1 of 0 against 1/2: in the tables as a difference, in the CSV 0 percent."""
    base, other = (write_train_run(tmp_path / name, ranks) for name, ranks in (("base", [2, 9]), ("other", [1, 9])))
    run = compare(settings(tmp_path, base=[base], other=[other]))
    lines = Path(run.file("table.md")).read_text(encoding="utf-8").splitlines()
    [recall] = [line for line in lines if line.startswith("| Recall@1 |")]
    assert "| 0.0000 | 0.5000 | +0.5000 [+0.0000, +1.0000] |" in recall


def test_p_values_are_corrected_over_the_whole_table(tmp_path: Path):
    """Holm by hand: the k-th smallest of m times m - k + 1, never falling, never above 1."""
    generator = np.random.default_rng(0)
    ranks = {name: generator.integers(1, 25, 40).tolist() for name in ("base", "a", "b")}
    arms = {name: [write_train_run(tmp_path / name, found)] for name, found in ranks.items()}
    found = compared(settings(tmp_path, **arms))["arms"]
    gains = [gain for name in ("a", "b") for gain in found[name]["against_base"]["full"].values()]
    assert len(gains) == 16
    ordered, least = sorted(gains, key=lambda gain: gain["p"]), 0.0
    for place, gain in enumerate(ordered):
        least = max(least, min(1.0, gain["p"] * (16 - place)))
        assert gain["p_holm"] == pytest.approx(least)


def test_cold_start_targets_are_compared_apart(tmp_path: Path):
    """Users 0 and 2 have targets with 3 and 9 train interactions; user 1's has 10."""
    base = write_train_run(tmp_path / "base", [2, 1, 4], counts=[3, 10, 9])
    other = write_train_run(tmp_path / "other", [1, 9, 4], counts=[3, 10, 9])
    found = compared(settings(tmp_path, base=[base], other=[other]))
    cold = found["arms"]["other"]["cold"]["full"]
    assert found["cold_below"] == 10 and (cold["targets"], cold["users"]) == (2, 2)
    assert cold["metrics"]["mrr"]["mean"] == pytest.approx((1 + 1 / 4) / 2)
    assert cold["against_base"]["mrr"]["difference"] == pytest.approx(0.25)
    text = Path(tmp_path / "compare/table.md").read_text(encoding="utf-8")
    assert "cold-start targets (fewer than 10 train interactions): 2 targets of 2 users" in text
    none = compared(settings(tmp_path / "none", {"cold_below": 3}, base=[base], other=[other]))
    assert none["arms"]["other"]["cold"]["full"] == {"targets": 0, "users": 0, "metrics": None, "against_base": None}


@pytest.fixture
def two_models(tmp_path: Path) -> CompareConfig:
    """Each model with its own base, the second under another split."""
    other = PROTOCOL | {"split": "temporal"}
    arms = {
        "SASRec": [write_train_run(tmp_path / "a", [2, 4])],
        "SASRec & scores": [write_train_run(tmp_path / "b", [1, 4])],
        "GRU4Rec": [write_train_run(tmp_path / "c", [5, 5], protocol=other)],
        "GRU4Rec_refined": [write_train_run(tmp_path / "d", [4, 5], protocol=other)],
    }
    bases = {"SASRec & scores": "SASRec", "GRU4Rec_refined": "GRU4Rec"}
    return settings(tmp_path, {"bases": bases}, **arms)


def test_each_pair_has_its_own_base_and_prints_its_own_stamp(two_models: CompareConfig):
    run = compare(two_models)
    found = runs.read_json(run.file("comparison.json"))
    assert found["protocol"] is None and found["shown"] == ["SASRec & scores", "GRU4Rec_refined"]
    assert [arm["base"] for arm in found["arms"].values()] == [None, "SASRec", None, "GRU4Rec"]
    gain = found["arms"]["GRU4Rec_refined"]["against_base"]["full"]["mrr"]
    assert gain["relative"] == pytest.approx(12.5)  # (1/4 + 1/5) against 2/5
    lines = Path(run.file("table.md")).read_text(encoding="utf-8").splitlines()
    [head] = [line for line in lines if line.startswith("| metric |")]
    assert head == (
        "| metric | SASRec | SASRec & scores | improvement | each run "
        "| GRU4Rec | GRU4Rec_refined | improvement | each run |"
    )
    [stamp] = [line for line in lines if line.startswith("| protocol |")]
    assert stamp.count("split: leave_one_out") == stamp.count("split: temporal") == 2 and "ties" not in stamp
    [mrr] = [line for line in lines if line.startswith("| MRR |")]
    assert mrr.split(" | ")[1:3] == ["0.3750", "0.6250"]
    assert sum(line.startswith("Protocol of ") for line in lines) == 4


def test_latex_has_the_papers_columns_and_rows(two_models: CompareConfig):
    text = Path(compare(two_models).file("table.tex")).read_text(encoding="utf-8")
    assert r"\begin{tabular}{lrrlrrl}" in text
    assert r"\multicolumn{3}{c}{SASRec \& scores} & \multicolumn{3}{c}{GRU4Rec\_refined} \\" in text
    assert r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert [row.split(" & ")[0] for row in body] == [
        *("MRR", "Recall@1", "Recall@5", "Recall@10", "Recall@20"),
        *("NDCG@5", "NDCG@10", "NDCG@20"),
    ]
    assert all(row.count(" & ") == 6 and row.endswith(r" \\") for row in body)
    assert body[0].split(" & ")[:3] == ["MRR", "0.3750", "0.6250"] and r"+66.7\% [" in body[0]
    assert text.count("{") == text.count("}")
    [caption] = [line for line in text.splitlines() if line.startswith(r"\caption")]
    assert "Protocol: candidates: full; seen: filtered" in caption and "split" not in caption
    [stamps] = [line for line in text.splitlines() if r"\scriptsize split" in line]
    assert r"split: leave\_one\_out" in stamps and "split: temporal" in stamps


def test_wrong_bases_are_refused(two_models: CompareConfig):
    for changes, message in [
        ({"bases": {"SASRec & scores": "SASREC"}}, "no base 'SASREC'"),
        ({"bases": {"BERT": "SASRec"}}, "no arm 'BERT'"),
        ({"bases": {"SASRec": "SASRec"}}, "'SASRec' is its own base"),
        ({"bases": two_models.bases, "shown": ("SASRec",)}, "shown: arm 'SASRec' has no base"),
        ({"bases": {"SASRec & scores": "GRU4Rec", "GRU4Rec_refined": "SASRec"}}, "unlike protocols: split"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compare(CompareConfig(**vars(two_models) | changes))
