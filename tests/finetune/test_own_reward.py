"""A user's own reward is used unchanged if its values are valid, and refused otherwise."""

import pytest
import torch
from test_tuning_metrics import ITEMS_IA, example
from tiny_policy import toy_config

from raygr.finetune.metrics import METRICS, advantages_of, rewards_of, standardised_users, tuning_task, user_metrics
from raygr.finetune.rewards import Normalisation, Reward


def own_outcome(own_reward: Reward, ratings_GA: list[list[float]], **changes: object):
    """Rewards (1, G) and advantages (1, G, A) of one user's answers."""
    task, examples = tuning_task(toy_config(**changes), ITEMS_IA, own_reward), [example(7, 0)]
    normalisation = Normalisation(task.item_mean, task.item_std, (5.5,), (2.0,))
    users_BGA = standardised_users(normalisation, torch.tensor([ratings_GA], dtype=torch.float64))
    reward_BG = rewards_of(task, examples, users_BGA)
    return reward_BG, advantages_of(task, examples, users_BGA, reward_BG)


def first_aspect(user_GA, items_CA, relevant_C):
    return user_GA[:, 0].clamp(-1, 1)


def test_ones_own_reward_is_taken_as_it_is():
    for values in ([1.0, -1.0], [1 + 1e-7, 0.5]):
        reward_BG, _ = own_outcome(lambda user_GA, *task, values=values: torch.tensor(values), [[9.0], [2.0]])
        assert reward_BG.tolist() == [pytest.approx(values, abs=1e-6)]
    assert own_outcome(first_aspect, [[9.0], [5.5]], per_aspect_credit=True)[1].shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([0.5, float("nan")]), r"it returned nan, not a number in \[-1, 1\]"),
        (torch.tensor([float("-inf"), 0.5]), "it returned -inf, not"),
        (torch.tensor([0.5, 1.01]), "it returned 1.01, not"),
        (torch.tensor([[0.5], [0.25]]), r"it returned \(2, 1\), not a tensor of shape \(2,\)"),
        (torch.tensor(0.5), r"it returned \(\), not"),
        ([0.5, 0.25], "it returned list, not a tensor"),
    ],
)
def test_ones_own_reward_outside_its_contract_is_refused(values, message: str):
    def wrong_reward(user_GA, items_CA, relevant_C):
        return values

    with pytest.raises(ValueError, match=f"reward .*wrong_reward: for user u7 {message}") as caught:
        own_outcome(wrong_reward, [[9.0], [2.0]])
    assert "\n" not in str(caught.value)


def test_ones_own_reward_is_checked_in_the_credit_of_aspects_too():
    def undefined_at_the_mean(user_GA, items_CA, relevant_C):
        """NaN for the rows in which an aspect has the others' mean."""
        return user_GA[:, 0] / 4 if user_GA[0, 0] == 1.0 else torch.full((len(user_GA),), float("nan"))

    own_outcome(undefined_at_the_mean, [[7.5], [3.5]])
    with pytest.raises(ValueError, match="undefined_at_the_mean: for user u7 it returned nan"):
        own_outcome(undefined_at_the_mean, [[7.5], [3.5]], per_aspect_credit=True)


def test_metrics_of_answers_that_nobody_gave_ask_for_no_reward():
    """The common answer and the centred answers may be zeros, for which a reward need not be defined."""

    def cosine(user_GA, items_CA, relevant_C):
        asked.append(user_GA.tolist())
        return user_GA[:, 0] / user_GA[:, 0].abs()

    asked: list = []
    task = tuning_task(toy_config(), ITEMS_IA, cosine)
    normalisation = Normalisation(task.item_mean, task.item_std, (5.5,), (2.0,))
    ratings_UA = torch.tensor([[7.5], [3.5]], dtype=torch.float64)  # their mean is 5.5
    metrics_MU = user_metrics(task, normalisation, [example(0, 0), example(1, 1)], ratings_UA)
    assert asked == [[[1.0]], [[-1.0]]] and metrics_MU[0].tolist() == [1.0, -1.0]
    assert metrics_MU[METRICS.index("common_auc")].tolist() == [0.5, 0.5]
