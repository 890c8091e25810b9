"""Comparison of hand-made train runs: gains, refusals, tables."""

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from pydantic_core import to_jsonable_python
from toy_data import RUN_METRICS, write_prepared

from raygr import files, runs
from raygr.compare.comparison import read_comparison
from raygr.compare.config import CompareConfig
from raygr.compare.gain_words import gain_text
from raygr.compare.references import catalogue_ranks
from raygr.compare.stage import compare
from raygr.config import ConfigError
from raygr.data.interactions import read_interactions
from raygr.metrics.ranking import full_ranks
from raygr.pipeline import outcome
from raygr.report.config import ReportConfig
from raygr.schema import CANDIDATE_SCHEMA, CANDIDATES, METRICS, RANK_SCHEMA, RANKS
from raygr.simulate.config import SimulateConfig
from raygr.simulate.review_texts import ASPECT_PHRASES
from raygr.simulate.stage import Films, simulate, write_shop
from raygr.train.config import TrainConfig

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
    config = TrainConfig(output=str(folder), **{"data": "prepare"} | changes)
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
    files.write_table(pa.table(columns).cast(RANK_SCHEMA), run.file(RANKS))
    shares = {"base": 0.9, "encoder_guided": 0.1, "user_guided": 0.0} if config.item_scores else None
    record = RUN_METRICS | {"protocol": protocol, "shares": shares, "parameters": 100}
    files.write_json(record, run.file(METRICS))
    runs.finish_run(run, inputs=[], counts={})
    return str(folder)


def settings(folder: Path, changes: dict[str, Any] | None = None, **arms: list[str]) -> CompareConfig:
    paths = {name: tuple(found) for name, found in arms.items()}
    return CompareConfig(output=str(folder / "compare"), arms=paths, **(changes or {}))


def compared(config: CompareConfig) -> dict[str, Any]:
    return files.read_json(compare(config).file("comparison.json"))


@pytest.fixture
def two_arms(tmp_path: Path) -> CompareConfig:
    """Base: ranks 2 and 4 of user 0, user 1. Refined: 1 and 4 under both seeds."""
    base = [write_train_run(tmp_path / f"base-{seed}", [2, 4], seed=seed) for seed in (0, 1)]
    refined = [
        write_train_run(tmp_path / f"refined-{s}", [1, 4], seed=s, item_scores="s", base_width=48) for s in (0, 1)
    ]
    return settings(tmp_path, base=base, refined=refined)


def test_gain_by_hand(two_arms: CompareConfig):
    """MRR rises from (1/2 + 1/4) / 2 to (1 + 1/4) / 2: by 0.25 or 66.7%."""
    run = compare(two_arms)
    found = files.read_json(run.file("comparison.json"))
    assert found["protocol"] == PROTOCOL and found["base"] == "base"
    base, refined = found["arms"]["base"], found["arms"]["refined"]
    assert base["against_base"] is None and base["shares"] is None
    assert base["metrics"]["full"]["mrr"] == {"mean": 0.375, "per_run": [0.375, 0.375]}
    gain = refined["against_base"]["full"]["mrr"]
    assert gain["difference"] == pytest.approx(0.25)
    assert gain["relative"] == pytest.approx(100 * 0.25 / 0.375)
    half_width = scipy.stats.t.ppf(0.975, 1) * 0.25  # users gain 0 and 0.5, the runs alike
    assert (gain["low"], gain["high"]) == pytest.approx((0.25 - half_width, 0.25 + half_width))
    assert gain["over"] == "users and runs"
    ndcg = refined["metrics"]["full"]["ndcg_at_10"]["mean"]
    assert ndcg == pytest.approx((1 + 1 / math.log2(5)) / 2)
    assert refined["settings"] == {
        "model": "sasrec",
        "fusion": "none",
        "control": "none",
        "user_scores": "history",
        "user_control": "none",
        "base_width": 48,
        "loss": "cross_entropy",
    }
    assert refined["shares"] == {"base": 0.9, "encoder_guided": 0.1, "user_guided": 0.0}
    assert runs.read_run(run.path, job="compare").counts == {"arms": 2, "runs": 4, "users": {"full": 2}}


