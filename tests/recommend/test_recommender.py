"""A trained recommender in Python: lists against plain loops, given histories, errors, exported vectors."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from toy_data import random_scores, walks, write_csv, write_prepared, write_score_run

from raygr import files, runs
from raygr.cli import main
from raygr.compare.config import CompareConfig
from raygr.compare.stage import compare
from raygr.config import ConfigError
from raygr.data.ids import write_id_lines
from raygr.data.vector_tables import read_vectors
from raygr.explain.stage import explain_item
from raygr.export import stage as export_stage
from raygr.export.config import ExportConfig
from raygr.export.stage import export
from raygr.metrics.z_scores import standardise
from raygr.models.workers import Share
from raygr.recommend.config import RecommendConfig
from raygr.recommend.recommender import SCORES_AT_ONCE, Histories, Recommender, load_recommender, with_rows
from raygr.recommend.stage import (
    RecommendingActor,
    actor_settings,
    contiguous,
    list_counts,
    read_subjects,
    recommend,
    recommendations,
    without_lists,
)
from raygr.schema import RECOMMENDATION_SCHEMA, VECTOR_SCHEMA
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.outputs import write_outputs
from raygr.train.serving import read_serving
from raygr.train.state import start_training

torch.set_num_threads(1)

USERS, ITEMS, LENGTH = 14, 30, 9
HISTORIES = walks(USERS, ITEMS, LENGTH, seed=7)


def trained(folder: Path, *, user_ids: list[str] | None = None, **changes: Any) -> str:
    """A finished train run of a model with random weights, whose learned maps are not 0."""
    ratings = [[1.0 + (user + step) % 5 for step in range(LENGTH)] for user in range(USERS)]
    write_prepared(folder / "prepare", HISTORIES, items=ITEMS, user_ids=user_ids, ratings=ratings)
    scores_IA = random_scores(ITEMS, 2, seed=3)
    path = write_csv(folder / "s.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ["a", "b"])
    guided = {"item_scores": path, "user_scores": "profile", "user_side": "add", "fusion": "add"}
    settings = {"base_width": 8, "max_history": 6} | (guided if "item_scores" not in changes else {}) | changes
    config = TrainConfig(output=str(folder / "train"), data=str(folder / "prepare"), **settings)
    run = runs.start_run(config.output, job="train", config=config)
    training = start_training(config, load_inputs(config), torch.device("cpu"), Share())
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    training.best_weights = dict(training.model.state_dict())
    training.progress.lines.append({"seconds": 1.0})
    write_outputs(training)
    runs.finish_run(run, inputs=[config.data, path], counts={})
    return run.path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(tmp_path_factory.mktemp("refined"))


@pytest.fixture(scope="module")
def recommender(run: str) -> Recommender:
    return load_recommender(run)


def naive_scores(recommender: Recommender, history: list[int], guided_A: torch.Tensor) -> torch.Tensor:
    """Scores of items 1..I after one history alone, from the model's parts."""
    model, window = recommender.model, history[-6:]
    with torch.inference_mode():
        rows_ID = model.embedding.item_rows()
        state_1D = model.encode(rows_ID, torch.tensor([window]), torch.tensor([len(window)]))
        return (model.embedding.refined_state(state_1D[:, None], guided_A[None])[0, 0] @ rows_ID.T).double()


