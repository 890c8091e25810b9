"""Held-out metrics of users' ratings, and what one answer for everybody is worth."""

import numpy as np
import pytest
import torch
from tiny_policy import toy_config

from raygr.finetuning.inputs import Problem
from raygr.finetuning.judging import (
    METRICS,
    Judge,
    Outcome,
    evaluation_record,
    judge_ratings,
    moments,
    moved,
    moved_slope,
    slope_sums,
    user_metrics,
)
from raygr.finetuning.rewards import Normalisation, accuracy

ITEMS_IA = np.array([[9.0], [2.0]])


def problem(user: int, target: int) -> Problem:
    """Likes the target and not the other of two items."""
    rows = np.array([target, 1 - target])
    liked = np.array([True, False])
    return Problem(user, f"u{user}", (1, 2), candidate_C=rows, judged_K=rows, liked_K=liked, teacher_A=None)


def metrics_of(problems: list[Problem], ratings_UA: list[list[float]]) -> dict[str, dict]:
    judge = Judge.of(toy_config(task="classification"), ITEMS_IA, None)
    normalisation = Normalisation(judge.item_mean, judge.item_std, (5.5,), (2.0,))
    ratings = torch.tensor(ratings_UA, dtype=torch.float64)
    return evaluation_record(user_metrics(judge, normalisation, problems, ratings))


def test_opposite_tastes_are_personal_and_a_shared_one_is_not():
    opposite = metrics_of([problem(0, 0), problem(1, 1)], [[10.0], [1.0]])["metrics"]
    assert (opposite["mrr"], opposite["auc"], opposite["reward"]) == (1.0, 1.0, 1.0)
    # the mean, 5.5, tells the two items not apart: rank 1.5
    assert opposite["common_mrr"] == pytest.approx(2 / 3) and opposite["common_auc"] == 0.5
    shared = metrics_of([problem(0, 0), problem(1, 0)], [[10.0], [7.0]])["metrics"]
    assert (shared["mrr"], shared["common_mrr"], shared["common_auc"]) == (1.0, 1.0, 1.0)
    # without the mean, 8.5, the first still leans to its target and the second away from it: ranks 1 and 2
    assert (opposite["personal_mrr"], opposite["personal_auc"]) == (1.0, 1.0)
    assert (shared["personal_mrr"], shared["personal_auc"]) == (0.75, 0.5)


def test_a_rating_that_was_not_read_counts_for_nobody():
    record = metrics_of([problem(0, 0), problem(1, 0)], [[9.0], [float("nan")]])
    assert record["users"]["valid"] == [1.0, 0.0]
    assert record["users"]["mrr"] == [1.0, pytest.approx(2 / 3)]
    assert record["users"]["common_mrr"] == [1.0, 1.0]
    assert record["metrics"].keys() == record["users"].keys() == set(METRICS)


def test_running_statistics_move_by_a_tenth_and_stay_where_nobody_rated():
    judge = Judge.of(toy_config(), np.array([[9.0, 1.0], [2.0, 3.0]]), None)
    before = Normalisation(judge.item_mean, judge.item_std, (5.0, 4.0), (2.0, 1.0))
    nan = float("nan")
    after = moved(judge, before, moments(torch.tensor([[7.0, nan], [9.0, nan]], dtype=torch.float64)))
    # means of x: 5 and 8; of x^2: 4 + 25 = 29 and (49 + 81) / 2 = 65
    assert after.user_mean == pytest.approx((5.3, 4.0))
    assert after.user_std == pytest.approx(((0.9 * 29 + 0.1 * 65 - 5.3**2) ** 0.5, 1.0))
    assert (after.item_mean, after.item_std) == (judge.item_mean, judge.item_std)


def outcome_of(ratings: list[list[float]], targets: list[int]) -> Outcome:
    """Two completions of each user, standardised by 5 and 2; a user's reward is 1 for the target's side, -1 else."""
    judge = Judge.of(toy_config(), ITEMS_IA, accuracy)
    normalisation = Normalisation(judge.item_mean, judge.item_std, (5.0,), (2.0,))
    problems = [problem(user, target) for user, target in enumerate(targets)]
    return judge_ratings(judge, normalisation, problems, torch.tensor(ratings)[..., None])


def test_the_slope_that_all_users_share_is_all_of_a_shared_taste_and_nothing_of_opposite_ones():
    shared = outcome_of([[7.0, 3.0], [9.0, 1.0]], targets=[0, 0])
    # ratings 1 and -1, 2 and -2: so far from each other; both rewards differ by 2
    assert shared.deviation_BGA.flatten().tolist() == [2.0, -2.0, 4.0, -4.0]
    assert shared.advantage_BGA.flatten().tolist() == [2.0, -2.0, 2.0, -2.0]
    assert slope_sums(shared).tolist() == [[24.0], [40.0]]
    opposite = outcome_of([[7.0, 3.0], [7.0, 3.0]], targets=[0, 1])
    assert opposite.advantage_BGA.flatten().tolist() == [2.0, -2.0, -2.0, 2.0]
    assert slope_sums(opposite).tolist() == [[0.0], [16.0]]


def test_the_slope_is_the_mean_of_the_first_steps_and_then_follows():
    assert moved_slope((0.0,), torch.tensor([[24.0], [40.0]], dtype=torch.float64), 1) == pytest.approx((0.6,))
    assert moved_slope((0.6,), torch.tensor([[0.0], [16.0]], dtype=torch.float64), 2) == pytest.approx((0.3,))
    assert moved_slope((0.6,), torch.tensor([[0.0], [16.0]], dtype=torch.float64), 50) == pytest.approx((0.54,))
    assert moved_slope((0.6,), torch.zeros(2, 1, dtype=torch.float64), 50) == pytest.approx((0.54,))
