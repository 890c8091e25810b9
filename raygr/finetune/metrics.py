"""The task that rewards ratings of users, held-out metrics, and the figures that are logged per step.

Whatever the task is, MRR is that of the target among its candidates, and AUC that of the items kept out of the prompt.
Shape letters: `B` users of a batch, `U` users, `G` completions, `A` aspects, `I` items, `C` candidates, `M` metrics,
`N` interactions.
Ratings and rewards are float64 on the CPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import PROFILE_MIDDLE, PROFILE_SPREAD, TuningExample
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

# Metrics of an evaluation. The common ones give all users the mean of all users' ratings, one answer for everybody.
# The personal ones use ratings centred on that mean: all that a recommender gets, because it standardises users.
METRICS = ("reward", "mrr", "auc", "common_mrr", "common_auc", "personal_mrr", "personal_auc", "valid")
LOSS_PARTS = LossParts._fields[:6]  # without those that are only logged
FEWEST_READINGS = 8  # ratings of an aspect that its statistics need
# Answers split evenly between two neighbouring ratings have this standard deviation. A smaller one means a single
# rating with exceptions: divided by it, one exception in 64 would lie eight deviations off and outweigh all other
# aspects together.
LEAST_SPREAD = 0.5
STEP_SUMS = (
    *("users", "reward", "spread", "flat", "mrr", "auc_users", "auc", "valid", "read", "tokens", "entropy"),
    *("kl_users", "divergence", *LOSS_PARTS),
)
REWARD_TOLERANCE = 1e-6  # rounding errors allowed in a user's own reward


class TuningTask(NamedTuple):
    """What the ratings of a user are rewarded for."""

    name: str
    reward: Reward
    is_own: bool
    """Whether `reward` is a user's own function, whose values are checked."""
    per_aspect_credit: bool
    value_reward: bool
    contrast_weight: float
    items_IA: Tensor  # standardised, 0 where an item has no score
    item_mean: tuple[float, ...]
    item_std: tuple[float, ...]


def tuning_task(config: FinetuneConfig, items_IA: np.ndarray, reward: Reward | None) -> TuningTask:
    """The configured task, or the given reward in its place.

    `items_IA` is NaN where an item has no score; mean and standard deviation are of the other items.
    """
    name = config.reward or ("auc" if config.task == "classification" else "reciprocal_rank")
    mean_A, std_A = np.nanmean(items_IA, axis=0), np.nanstd(items_IA, axis=0)
    return TuningTask(
        name=config.task,
        reward=reward or reward_function(name),
        is_own=reward is not None,
        per_aspect_credit=config.per_aspect_credit,
        value_reward=config.value_reward,
        contrast_weight=config.contrast_weight,
        items_IA=standardised(torch.as_tensor(items_IA, dtype=torch.float64), mean_A, std_A),
        item_mean=tuple(mean_A.tolist()),
        item_std=tuple(std_A.tolist()),
    )


def keep_best_by(config: FinetuneConfig) -> str:
    """The held-out metric that chooses the adapter; by default that of ratings centred on the mean answer.

    A recommender standardises users, so it ignores what all users' answers share, though that may raise the reward.
    """
    if config.subjects == "items":
        return "spearman"
    return config.keep_best_by or ("personal_auc" if config.task == "classification" else "personal_mrr")


def standardised_users(normalisation: Normalisation, ratings_BGA: Tensor) -> Tensor:
    """The users' vectors, (B, G, A): their standardised ratings, 0 where none was read."""
    return standardised(ratings_BGA.detach().cpu().double(), normalisation.user_mean, normalisation.user_std)


def rewards_of(task: TuningTask, examples: Sequence[TuningExample], users_BGA: Tensor) -> Tensor:
    """Reward in [-1, 1] of every completion, (B, G)."""
    pairs = zip(examples, users_BGA, strict=True)
    return torch.stack([reward_of(task, one)(user_GA, *rewarded_items(task, one)) for one, user_GA in pairs])


