"""Rewards, advantages and format marks agree with numbers worked by hand and with other libraries."""

import math

import numpy as np
import pytest
import tiny_policy
import torch
from tiny_policy import template, tokenizer
from torchmetrics.functional.classification import binary_auroc

from raygr.finetune.rewards import (
    accuracy,
    aspect_credit,
    auc,
    correct_characters,
    leave_one_out_advantage,
    log_prob,
    mean_rank,
    reciprocal_rank,
    standardised,
    token_advantages,
)
from raygr.finetune.sampling import FORMAT, free_rollouts

NAMES = ("tension", "humor")
ITEMS_CA = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
FIRST_C = torch.tensor([True, False, False, False])
USERS_GA = torch.tensor([[2.0, 1.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)


def test_standardised_vectors_are_zero_where_nothing_is_known():
    values = torch.tensor([[7.0, 5.0], [float("nan"), 9.0]], dtype=torch.float64)
    assert standardised(values, (5.0, 5.0), (2.0, 0.0)).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_ranks_of_ties_are_their_mean():
    # similarities: [2 1 -2 2], [0 3 0 0], [-1 0 1 -1], all 0
    assert mean_rank(USERS_GA, ITEMS_CA, FIRST_C).tolist() == [1.5, 3.0, 3.5, 2.5]
    reward = reciprocal_rank(USERS_GA, ITEMS_CA, FIRST_C)
    assert reward.tolist() == pytest.approx([2 / 1.5 - 1, 2 / 3 - 1, 2 / 3.5 - 1, 2 / 2.5 - 1])


def test_log_prob_is_zero_where_all_items_look_alike_and_never_below_minus_one():
    strong = 50 * USERS_GA
    reward = log_prob(torch.cat([USERS_GA, strong]), ITEMS_CA, FIRST_C)
    expected = 1 + (2 - math.log(2 * math.exp(2) + math.exp(1) + math.exp(-2))) / math.log(4)
    assert reward[0].item() == pytest.approx(expected)
    assert reward[3].item() == pytest.approx(0)
    assert reward[6].item() == -1


def test_auc_agrees_with_torchmetrics_and_knows_no_value_without_two_classes():
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    liked = torch.tensor([True, False, True, False])
    expected = [2 * binary_auroc(torch.sigmoid(ITEMS_CA @ user), liked.int()).item() - 1 for user in users]
    assert auc(users, ITEMS_CA, liked).tolist() == pytest.approx(expected, abs=1e-6)
    assert auc(users, ITEMS_CA, torch.ones(4, dtype=torch.bool)).isnan().all()


def test_accuracy_calls_an_item_liked_where_the_similarity_is_positive():
    liked = torch.tensor([True, False, False, True])
    # positive: items 0 1 3, 1, 2, none
    assert accuracy(USERS_GA, ITEMS_CA, liked).tolist() == [0.5, -0.5, -0.5, 0.0]


def test_the_advantage_leaves_the_own_reward_out():
    assert leave_one_out_advantage(torch.tensor([1.0, 0.0, -1.0])).tolist() == [1.5, 0.0, -1.5]
    assert leave_one_out_advantage(torch.tensor([1.0])).tolist() == [0.0]


def test_an_aspects_credit_is_the_loss_when_the_others_mean_replaces_it():
    credit = aspect_credit(USERS_GA, ITEMS_CA, FIRST_C, reciprocal_rank)
    assert credit.shape == (4, 2)
    for g in range(4):
        for a in range(2):
            changed = USERS_GA[g].clone()
            changed[a] = USERS_GA[[other for other in range(4) if other != g], a].mean()
            one_by_one = reciprocal_rank(torch.stack([USERS_GA[g], changed]), ITEMS_CA, FIRST_C)
            assert credit[g, a].item() == pytest.approx((one_by_one[0] - one_by_one[1]).item())


def test_groups_side_by_side_have_the_credits_and_advantages_of_each_alone():
    groups_BGA = torch.stack([USERS_GA, USERS_GA.flip(0) + 1])
    together = aspect_credit(groups_BGA, ITEMS_CA, FIRST_C, reciprocal_rank)
    assert together.tolist() == [aspect_credit(one, ITEMS_CA, FIRST_C, reciprocal_rank).tolist() for one in groups_BGA]
    assert leave_one_out_advantage(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).tolist() == [[1.0, -1.0], [-4.0, 4.0]]


def test_token_advantages_worked_by_hand():
    # completion 0: format token in format, value of aspect 1, format token out of format, padding
    # completion 1: value of aspect 0, format token in format, the same, the same
    aspect = torch.tensor([[[-1, 1, -1, -2], [0, -1, -1, -1]]])
    correct = torch.tensor([[[True, True, False, False], [True, True, True, True]]])
    value, in_format = token_advantages(torch.tensor([[[0.5, 0.25], [-0.5, -0.25]]]), aspect, correct)
    assert value.tolist() == [[[0, 0.25, 0, 0], [-0.5, 0, 0, 0]]]
    # mean format rewards: 0 of the first, 1 of the second
    assert in_format.tolist() == [[[1 - 1, 0, -1 - 1, 0], [0, 1 - 0, 1 - 0, 1 - 0]]]


def marks(text: str) -> tuple[str, bool]:
    correct, is_complete = correct_characters(text, NAMES)
    return "".join(np.where(correct, "x", ".")), is_complete


@pytest.mark.parametrize(
    ("text", "expected", "is_complete"),
    [
        ("tension: 7\nhumor: 10", "x" * 20, True),
        ("tension: 7\nhumor: 10\n", "x" * 20 + ".", False),
        ("Tension: 7\nhumor: 10", "." * 11 + "x" * 9, False),
        ("humor: 3\ntension: 7", "x" * 8 + "." * 11, False),
        ("tension: 11\nhumor: 1", "." * 12 + "x" * 8, False),
        ("tension: 7\ntension: 7\nhumor: 1", "x" * 11 + "." * 11 + "x" * 8, False),
        ("tension: 7", "x" * 10, False),
        ("", "", False),
    ],
)
def test_format_marks(text, expected, is_complete):
    assert marks(text) == (expected, is_complete)


def test_a_broken_template_lowers_the_format_reward():
    texts = ["tension level: 7\nhumor: 3", "tension level = 7\nhumor: 3", "tension level = 7\nhumor = 3"]
    completions = [[tokenizer().encode(f"{text}<|im_end|>") for text in texts]]
    rollouts = free_rollouts(tokenizer(), completions, tiny_policy.NAMES, template(), torch.device("cpu"))
    assert rollouts.ratings_BGA.tolist() == [[[7, 3]] * 3]
    is_format_GT = rollouts.aspect_BGT[0] == FORMAT
    assert is_format_GT.sum(1).tolist() == [11, 11, 11]
    in_format_GT = token_advantages(torch.zeros(1, 3, 2), rollouts.aspect_BGT, rollouts.correct_BGT)[1][0]
    # in format are all 11; the four of "humor: " alone; none
    means = [1.0, (4 - 7) / 11, -1.0]
    expected = [1 - (means[1] + means[2]) / 2, means[1] - (means[0] + means[2]) / 2, -1 - (means[0] + means[1]) / 2]
    assert (in_format_GT.sum(1) / 11).tolist() == pytest.approx(expected)