def test_tables_hold_the_same_numbers(two_arms: CompareConfig):
    run = compare(two_arms)
    markdown = Path(run.file("table.md")).read_text(encoding="utf-8")
    assert "| base |  | 2 | 100 |" in markdown and "+66.7%" in markdown
    lines = list(csv.DictReader(Path(run.file("table.csv")).read_text(encoding="utf-8").splitlines()))
    [refined] = [line for line in lines if line["arm"] == "refined" and line["metric"] == "mrr"]
    assert float(refined["relative"]) == pytest.approx(100 * 0.25 / 0.375, rel=1e-12)
    assert (refined["base"], refined["targets"], refined["base_mean"]) == ("base", "all", "0.375")
    assert [float(one) for one in refined["each_run"].split()] == pytest.approx([100 * 0.25 / 0.375] * 2)


def test_a_pipeline_ends_with_the_gains_and_the_address_of_the_report(two_arms: CompareConfig, tmp_path: Path):
    run = compare(two_arms)
    report = ReportConfig(output=f"{tmp_path}/my report", title="t", data="d")
    lines = outcome([("compare", two_arms), ("report", report)]).splitlines()
    gain = read_comparison(run.path).arms["refined"].against_base["full"]["ndcg_at_10"]
    before, after = (1 / math.log2(3) + 1 / math.log2(5)) / 2, (1 + 1 / math.log2(5)) / 2
    assert lines[1] == "arm      NDCG@10  gain over the base arm, 95% interval (candidates: full)"
    assert lines[2] == f"base     {before:.4f}"
    assert lines[3] == f"refined  {after:.4f}   {gain_text(gain)}" and f"+{100 * (after / before - 1):.1f}%" in lines[3]
    assert lines[-1] == f"report: {tmp_path.as_uri()}/my%20report/report.html"
    on_s3 = ReportConfig(output="s3://b/report", title="t", data="d")
    assert outcome([("report", on_s3)]) == "\nreport: s3://b/report/report.html\n"


def test_users_are_paired_by_index_and_not_by_row(tmp_path: Path):
    """Equal ranks per user give a gain of exactly 0, whatever the order of rows."""
    base = write_train_run(tmp_path / "base", [1, 2, 3, 50])
    other = write_train_run(tmp_path / "other", [1, 2, 3, 50])
    table = files.read_table(f"{other}/{RANKS}")
    files.write_table(table.take(np.arange(table.num_rows)[::-1]), f"{other}/{RANKS}")
    found = files.read_json(compare(settings(tmp_path, base=[base], other=[other])).file("comparison.json"))
    gain = found["arms"]["other"]["against_base"]["full"]["ndcg_at_10"]
    assert (gain.pop("p"), gain.pop("p_holm"), gain.pop("per_run"), gain.pop("over")) == (None, None, [0.0], "users")
    assert set(gain.values()) == {0.0}
    assert "0.5327 the same for every user |" in Path(tmp_path / "compare/table.md").read_text(encoding="utf-8")


def test_unlike_protocols_are_refused(tmp_path: Path):
    base = write_train_run(tmp_path / "base", [1, 2])
    other = write_train_run(tmp_path / "other", [1, 2], protocol=PROTOCOL | {"data": "xyz"})
    with pytest.raises(ConfigError, match=r"different protocols: data \(abc / xyz\)"):
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
    base = [write_train_run(tmp_path / f"base-{s}", [rank] * 2, seed=s) for s, rank in ((1, 4), (0, 2))]
    other = [write_train_run(tmp_path / f"other-{s}", [rank] * 2, seed=s) for s, rank in ((0, 1), (1, 5))]
    gain = compared(settings(tmp_path, base=base, other=other))["arms"]["other"]["against_base"]["full"]["mrr"]
    assert gain["per_run"] == pytest.approx([100.0, -20.0])
    half_width = scipy.stats.t.ppf(0.975, 1) * (0.5 - (0.2 - 0.25)) / 2  # the users are alike
    assert (gain["low"], gain["high"]) == pytest.approx(
        (gain["difference"] - half_width, gain["difference"] + half_width)
    )


