"""Ratings of users -> rewards, advantages, held-out metrics and the figures of a step, by the frozen item scores.

MRR is that of the target among its candidates and AUC that of the items kept out of the prompt, whatever the task is.
Shape suffixes as in rewards.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import PROFILE_MIDDLE, PROFILE_SPREAD, Problem
from raygr.finetune.losses import LossParts
from raygr.finetune.rewards import (
    Normalisation,
    Reward,
    aspect_credit,
    auc,
    leave_one_out_advantage,
    mean_rank,
    reward_function,
    standardised,
)
from raygr.finetune.sampling import Rollouts

# Of an evaluation. The common ones are what the mean of all users' ratings gives, one answer for everybody. The
# personal ones are of ratings centred on that mean: a recommender, which standardises users, is given no more.
METRICS = ("reward", "mrr", "auc", "common_mrr", "common_auc", "personal_mrr", "personal_auc", "valid")
LOSS_PARTS = ("value", "format", "format_reward", "teacher", "kl")
FEWEST_READINGS = 8  # of an aspect, to fit its statistics on
# Answers split evenly between two neighbouring ratings have this spread. One with less is a single rating with
# exceptions: divided by it, one exception in 64 would lie eight spreads off and outweigh all other aspects together.
LEAST_SPREAD = 0.5
STEP_SUMS = (
    *("users", "reward", "spread", "flat", "mrr", "auc_users", "auc", "valid", "read", "tokens", "entropy"),
    *("kl_users", "divergence", *LOSS_PARTS),
)
REWARD_TOLERANCE = 1e-6  # rounding in one's own reward


class Judge(NamedTuple):
    """The task: what a user's ratings are worth."""

    task: str
    reward: Reward
    is_own: bool
    """Whether `reward` is one's own function, whose values are checked."""
    per_aspect_credit: bool
    value_reward: bool
    items_IA: Tensor  # standardised, 0 where an item has no score
    item_mean: tuple[float, ...]
    item_std: tuple[float, ...]

    @staticmethod
    def of(config: FinetuneConfig, items_IA: np.ndarray, reward: Reward | None) -> "Judge":
        """`items_IA` is NaN where an item has no score; mean and deviation are of the others."""
        name = config.reward or ("auc" if config.task == "classification" else "reciprocal_rank")
        mean_A, std_A = np.nanmean(items_IA, axis=0), np.nanstd(items_IA, axis=0)
        return Judge(
            task=config.task,
            reward=reward or reward_function(name),
            is_own=reward is not None,
            per_aspect_credit=config.per_aspect_credit,
            value_reward=config.value_reward,
            items_IA=standardised(torch.as_tensor(items_IA, dtype=torch.float64), mean_A, std_A),
            item_mean=tuple(mean_A.tolist()),
            item_std=tuple(std_A.tolist()),
        )


def keep_best_by(config: FinetuneConfig) -> str:
    """The held-out metric that chooses the adapter: of ratings centred on the mean answer, unless told otherwise.

    A recommender standardises users, so what all users' answers share is lost on it, and may still raise the reward.
    """
    return config.keep_best_by or ("personal_auc" if config.task == "classification" else "personal_mrr")


class Outcome(NamedTuple):
    """Of G completions of B users, on the CPU."""

    reward_BG: Tensor
    mrr_BG: Tensor
    auc_BG: Tensor  # NaN where the user likes all or none
    advantage_BGA: Tensor


def judge_ratings(
    judge: Judge, normalisation: Normalisation, problems: Sequence[Problem], ratings_BGA: Tensor
) -> Outcome:
    ratings_BGA = ratings_BGA.detach().cpu().double()
    users_BGA = standardised(ratings_BGA, normalisation.user_mean, normalisation.user_std)
    judged = [judge_user(judge, problem, user_GA) for problem, user_GA in zip(problems, users_BGA, strict=True)]
    return Outcome(*(torch.stack(column) for column in zip(*judged, strict=True)))