def advantages_of(
    task: TuningTask,
    examples: Sequence[TuningExample],
    users_BGA: Tensor,
    reward_BG: Tensor,
    others: Sequence[TuningExample] = (),
) -> Tensor:
    """Advantage of every rating, (B, G, A): the completion's for each, or with `per_aspect_credit` the rating's own.

    With a contrast, each reward is reduced by `contrast_weight` times its mean on the items of `others`. These are
    users of the step, whose own row is left out; the advantage is linear in the reward, so it is reduced instead.
    """
    if not task.value_reward:
        return torch.zeros_like(users_BGA)
    if task.per_aspect_credit:
        own = [advantages_on(task, one, user_GA) for one, user_GA in zip(examples, users_BGA, strict=True)]
        own_BGA = torch.stack(own)
    else:
        own_BGA = torch.stack([leave_one_out_advantage(reward_G) for reward_G in reward_BG])[..., None].expand_as(
            users_BGA
        )
    if not task.contrast_weight:
        return own_BGA
    sum_BGA, number_B = torch.zeros_like(users_BGA), torch.zeros(len(examples))
    user_B = torch.tensor([one.user_index for one in examples])
    for other in others:
        is_other_B = user_B != other.user_index
        sum_BGA += advantages_on(task, other, users_BGA) * is_other_B[:, None, None]
        number_B += is_other_B
    return own_BGA - task.contrast_weight * sum_BGA / number_B.clamp(min=1)[:, None, None]


def advantages_on(task: TuningTask, example: TuningExample, users_XGA: Tensor) -> Tensor:
    """Advantages of any users' ratings, (..., G, A), by the reward on the items of one user."""
    items_CA, relevant_C = rewarded_items(task, example)
    reward = reward_of(task, example)
    if task.per_aspect_credit:
        return aspect_credit(users_XGA, items_CA, relevant_C, reward)
    reward_XG = reward(users_XGA.flatten(0, -2), items_CA, relevant_C).view(users_XGA.shape[:-1])
    return leave_one_out_advantage(reward_XG)[..., None].expand_as(users_XGA)


def mrr_and_auc(task: TuningTask, examples: Sequence[TuningExample], users_BGA: Tensor) -> tuple[Tensor, Tensor]:
    """MRR of the target among the candidates and AUC of the judged items, (B, G) each.

    AUC is NaN where the user likes all judged items or none.
    """
    pairs = list(zip(examples, users_BGA, strict=True))
    mrr_BG = torch.stack([1 / mean_rank(user_GA, *candidate_items(task, one)) for one, user_GA in pairs])
    auc_BG = torch.stack([(auc(user_GA, *liked_items(task, one)) + 1) / 2 for one, user_GA in pairs])
    return mrr_BG, auc_BG


def rewarded_items(task: TuningTask, example: TuningExample) -> tuple[Tensor, Tensor]:
    """The items that the reward looks at, (C, A), and which of them are relevant, (C,)."""
    return liked_items(task, example) if task.name == "classification" else candidate_items(task, example)


def candidate_items(task: TuningTask, example: TuningExample) -> tuple[Tensor, Tensor]:
    return task.items_IA[example.candidate_C], torch.arange(len(example.candidate_C)) == 0


def liked_items(task: TuningTask, example: TuningExample) -> tuple[Tensor, Tensor]:
    return task.items_IA[example.judged_N], torch.as_tensor(example.liked_N)


def reward_of(task: TuningTask, example: TuningExample) -> Reward:
    """The task's reward; a user's own function raises a ValueError unless it returns (G,) values in [-1, 1]."""
    if not task.is_own:
        return task.reward

    def checked(user_GA: Tensor, items_CA: Tensor, relevant_C: Tensor) -> Tensor:
        reward_G = task.reward(user_GA, items_CA, relevant_C)
        if not isinstance(reward_G, Tensor) or reward_G.shape != user_GA.shape[:1]:
            found = tuple(reward_G.shape) if isinstance(reward_G, Tensor) else type(reward_G).__name__
            wrong = f"returned {found}, not a tensor of shape ({len(user_GA)},), a value per row of its first argument"
        elif not (reward_G.abs() <= 1 + REWARD_TOLERANCE).all():  # also where a value is NaN
            worst = reward_G[~(reward_G.abs() <= 1 + REWARD_TOLERANCE)][0]
            wrong = f"returned {float(worst):g}, not a number in [-1, 1]"
        else:
            return reward_G
        raise ValueError(f"reward {task.reward.__qualname__}: for user {example.user_id} it {wrong}")

    return checked


def moments(ratings_XA: Tensor) -> Tensor:
    """Number, sum and sum of squares of the ratings per aspect, (3, A); NaN counts as no rating."""
    read_XA = ~ratings_XA.isnan()
    known_XA = ratings_XA.nan_to_num(nan=0.0)
    return torch.stack([read_XA.sum(0).double(), known_XA.sum(0), (known_XA**2).sum(0)])


