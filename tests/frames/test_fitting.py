"""`fit` and its recommender: results of the stages on the same data, frames in and out, errors, notebooks."""

import asyncio
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from raygr import fit, load_recommender, prepare_frame
from raygr.config import ConfigError
from raygr.explain.explanation import explain_item
from raygr.files import read_json, read_table
from raygr.frames.fitting import FrameRecommender
from raygr.prepare.config import PrepareConfig
from raygr.prepare.stage import prepare
from raygr.recommend.config import RecommendConfig
from raygr.recommend.stage import recommend
from raygr.train.config import TrainConfig
from raygr.train.stage import train

SMALL = {"base_width": 16, "batch_size": 16, "max_history": 10, "epochs": 3, "threads": 1, "use_gpu": False, "heads": 1}
ASPECTS = ["pace", "tension level", "humour"]
LOOSE = {"min_user_interactions": 3, "min_item_interactions": 1}


def orders(users: int = 30, items: int = 20) -> pd.DataFrame:
    """Everybody orders seven items at random, and rates them."""
    generator = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", 1_700_000_000 + 86_400 * step, int(generator.integers(1, 6)))
        for user in range(users)
        for step, item in enumerate(generator.permutation(items)[:7])
    ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "rating"]).sample(frac=1, random_state=0)


def scores(items: int = 20) -> pd.DataFrame:
    values = np.random.default_rng(1).integers(1, 11, (items, len(ASPECTS)))
    return pd.DataFrame(values, columns=ASPECTS).assign(item_id=[f"i{item}" for item in range(items)])


@pytest.fixture(scope="module")
def fitted() -> FrameRecommender:
    titles = {f"i{item}": f"Title {item}" for item in range(20)}
    return fit(prepare_frame(orders(), settings=LOOSE), scores(), titles=titles, settings=SMALL)


# --- the stages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
def test_results_are_those_of_the_stages(tmp_path: Path, guided: bool):
    orders().to_csv(tmp_path / "orders.csv", index=False)
    scores()[["item_id", *ASPECTS]].to_csv(tmp_path / "scores.csv", index=False)
    places = {"output": str(tmp_path / "data"), "reviews": (str(tmp_path / "orders.csv"),)}
    data = prepare(PrepareConfig(**places, format="table", **LOOSE)).path
    item_scores = str(tmp_path / "scores.csv") if guided else None
    run = train(
        TrainConfig(output=str(tmp_path / "run"), data=data, item_scores=item_scores, ray="never", **SMALL)
    ).path
    lists = recommend(RecommendConfig(output=str(tmp_path / "lists"), train_run=run, n=4, ray="never"))

    interactions = prepare_frame(orders(), settings=LOOSE)
    kept = read_table(f"{data}/interactions.parquet").to_pandas()
    ids = [read_table(f"{data}/{name}").to_pandas() for name in ("users.parquet", "items")]
    assert interactions["user_id"].tolist() == ids[0]["user_id"].to_numpy()[kept["user_index"]].tolist()
    assert interactions["item_id"].tolist() == ids[1]["item_id"].to_numpy()[kept["item_index"] - 1].tolist()
    for name in ("rating", "position", "split"):
        assert interactions[name].tolist() == kept[name].tolist()
    assert (interactions["timestamp"].astype("datetime64[ms]").astype("int64") == kept["timestamp"]).all()

    shuffled = interactions.sample(frac=1, random_state=2)
    recommender = fit(shuffled, scores() if guided else None, settings=SMALL)
    expected = read_table(lists.file("recommendations")).to_pandas()
    found = recommender.recommend(n=4)
    assert found.rename(columns={"user_id": "subject_id"}).equals(
        expected.astype(found.dtypes.rename({"user_id": "subject_id"}))
    )
    ours, theirs = (read_json(f"{one}/metrics.json") for one in (recommender.recommender.run, run))
    for name in ("test", "validation", "shares", "cold", "lists", "parameters", "best_epoch"):
        assert ours[name] == theirs[name], name
    if guided:
        theirs = explain_item(load_recommender(run), "i3", ["u4"]).users[0]
        rows = recommender.explain("i3", ["u4"])
        assert rows["lift"].tolist() == [term.lift() for term in theirs.terms]
        assert rows["score"].unique().tolist() == [theirs.score]


