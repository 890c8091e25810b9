"""How true explanations are, against loops over the model's own scores and known truths."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from random_run import random_run
from toy_data import random_scores, walks, write_csv, write_prepared

from raygr.data.interactions import Interactions, read_interactions
from raygr.recommend import faithfulness as faithfulness_module
from raygr.recommend.faithfulness import (
    deletion,
    lifts,
    ranks_without,
    rated_targets,
    row_correlations,
    shared_strongest,
    stability,
)
from raygr.recommend.recommender import Recommender, load_recommender
from raygr.report.faithful_section import can_explain, faithfulness_section
from raygr.train.config import TrainConfig

torch.set_num_threads(1)
USERS, ITEMS, LENGTH = 9, 20, 8
ASPECTS = ["pace", "mood", "<b>"]
HISTORIES = walks(USERS, ITEMS, LENGTH, seed=7)
RATINGS = (np.random.default_rng(1).integers(1, 6, size=(USERS, LENGTH)) * 1.0).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The prepare run, and two train runs of one arm with random weights: they differ as runs with two seeds do."""
    folder = tmp_path_factory.mktemp("faithful")
    data = write_prepared(folder / "prepare", HISTORIES, items=ITEMS, ratings=RATINGS)
    (folder / "prepare" / "statistics.json").write_text("{}")
    scores = {f"i{i + 1}": row.tolist() for i, row in enumerate(random_scores(ITEMS, 3, seed=3))}
    settings = {"data": data, "item_scores": write_csv(folder / "s.csv", scores, ASPECTS), "fusion": "add"}
    configs = [TrainConfig(output=f"{folder}/{seed}", base_width=8, seed=seed, **settings) for seed in (1, 2)]
    return [data, *(random_run(config, noise_seed=config.seed) for config in configs)]


@pytest.fixture(scope="module")
def both(made: list[str]) -> list[Recommender]:
    return [load_recommender(run) for run in made[1:]]


@pytest.fixture(scope="module")
def found(made: list[str]) -> Interactions:
    return read_interactions(made[0])


def lifts_by_hand(recommender: Recommender, user: int, length: int, item: int) -> tuple[np.ndarray, np.ndarray]:
    """All scores after the user's first interactions, and the lifts of the item, for one user alone."""
    start = user * LENGTH
    histories = recommender.up_to(np.array([user]), np.array([start + length]))
    parts = recommender.split_scores(histories, torch.arange(1, ITEMS + 1))
    terms_IA = (parts.encoder_BCA + parts.user_BCA)[0].double().numpy()
    scores_I = parts.base_BC[0].double().numpy() + terms_IA.sum(1)
    return scores_I, terms_IA[item - 1] - terms_IA.mean(0)


def test_the_best_item_falls_as_a_loop_over_users_and_items_says(both: list[Recommender], monkeypatch):
    monkeypatch.setattr(faithfulness_module, "USERS_AT_ONCE", 4)
    monkeypatch.setattr(faithfulness_module, "RANDOM_ORDERS", 400)
    removed = deletion(both[0], np.arange(USERS))
    for user in range(USERS):
        scores_I, _ = lifts_by_hand(both[0], user, LENGTH, 1)
        others = [item for item in range(1, ITEMS + 1) if item not in HISTORIES[user]]
        best = max(others, key=lambda item: scores_I[item - 1])
        _, lift_A = lifts_by_hand(both[0], user, LENGTH, best)

        def rank(removed_aspects: tuple[int, ...]) -> int:
            left = scores_I[best - 1] - lift_A[list(removed_aspects)].sum()  # noqa: B023
            return 1 + sum(scores_I[item - 1] > left for item in others if item != best)  # noqa: B023

        order = tuple(np.argsort(-lift_A).tolist())
        assert removed.strongest_UX[user].tolist() == [rank(order[:count]) for count in range(4)]
        for count in range(4):
            means = [rank(some) for some in itertools.combinations(range(3), count)]
            tolerance = 0.001 + 4 * np.std(means) / np.sqrt(400)
            assert removed.random_UX[user, count] == pytest.approx(np.mean(means), abs=tolerance)
    assert removed.strongest_UX[:, 1].max() > 1  # the toy model's aspects matter


def test_ties_share_their_mean_rank():
    sorted_BI = torch.tensor([[-torch.inf, 1.0, 2.0, 2.0, 3.0]])
    ranks_BX = ranks_without(torch.tensor([4.0]), torch.tensor([[2.0, -1.0, 2.5]]), sorted_BI)
    assert ranks_BX.tolist() == [[1, 3, 1.5, 5]]  # scores 4, 2, 3 and 0.5


def test_held_out_ratings_meet_the_parts_of_their_scores(both: list[Recommender], found: Interactions):
    rated = rated_targets(both[0], found, np.array([0, 5]))
    assert rated.user_E.tolist() == [0, 0, 5, 5]
    for place, (user, at) in enumerate(itertools.product((0, 5), (LENGTH - 2, LENGTH - 1))):
        item = HISTORIES[user][at]
        scores_I, lift_A = lifts_by_hand(both[0], user, at, item)
        assert rated.rating_E[place] == pytest.approx(RATINGS[user][at] - np.mean(RATINGS[user][:at]))
        assert rated.aspects_E[place] == pytest.approx(lift_A.sum(), rel=1e-4)
        assert rated.score_E[place] == pytest.approx(scores_I[item - 1] - scores_I.mean(), rel=1e-4)
        assert rated.base_E[place] == pytest.approx(rated.score_E[place] - rated.aspects_E[place])
    unrated = found._replace(rating_N=np.full(USERS * LENGTH, np.nan))
    assert rated_targets(both[0], unrated, np.arange(USERS)) is None