def judge_user(judge: Judge, problem: Problem, user_GA: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reward, MRR, AUC and advantage of one user's completions."""
    task = liked_items(judge, problem) if judge.task == "classification" else candidate_items(judge, problem)
    reward = checked_reward(judge.reward, problem.user_id) if judge.is_own else judge.reward
    reward_G = reward(user_GA, *task)
    if not judge.value_reward:
        advantage_GA = torch.zeros_like(user_GA)
    elif judge.per_aspect_credit:
        advantage_GA = aspect_credit(user_GA, *task, reward)
    else:
        advantage_GA = leave_one_out_advantage(reward_G)[:, None].expand_as(user_GA)
    return reward_G, *similarity_metrics(judge, problem, user_GA), advantage_GA


def similarity_metrics(judge: Judge, problem: Problem, user_GA: Tensor) -> tuple[Tensor, Tensor]:
    """MRR of the target among the candidates and AUC of the judged items, NaN where the user likes all or none."""
    mrr_G = 1 / mean_rank(user_GA, *candidate_items(judge, problem))
    return mrr_G, (auc(user_GA, *liked_items(judge, problem)) + 1) / 2


def candidate_items(judge: Judge, problem: Problem) -> tuple[Tensor, Tensor]:
    return judge.items_IA[problem.candidate_C], torch.arange(len(problem.candidate_C)) == 0


def liked_items(judge: Judge, problem: Problem) -> tuple[Tensor, Tensor]:
    return judge.items_IA[problem.judged_K], torch.as_tensor(problem.liked_K)


def checked_reward(reward: Reward, user_id: str) -> Reward:
    """One's own function, with a ValueError where it returns anything but (G,) values in [-1, 1]."""

    def checked(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
        reward_G = reward(user_GA, items_CA, relevant_C)
        if not isinstance(reward_G, Tensor) or reward_G.shape != user_GA.shape[:1]:
            found = tuple(reward_G.shape) if isinstance(reward_G, Tensor) else type(reward_G).__name__
            wrong = f"returned {found}, not a tensor of shape ({len(user_GA)},), a value per row of its first argument"
        elif not (reward_G.abs() <= 1 + REWARD_TOLERANCE).all():  # false of a NaN, too
            worst = reward_G[~(reward_G.abs() <= 1 + REWARD_TOLERANCE)][0]
            wrong = f"returned {float(worst):g}, not a number in [-1, 1]"
        else:
            return reward_G
        raise ValueError(f"reward {reward.__qualname__}: for user {user_id} it {wrong}")

    return checked


def fitted(judge: Judge, moments_3A: Tensor) -> Normalisation:
    """From the number, the sum and the sum of squares of the policy's ratings per aspect."""
    count_A, sum_A, squares_A = moments_3A.cpu().numpy()
    mean_A = sum_A / np.maximum(count_A, 1)
    std_A = np.sqrt(np.maximum(squares_A / np.maximum(count_A, 1) - mean_A**2, 0))
    return Normalisation(judge.item_mean, judge.item_std, tuple(mean_A.tolist()), tuple(std_A.tolist()))


def lasting_statistics(judge: Judge, moments_3A: Tensor) -> tuple[Normalisation, list[int]]:
    """`fitted` for a whole run, and the aspects that have too few ratings, or too like ones, to be fitted on.

    An aspect may come to be read and to differ later, and a spread of 0 would keep it out of all rewards for ever.
    With too few ratings it takes the mean and the spread that profiles have; with too like ones LEAST_SPREAD.
    """
    measured = fitted(judge, moments_3A)
    few_A = moments_3A[0].cpu().numpy() < FEWEST_READINGS
    mean_A = np.where(few_A, PROFILE_MIDDLE, measured.user_mean)
    std_A = np.where(few_A, PROFILE_SPREAD, np.maximum(measured.user_std, LEAST_SPREAD))
    unsure = np.flatnonzero(few_A | (std_A > measured.user_std)).tolist()
    return measured._replace(user_mean=tuple(mean_A.tolist()), user_std=tuple(std_A.tolist())), unsure


def moments(ratings_NA: Tensor) -> Tensor:
    read_NA = ~ratings_NA.isnan()
    known_NA = ratings_NA.nan_to_num(nan=0.0)
    return torch.stack([read_NA.sum(0).double(), known_NA.sum(0), (known_NA**2).sum(0)])


def user_metrics(judge: Judge, normalisation: Normalisation, problems: Sequence[Problem], ratings_UA: Tensor) -> Tensor:
    """METRICS of every user, (M, U), from one answer of each."""
    own = judge_ratings(judge, normalisation, problems, ratings_UA[:, None])
    common_UA = ratings_UA.nanmean(dim=0).expand_as(ratings_UA)
    common = metrics_of_users(judge, normalisation, problems, common_UA)
    personal = metrics_of_users(judge, fitted(judge, moments(ratings_UA)), problems, ratings_UA)
    valid_U = (~ratings_UA.isnan()).all(dim=1).double().cpu()
    own_U = (column_U1[:, 0] for column_U1 in (own.reward_BG, own.mrr_BG, own.auc_BG))
    return torch.stack([*own_U, *common, *personal, valid_U])


def metrics_of_users(
    judge: Judge, normalisation: Normalisation, problems: Sequence[Problem], ratings_UA: Tensor
) -> tuple[Tensor, Tensor]:
    """MRR and AUC of one answer of each user, (U,) each; no reward, which need not be defined of such answers."""
    users_UA = standardised(ratings_UA.detach().cpu().double(), normalisation.user_mean, normalisation.user_std)
    pairs = [
        similarity_metrics(judge, problem, user_A[None]) for problem, user_A in zip(problems, users_UA, strict=True)
    ]
    mrr_U, auc_U = (torch.cat(column) for column in zip(*pairs, strict=True))
    return mrr_U, auc_U


def evaluation_record(metrics_MU: Tensor) -> dict[str, dict]:
    """Means over the users that have a value, and the users' own; None where a user has none."""
    users = {
        name: [None if np.isnan(value) else value for value in row]
        for name, row in zip(METRICS, metrics_MU.tolist(), strict=True)
    }
    means = {name: mean_of([v for v in values if v is not None]) for name, values in users.items()}
    return {"metrics": means, "users": users}


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def step_sums(problems: list[Problem], rollouts: Rollouts, outcome: Outcome, parts: LossParts) -> Tensor:
    """Sums over users, in the order of STEP_SUMS: workers' sums add up."""
    spread_B = outcome.reward_BG.std(dim=1)
    read_BGA = ~rollouts.ratings_BGA.isnan()
    auc_B, divergence_B = outcome.auc_BG.mean(1), parts.divergence
    values = {
        "users": len(problems),
        "reward": outcome.reward_BG.mean(1).sum(),
        "spread": spread_B.sum(),
        "flat": (spread_B < 1e-12).sum(),
        "mrr": outcome.mrr_BG.mean(1).sum(),
        "auc_users": (~auc_B.isnan()).sum(),
        "auc": auc_B.nansum(),
        "valid": read_BGA.all(2).double().mean(1).sum(),
        "read": read_BGA.double().mean((1, 2)).sum(),
        "tokens": sum(len(p.prompt_ids) for p in problems) + rollouts.rows.kept_BRT.sum(),
        "entropy": parts.entropy.sum(),
        "kl_users": (~divergence_B.isnan()).sum(),
        "divergence": divergence_B.nansum(),
    } | {name: value.detach().sum() for name, value in zip(LOSS_PARTS, parts, strict=False)}
    return torch.tensor([float(values[name]) for name in STEP_SUMS], dtype=torch.float64)


def step_figures(sums: list[float], seconds: float) -> dict[str, Any]:
    """A line of steps.jsonl but for its place."""
    total = dict(zip(STEP_SUMS, sums, strict=True))
    users = total["users"]
    losses = {name: total[name] / users for name in LOSS_PARTS}
    return {
        "reward": total["reward"] / users,
        "reward_spread": total["spread"] / users,
        "flat_groups": total["flat"] / users,
        "mrr": total["mrr"] / users,
        "auc": total["auc"] / total["auc_users"] if total["auc_users"] else None,
        "valid": total["valid"] / users,
        "aspects_read": total["read"] / users,
        "entropy": total["entropy"] / users,
        "kl": total["divergence"] / total["kl_users"] if total["kl_users"] else None,
        "loss": sum(losses.values()),
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": total["tokens"] / seconds,
    }
