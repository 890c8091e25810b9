"""Held-out metrics of users' ratings, and of one answer for all users."""

import numpy as np
import pytest
import torch
from tiny_policy import toy_config

from raygr.finetune.examples import TuningExample
from raygr.finetune.metrics import (
    METRICS,
    evaluation_record,
    lasting_normalisation,
    moments,
    tuning_task,
    user_metrics,
)
from raygr.finetune.rewards import Normalisation

ITEMS_IA = np.array([[9.0], [2.0]])


def example(user: int, target: int) -> TuningExample:
    """A user who likes the target and does not like the other of two items."""
    rows = np.array([target, 1 - target])
    liked = np.array([True, False])
    return TuningExample(user, f"u{user}", (1, 2), candidate_C=rows, judged_N=rows, liked_N=liked, teacher_A=None)


def metrics_of(examples: list[TuningExample], ratings_UA: list[list[float]]) -> dict[str, dict]:
    task = tuning_task(toy_config(task="classification"), ITEMS_IA, None)
    normalisation = Normalisation(task.item_mean, task.item_std, (5.5,), (2.0,))
    ratings = torch.tensor(ratings_UA, dtype=torch.float64)
    return evaluation_record(user_metrics(task, normalisation, examples, ratings))


def test_opposite_tastes_are_personal_and_a_shared_one_is_not():
    opposite = metrics_of([example(0, 0), example(1, 1)], [[10.0], [1.0]])["metrics"]
    assert (opposite["mrr"], opposite["auc"], opposite["reward"]) == (1.0, 1.0, 1.0)
    # the mean, 5.5, ranks the two items equally: rank 1.5
    assert opposite["common_mrr"] == pytest.approx(2 / 3) and opposite["common_auc"] == 0.5
    shared = metrics_of([example(0, 0), example(1, 0)], [[10.0], [7.0]])["metrics"]
    assert (shared["mrr"], shared["common_mrr"], shared["common_auc"]) == (1.0, 1.0, 1.0)
    # centred on the mean, 8.5, the first user still ranks the target first and the second ranks it second
    assert (opposite["personal_mrr"], opposite["personal_auc"]) == (1.0, 1.0)
    assert (shared["personal_mrr"], shared["personal_auc"]) == (0.75, 0.5)


def test_a_rating_that_was_not_read_counts_for_nobody():
    record = metrics_of([example(0, 0), example(1, 0)], [[9.0], [float("nan")]])
    assert record["users"]["valid"] == [1.0, 0.0]
    assert record["users"]["mrr"] == [1.0, pytest.approx(2 / 3)]
    assert record["users"]["common_mrr"] == [1.0, 1.0]
    assert record["metrics"].keys() == record["users"].keys() == set(METRICS)


def test_statistics_of_a_whole_run_worked_by_hand():
    task = tuning_task(toy_config(), np.array([[9.0] * 5, [2.0] * 5]), None)
    ratings = torch.full((64, 5), float("nan"), dtype=torch.float64)
    ratings[:7, 1] = torch.tensor([1.0, 1, 1, 9, 9, 9, 9])  # aspect 0 was never read, aspect 1 too rarely
    ratings[:8, 2] = torch.tensor([2.0, 2, 2, 2, 8, 8, 8, 8])
    ratings[:, 3] = 7
    ratings[0, 3] = 8
    ratings[:32, 4], ratings[32:, 4] = 3, 4
    normalisation, unsure = lasting_normalisation(task, moments(ratings))
    assert normalisation.user_mean == pytest.approx((5.5, 5.5, 5, 7 + 1 / 64, 3.5))
    assert normalisation.user_std == pytest.approx((2, 2, 3, 0.5, 0.5))
    assert unsure == [0, 1, 3]
    assert normalisation.item_std == task.item_std


def test_personal_metrics_are_of_the_spread_that_there_is():
    """Expected ratings in slots differ by little, and no minimum spread may shrink one aspect beside another."""
    items_IA = np.array([[9.0, 2.0], [2.0, 9.0]])
    task = tuning_task(toy_config(task="classification"), items_IA, None)
    # spreads .1 and 1: z is (1, .5), (-1, -.5), (1, -1.32), (-1, 1.32), and the items' (1, -1) and (-1, 1)
    far = 1.75**0.5
    ratings = torch.tensor([[5.6, 6.0], [5.4, 5.0], [5.6, 5.5 - far], [5.4, 5.5 + far]], dtype=torch.float64)
    examples = [example(user, user % 2) for user in range(4)]
    normalisation = Normalisation(task.item_mean, task.item_std, (5.5, 5.5), (2.0, 2.0))
    metrics = evaluation_record(user_metrics(task, normalisation, examples, ratings))["metrics"]
    assert (metrics["personal_mrr"], metrics["personal_auc"]) == (1.0, 1.0)
    assert metrics["mrr"] == 0.75  # if both were divided by 2, the first aspect would have too little weight