def test_a_gain_over_a_base_of_0_is_no_percentage(tmp_path: Path):
    """Recall@1 of 0 against 1/2: in the tables as a difference, in the CSV 0 percent."""
    base, other = (write_train_run(tmp_path / name, ranks) for name, ranks in (("base", [2, 9]), ("other", [1, 9])))
    run = compare(settings(tmp_path, base=[base], other=[other]))
    lines = Path(run.file("table.md")).read_text(encoding="utf-8").splitlines()
    [recall] = [line for line in lines if line.startswith("| Recall@1 |")]
    half_width = scipy.stats.t.ppf(0.975, 1) * 0.5
    assert f"| 0.0000 | 0.5000 | +0.5000 [{0.5 - half_width:+.4f}, {0.5 + half_width:+.4f}]° |" in recall
    gain = files.read_json(run.file("comparison.json"))["arms"]["other"]["against_base"]["full"]["recall_at_1"]
    assert gain["relative"] is None and gain["per_run"] == [None]


def test_a_gain_of_0_over_0_is_reported_in_words(tmp_path: Path):
    """Such a table once read `+0.0% [+0.0, +0.0]`, as if the comparison had found the arms equal."""
    base, other = (write_train_run(tmp_path / name, [90, 70, 80], counts=[1, 2, 3]) for name in ("base", "other"))
    compare(settings(tmp_path, base=[base], other=[other]))
    text = Path(tmp_path / "compare/table.md").read_text(encoding="utf-8")
    assert "| NDCG@10 | 0.0000 | 0.0000 | 0 in both |" in text and "+0.0%" not in text
    assert text.count("0.0000 0 in both") == 4  # NDCG@10 and Recall@10, of all targets and of the cold ones


def test_an_interval_of_one_run_is_reported_as_over_users_only(tmp_path: Path):
    base, other = (
        write_train_run(tmp_path / name, ranks) for name, ranks in (("base", [2, 4, 3]), ("other", [1, 4, 5]))
    )
    run = compare(settings(tmp_path, base=[base], other=[other]))
    text = Path(run.file("table.md")).read_text(encoding="utf-8")
    assert "° one run: users only" in text and "]° |" in text and "Holm" not in text
    found = files.read_json(run.file("comparison.json"))["arms"]["other"]["against_base"]["full"]
    assert {gain["p"] for gain in found.values()} == {gain["p_holm"] for gain in found.values()} == {None}


def test_arms_of_unequal_seeds_are_compared_without_pairs(tmp_path: Path):
    base = [write_train_run(tmp_path / f"base-{s}", [2, 4, 3 + s], seed=s) for s in (0, 1, 2)]
    other = [write_train_run(tmp_path / f"other-{s}", [1, 4, 2 + s], seed=s) for s in (5, 6)]
    gain = compared(settings(tmp_path, base=base, other=other))["arms"]["other"]["against_base"]["full"]["mrr"]
    arm_Z, base_Z = [(1 + 1 / 4 + 1 / r) / 3 for r in (7, 8)], [(1 / 2 + 1 / 4 + 1 / r) / 3 for r in (3, 4, 5)]
    assert gain["per_run"] == pytest.approx([100 * (one / np.mean(base_Z) - 1) for one in arm_Z])
    assert gain["difference"] == pytest.approx(np.mean(arm_Z) - np.mean(base_Z))
    assert gain["low"] < gain["difference"] < gain["high"]
    assert 0 < gain["p"] < 1


def test_p_values_of_the_primary_metric_are_corrected_over_the_arms(tmp_path: Path):
    """Holm by hand: the k-th smallest of m p-values times m - k + 1, never falling, never above 1.

    No other metric is corrected.
    """
    generator = np.random.default_rng(0)
    arms = {
        name: [
            write_train_run(tmp_path / f"{name}-{s}", generator.integers(1, 25, 40).tolist(), seed=s) for s in (0, 1)
        ]
        for name in ("base", "a", "b", "c")
    }
    found = compared(settings(tmp_path, {"primary_metric": "mrr"}, **arms))["arms"]
    gains = [found[name]["against_base"]["full"]["mrr"] for name in ("a", "b", "c")]
    ordered, least = sorted(gains, key=lambda gain: gain["p"]), 0.0
    for place, gain in enumerate(ordered):
        least = max(least, min(1.0, gain["p"] * (3 - place)))
        assert gain["p_holm"] == pytest.approx(least)
    others = [gain for metric, gain in found["a"]["against_base"]["full"].items() if metric != "mrr"]
    assert all(gain["p_holm"] is None and 0 < gain["p"] <= 1 for gain in others)
    text = Path(tmp_path / "compare/table.md").read_text(encoding="utf-8")
    assert "in MRR, the primary metric, after Holm's correction" in text


