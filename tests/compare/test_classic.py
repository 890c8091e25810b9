"""Item-kNN, EASE and ALS: right weights, right ranks, and a place beside the arms."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_run import random_run
from scipy.sparse import csr_matrix
from toy_data import walks, write_prepared

from raygr.compare import classic as classic_module
from raygr.compare import references as references_module
from raygr.compare.classic import chosen_model, ease_weights, fitted, scores_after
from raygr.compare.comparison import read_comparison
from raygr.compare.config import CompareConfig
from raygr.compare.references import classic_rankings, score_ranks
from raygr.compare.stage import compare
from raygr.config import ConfigError
from raygr.data.interactions import read_interactions
from raygr.metrics.rank_tables import Ranking
from raygr.train.batches import evaluation_targets
from raygr.train.config import TrainConfig

USERS, ITEMS, LENGTH = 30, 12, 7
MATRIX_UI = (np.random.default_rng(2).random((9, 5)) < 0.5).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Users of two tastes: those with even numbers buy from items 1..8, the others from 5..12."""
    histories = [
        [item + (4 if user % 2 else 0) for item in history]
        for user, history in enumerate(walks(USERS, ITEMS - 4, LENGTH, seed=4))
    ]
    return write_prepared(tmp_path_factory.mktemp("classic") / "prepare", histories, items=ITEMS)


def test_weights_of_ease_are_ridge_regressions_of_each_item_on_the_others():
    weights_II = ease_weights(csr_matrix(MATRIX_UI), 3.0)
    for item in range(5):
        others = [one for one in range(5) if one != item]
        x, y = MATRIX_UI[:, others].astype(float), MATRIX_UI[:, item].astype(float)
        # least squares on the matrix with sqrt(3) times the unit matrix below it
        x, y = np.vstack([x, np.sqrt(3.0) * np.eye(4)]), np.append(y, np.zeros(4))
        assert weights_II[others, item] == pytest.approx(np.linalg.lstsq(x, y, rcond=None)[0], abs=1e-6)
        assert weights_II[item, item] == 0


def test_item_knn_scores_by_the_cosines_of_the_nearest_items():
    pytest.importorskip("implicit", reason="pip install 'raygr[classic]'")
    matrix_UI = (np.random.default_rng(5).random((200, 6)) < [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]).astype(np.float32)
    scorer = fitted("item-kNN", csr_matrix(matrix_UI), {"neighbours": 3})
    norm_I = np.linalg.norm(matrix_UI, axis=0)
    cosine_II = matrix_UI.T @ matrix_UI / norm_I / norm_I[:, None]
    least_I = np.sort(cosine_II, axis=1)[:, -3]  # an item is its own nearest
    kept_II = np.where(cosine_II >= least_I[:, None], cosine_II, 0)
    assert (kept_II > 0).sum(1).tolist() == [3] * 6  # no ties
    assert scorer(csr_matrix(matrix_UI[:9])) == pytest.approx(matrix_UI[:9] @ kept_II, abs=1e-4)


def test_als_solves_a_users_factors_from_the_history_before_the_target():
    """Hu, Koren, Volinsky (2008): (Y'CY + reg I) x = Y'C p; the confidence is alpha for the history, else 1."""
    implicit_als = pytest.importorskip("implicit.cpu.als", reason="pip install 'raygr[classic]'")
    settings = {"factors": 4, "regularization": 0.5, "alpha": 3.0}
    scorer = fitted("ALS", csr_matrix(MATRIX_UI), settings)
    model = implicit_als.AlternatingLeastSquares(
        factors=4, regularization=0.5, alpha=3.0, iterations=15, num_threads=1, random_state=0
    )
    model.fit(csr_matrix(MATRIX_UI), show_progress=False)
    items_ID = model.item_factors.astype(float)
    for row_I in MATRIX_UI[:3]:
        confidence_I = np.where(row_I > 0, 3.0, 1.0)
        system_DD = (items_ID.T * confidence_I) @ items_ID + 0.5 * np.eye(4)
        user_D = np.linalg.solve(system_DD, items_ID.T @ (confidence_I * row_I))
        assert scorer(csr_matrix(row_I[None]))[0] == pytest.approx(items_ID @ user_D, abs=1e-3)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_targets_are_ranked_by_the_items_before_them(data: str, part: str, monkeypatch: pytest.MonkeyPatch):
    """These are train items for validation, train and validation items for test; in both kinds of candidates."""
    found = read_interactions(data)
    weights_II = np.random.default_rng(0).normal(size=(ITEMS, ITEMS))
    targets = evaluation_targets(found.user_N, found.split_N == part, max_history=1)
    candidates_UC = np.random.default_rng(1).integers(1, ITEMS + 1, size=(USERS, 3))
    monkeypatch.setattr(references_module, "read_candidates", lambda run, name: candidates_UC)
    monkeypatch.setattr(references_module, "SCORED_AT_ONCE", 7)

    def scores(example_B: torch.Tensor) -> torch.Tensor:
        return scores_after(lambda history_BI: history_BI @ weights_II, found, targets, example_B, None)

    full_E, sampled_E = (score_ranks("r", found, None, name, targets, scores) for name in ("full", "uniform-100"))
    for user in range(USERS):
        items = found.item_N[found.user_N == user]
        at = LENGTH - (1 if part == "test" else 2)
        scores_I = weights_II[items[:at] - 1].sum(0)
        own = scores_I[items[at] - 1]
        rivals = [scores_I[one - 1] for one in range(1, ITEMS + 1) if one not in items[: at + 1]]
        assert full_E[user] == 1 + sum(rival > own for rival in rivals)
        rivals = [scores_I[one - 1] for one in candidates_UC[user]]
        assert sampled_E[user] == 1 + sum((rival > own) + (rival == own) / 2 for rival in rivals)