# --- answers ------------------------------------------------------------------------------------


def test_lists_are_frames_with_titles(fitted: FrameRecommender):
    everybody = fitted.recommend(n=3)
    assert everybody.columns.tolist() == ["user_id", "rank", "item_id", "title", "score"]
    assert len(everybody) == 90 and everybody["title"].equals("Title " + everybody["item_id"].str[1:])
    single = fitted.recommender.recommend("u7", n=3)
    for frame in (fitted.recommend("u7", 3), fitted.recommend(["u7"], 3), fitted.recommend(pd.Series(["u7"]), 3)):
        assert frame["item_id"].tolist() == [one.item_id for one in single]
        assert frame["score"].tolist() == pytest.approx([one.score for one in single], abs=1e-6)
    steered = fitted.recommend("u7", 3, steer={"pace": 50.0})["item_id"]
    levels = scores().set_index("item_id")["pace"]
    assert levels[steered].mean() > levels.mean()


def test_histories_of_anybody_are_a_frame(fitted: FrameRecommender):
    histories = pd.DataFrame({"user_id": ["b", "a", "b"], "item_id": ["i1", "i2", "i3"]})
    found = fitted.recommend(histories=histories, n=2)
    assert found["user_id"].tolist() == ["b", "b", "a", "a"]
    for who, items in (("a", ["i2"]), ("b", ["i1", "i3"])):
        single = [one.item_id for one in fitted.recommender.recommend(items, n=2)]
        assert found.loc[found["user_id"] == who, "item_id"].tolist() == single
    assert fitted.looks_for(histories=histories).index.tolist() == ["b", "a"]


def test_looks_for_has_a_column_per_aspect(fitted: FrameRecommender):
    found = fitted.looks_for()
    assert found.columns.tolist() == ASPECTS and found.index.name == "user_id" and len(found) == 30
    single = fitted.recommender.looks_for("u3")
    assert found.loc["u3"].tolist() == pytest.approx(list(single.values()), abs=1e-6)


def test_terms_and_base_part_of_an_explanation_add_up_to_the_score(fitted: FrameRecommender):
    found = fitted.explain("i5", ["u1", "u2"])
    assert found["aspect"].tolist() == ASPECTS * 2
    by_user = found.groupby("user_id")
    assert (by_user["base_part"].first() + by_user["term"].sum()).tolist() == pytest.approx(
        by_user["score"].first().tolist(), abs=1e-5
    )
    assert found["item_value"].tolist() == scores().loc[5, ASPECTS].tolist() * 2
    assert len(found.attrs["sentences"]) == 2 and "“Title 5”" in found.attrs["sentences"][0]
    assert fitted.explain("i5", "u1", aspects=["humour"])["aspect"].tolist() == ["humour"]


def test_metrics_are_a_row_per_part_and_candidate_set(fitted: FrameRecommender):
    found = fitted.metrics().set_index(["part", "candidates"])
    stored = read_json(f"{fitted.recommender.run}/metrics.json")
    assert found.loc[("test", "full"), "ndcg_at_10"] == stored["test"]["full"]["ndcg_at_10"]
    assert found.index.tolist() == [("validation", "full"), ("test", "full")]


def test_the_folder_goes_with_the_recommender_and_can_be_saved(tmp_path: Path):
    recommender = fit(prepare_frame(orders(), settings=LOOSE), settings={**SMALL, "epochs": 1})
    place, expected = Path(recommender.folder.name), recommender.recommend("u1", 2)["item_id"].tolist()
    recommender.save(str(tmp_path / "run"))
    del recommender
    assert not place.exists()
    assert [one.item_id for one in load_recommender(str(tmp_path / "run")).recommend("u1", n=2)] == expected