# --- popularity and chance ----------------------------------------------------------------------

HISTORIES = [[1, 2, 3, 5], [1, 2, 4, 6], [1, 3, 2, 4], [2, 1, 6, 3]]  # the last is test, the one before validation


def on_data(tmp_path: Path, name: str, ranks: list[float], *, seed: int = 0, sampled: bool = False) -> str:
    """A train run whose data exists, with two candidates per user if `sampled`."""
    data = str(tmp_path / "data")
    if not runs.is_finished(data):
        write_prepared(tmp_path / "data", HISTORIES, items=8)
    protocol = PROTOCOL | {"data": files.fingerprint(data)}
    path = write_train_run(tmp_path / name, ranks, protocol=protocol, seed=seed, data=data)
    table = pa.table({
        "user_index": range(4), "position": [3] * 4, "last": [True] * 4, "part": ["test"] * 4,
        "candidates": ["uniform-100" if sampled else "full"] * 4, "target": [5, 6, 4, 3], "rank": ranks,
        "target_train_count": [0, 0, 0, 1],
    })  # fmt: skip
    files.write_table(table.cast(RANK_SCHEMA), f"{path}/{RANKS}")
    if sampled:
        rows = {"user_index": range(4), "candidates": ["uniform-100"] * 4, "items": [[7, 4], [3, 5], [7, 8], [4, 5]]}
        files.write_table(pa.table(rows).cast(CANDIDATE_SCHEMA), f"{path}/{CANDIDATES}")
    return path


def test_popularity_and_chance_by_hand(tmp_path: Path):
    """Five items are unseen. Nobody bought the targets of users 0 to 2; the target of user 3, item 3, was bought."""
    run = on_data(tmp_path, "base", [1, 2, 3, 4])
    found = compared(settings(tmp_path, base=[run]))
    popularity, chance = found["arms"]["popularity"], found["arms"]["chance"]
    # unseen of user 0: 4, 5, 6, 7, 8, all with 0; of user 1: item 3 is above, 4 others with 0; user 2: 5 with 0
    ranks = [1 + 4 / 2, 2 + 3 / 2, 1 + 4 / 2, 1]
    assert popularity["metrics"]["full"]["mrr"]["mean"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert chance["metrics"]["full"]["mrr"]["mean"] == pytest.approx(sum(1 / rank for rank in range(1, 6)) / 5)
    assert chance["metrics"]["full"]["recall_at_1"]["mean"] == pytest.approx(1 / 5)
    assert chance["cold"]["full"]["metrics"]["recall_at_1"]["mean"] == pytest.approx(1 / 5)
    gain = popularity["against_base"]["full"]["mrr"]
    base_mean = found["arms"]["base"]["metrics"]["full"]["mrr"]["mean"]
    assert gain["difference"] == pytest.approx(popularity["metrics"]["full"]["mrr"]["mean"] - base_mean)
    assert gain["p_holm"] is None and found["shown"] == []
    text = Path(tmp_path / "compare/table.md").read_text(encoding="utf-8")
    assert "| popularity | base |  |  |" in text and "Popularity ranks by train interactions" in text


def test_popularity_and_chance_rank_sampled_candidates_too(tmp_path: Path):
    run = on_data(tmp_path, "base", [1, 2, 3, 2], sampled=True)
    found = compared(settings(tmp_path, base=[run]))["arms"]
    ranks = [2, 1 + 1 + 1 / 2, 2, 1]
    popularity = found["popularity"]["metrics"]["uniform-100"]["mrr"]["mean"]
    assert popularity == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert found["chance"]["metrics"]["uniform-100"]["mrr"]["mean"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


@settings_of_hypothesis(max_examples=50, deadline=None)
@given(st.data())
def test_popularity_over_the_catalogue_has_the_ranks_of_full_ranks(data: st.DataObject):
    """The inputs have ties, items seen twice and a target that was seen before."""
    count_I = np.array(data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=12)))
    item = st.integers(1, len(count_I))
    target_B = np.array(data.draw(st.lists(item, min_size=1, max_size=4)))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(target_B) - 1), item), max_size=20))
    row_N, item_N = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    rank_B, among_B = catalogue_ranks(target_B, row_N, item_N, count_I, np.sort(count_I))
    scores_BI = torch.from_numpy(count_I).double().expand(len(target_B), -1)
    assert rank_B.tolist() == full_ranks(scores_BI, *map(torch.from_numpy, (target_B, row_N, item_N))).tolist()
    unseen = [set(range(1, len(count_I) + 1)) - {i for r, i in pairs if r == row} for row in range(len(target_B))]
    assert among_B.tolist() == [len(some | {target}) for some, target in zip(unseen, target_B.tolist(), strict=True)]


