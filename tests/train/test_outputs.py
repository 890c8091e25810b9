"""The files of a trained run: ranks of every target against a plain loop, candidates, metrics."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from toy_data import random_scores, walks, write_csv, write_prepared

from raygr import files
from raygr.metrics.rank_tables import Ranking
from raygr.models.workers import Share
from raygr.schema import CANDIDATE_SCHEMA, RANK_SCHEMA
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.outputs import chance_warnings, write_outputs
from raygr.train.run_metrics import read_metrics
from raygr.train.state import Training, start_training

torch.set_num_threads(1)

USERS, ITEMS, LENGTH, TESTS = 12, 130, 9, 3
WINDOW = 4  # shorter than histories
SETS = ("full", "uniform-100", "popularity-100")
HISTORIES = walks(USERS, ITEMS, LENGTH, seed=4)


def begun(folder: Path, **changes: Any) -> Training:
    write_prepared(folder / "prepare", HISTORIES, items=ITEMS, tests=TESTS)
    config = TrainConfig(
        output=str(folder / "train"), data=str(folder / "prepare"), base_width=8, max_history=WINDOW, **changes
    )
    training = start_training(config, load_inputs(config), torch.device("cpu"), Share())
    training.progress.lines.append({"seconds": 1.0})
    return training


def written(training: Training) -> tuple[Any, dict[str, Any]]:
    write_outputs(training)
    folder = training.config.output
    return pq.read_table(f"{folder}/ranks.parquet"), files.read_json(f"{folder}/metrics.json")


def scores_after(training: Training, history: list[int]) -> torch.Tensor:
    """Scores of items 1..I after one history alone."""
    training.model.eval()
    window = history[-WINDOW:]
    with torch.inference_mode():
        rows_ID = training.model.embedding.item_rows()
        state_1D = training.model.encode(rows_ID, torch.tensor([window]), torch.tensor([len(window)]))
        return (state_1D @ rows_ID.T)[0]


def naive_rank(scores_I: torch.Tensor, target: int, others: set[int]) -> float:
    scores = scores_I.tolist()
    greater = sum(scores[item - 1] > scores[target - 1] for item in others)
    return 1 + greater  # random weights: no ties


def test_every_target_is_ranked_after_all_that_came_before_it(tmp_path: Path):
    training = begun(tmp_path, candidates=SETS, targets=("last", "every"))
    table, metrics = written(training)
    assert table.schema.equals(RANK_SCHEMA)
    rows = table.to_pylist()
    assert len(rows) == USERS * (TESTS + 1) * 3
    drawn = {
        (row["user_index"], row["candidates"]): set(row["items"])
        for row in pq.read_table(tmp_path / "train/candidates.parquet").to_pylist()
    }
    scores = {}
    for row in rows:
        history = HISTORIES[row["user_index"]]
        before, target = history[: row["position"]], history[row["position"]]
        assert row["target"] == target
        assert row["last"] == (row["position"] in (LENGTH - 1, LENGTH - TESTS - 1))
        assert row["part"] == ("test" if row["position"] >= LENGTH - TESTS else "validation")
        catalogue = set(range(1, ITEMS + 1)) - set(before)
        others = catalogue if row["candidates"] == "full" else drawn[row["user_index"], row["candidates"]]
        if tuple(before) not in scores:
            scores[tuple(before)] = scores_after(training, before)
        assert row["rank"] == naive_rank(scores[tuple(before)], target, others - {target})
    assert list(metrics["test"]) == [f"{name}{more}" for name in SETS for more in ("", ", every target")]
    assert list(metrics["validation"]) == list(SETS)
    last = [1 / row["rank"] for row in rows if row["position"] == LENGTH - 1 and row["candidates"] == "full"]
    assert metrics["test"]["full"]["mrr"] == pytest.approx(np.mean(last), rel=1e-6)
    every = [1 / row["rank"] for row in rows if row["part"] == "test" and row["candidates"] == "full"]
    assert metrics["test"]["full, every target"]["mrr"] == pytest.approx(np.mean(every), rel=1e-6)  # equally many each


def test_sampled_candidates_are_stored_and_stamped(tmp_path: Path):
    training = begun(tmp_path, candidates=("full", "uniform-100"))
    _, metrics = written(training)
    stored = pq.read_table(tmp_path / "train/candidates.parquet")
    assert stored.schema.equals(CANDIDATE_SCHEMA) and stored.num_rows == USERS
    for row in stored.to_pylist():
        assert row["candidates"] == "uniform-100" and len(set(row["items"])) == 100
        assert not set(row["items"]) & set(HISTORIES[row["user_index"]])
    other = load_inputs(TrainConfig(**vars(training.config) | {"candidate_seed": 1}))
    stamps = [metrics["protocol"], other.protocol]
    assert stamps[0]["candidate_sets"] != stamps[1]["candidate_sets"]
    assert stamps[0] == load_inputs(TrainConfig(**vars(training.config) | {"seed": 5})).protocol


@pytest.mark.parametrize("scored", [False, True])
def test_metrics_json_is_what_its_reader_would_write(tmp_path: Path, scored: bool):
    """Every key has a field, in the order that the file has always had, and equal values give equal bytes."""
    rows = {f"i{place}": row.tolist() for place, row in enumerate(random_scores(ITEMS, 3, seed=2), start=1)}
    scores = {"item_scores": str(write_csv(tmp_path / "scores.csv", rows, list("abc")))} if scored else {}
    training = begun(tmp_path, candidates=("full",), targets=("last", "every"), **scores)
    _, metrics = written(training)
    expected = "protocol shares base_moved best_epoch epochs parameters seconds_per_epoch warnings validation test cold"
    assert list(metrics) == [*expected.split(), "lists", "new"]
    assert list(metrics["lists"]) == ["length", "mmr_weight", "scores", "ranked", "reranked"]
    assert (metrics["shares"] is None, metrics["base_moved"] is None) == (not scored, not scored)
    files.write_json(read_metrics(training.config.output), str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "train/metrics.json").read_bytes()


def test_a_run_at_or_below_chance_is_said_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Equal scores put every target in the middle, where NDCG@10 is 0."""
    training = begun(tmp_path, candidates=("full", "uniform-100"))
    with torch.no_grad():
        training.model.embedding.base_ID.zero_()
    training.best_weights = dict(training.model.state_dict())
    _, metrics = written(training)
    chance = [sum(1 / np.log2(1 + rank) for rank in range(1, 11)) / among for among in (ITEMS - LENGTH + 1, 101)]
    assert metrics["warnings"] == [
        f"test NDCG@10 among {name} candidates is 0.0000, no better than chance ({one:.4f})"
        for name, one in zip(("full", "uniform-100"), chance, strict=True)
    ]
    assert metrics["warnings"][0] in caplog.text
    ranking = Ranking(*(np.array([value]) for value in (0, 3, 1, 5)))
    assert chance_warnings({"full": ranking}, items=30) == []