@pytest.fixture(scope="module")
def steerable(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """With a guided user state."""
    state = {"user_scores": "history", "user_side": "learned", "fusion": "concat"}
    return load_recommender(trained(tmp_path_factory.mktemp("steerable"), **state))


def test_what_a_user_looks_for_makes_the_score_and_is_exported(steerable: Recommender):
    """The user's vector ends with what `looks_for` says, and an item's row with its standardised scores."""
    looks_for = steerable.looks_for("u3")
    assert list(looks_for) == ["a", "b"] and all(abs(value) > 0.01 for value in looks_for.values())
    vector_D, found = steerable.states(steerable.of_users(["u3"]))[0], steerable.recommend("u3", n=4)
    assert vector_D[-2:].tolist() == list(looks_for.values())
    standard_IA = torch.tensor(standardise(random_scores(ITEMS, 2, seed=3))[0], dtype=torch.float32)
    torch.testing.assert_close(steerable.rows_ID[:, -2:], standard_IA)
    scores_I = steerable.rows_ID @ vector_D
    assert [one.score for one in found] == pytest.approx([float(scores_I[int(one.item_id[1:]) - 1]) for one in found])


def test_ratings_of_the_history_count_for_a_user_and_are_not_known_of_a_history(steerable: Recommender):
    """u3's own history without its ratings looks for something else; a run that is moved knows the ratings."""
    items = [f"i{item}" for item in HISTORIES[3]]
    assert steerable.looks_for("u3") != pytest.approx(steerable.looks_for(items))
    serving = read_serving(steerable.run)
    assert serving.rating_N[serving.first_U[3] : serving.first_U[4]].tolist() == [1.0 + (3 + s) % 5 for s in range(9)]


@pytest.mark.parametrize("aspect", ["a", "b"])
def test_steering_up_raises_the_mean_level_of_the_list_monotonically(steerable: Recommender, aspect: str):
    column, scores_IA = "ab".index(aspect), random_scores(ITEMS, 2, seed=3)
    for user in ("u0", "u5"):
        lists = [steerable.recommend(user, n=6, steer={aspect: amount}) for amount in (-4, -1, -0.2, 0, 0.2, 1, 4)]
        levels = [np.mean([scores_IA[int(one.item_id[1:]) - 1, column] for one in found]) for found in lists]
        assert levels == sorted(levels) and levels[0] < levels[-1]
        assert lists[3] == steerable.recommend(user, n=6)


def test_steering_is_refused_where_it_cannot_work(steerable: Recommender, recommender: Recommender):
    with pytest.raises(ValueError, match="steer: no aspect pace; the run has: a, b"):
        steerable.recommend("u0", steer={"pace": 1.0})
    with pytest.raises(ValueError, match="has no guided user state: train with user_scores: history"):
        recommender.recommend("u0", steer={"a": 1.0})
    with pytest.raises(ValueError, match="has no guided user state"):
        recommender.looks_for("u0")


# --- new items -----------------------------------------------------------------------------------

SCORES_IA = random_scores(ITEMS, 2, seed=3)
HISTORY_STATE = {"user_scores": "history", "user_side": "learned"}


def all_scores(recommender: Recommender, who: str | list[str]) -> torch.Tensor:
    with torch.inference_mode():
        return recommender.scores(recommender.encoded(recommender.histories_of(who)))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_map": "linear", "model": "gru4rec"},
        {"fusion": "concat", "user_side": "concat", "linear_map": True},
        {"fusion": "none", **HISTORY_STATE},
        {"fusion": "add", "model": "bert4rec", **HISTORY_STATE},
    ],
    ids=["add", "gru4rec", "concat", "state alone", "bert4rec"],
)
def test_a_new_item_scores_as_a_known_one_without_a_learned_part(tmp_path: Path, changes: dict[str, Any]):
    """N has the scores of i5, whose learned row is 0; it differs by the offset alone, also in a history."""
    before = load_recommender(trained(tmp_path, **changes), new_item_offset=0.7)
    with torch.no_grad():
        before.model.embedding.base_ID[4] = 0
    before = with_rows(before)
    after = before.with_new_items({"N": SCORES_IA[4].tolist(), "M": {"b": SCORES_IA[8, 1]}})
    for who in ("u3", ["i2", "i9"]):
        known_I, scores_I = all_scores(before, who), all_scores(after, who)
        torch.testing.assert_close(scores_I[:ITEMS], known_I)
        assert float(scores_I[ITEMS]) == pytest.approx(float(known_I[4]) + 0.7, rel=1e-4)
    torch.testing.assert_close(all_scores(after, ["i2", "N"]), all_scores(after, ["i2", "i5"]))
    again = before.with_new_items({"N": SCORES_IA[4].tolist()}).with_new_items({"M": [np.nan, SCORES_IA[8, 1]]})
    assert torch.equal(again.rows_ID, after.rows_ID) and again.index_of_item == after.index_of_item
    assert before.item_ids_I.tolist() == [f"i{item}" for item in range(1, ITEMS + 1)]  # it did not change


def test_new_scores_are_measured_on_the_scale_of_the_training(steerable: Recommender, recommender: Recommender):
    mean_A, deviation_A = SCORES_IA.mean(axis=0), SCORES_IA.std(axis=0)
    found = steerable.with_new_items({"N": [9.5, 1.0], "M": {"a": 2.0}})
    rows_SA = found.model.embedding.standard_IA[-2:].numpy()
    np.testing.assert_allclose(rows_SA[0], (np.array([9.5, 1.0]) - mean_A) / deviation_A, rtol=1e-5)
    np.testing.assert_allclose(rows_SA[1], [(2.0 - mean_A[0]) / deviation_A[0], 0.0], rtol=1e-5)
    levels = recommender.with_new_items({"N": [9.0, 11.0], "M": {"a": 1.0}}).model.embedding.features_IF[-2:]
    assert levels[0].tolist() == [0] * 7 + [0.5, 1, 0.5] + [0] * 8 + [0.5, 1]  # 11 is beyond the scale: its end
    assert levels[1].tolist() == [1, 0.5] + [0] * 18  # the missing score of b adds nothing


def test_new_items_have_the_calibrated_offset_unless_another_is_given(steerable: Recommender):
    calibrated = read_serving(steerable.run).new_item_offset
    assert steerable.new_item_offset == calibrated != 0
    new = {"N": [5.0, 5.0]}
    scores = {
        offset: float(all_scores(load_recommender(steerable.run, new_item_offset=offset).with_new_items(new), "u3")[-1])
        for offset in (None, 0.0, 100.0, -100.0)
    }
    assert scores[None] == pytest.approx(scores[0.0] + calibrated, abs=1e-4)
    assert scores[100.0] == pytest.approx(scores[0.0] + 100, abs=1e-4)
    first, last = (load_recommender(steerable.run, new_item_offset=one).with_new_items(new) for one in (100.0, -100.0))
    assert first.recommend("u3", n=1)[0].item_id == "N" == last.recommend("u3", n=100)[-1].item_id
    assert "N" not in [one.item_id for one in first.recommend(["i3", "N"], n=100)]
    assert first.recommend("u3", n=3, mmr_weight=1.0)[0].item_id == "N"