def test_it_works_inside_a_running_event_loop():
    """As in a notebook, where `asyncio.run` fails; tests/test_wheel.py sees that Ray is not even imported."""

    async def cells() -> tuple[int, int]:
        recommender = fit(prepare_frame(orders(), settings=LOOSE), scores(), settings={**SMALL, "epochs": 1})
        return len(recommender.recommend(n=1)), len(recommender.looks_for("u1"))

    assert asyncio.run(cells()) == (30, 1)


# --- refusals -----------------------------------------------------------------------------------


def at(frame: pd.DataFrame, row: int, column: str, value: object) -> pd.DataFrame:
    """The frame with another value in a row, counted from 1."""
    changed = frame.astype({column: object})
    changed.iloc[row - 1, changed.columns.get_loc(column)] = value
    return changed.infer_objects()


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("user_id", 3, None, "interactions: column 'user_id': row 3 has no id, but None"),
        ("split", 4, "valid", "interactions: column 'split', row 4 has 'valid', not train, validation, test"),
        ("split", 6, "train", "interactions: column 'split', row 6 has train after a later part of the same user"),
        ("position", 2, 0, "interactions: column 'position', row 2 has 0.0 twice for a user"),
        ("position", 2, None, "interactions: column 'position' has an empty or infinite value in row 2"),
        ("rating", 5, np.inf, "interactions: column 'rating' has an infinite value in row 5"),
        ("item_id", 2, 7, "interactions: column 'item_id' holds values of several types: row 2 has 7, row 1 has 'i"),
    ],
)
def test_errors_in_interactions_name_column_and_row(column, row, value, message):
    wrong = at(prepare_frame(orders(), settings=LOOSE), row, column, value)
    if (column, row) == ("split", 6):
        wrong = at(wrong, 5, "split", "validation")
    with pytest.raises(ValueError, match=message):
        fit(wrong, settings=SMALL)


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("pace", 3, None, "^item_scores: column 'pace' has an empty or infinite value in row 3"),
        ("pace", 4, "high", "^item_scores: column 'pace' holds values of several types: row 4 has 'high', row 1 has "),
        ("item_id", 2, "i0", "^item_scores: id i0 occurs more than once"),
    ],
)
def test_errors_in_scores_name_column_and_row(column, row, value, message):
    with pytest.raises(ValueError, match=message):
        fit(prepare_frame(orders(), settings=LOOSE), at(scores(), row, column, value), settings=SMALL)


def test_what_fit_cannot_do_is_said(fitted: FrameRecommender):
    interactions = prepare_frame(orders(), settings=LOOSE)
    with pytest.raises(ConfigError, match="interactions: no column position, split; the frame has the columns user_id"):
        fit(orders())
    with pytest.raises(ConfigError, match="item_scores: no column item_id; the frame has the columns sku, pace"):
        fit(interactions, pd.DataFrame({"sku": ["i1"], "pace": [3]}))
    with pytest.raises(ConfigError, match="settings of fit is no valid TrainConfig:\n  epoch: no such field; did you"):
        fit(interactions, settings={"epoch": 3})
    with pytest.raises(ConfigError, match="fit: output is no setting here"):
        fit(interactions, settings={"output": "x"})
    with pytest.raises(ValueError, match=r"^interactions has no user u99 \(1 unknown, 30 known users\)"):
        fitted.recommend(["u1", "u99"])
    with pytest.raises(ValueError, match="steer: no aspect speed; the run has: pace, tension level, humour"):
        fitted.recommend("u1", steer={"speed": 1})
    with pytest.raises(ValueError, match="users and histories are two ways"):
        fitted.recommend([])
    with pytest.raises(ValueError, match="interactions has no item i99"):
        fitted.explain("i99", ["u1"])
    base = fit(interactions, settings={**SMALL, "epochs": 1})
    with pytest.raises(ValueError, match=r"^recommender has no guided user state: train with item_scores"):
        base.looks_for()