def test_the_stamp_tells_several_test_interactions_apart(tmp_path: Path):
    """The published leave-one-out keeps the stamp that it had before there were several."""
    stamps = []
    for place, settings in enumerate(({}, {"test_interactions": 1, "new_items": 0.0}, {"test_interactions": 3})):
        data = write_prepared(tmp_path / str(place), HISTORIES, items=ITEMS, **settings)
        stamps.append(load_inputs(TrainConfig(output="o", data=data)).protocol)
    plain, one, three = ({name: value for name, value in stamp.items() if name != "data"} for stamp in stamps)
    assert plain == one and three == plain | {"test_interactions": 3}


def test_one_ranking_is_one_row_a_user_and_no_candidates_are_written(tmp_path: Path):
    table, metrics = written(begun(tmp_path))
    assert table.num_rows == 2 * USERS and not (tmp_path / "train/candidates.parquet").exists()
    assert list(metrics["test"]) == ["full"] and "candidate_sets" not in metrics["protocol"]


def naive_lists(training: Training, vectors_IA: np.ndarray) -> dict[str, float]:
    """Means over users of the model's top 10, by plain loops, in the given space."""
    unit_IA = vectors_IA / np.linalg.norm(vectors_IA, axis=1, keepdims=True)
    hits, diversities, mmrs = [], [], []
    for history in HISTORIES:
        scores = scores_after(training, history[:-1]).tolist()
        left = [item for item in range(1, ITEMS + 1) if item not in history[:-1]]
        low, high = min(scores[item - 1] for item in left), max(scores[item - 1] for item in left)
        top = sorted(left, key=lambda item: -scores[item - 1])[:10]
        cosine = unit_IA[[item - 1 for item in top]] @ unit_IA[[item - 1 for item in top]].T
        hits.append(history[-1] in top)
        diversities.append(np.mean([1 - cosine[i, j] for i in range(10) for j in range(i)]))
        redundancy = [max(cosine[i, :i], default=0.0) for i in range(10)]
        relevance = [(scores[item - 1] - low) / (high - low) for item in top]
        mmrs.append(np.mean([0.7 * rel - 0.3 * red for rel, red in zip(relevance, redundancy, strict=True)]))
    return {"recall": np.mean(hits), "intra_list_diversity": np.mean(diversities), "mmr": np.mean(mmrs)}


def test_lists_are_those_of_a_plain_loop_in_the_models_space_or_the_scores(tmp_path: Path):
    scores_IA = random_scores(ITEMS, 3, seed=2)
    path = write_csv(tmp_path / "s.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, list("abc"))
    own = begun(tmp_path / "own", mmr_weight=0.7, targets=("every",))
    guided = begun(tmp_path / "guided", mmr_weight=0.7, list_scores=path)
    standardised_IA = (scores_IA - scores_IA.mean(0)) / scores_IA.std(0)
    spaces = [(own, own.model.embedding.base_ID.detach().numpy()), (guided, standardised_IA)]
    for training, vectors_IA in spaces:
        lists = written(training)[1]["lists"]
        assert (lists["length"], lists["mmr_weight"]) == (10, 0.7)
        expected = naive_lists(training, vectors_IA)
        assert {name: lists["ranked"][name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert lists["reranked"]["intra_list_diversity"] > lists["ranked"]["intra_list_diversity"]
        assert lists["reranked"]["mmr"] > lists["ranked"]["mmr"]


def test_a_list_of_ten_finds_the_target_as_the_rank_does(tmp_path: Path):
    _, metrics = written(begun(tmp_path, list_length=20))
    found, ranked = metrics["lists"]["ranked"], metrics["test"]["full"]
    assert found["recall"] == pytest.approx(ranked["recall_at_20"]) and found["recall"] > 0
    assert found["ndcg"] == pytest.approx(ranked["ndcg_at_20"])


def test_cold_start_targets_are_apart(tmp_path: Path):
    """12 users, 5 train interactions each, over 130 items: every target has fewer than 10, few have none."""
    _, metrics = written(begun(tmp_path))
    assert metrics["cold"]["below"] == 10
    assert metrics["cold"]["full"] == {"targets": USERS, "users": USERS, "metrics": metrics["test"]["full"]}
    train_items = [item for history in HISTORIES for item in history[: LENGTH - TESTS - 1]]
    unseen = [history[-1] for history in HISTORIES if history[-1] not in train_items]
    _, strict = written(begun(tmp_path / "strict", cold_below=1))
    assert 0 < strict["cold"]["full"]["users"] == len(unseen) < USERS