def test_new_items_are_steered(steerable: Recommender):
    wider = steerable.with_new_items({"high": {"a": 30.0}, "low": {"a": -20.0}})
    for amount, item in ((9.0, "high"), (-9.0, "low")):
        assert wider.recommend("u0", n=1, steer={"a": amount})[0].item_id == item


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"N": {"a": 1.0, "pace": 2.0}}, "N: no aspect pace; the run has: a, b"),
        ({"N": [1.0]}, "N has 1 scores; the run has 2 aspects: a, b"),
        ({"N": {"a": "high"}}, "N: a is 'high', not a finite number"),
        ({"N": [1.0, np.inf]}, "N: b is inf, not a finite number"),
        ({"N": [1, 2], "i3": [1, 2], "i7": [3, 4]}, r"already in the catalogue: i3, i7 \(2 such\)"),
        ({"N": {}, "M": [1, 2]}, r"without any score: N \(1 such\)"),
        ({}, "new_items: no item is in it"),
        ("id,a\nN,1\n", r"new\.csv: no aspect b; it has: a"),
        ("id,b,a,c\nN,1,2,3\n", r"new\.csv: no aspect c; the run has: a, b"),
        ("id,a,b\nN,1,2\nM,3,high\n", r"new\.csv: column 'b' is string, not numeric .*row 2 has 'high'"),
        ("id,a,b\nN,1,2\nM,inf,1\n", r"new\.csv: column 'a' has an infinite value in row 2"),
        ("id,a,b\nN,1,2\nN,3,4\n", r"new\.csv: id N occurs more than once"),
        ("id,a,b\nN,1,2\ni4,3,4\n", r"new\.csv: already in the catalogue: i4"),
    ],
)
def test_wrong_new_items_are_refused(steerable: Recommender, tmp_path: Path, new: Any, message: str):
    if isinstance(new, str):
        (tmp_path / "new.csv").write_text(new)
        new = str(tmp_path / "new.csv")
    with pytest.raises(ValueError, match=message):
        steerable.with_new_items(new)


def test_new_items_come_from_a_score_run_or_parquet(steerable: Recommender, tmp_path: Path):
    scored = write_score_run(tmp_path / "scored", {"N": [3.0, 8.0], "M": [None, 2.0]}, aspects=["b", "a"])
    pq.write_table(pa.table({"id": ["M", "N"], "a": [2.0, 8.0], "b": [None, 3.0]}), tmp_path / "new.parquet")
    expected = steerable.with_new_items({"M": {"a": 2.0}, "N": [8.0, 3.0]})
    for path in (scored, str(tmp_path / "new.parquet")):
        found = steerable.with_new_items(path)
        assert found.item_ids_I.tolist()[-2:] == ["M", "N"] and torch.equal(found.rows_ID, expected.rows_ID)


def test_an_explanation_refuses_new_items_because_the_data_do_not_hold_them(steerable: Recommender):
    with pytest.raises(ValueError, match="prepare does not hold the new items of this recommender"):
        explain_item(steerable.with_new_items({"N": [1.0, 2.0]}), "N", ["u1"])


def test_a_run_that_cannot_rank_new_items_says_so(tmp_path: Path):
    base = load_recommender(trained(tmp_path / "base", item_scores=None))
    assert base.new_item_offset == 0
    with pytest.raises(ValueError, match="was trained without item_scores, which are all a new item has"):
        base.with_new_items({"N": [1.0]})
    control = load_recommender(trained(tmp_path / "control", control="shuffled"))
    with pytest.raises(ValueError, match="is a control arm"):
        control.with_new_items({"N": [1.0, 2.0]})


def test_new_items_of_a_file_are_recommended_exported_and_stand_in_histories(tmp_path: Path):
    """After the run was moved and its data and scores are gone; empty cells of the file are missing scores."""
    path = shutil.move(trained(tmp_path, fusion="none", **HISTORY_STATE), tmp_path / "moved")
    shutil.rmtree(tmp_path / "prepare")
    (tmp_path / "s.csv").unlink()
    new = tmp_path / "new.csv"
    new.write_text("item,b,a\n007,2,9.5\nN,,4\n")
    wider = load_recommender(str(path), new_item_offset=0.3).with_new_items(str(new))
    assert wider.item_ids_I.tolist()[-2:] == ["007", "N"]
    expected = load_recommender(str(path), new_item_offset=0.3).with_new_items({"007": [9.5, 2], "N": {"a": 4}})
    assert torch.equal(wider.rows_ID, expected.rows_ID)
    (tmp_path / "h.jsonl").write_text('{"history_id": "h", "item_ids": ["i3", "N"]}\n')
    for name, given in (("users", []), ("histories", ["--set", f"histories={tmp_path / 'h.jsonl'}"])):
        settings = [f"output={tmp_path / name}", f"train_run={path}", "new_item_offset=0.3", "n=40"]
        words = [word for one in settings for word in ("--set", one)]
        assert main(["recommend", *words, "--new-items", str(new), *given]) == 0
    table = files.read_table(str(tmp_path / "users" / "recommendations"))
    rows = [(row["item_id"], row["score"]) for row in table.to_pylist() if row["subject_id"] == "u2"]
    assert [item for item, _ in rows] == [one.item_id for one in wider.recommend("u2", n=40)]
    assert len(rows) == ITEMS - LENGTH + 2 and {"007", "N"} < {item for item, _ in rows}
    found = files.read_table(str(tmp_path / "histories" / "recommendations"))["item_id"].to_pylist()
    assert found == [one.item_id for one in wider.recommend(["i3", "N"], n=40)] and "N" not in found
    assert str(new) in runs.read_run(str(tmp_path / "users"), job="recommend").inputs
    config = ExportConfig(
        output=str(tmp_path / "export"), train_run=str(path), new_item_scores=str(new), new_item_offset=0.3
    )
    exported = export(config)
    items_ID, users_UD = (np.load(exported.file(f"{kind}_vectors.npy")) for kind in ("item", "user"))
    scores = {item: float(items_ID[wider.index_of_item[item] - 1] @ users_UD[2]) for item, _ in rows}
    assert scores == pytest.approx(dict(rows), rel=1e-4)