def test_validation_chooses_the_setting_with_the_best_ndcg(data: str, monkeypatch: pytest.MonkeyPatch):
    found, asked = read_interactions(data), []
    monkeypatch.setitem(classic_module.GRIDS, "EASE", {"regularization": (1.0, 2.0, 3.0)})

    def ranker(scorer, targets):
        asked.append(scorer)
        assert targets.target_at_E.tolist() == np.flatnonzero(found.split_N == "validation").tolist()
        return np.array([[11.0, 5.0], [1.0, 9.0], [2.0, 2.0]][len(asked) - 1])  # NDCG@10: .19, .65, .63

    chosen = chosen_model("EASE", found, ranker)
    assert chosen.settings == {"regularization": 2.0} and chosen.scorer is asked[1]


def test_new_items_share_the_last_place(data: str):
    found = read_interactions(data)._replace(items=ITEMS + 2, new_items=2)
    targets = evaluation_targets(found.user_N, found.split_N == "test", max_history=1)
    scores_BI = scores_after(
        lambda history_BI: -history_BI.toarray(), found, targets, torch.arange(3), None
    )  # fmt: skip
    assert (scores_BI[:, -2:] == -2).all() and scores_BI[:, :-2].min() == -1


def test_a_catalogue_too_large_for_ease_is_left_out_in_words(data: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(references_module, "LARGEST_EASE", 11)
    ranking = Ranking(*(np.zeros(0, np.int64),) * 4)
    assert classic_rankings("r", data, {"full": ranking}, ["EASE"]) == {
        "EASE": "it inverts a matrix of 12 x 12 items, more than 11"
    }


@pytest.fixture(scope="module")
def base_run(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model with random weights."""
    output = str(tmp_path_factory.mktemp("classic-base") / "run")
    return random_run(TrainConfig(output=output, data=data, base_width=8, max_history=4))


def test_the_comparison_shows_them_beside_the_base(data: str, base_run: str, tmp_path: Path):
    config = CompareConfig(output=f"{tmp_path}/compare", arms={"base": (base_run,)}, classic=("EASE",))
    compare(config)
    arms = read_comparison(config.output).arms
    arm, base = arms["EASE"], arms["base"].metrics["full"]["mrr"].mean
    assert arm.is_reference and arm.base == "base" and list(arm.chosen) == ["regularization"]
    found = read_interactions(data)
    train_UI = np.zeros((USERS, ITEMS))
    train_UI[found.user_N[found.split_N == "train"], found.item_N[found.split_N == "train"] - 1] = 1
    weights_II = ease_weights(csr_matrix(train_UI), arm.chosen["regularization"])
    reciprocal = []
    for user in range(USERS):
        items = found.item_N[found.user_N == user]
        scores_I = weights_II[items[:-1] - 1].sum(0)
        rivals = [scores_I[one - 1] for one in range(1, ITEMS + 1) if one not in items]
        reciprocal.append(1 / (1 + sum(rival > scores_I[items[-1] - 1] for rival in rivals)))
    assert arm.metrics["full"]["mrr"].mean == pytest.approx(np.mean(reciprocal))
    gain = arm.against_base["full"]["mrr"]
    assert gain.difference == pytest.approx(np.mean(reciprocal) - base) and gain.low < gain.difference < gain.high
    text = Path(tmp_path / "compare/table.md").read_text(encoding="utf-8")
    assert "| EASE | base |" in text and f"EASE regularization {arm.chosen['regularization']:g}." in text


def test_a_missing_library_and_a_taken_name_are_named_before_anything_is_written(
    base_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "implicit", None)
    for name, chosen, message in (
        ("base", ("ALS", "EASE"), r"classic: ALS need.* implicit: pip install 'raygr\[classic\]'"),
        ("EASE", ("EASE",), "an arm is called EASE"),
    ):
        config = CompareConfig(output=f"{tmp_path}/c", arms={name: (base_run,)}, base=name, classic=chosen)
        with pytest.raises(ConfigError, match=message):
            compare(config)
    assert not (tmp_path / "c").exists()
