"""Held-out metrics of users' ratings, and of one answer for all users."""

import numpy as np
import pytest
import torch
from tiny_policy import toy_config

from raygr.finetune.examples import TuningExample
from raygr.finetune.metrics import (
    METRICS,
    advantages_of,
    evaluation_record,
    lasting_normalisation,
    moments,
    rewards_of,
    standardised_users,
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


def contrasted(examples: list[TuningExample], users_BGA: list, weight: float, *, credit: bool = False) -> list:
    """Advantages on two items with the scores 1 and -1, so AUC is 1 or -1 by the sign of a rating."""
    task = tuning_task(toy_config(task="classification", contrast_weight=weight), ITEMS_IA, None)
    task = task._replace(per_aspect_credit=credit)
    users = torch.tensor(users_BGA, dtype=torch.float64)
    return advantages_of(task, examples, users, rewards_of(task, examples, users), examples)[..., 0].tolist()


@pytest.mark.parametrize("credit", [False, True])
def test_the_contrast_leaves_an_answer_that_suits_everybody_no_advantage(credit: bool):
    users_BGA = [[[1.0], [-1.0]]] * 3
    alike = [example(0, 0), example(1, 0), example(2, 0)]
    assert contrasted(alike, users_BGA, 0.0, credit=credit) == [[2.0, -2.0]] * 3
    assert contrasted(alike, users_BGA, 1.0, credit=credit) == [[0.0, 0.0]] * 3
    assert contrasted(alike, users_BGA, 0.5, credit=credit) == [[1.0, -1.0]] * 3
    # two users like the first item and one the second: the mean of the others is 0 for the two, 1 for the one
    mixed = [example(0, 0), example(1, 0), example(2, 1)]
    assert contrasted(mixed, users_BGA, 1.0, credit=credit) == [[2.0, -2.0], [2.0, -2.0], [-4.0, 4.0]]


def test_the_contrast_of_a_step_does_not_depend_on_its_batches_and_a_user_alone_has_none():
    examples = [example(0, 0), example(1, 0), example(2, 1)]
    task = tuning_task(toy_config(task="classification", contrast_weight=1.0), ITEMS_IA, None)
    users = torch.tensor([[[1.0], [-1.0], [0.5]]], dtype=torch.float64)
    own = rewards_of(task, examples[1:2], users)
    alone = advantages_of(task, examples[1:2], users, own, examples)
    rewards = rewards_of(task, examples, users.expand(3, -1, -1))
    whole = advantages_of(task, examples, users.expand(3, -1, -1), rewards, examples)
    assert alone.tolist() == whole[1:2].tolist()
    single = advantages_of(task, examples[1:2], users, own, examples[1:2])
    assert single.tolist() == advantages_of(task._replace(contrast_weight=0.0), examples[1:2], users, own).tolist()


def ratings_after_reinforcement(contrast_weight: float, *, seed: int) -> list[float]:
    """Mean ratings of three users who like the first item, and of one who likes the second.

    A table takes the place of the LLM: logits that all users share, and faint ones of the kind of user.
    """
    task = tuning_task(toy_config(task="classification", contrast_weight=contrast_weight), ITEMS_IA, None)
    normalisation = Normalisation(task.item_mean, task.item_std, (5.5,), (2.0,))
    kind_B = torch.tensor([0, 0, 0, 1])
    users = [example(user, int(kind)) for user, kind in enumerate(kind_B)]
    generator = torch.Generator().manual_seed(seed)
    shared_Q, own_KQ = torch.zeros(10, requires_grad=True), torch.zeros(2, 10, requires_grad=True)
    optimizer = torch.optim.SGD([shared_Q, own_KQ], lr=4.0)
    level_Q = torch.arange(1.0, 11, dtype=torch.float64)
    for _ in range(200):
        log_probs_BQ = (shared_Q + 0.2 * own_KQ[kind_B]).log_softmax(-1)
        drawn_BG = torch.multinomial(log_probs_BQ.exp(), 8, replacement=True, generator=generator)
        users_BGA = standardised_users(normalisation, level_Q[drawn_BG][..., None])
        advantage_BGA = advantages_of(task, users, users_BGA, rewards_of(task, users, users_BGA), users)
        optimizer.zero_grad()
        (-(advantage_BGA[..., 0] * log_probs_BQ.gather(1, drawn_BG)).mean()).backward()
        optimizer.step()
    return (log_probs_BQ.detach().exp().double() @ level_Q).tolist()


def test_the_contrast_finds_personal_tastes_where_the_plain_reward_settles_on_one_answer():
    for seed in range(3):
        plain, contrast = (ratings_after_reinforcement(weight, seed=seed) for weight in (0.0, 1.0))
        assert plain[3] > 7 and abs(plain[0] - plain[3]) < 0.5  # both kinds give the answer of the majority
        assert contrast[0] - contrast[3] > 1.5


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