def test_re_ranked_lists_with_vectors_of_their_own_know_new_items(tmp_path: Path):
    path = trained(tmp_path)
    vectors = {f"i{item + 1}": row.tolist() for item, row in enumerate(SCORES_IA)} | {"N": [1.0, 9.0]}
    scores = write_csv(tmp_path / "lists.csv", vectors, ["a", "b"])
    wider = load_recommender(path, list_scores=scores).with_new_items({"N": [1.0, 9.0]})
    standard_A = standardise(np.array(list(vectors.values())))[0][-1]
    np.testing.assert_allclose(wider.unit_ID[-1].numpy(), standard_A / np.linalg.norm(standard_A))


# --- lists ---------------------------------------------------------------------------------------


def naive_list(scores_I: torch.Tensor, history: list[int], n: int) -> list[str]:
    left = [item for item in range(1, ITEMS + 1) if item not in history]
    return [f"i{item}" for item in sorted(left, key=lambda item: -scores_I[item - 1])[:n]]


@pytest.mark.parametrize("user", [0, 5, USERS - 1])
def test_a_users_list_is_that_of_a_plain_loop_over_the_whole_history(recommender: Recommender, user: int):
    scores_I = naive_scores(recommender, HISTORIES[user], recommender.model.embedding.users_UA[user])
    found = recommender.recommend(f"u{user}", n=7)
    assert [one.item_id for one in found] == naive_list(scores_I, HISTORIES[user], 7)
    scores = [float(scores_I[int(one.item_id[1:]) - 1]) for one in found]
    assert [one.score for one in found] == pytest.approx(scores, rel=1e-4)


def test_a_given_history_gets_the_average_users_list(recommender: Recommender):
    history = [3, 17, 8]
    expected = naive_list(naive_scores(recommender, history, torch.zeros(2)), history, 5)
    assert [one.item_id for one in recommender.recommend(["i3", "i17", "i8"], n=5)] == expected
    own = recommender.recommend([f"i{item}" for item in HISTORIES[2]], n=5)
    assert own != recommender.recommend("u2", n=5)  # the user that has a vector has other scores


def test_nothing_seen_comes_back_and_a_list_ends_with_the_catalogue(recommender: Recommender):
    for weight in (None, 0.5, 0.0):
        found = [one.item_id for one in recommender.recommend("u1", n=100, mmr_weight=weight)]
        assert sorted(found) == sorted(f"i{item}" for item in range(1, ITEMS + 1) if item not in HISTORIES[1])


def test_mmr_weight_1_keeps_the_order_and_less_makes_lists_diverse(recommender: Recommender):
    plain = [one.item_id for one in recommender.recommend("u3", n=6)]
    assert [one.item_id for one in recommender.recommend("u3", n=6, mmr_weight=1.0)] == plain
    diverse = [one.item_id for one in recommender.recommend("u3", n=6, mmr_weight=0.1)]
    assert diverse[0] == plain[0] and diverse != plain

    def closeness(items: list[str]) -> float:
        unit_YD = recommender.unit_ID[[int(item[1:]) - 1 for item in items]]
        return float((unit_YD @ unit_YD.T).mean())

    assert closeness(diverse) < closeness(plain)


def test_unknown_ids_are_named(recommender: Recommender):
    with pytest.raises(ValueError, match=r"prepare has no user nobody \(1 unknown, 14 known users\)"):
        recommender.recommend("nobody")
    with pytest.raises(ValueError, match=r"has no item i99, x \(2 unknown"):
        recommender.recommend(["i1", "i99", "x"])
    with pytest.raises(ValueError, match="history 1 is empty"):
        recommender.recommend([])


def test_changed_or_lost_data_are_refused(tmp_path: Path):
    path = trained(tmp_path)
    scores = tmp_path / "s.csv"
    scores.write_text(scores.read_text().replace("i1,", "i1,9"))
    recommender = load_recommender(path)
    with pytest.raises(runs.RunError, match=r"trained on other content of .*s\.csv"):
        explain_item(recommender)
    scores.unlink()
    with pytest.raises(runs.RunError, match=r"trained on .*s\.csv, which is not there"):
        explain_item(recommender)


