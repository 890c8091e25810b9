"""Held-out metrics of users' ratings, and what one answer for everybody is worth."""

import numpy as np
import pytest
import torch
from tiny_policy import toy_config

from raygr.finetuning.inputs import Problem
from raygr.finetuning.judging import METRICS, Judge, evaluation_record, user_metrics
from raygr.finetuning.rewards import Normalisation

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