def test_two_runs_are_compared_on_the_same_items_and_users(both: list[Recommender]):
    same = stability(both, np.arange(USERS))
    assert same.named == 1
    for user in range(USERS):
        scores_I, _ = lifts_by_hand(both[0], user, LENGTH, 1)
        best = max(set(range(1, ITEMS + 1)) - {*HISTORIES[user]}, key=lambda item: scores_I[item - 1])
        left_A, right_A = (lifts_by_hand(one, user, LENGTH, best)[1] for one in both)
        other_left_A, other_right_A = (lifts_by_hand(one, (user - 1) % USERS, LENGTH, best)[1] for one in both)
        assert same.correlation_U[user] == pytest.approx(scipy.stats.pearsonr(left_A, right_A)[0], abs=1e-3)
        others = [scipy.stats.pearsonr(*one)[0] for one in ((left_A, other_right_A), (right_A, other_left_A))]
        assert same.other_user_U[user] == pytest.approx(np.mean(others), abs=1e-3)
        assert same.shared_U[user] == float(left_A.argmax() == right_A.argmax())
    itself = stability([both[0], both[0]], np.arange(USERS))
    assert itself.correlation_U == pytest.approx(np.ones(USERS)) and itself.shared_U.tolist() == [1.0] * USERS


def test_correlations_and_shares_of_rows_by_hand():
    left_UA, right_UA = np.array([[1.0, 2, 4, 3], [1, 1, 1, 1]]), np.array([[9.0, 8, 5, 7], [1, 2, 3, 4]])
    found_U = row_correlations(left_UA, right_UA)
    assert found_U[0] == pytest.approx(scipy.stats.pearsonr(left_UA[0], right_UA[0])[0]) and np.isnan(found_U[1])
    assert shared_strongest(left_UA[:1], np.array([[4.0, 1, 5, 2]]), 2).tolist() == [0.5]  # {2, 3} and {0, 2}


def test_the_section_says_what_was_measured(both: list[Recommender], made: list[str], found: Interactions):
    section = faithfulness_section(made[1:], made[0], name="guided")
    removed, same = deletion(both[0], np.arange(USERS)), stability(both, np.arange(USERS))
    first, last = section.tables[0].rows[0], section.tables[0].rows[-1]
    assert first[0] == "1" and first[1].startswith(f"{removed.strongest_UX[:, 1].mean():.1f} (")
    assert last[0] == "3 of 3" and last[1].startswith(f"{removed.random_UX[:, 3].mean():.1f} (")
    assert last[3].startswith(f"{(removed.strongest_UX[:, 3] <= 10).mean():.0%} (")
    rated = rated_targets(both[0], found, np.arange(USERS))
    order = scipy.stats.spearmanr(rated.aspects_E, rated.rating_E)[0]
    assert f"correlate by {order:+.2f} (" in section.text and f"over {2 * USERS} held-out ratings" in section.text
    assert section.tables[1].rows[0][1].startswith(f"{order:+.2f} (")
    assert f"for the same user correlates by {same.correlation_U.mean():+.2f} (" in section.text
    assert section.tables[2].rows[-1] == ["the same for two random choices", "33%"]
    assert "There is one run" in faithfulness_section(made[1:2], made[0], name="guided").text


def test_aspects_that_do_nothing_are_a_remark(made: list[str], tmp_path: Path):
    """A model whose aspects weigh nothing: the section says so."""
    weightless = TrainConfig(
        output=f"{tmp_path}/none", data=made[0], item_scores=made[1].replace("/1", "/s.csv"), fusion="concat",
        base_width=9, guided_weight=1e-6, user_scores="none",
    )  # fmt: skip
    run = random_run(weightless)
    section = faithfulness_section([run], made[0], name="<i>")
    assert section.remarks[0] == (
        "Aspects decide little in “<i>”: without its strongest ones, a user's best item stays near the top."
    )


def test_only_runs_with_aspects_of_their_own_items_are_asked(made: list[str]):
    settings = {"item_scores": "s.csv", "control": "none"}
    assert can_explain(made[1], settings) and not can_explain(made[0], settings)  # which keeps nothing to serve
    assert not can_explain(made[1], {"item_scores": None}) and not can_explain(
        made[1], {**settings, "control": "random"}
    )


def test_lifts_are_those_of_one_history_at_a_time(both: list[Recommender]):
    histories = both[0].of_users(["u3", "u1"])
    found_BA = lifts(both[0], histories, torch.tensor([4, 9])).numpy()
    for row, (user, item) in enumerate([(3, 4), (1, 9)]):
        assert found_BA[row] == pytest.approx(lifts_by_hand(both[0], user, LENGTH, item)[1], rel=1e-3, abs=1e-5)