def test_an_arm_next_to_chance_is_reported_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The target is the last of five in every run: NDCG@10 is 1 / log2(6), and chance has .5897."""
    arms = {
        name: [on_data(tmp_path, f"{name}-{s}", ranks, seed=s) for s in (0, 1)]
        for name, ranks in (("base", [1, 1, 1, 1.0]), ("worse", [5, 5, 5, 5.0]), ("unsure", [1, 5, 2, 5.0]))
    }
    found = compared(settings(tmp_path, **arms))
    chance = sum(1 / math.log2(1 + rank) for rank in range(1, 6)) / 5
    assert found["remarks"] == [
        f"“worse” ranks worse than chance (candidates: full): NDCG@10 {1 / math.log2(6):.4f} against {chance:.4f}.",
        "“unsure” cannot be told from chance (candidates: full): NDCG@10 "
        f"{(1 + 2 / math.log2(6) + 1 / math.log2(3)) / 4:.4f} against {chance:.4f}.",
    ]
    assert all(text in caplog.text for text in found["remarks"])
    assert found["remarks"][0] in Path(tmp_path / "compare/table.md").read_text(encoding="utf-8")


def test_data_that_is_gone_leaves_popularity_out_and_says_so(two_arms: CompareConfig):
    found = compared(two_arms)
    assert list(found["arms"]) == ["base", "refined"]
    [text] = found["remarks"]
    assert text.startswith("Popularity and chance are left out beside “base”: ")
    assert text.endswith("prepare is not there any more.")


def test_data_that_has_changed_leaves_popularity_out(tmp_path: Path):
    run = on_data(tmp_path, "base", [1, 2, 3, 4])
    record = tmp_path / "data/run.json"
    record.write_text(record.read_text().replace("leave_one_out", "temporal"))
    found = compared(settings(tmp_path, base=[run]))
    assert list(found["arms"]) == ["base"] and "other content" in found["remarks"][0]


def test_a_comparison_of_an_earlier_version_is_not_shown_as_one_of_this(two_arms: CompareConfig):
    run = compare(two_arms)
    found = files.read_json(run.file("comparison.json"))
    assert to_jsonable_python(read_comparison(run.path)) == found
    del found["primary_metric"]
    files.write_json(found, run.file("comparison.json"))
    with pytest.raises(runs.RunError, match="compared by an earlier version"):
        read_comparison(run.path)


# --- the truth of simulated shoppers -------------------------------------------------------------

FILMS, SHOPPERS, EACH = 30, 60, 8  # every shopper buys eight films or more


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated shop in `shop`, and in `data` a prepare run of it in which items and users have another order."""
    folder = tmp_path_factory.mktemp("simulated")
    scores_IA = np.random.default_rng(7).integers(1, 11, size=(FILMS, len(ASPECT_PHRASES)))
    names = [f"T{number:02d}" for number in range(FILMS)]
    films = Films(names, names, ["1999"] * FILMS, [["War"]] * FILMS, ["Plot."] * FILMS, [*ASPECT_PHRASES], scores_IA)
    run = runs.start_run(str(folder / "shop"), job="simulate", config={})
    write_shop(run.path, films, shoppers=SHOPPERS, seed=1)
    runs.finish_run(run, inputs=[], counts={})
    order = [*range(0, FILMS, 2), *range(1, FILMS, 2)]
    index_of = {names[film]: place + 1 for place, film in enumerate(order)}
    bought: dict[str, list[int]] = {}
    with gzip.open(run.file("reviews.jsonl.gz"), "rt") as file:
        for review in map(json.loads, file):
            bought.setdefault(review["user_id"], []).append(index_of[review["parent_asin"]])
    histories = [items[:EACH] for items in reversed(bought.values())]  # another order of users, too
    data = write_prepared(folder / "data", histories, items=FILMS, tests=2, user_ids=[*reversed(bought)])
    items = files.read_table(f"{data}/items")
    at = items.schema.get_field_index("item_id")
    files.write_table(
        items.set_column(at, "item_id", pa.array([names[film] for film in order])), f"{data}/items/part-0.parquet"
    )
    record = files.read_json(f"{data}/run.json")
    record["inputs"] = {"reviews": files.fingerprint(run.file("reviews.jsonl.gz"))}
    files.write_json(record, f"{data}/run.json")
    return folder