def normalisation_from(task: TuningTask, moments_3A: Tensor) -> Normalisation:
    """Statistics of the items, and of the users by the `moments` of their ratings."""
    count_A, sum_A, squares_A = moments_3A.cpu().numpy()
    mean_A = sum_A / np.maximum(count_A, 1)
    std_A = np.sqrt(np.maximum(squares_A / np.maximum(count_A, 1) - mean_A**2, 0))
    return Normalisation(task.item_mean, task.item_std, tuple(mean_A.tolist()), tuple(std_A.tolist()))


def lasting_normalisation(task: TuningTask, moments_3A: Tensor) -> tuple[Normalisation, list[int]]:
    """`normalisation_from` for a whole run, and the aspects whose ratings are too few or too similar to fit it.

    Such an aspect may be read, and differ, later in the run, and a deviation of 0 would exclude it from all rewards.
    With too few ratings it takes the mean and deviation of profiles; with too similar ones, LEAST_SPREAD.
    """
    measured = normalisation_from(task, moments_3A)
    few_A = moments_3A[0].cpu().numpy() < FEWEST_READINGS
    mean_A = np.where(few_A, PROFILE_MIDDLE, measured.user_mean)
    std_A = np.where(few_A, PROFILE_SPREAD, np.maximum(measured.user_std, LEAST_SPREAD))
    unsure = np.flatnonzero(few_A | (std_A > measured.user_std)).tolist()
    return replace(measured, user_mean=tuple(mean_A.tolist()), user_std=tuple(std_A.tolist())), unsure


def user_metrics(
    task: TuningTask, normalisation: Normalisation, examples: Sequence[TuningExample], ratings_UA: Tensor
) -> Tensor:
    """METRICS of every user, (M, U), from one answer of each."""
    common_UA = ratings_UA.nanmean(dim=0).expand_as(ratings_UA)
    own_U1A = standardised_users(normalisation, ratings_UA[:, None])
    common_U1A = standardised_users(normalisation, common_UA[:, None])
    personal_U1A = standardised_users(normalisation_from(task, moments(ratings_UA)), ratings_UA[:, None])
    # the common and the centred answers get no reward, which need not be defined for them
    columns = [rewards_of(task, examples, own_U1A)]
    for users_U1A in (own_U1A, common_U1A, personal_U1A):
        columns += mrr_and_auc(task, examples, users_U1A)
    valid_U = (~ratings_UA.isnan()).all(dim=1).double().cpu()
    return torch.stack([*(column_U1[:, 0] for column_U1 in columns), valid_U])


def evaluation_record(metrics_MU: Tensor) -> dict[str, dict]:
    """`metrics`: means over the users that have a value; `users`: each user's value, None where there is none."""
    users = {
        name: [None if np.isnan(value) else value for value in row]
        for name, row in zip(METRICS, metrics_MU.tolist(), strict=True)
    }
    known = {name: [value for value in values if value is not None] for name, values in users.items()}
    means = {name: sum(values) / len(values) if values else 0.0 for name, values in known.items()}
    return {"metrics": means, "users": users}


def step_sums(
    examples: list[TuningExample],
    rollouts: Rollouts,
    reward_BG: Tensor,
    mrr_and_auc_BG: tuple[Tensor, Tensor],
    losses: LossParts,
) -> Tensor:
    """Sums over users, in the order of STEP_SUMS; the sums of batches and of workers add up."""
    spread_B = reward_BG.std(dim=1)
    read_BGA = ~rollouts.ratings_BGA.isnan()
    mrr_B, auc_B = (metric_BG.mean(1) for metric_BG in mrr_and_auc_BG)
    values: dict[str, Tensor | float] = {
        "users": len(examples),
        "reward": reward_BG.mean(1).sum(),
        "spread": spread_B.sum(),
        "flat": (spread_B < 1e-12).sum(),
        "mrr": mrr_B.sum(),
        "auc_users": (~auc_B.isnan()).sum(),
        "auc": auc_B.nansum(),
        "valid": read_BGA.all(2).double().mean(1).sum(),
        "read": read_BGA.double().mean((1, 2)).sum(),
        "tokens": sum(len(example.prompt_ids) for example in examples) + rollouts.rows.kept_BRT.sum(),
        "entropy": losses.entropy.sum(),
        "kl_users": (~losses.divergence.isnan()).sum(),
        "divergence": losses.divergence.nansum(),
    }
    values |= {name: value.detach().sum() for name, value in zip(LOSS_PARTS, losses, strict=False)}
    return torch.tensor([float(values[name]) for name in STEP_SUMS], dtype=torch.float64)


def step_figures(sums: list[float], seconds: float) -> dict[str, Any]:
    """The figures of one line of steps.jsonl: means over the users, and tokens per second."""
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