def test_a_moved_run_serves_from_anywhere_without_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run with relative paths is moved, and read from another working directory without data and scores."""
    monkeypatch.chdir(tmp_path)
    path = trained(Path())
    before = load_recommender(path)
    wanted = [before.recommend(who, n=5) for who in ("u3", ["i3", "i17"])]
    vectors_UD = before.states(before.of_users(before.user_ids_U.tolist()))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(path, tmp_path / "elsewhere" / "moved")
    shutil.rmtree(tmp_path / "prepare")
    (tmp_path / "s.csv").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    after = load_recommender("moved")
    assert [after.recommend(who, n=5) for who in ("u3", ["i3", "i17"])] == wanted
    assert torch.equal(after.states(after.of_users(after.user_ids_U.tolist())), vectors_UD)
    assert len(read_subjects(RecommendConfig(output="x", train_run="moved"), read_serving("moved"))) == USERS
    found = export(ExportConfig(output="export", train_run="moved"))
    assert np.array_equal(np.load(found.file("user_vectors.npy")), vectors_UD.numpy())


def test_a_run_of_an_older_version_says_to_train_again(tmp_path: Path):
    path = trained(tmp_path)
    record = files.read_json(f"{path}/serving.json")
    del record["new_item_offset"]
    files.write_json(record, f"{path}/serving.json")
    with pytest.raises(runs.RunError, match="an older version of raygr trained it, and kept no item scores; train it"):
        load_recommender(path)
    Path(path, "serving.json").unlink()
    with pytest.raises(runs.RunError, match=r"holds no serving\.json: an older version of raygr trained it; train it"):
        load_recommender(path)


def test_serving_needs_neither_ray_nor_vllm(run: str):
    code = "import sys; from raygr.recommend.recommender import load_recommender; "
    code += f"load_recommender({run!r}).recommend('u3'); "
    code += "print([name for name in ('ray', 'vllm', 'peft') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def test_the_base_model_is_served_too(tmp_path: Path):
    path = trained(tmp_path, item_scores=None)
    recommender = load_recommender(path)
    same = [recommender.recommend(who, n=4) for who in ("u4", [f"i{item}" for item in HISTORIES[4]])]
    assert [one.item_id for one in same[0]] == [one.item_id for one in same[1]]


@pytest.mark.parametrize(
    "changes",
    [{"model": "gru4rec"}, {"model": "bert4rec"}, {"model": "bert4rec", "train_user_guided": True}],
    ids=["gru4rec", "bert4rec", "trained users"],
)
def test_every_model_is_served_and_its_exported_vectors_rank_as_it_does(tmp_path: Path, changes: dict[str, Any]):
    path = trained(tmp_path, **changes)
    recommender = load_recommender(path)
    model = recommender.model
    found = export(ExportConfig(output=str(tmp_path / "export"), train_run=path))
    items_ID, users_UD = (np.load(found.file(f"{kind}_vectors.npy")) for kind in ("item", "user"))
    for user in (0, 5, USERS - 1):
        vector_1A = model.embedding.tuned_users(model.embedding.users_UA[user][None], torch.tensor([user]))
        scores_I = naive_scores(recommender, HISTORIES[user], vector_1A[0])
        ids = [one.item_id for one in recommender.recommend(f"u{user}", n=7)]
        assert ids == naive_list(scores_I, HISTORIES[user], 7)
        assert ids == naive_list(torch.from_numpy(items_ID.astype(float) @ users_UD[user]), HISTORIES[user], 7)
    assert len(recommender.recommend(["i3", "i17", "i8"], n=5)) == 5  # an id that is no user of the data


def test_a_batch_has_the_rows_of_its_histories_alone(run: str, recommender: Recommender):
    config = RecommendConfig(output="unused", train_run=run, n=4)
    subjects = read_subjects(config, read_serving(run))
    table = recommendations(recommender, subjects, config)
    assert table.schema.equals(RECOMMENDATION_SCHEMA) and len(table) == USERS * 4
    for user in range(USERS):
        rows = table.slice(4 * user, 4).to_pylist()
        alone = recommender.recommend(f"u{user}", n=4)
        assert [(row["subject_id"], row["rank"]) for row in rows] == [(f"u{user}", rank) for rank in (1, 2, 3, 4)]
        assert [row["item_id"] for row in rows] == [one.item_id for one in alone]
        assert [row["score"] for row in rows] == pytest.approx([one.score for one in alone], rel=1e-4)


def test_some_users_in_their_order_and_histories_from_a_file(run: str, recommender: Recommender, tmp_path: Path):
    (tmp_path / "users.txt").write_text("u9\nu2\n\n")
    for users in ({"users": ("u9", "u2")}, {"users_file": str(tmp_path / "users.txt")}):
        config = RecommendConfig(output="x", train_run=run, n=1, **users)
        table = recommendations(recommender, read_subjects(config, read_serving(run)), config)
        assert table["subject_id"].to_pylist() == ["u9", "u2"]
        assert table["item_id"].to_pylist() == [recommender.recommend(u, n=1)[0].item_id for u in ("u9", "u2")]
    (tmp_path / "h.jsonl").write_text(
        '{"history_id": "a", "item_ids": ["i3", "i4"]}\n{"history_id": "b", "item_ids": ["i5"]}\n'
    )
    rows = {"history_id": ["a", "b"], "item_ids": [["i3", "i4"], ["i5"]]}
    pq.write_table(pa.table(rows), tmp_path / "h.parquet")
    for name in ("h.jsonl", "h.parquet"):
        config = RecommendConfig(output="x", train_run=run, n=2, histories=str(tmp_path / name))
        table = recommendations(recommender, read_subjects(config, read_serving(run)), config)
        assert table["subject_id"].to_pylist() == ["a", "a", "b", "b"]
        assert table["item_id"].to_pylist()[2:] == [one.item_id for one in recommender.recommend(["i5"], n=2)]


def test_wrong_histories_are_named_with_file_and_row(run: str, tmp_path: Path):
    path = tmp_path / "h.jsonl"
    for text, message in [
        ('{"history_id": "a", "item_ids": ["i3"]}\n{"history_id": "b", "item_ids": []}\n', "history in row 2 is empty"),
        ('{"history_id": "a", "item_ids": ["i3", "zz"]}\n', "no item zz"),
        ('{"history_id": "a", "items": ["i3"]}\n', "no column item_ids; it has history_id, items"),
        ('{"history_id": 7.5, "item_ids": ["i3"]}\n', "history_id: row 1 has no id.*text or whole numbers"),
        ('{"history_id": "a", "item_ids": ["i3", true]}\n', "item_ids: row 1 has no id"),
        ('{"history_id": "a", "item_ids": ["i3"]}\n{"history_id": "a", "item_ids": ["i4"]}\n', "a is there more than"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"h\.jsonl: .*{message}"):
            read_subjects(RecommendConfig(output="x", train_run=run, histories=str(path)), read_serving(run))


def test_exported_vectors_rank_as_the_model_does(run: str, recommender: Recommender, tmp_path: Path):
    found = export(ExportConfig(output=str(tmp_path / "export"), train_run=run))
    tables = {kind: pq.read_table(found.file(f"{kind}_vectors.parquet")) for kind in ("item", "user")}
    assert all(table.schema.equals(VECTOR_SCHEMA) for table in tables.values())
    assert tables["item"]["id"].to_pylist() == [f"i{i}" for i in range(1, ITEMS + 1)]
    items_ID, users_UD = (np.load(found.file(f"{kind}_vectors.npy")) for kind in ("item", "user"))
    assert items_ID.dtype == np.float32 and users_UD.shape == (USERS, 8)
    np.testing.assert_array_equal(np.array(tables["user"]["vector"].to_pylist(), np.float32), users_UD)
    assert Path(found.file("user_vectors.ids.txt")).read_text().split() == [f"u{u}" for u in range(USERS)]
    for user in range(USERS):
        scores_I = torch.from_numpy(items_ID.astype(float) @ users_UD[user])
        assert naive_list(scores_I, HISTORIES[user], 8) == [
            one.item_id for one in recommender.recommend(f"u{user}", n=8)
        ]


def test_an_interrupted_export_goes_on_and_writes_the_same(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = export(ExportConfig(output=str(tmp_path / "whole"), train_run=run))
    monkeypatch.setattr(export_stage, "SHARD_USERS", 5)
    encoded: list[int] = []
    states = Recommender.states

    def interrupted(self: Recommender, histories: Histories) -> torch.Tensor:
        encoded.append(len(histories.user_B))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return states(self, histories)

    monkeypatch.setattr(Recommender, "states", interrupted)
    config = ExportConfig(output=str(tmp_path / "export"), train_run=run)
    with pytest.raises(KeyboardInterrupt):
        export(config)
    found = export(config)
    assert encoded == [5, 5, 4, 4]  # the last shard twice
    for name in ("user_vectors.npy", "item_vectors.npy", "user_vectors.ids.txt"):
        assert Path(found.file(name)).read_bytes() == Path(whole.file(name)).read_bytes()
    assert pq.read_table(found.file("user_vectors.parquet")).equals(pq.read_table(whole.file("user_vectors.parquet")))
    assert not Path(found.file("user_parts")).exists()


@pytest.mark.parametrize("mmr_weight", [None, 0.5])
def test_users_in_small_blocks_have_the_same_lists(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch, mmr_weight: float | None
):
    everyone = recommender.of_users([f"u{user}" for user in range(USERS)])
    lists, score_BY = recommender.lists(everyone, 7, mmr_weight=mmr_weight)
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 3 * ITEMS)
    in_blocks, score_of_blocks_BY = recommender.lists(everyone, 7, mmr_weight=mmr_weight)
    assert torch.equal(in_blocks.place_BY, lists.place_BY)
    torch.testing.assert_close(score_of_blocks_BY, score_BY)


def test_exported_vectors_come_back_as_scores(run: str, tmp_path: Path):
    found = export(ExportConfig(output=str(tmp_path / "export"), train_run=run))
    expected = np.load(found.file("item_vectors.npy"))
    for name in ("item_vectors.parquet", "item_vectors.npy"):
        vectors = read_vectors(found.file(name), subjects="items", column="expected", aspects=None)
        assert vectors.ids_S.tolist() == [f"i{i}" for i in range(1, ITEMS + 1)]
        np.testing.assert_array_equal(vectors.values_SA.astype(np.float32), expected)


def test_ids_with_other_line_ends_survive_export_and_come_back(tmp_path: Path):
    ids = ["a\u2028b", "c\x85d", " e ", *(f"u{user}" for user in range(3, USERS))]
    path = trained(tmp_path, user_ids=ids, item_scores=None)
    found = export(ExportConfig(output=str(tmp_path / "export"), train_run=path))
    for name in ("user_vectors.parquet", "user_vectors.npy"):
        assert read_vectors(found.file(name), subjects="users", column="expected", aspects=None).ids_S.tolist() == ids
    write_id_lines(ids[:3], str(tmp_path / "users.txt"))
    config = RecommendConfig(output="x", train_run=path, users_file=str(tmp_path / "users.txt"))
    assert read_subjects(config, read_serving(path))["subject_id"].to_pylist() == ids[:3]


def test_an_id_with_a_line_break_is_refused_before_anything_is_exported(tmp_path: Path):
    ids = ["a\nb", *(f"u{user}" for user in range(1, USERS))]
    path = trained(tmp_path, user_ids=ids, item_scores=None)
    with pytest.raises(ValueError, match=r"'a\\nb' \(1 such\) holds a line break"):
        export(ExportConfig(output=str(tmp_path / "export"), train_run=path))
    assert not (tmp_path / "export").exists()


def test_an_actor_writes_one_part_per_batch_and_the_same_one_again(run: str, recommender: Recommender, tmp_path: Path):
    scores = str(Path(run).parent / "s.csv")
    config = RecommendConfig(output=str(tmp_path), train_run=run, n=3, mmr_weight=0.2, mmr_scores=scores)
    actor = RecommendingActor(**actor_settings(config, device="cpu"))
    subjects = read_subjects(config, read_serving(run))
    for first, last in ((0, 10), (10, USERS), (10, USERS)):
        assert actor(subjects.slice(first, last - first))["subjects"].tolist() == [last - first]
    assert sorted(path.name for path in (tmp_path / "recommendations").iterdir()) == [
        "part-000000000-000000009.parquet",
        "part-000000010-000000013.parquet",
    ]
    table = files.read_table(str(tmp_path / "recommendations"))
    guided = load_recommender(run, list_scores=scores)
    expected = [one.item_id for user in range(USERS) for one in guided.recommend(f"u{user}", n=3, mmr_weight=0.2)]
    refined = [one.item_id for user in range(USERS) for one in recommender.recommend(f"u{user}", n=3, mmr_weight=0.2)]
    assert table["item_id"].to_pylist() == expected != refined


@pytest.mark.parametrize("name", ["large", "view", "dictionary", "fixed", "polars", "pandas"])
def test_histories_of_any_writer_are_read(run: str, tmp_path: Path, name: str):
    path, ids = str(tmp_path / "h.parquet"), pa.array(["a", "b"])
    lists = [["i3", "i4"], ["i5", "i3"]]
    match name:
        case "polars":
            polars.DataFrame({"history_id": ["a", "b"], "item_ids": lists}).write_parquet(path)
        case "pandas":
            pandas.DataFrame({"history_id": ["a", "b"], "item_ids": lists}).to_parquet(path)
        case _:
            text, listed = {
                "large": (pa.large_string(), pa.large_list(pa.large_string())),
                "view": (pa.string_view(), pa.list_(pa.string_view())),
                "dictionary": (pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))),
                "fixed": (pa.string(), pa.list_(pa.string(), 2)),
            }[name]
            pq.write_table(pa.table({"history_id": ids.cast(text), "item_ids": pa.array(lists).cast(listed)}), path)
    config = RecommendConfig(output="x", train_run=run, histories=path)
    subjects = read_subjects(config, read_serving(run))
    assert subjects["subject_id"].to_pylist() == ["a", "b"]
    assert subjects["items"].to_pylist() == [[3, 4], [5, 3]]


def test_a_list_of_histories_without_ids_or_lists_is_refused(run: str, tmp_path: Path):
    path = str(tmp_path / "h.parquet")
    for columns, message in [
        ({"history_id": ["a"], "item_ids": ["i3"]}, "item_ids is string, not a list"),
        ({"history_id": ["a", None], "item_ids": [["i3"], ["i4"]]}, "history_id: row 2 has no id, but None"),
        ({"history_id": ["a", "b"], "item_ids": [["i3"], ["i4", None]]}, "item_ids: row 2 has no id, but None"),
        ({"history_id": ["a"], "item_ids": [[True]]}, "item_ids: values of type bool are no ids"),
    ]:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(ValueError, match=rf"h\.parquet: {message}"):
            read_subjects(RecommendConfig(output="x", train_run=run, histories=path), read_serving(run))


def test_a_user_named_twice_has_one_list_and_that_is_said(run: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    config = RecommendConfig(output="x", train_run=run, users=("u3", "u2", "u3"))
    assert read_subjects(config, read_serving(run))["subject_id"].to_pylist() == ["u3", "u2"]
    assert "users asked for: 2 of 3 kept; left out: 1 named twice" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"users_file: no file .*u3"):
        read_subjects(RecommendConfig(output="x", train_run=run, users_file="u3"), read_serving(run))


def test_an_interrupted_run_keeps_its_parts_and_goes_on(
    run: str, recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[list[int]] = []

    def write_here(config: RecommendConfig, subjects: pa.Table) -> None:
        """Two batches, then a crash in the first attempt."""
        actor = RecommendingActor(**actor_settings(config, device="cpu"))
        for first in range(0, len(subjects), config.batch_size):
            if len(asked) == 2:
                asked.append([])
                raise KeyboardInterrupt
            batch = subjects.slice(first, config.batch_size)
            asked.append(batch["row"].to_pylist())
            actor(batch)

    monkeypatch.setattr("raygr.recommend.stage.write_lists", write_here)
    config = RecommendConfig(output=str(tmp_path / "out"), train_run=run, n=3, batch_size=5)
    with pytest.raises(KeyboardInterrupt):
        recommend(config)
    folder = tmp_path / "out" / "recommendations"
    (folder / "part-000000010-000000013.parquet.part").write_bytes(b"half")
    found = recommend(config)
    assert asked == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [], [10, 11, 12, 13]]
    assert len(list(folder.iterdir())) == 3
    expected = [one.item_id for user in range(USERS) for one in recommender.recommend(f"u{user}", n=3)]
    assert files.read_table(str(folder))["item_id"].to_pylist() == expected
    counts = runs.read_run(found.path, job="recommend").counts
    assert counts == {"subjects": USERS, "with_list": USERS, "recommendations": USERS * 3}


def test_subjects_with_a_part_have_their_lists_whatever_the_size_of_the_batches(tmp_path: Path):
    subjects = pa.table({"row": list(range(10))})
    assert len(without_lists(subjects, str(tmp_path / "not there"))) == 10
    (tmp_path / "part-000000002-000000004.parquet").write_bytes(b"")
    left = without_lists(subjects, str(tmp_path))
    assert left["row"].to_pylist() == [0, 1, 5, 6, 7, 8, 9]
    assert [part["row"].to_pylist() for part in contiguous(left.slice(1, 4))] == [[1], [5, 6, 7]]


def test_users_without_an_item_left_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    rows = {"subject_id": ["a", "a"], "rank": [1, 2], "item_id": ["x", "y"], "score": [1.0, 0.5]}
    files.write_table(pa.table(rows), str(tmp_path / "r" / "part-0.parquet"))
    counts = list_counts(2, str(tmp_path / "r"))
    assert counts == {"subjects": 2, "with_list": 1, "recommendations": 2}
    assert "subjects: 1 of 2 kept; left out: 1 no item left" in caplog.text


def test_nobody_to_recommend_to_is_refused(run: str, tmp_path: Path):
    with pytest.raises(ValidationError, match="users: nobody is in it"):
        RecommendConfig(output="x", train_run=run, users=())
    with pytest.raises(ValidationError, match="set one of them"):
        RecommendConfig(output="x", train_run=run, users=("u1",), histories="h")
    (tmp_path / "users.txt").write_text("\n")
    config = RecommendConfig(output="x", train_run=run, users_file=str(tmp_path / "users.txt"))
    with pytest.raises(ConfigError, match=r"users\.txt: nobody is in it"):
        read_subjects(config, read_serving(run))


def test_trained_runs_are_compared(run: str, tmp_path: Path):
    """Compare reads what training writes: a run of random weights is compared with a run of the same weights."""
    arms = {"base": (run,), "same": (run,)}
    found = compare(CompareConfig(output=str(tmp_path / "compare"), arms=arms))
    comparison = files.read_json(found.file("comparison.json"))
    gain = comparison["arms"]["same"]["against_base"]["full"]["ndcg_at_10"]
    assert (gain["difference"], gain["over"], gain["p_holm"]) == (0.0, "users", None)
    assert {"popularity", "chance"} < comparison["arms"].keys()
    assert comparison["arms"]["same"]["lists"]["ranked"] == files.read_json(f"{run}/metrics.json")["lists"]["ranked"]
    assert comparison["arms"]["same"]["cold"]["full"]["users"] == USERS  # 7 train interactions each, 30 items
    assert "Lists of 10" in Path(found.file("table.md")).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_stage_writes_a_part_per_batch(run: str, recommender: Recommender, tmp_path: Path, local_ray: Any):
    config = RecommendConfig(output=str(tmp_path / "out"), train_run=run, n=3, batch_size=5, workers=2, mmr_weight=0.5)
    found = recommend(config)
    table = files.read_table(found.file("recommendations"))
    assert len(list(Path(found.file("recommendations")).glob("*.parquet"))) == 3
    assert table.schema.equals(RECOMMENDATION_SCHEMA)
    expected = [
        (f"u{user}", rank, one.item_id)
        for user in range(USERS)
        for rank, one in enumerate(recommender.recommend(f"u{user}", n=3, mmr_weight=0.5), start=1)
    ]
    rows = [(row["subject_id"], row["rank"], row["item_id"]) for row in table.to_pylist()]
    assert rows == expected
    counts = runs.read_run(found.path, job="recommend").counts
    assert counts == {"subjects": USERS, "with_list": USERS, "recommendations": USERS * 3}