def on_shop(folder: Path, name: str, ranks: np.ndarray) -> str:
    """A train run on the shop's data: `ranks` are of the last two interactions of each user, U x 2."""
    data = str(folder / "data")
    protocol = PROTOCOL | {"data": files.fingerprint(data)}
    path = write_train_run(folder / name, [1.0], protocol=protocol, data=data, targets=("last", "every"))
    found = read_interactions(data)
    at_E = np.flatnonzero(found.split_N == "test")
    position_E = at_E - np.searchsorted(found.user_N, found.user_N[at_E])
    counts_I = np.bincount(found.item_N[found.split_N == "train"], minlength=FILMS + 1)
    table = pa.table({
        "user_index": found.user_N[at_E], "position": position_E, "last": position_E == position_E.max(),
        "part": ["test"] * len(at_E), "candidates": ["full"] * len(at_E), "target": found.item_N[at_E],
        "rank": ranks.reshape(-1), "target_train_count": counts_I[found.item_N[at_E]],
    })  # fmt: skip
    files.write_table(table.cast(RANK_SCHEMA), f"{path}/{RANKS}")
    return path


def true_ranks(shop: Path, *, taste_weight: float) -> np.ndarray:
    """(U, 2) ranks of the test targets by the formula of the choice model, film by film from the shop's files."""
    item_rows, taste_rows, popularity_rows = (
        {row[0]: np.array(row[1:], float) for row in list(csv.reader((shop / "shop" / name).open()))[1:]}
        for name in ("item_scores.csv", "tastes.csv", "popularity.csv")
    )
    scores_FA = np.array([*item_rows.values()])
    levels = dict(zip(item_rows, (scores_FA - scores_FA.mean(0)) / scores_FA.std(0), strict=True))
    found = read_interactions(str(shop / "data"))
    ids = files.read_table(str(shop / "data/items")).sort_by("item_index")["item_id"].to_pylist()
    users = files.read_table(str(shop / "data/users.parquet")).sort_by("user_index")["user_id"].to_pylist()
    ranks = []
    for user, user_id in enumerate(users):
        history = [ids[item - 1] for item in found.item_N[found.user_N == user]]
        for place in (-2, -1):
            before = history[:place]
            centre_A = (levels[before[-1]] + levels[before[-2]]) / 2
            near = {film: -float(((centre_A - level_A) ** 2).sum()) for film, level_A in levels.items()}
            mean, spread = np.mean([*near.values()]), np.std([*near.values()])
            logit = {
                film: popularity_rows[film][0]
                + taste_weight * float(taste_rows[user_id] @ levels[film])
                + 1.6 * (near[film] - mean) / spread
                for film in levels
            }
            rivals = [logit[film] for film in levels if film not in before and film != history[place]]
            ranks.append(1 + sum(rival > logit[history[place]] for rival in rivals))
    return np.array(ranks, float).reshape(-1, 2)


@pytest.mark.parametrize(("name", "taste_weight"), [("truth", 1.6), ("truth without tastes", 0.0)])
def test_the_truth_ranks_by_the_choice_model(shop: Path, tmp_path: Path, name: str, taste_weight: float):
    run = on_shop(shop, f"{name}-base", np.ones((SHOPPERS, 2)))
    found = compared(settings(tmp_path, {"truth": str(shop / "shop")}, base=[run]))["arms"][name]
    ranks_U2 = true_ranks(shop, taste_weight=taste_weight)
    assert found["metrics"]["full"]["mrr"]["mean"] == pytest.approx((1 / ranks_U2[:, 1]).mean())
    assert found["metrics"]["full, every target"]["mrr"]["mean"] == pytest.approx((1 / ranks_U2).mean())
    assert found["is_reference"]


def test_no_ranking_is_better_than_the_truth(shop: Path, tmp_path: Path):
    """The truth without tastes, popularity and chance know less; an arm on the truth's way is measured along it."""
    truth_U2, tasteless_U2 = true_ranks(shop, taste_weight=1.6), true_ranks(shop, taste_weight=0.0)
    base, half = (on_shop(shop, name, ranks) for name, ranks in (("way-base", tasteless_U2), ("way-truth", truth_U2)))
    run = compare(settings(tmp_path, {"truth": str(shop / "shop")}, base=[base], arm=[half]))
    found = files.read_json(run.file("comparison.json"))["arms"]
    mean = {name: arm["metrics"]["full, every target"]["ndcg_at_10"]["mean"] for name, arm in found.items()}
    assert mean["truth"] == mean["arm"] > mean["truth without tastes"] == mean["base"] > mean["popularity"]
    assert mean["popularity"] > mean["chance"]
    way = {name: arm["way_to_truth"]["full"]["mrr"] for name, arm in found.items() if arm["way_to_truth"]}
    assert list(way) == ["arm", "popularity", "chance", "truth", "truth without tastes"]
    assert way["arm"] == way["truth"] == {"share": 1.0, "low": 1.0, "high": 1.0}
    assert way["truth without tastes"]["share"] == 0.0 and way["chance"]["share"] < way["popularity"]["share"] < 0
    text = Path(run.file("table.md")).read_text(encoding="utf-8")
    assert "Share of the way from the base arm to the truth" in text and "| arm | 100% [+100, +100] |" in text
    lines = csv.DictReader(Path(run.file("table.csv")).read_text(encoding="utf-8").splitlines())
    [line] = [
        line for line in lines
        if (line["arm"], line["candidates"], line["targets"], line["metric"]) == ("popularity", "full", "all", "mrr")
    ]  # fmt: skip
    assert float(line["way_to_truth"]) == way["popularity"]["share"] < float(line["way_high"])


def test_the_truth_of_another_shop_is_refused(shop: Path, tmp_path: Path):
    run = on_shop(shop, "refused", np.ones((SHOPPERS, 2)))
    other = simulate(SimulateConfig(output=str(tmp_path / "other"), shoppers=10)).path
    for truth, message in ((other, "was not prepared from"), (str(tmp_path), "holds no popularity.csv")):
        with pytest.raises(ConfigError, match=message):
            compare(settings(tmp_path, {"truth": truth}, base=[run]))
    with pytest.raises(ConfigError, match="an arm is called truth"):
        compare(settings(tmp_path, {"truth": str(shop / "shop")}, base=[run], truth=[run]))


def test_gains_by_how_often_the_target_was_bought(tmp_path: Path):
    """Twelve users: two targets that nobody bought, then two each with 1, 2, 3, 4 and 5 train interactions."""
    counts = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    base = write_train_run(tmp_path / "base", [2.0] * 12, counts=counts)
    other = write_train_run(tmp_path / "other", [1.0, 1.0, *[2.0] * 8, 2.0, 1.0], counts=counts)
    run = compare(settings(tmp_path, {"primary_metric": "mrr"}, base=[base], other=[other]))
    found = files.read_json(run.file("comparison.json"))["arms"]
    assert found["base"]["by_train_count"] == {}
    groups = found["other"]["by_train_count"]["full"]
    assert [(one["least"], one["most"], one["targets"]) for one in groups] == [(n, n, 2) for n in range(6)]
    assert [one["gain"]["difference"] for one in groups] == [0.5, 0, 0, 0, 0, 0.25]
    assert {one["base"] for one in groups} == {0.5} and groups[5]["gain"]["low"] < 0.25 < groups[5]["gain"]["high"]
    assert "| other | 5 | 2 | 0.5000 | +0.2500 |" in Path(run.file("table.md")).read_text(encoding="utf-8")


def test_arms_called_like_the_references_are_refused(tmp_path: Path):
    run = write_train_run(tmp_path / "a", [1, 2])
    with pytest.raises(ConfigError, match="an arm is called popularity"):
        compare(settings(tmp_path, base=[run], popularity=[run]))


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
    assert "Cold-start targets (fewer than 10 train interactions), candidates: full: 2 targets of 2 users" in text
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
    found = files.read_json(run.file("comparison.json"))
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
        ({"bases": {"SASRec & scores": "GRU4Rec", "GRU4Rec_refined": "SASRec"}}, "different protocols: split"),
    ]:
        with pytest.raises(ConfigError, match=message):
            compare(CompareConfig(**vars(two_models) | changes))
