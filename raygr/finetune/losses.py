"""The losses (5), (6) and (7) of rollouts, in fp32, from the logits of prefix_cache.py.

(5) is the policy gradient: minus advantage times log-probability of the rating, over G completions and A aspects.
(6) is the cross-entropy of the answer's template with the ratings masked; where `10` is two tokens, what follows a
rating of 1 is conditioned on there being no `0`, which belongs to the rating.
(7) adds them in three cases. All aspects read: (5) + the small lambda times (6). Some: (5) on what was read, the large
lambda. None: cross-entropy to a teacher's answer alone.
Every update is on policy: no ratio, no clipping, no second pass over the same rollouts, no division by the spread.
B prompts, G completions of each, R rows (completions, then their target answers), A aspects, T places, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raygr.finetune.prefix_cache import Rows
from raygr.finetune.sampling import FORMAT, PADDING, AnswerTemplate, Rollouts, slots_rows, zero_or_other


class LossWeights(NamedTuple):
    """What (7) is made of; 0 switches a part off."""

    temperature: float = 1.0
    format_reward: float = 1.0
    format_read: float = 0.1
    format_unread: float = 1.0
    kl: float = 0.0


class LossParts(NamedTuple):
    """Per prompt, (B,): what each part adds to the loss, then what is only watched."""

    value: Tensor  # (5)
    format: Tensor  # lambda times (6)
    format_reward: Tensor  # policy gradient of the format tokens
    teacher: Tensor  # cross-entropy where nothing was read
    kl: Tensor  # weighted
    divergence: Tensor  # KL to the base model, not weighted; NaN where it was not asked for
    entropy: Tensor

    @property
    def total(self) -> Tensor:
        """(7), per prompt."""
        return self.value + self.format + self.format_reward + self.teacher + self.kl


class AnswerLogProbs(NamedTuple):
    """Of rows in the layout of `slots`."""

    rating_BRAR: Tensor  # log P(1..10) at every slot, not normalised to the ten
    template_BRT: Tensor  # of template tokens; 0 at ratings


class LogProbsAt(torch.autograd.Function):
    """log softmax at K tokens of every place: (..., V) logits and (..., K) token ids -> (..., K).

    The backward pass writes the logits' gradient, the largest tensor of all, once and not once for each use.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, token_NK: Tensor) -> Tensor:
        total_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
        ctx.save_for_backward(logits_NV, total_N1, token_NK)
        return logits_NV.gather(-1, token_NK) - total_N1

    @staticmethod
    def backward(ctx: Any, gradient_NK: Tensor) -> tuple[Tensor, None]:
        logits_NV, total_N1, token_NK = ctx.saved_tensors
        gradient_NV = torch.sub(logits_NV, total_N1).exp_().mul_(-gradient_NK.sum(-1, keepdim=True))
        return gradient_NV.scatter_add_(-1, token_NK, gradient_NK), None


def token_log_probs(logits_BRTV: Tensor, rows: Rows, others: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """log P of every token behind the last kept one before it, (B, R, T), and of `others` at every place, (B, R, T, K).

    Of two places side by side, at least one is kept, but at the end of a row.
    """
    next_BRT = torch.nn.functional.pad(rows.ids_BRT[..., 1:], (0, 1))
    others_BRTK = torch.tensor(others, dtype=torch.long, device=next_BRT.device).expand(*next_BRT.shape, -1)
    log_probs_BRTK = LogProbsAt.apply(
        logits_BRTV, torch.cat([rows.ids_BRT[..., None], next_BRT[..., None], others_BRTK], -1)
    )
    # logits at place t are those behind the token of place t - 1; place 0 stands behind the prompt
    is_behind_kept_BRT = torch.nn.functional.pad(rows.kept_BRT[..., :-1], (1, 0), value=True)
    earlier_BRT = torch.nn.functional.pad(log_probs_BRTK[..., :-1, 1], (1, 0))
    return torch.where(is_behind_kept_BRT, log_probs_BRTK[..., 0], earlier_BRT), log_probs_BRTK[..., 2:]


def answer_log_probs(logits_BRTV: Tensor, rows: Rows, ratings_BRA: Tensor, template: AnswerTemplate) -> AnswerLogProbs:
    """`rows` are those of `slots_rows(template, ratings_BRA)`, or longer ones that start with them."""
    first_A = torch.as_tensor(template.first_A, device=logits_BRTV.device)
    is_template_T = torch.zeros(rows.ids_BRT.shape[2], dtype=torch.bool, device=first_A.device)
    is_template_T[: template.places] = torch.as_tensor(template.is_template())
    ratings = template.ratings
    log_probs_BRT, digits_BRTK = token_log_probs(logits_BRTV, rows, [*ratings.digits, ratings.ten[-1]])
    log_probs_BRT, slot_BRAK = log_probs_BRT * is_template_T, digits_BRTK[:, :, first_A]
    if not ratings.ten_is_split:
        return AnswerLogProbs(slot_BRAK, log_probs_BRT)
    zero_BRA = digits_BRTK[:, :, first_A + 1, 9]
    other_BRA = log_complement(
        zero_BRA, zero_or_other(logits_BRTV.detach()[:, :, first_A + 1], ratings.ten[1])[1][..., 0]
    )
    one_BRA = slot_BRAK[..., 0]
    rating_BRAR = torch.cat(
        [(one_BRA + other_BRA)[..., None], slot_BRAK[..., 1:9], (one_BRA + zero_BRA)[..., None]], -1
    )
    no_zero_BRT = torch.zeros_like(log_probs_BRT)
    no_zero_BRT[:, :, first_A + 2] = torch.where(ratings_BRA == 1, other_BRA, 0.0)
    return AnswerLogProbs(rating_BRAR, log_probs_BRT - no_zero_BRT)


def log_complement(log_p: Tensor, value: Tensor) -> Tensor:
    """log(1 - P) with its gradient through `log_p`; `value` is exact, which log(1 - P) is not where P is nearly 1.

    There the slope -P / (1 - P) stops at -10,000: beyond, it would multiply mere rounding of the gradient of log P.
    """
    slope = -(log_p.detach() - value).exp().clamp(max=1e4)
    return value + slope * (log_p - log_p.detach())


def slots_loss(
    logits_BGTV: Tensor,
    rollouts: Rollouts,
    advantage_BGA: Tensor,
    template: AnswerTemplate,
    weights: LossWeights,
    base_logits_BGTV: Tensor | None,
) -> LossParts:
    """All aspects are read, and there is no sampled format token."""
    ratings_BGA = rollouts.ratings_BGA.long()
    answer = answer_log_probs(logits_BGTV, rollouts.rows, ratings_BGA, template)
    policy_BGAR = (answer.rating_BRAR / weights.temperature).log_softmax(dim=-1)
    chosen_BGA = policy_BGAR.gather(-1, (ratings_BGA - 1)[..., None])[..., 0]
    zero_B = torch.zeros(len(chosen_BGA), device=chosen_BGA.device)
    divergence_B = zero_B + float("nan")
    if base_logits_BGTV is not None:
        base = answer_log_probs(base_logits_BGTV, rollouts.rows, ratings_BGA, template)
        divergence_B = divergence(answer.rating_BRAR.log_softmax(-1), base.rating_BRAR.log_softmax(-1)).mean((1, 2))
    return LossParts(
        value=-(advantage_BGA.float() * chosen_BGA).mean(dim=(1, 2)),
        format=weights.format_read * format_loss(answer, template).mean(dim=1),
        format_reward=zero_B,
        teacher=zero_B,
        kl=weights.kl * divergence_B if weights.kl else zero_B,
        divergence=divergence_B.detach(),
        entropy=-(policy_BGAR.exp() * policy_BGAR).sum(-1).mean((1, 2)).detach(),
    )


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def format_loss(answer: AnswerLogProbs, template: AnswerTemplate) -> Tensor:
    """(6) of every row, (B, R): mean cross-entropy over the template's tokens."""
    return -answer.template_BRT.sum(dim=2) / template.is_template().sum()


def soft_ratings(ratings_A: Tensor) -> Tensor:
    """Weights of 1..10 whose mean is the rating: 7.3 is 0.7 of 7 and 0.3 of 8, (..., 10)."""
    scale_R = torch.arange(1, 11, device=ratings_A.device)
    return (1 - (ratings_A[..., None] - scale_R).abs()).clamp(min=0).float()


def teacher_loss(answer: AnswerLogProbs, teacher_BRA: Tensor, template: AnswerTemplate) -> Tensor:
    """Cross-entropy of every row to a teacher's answer, (B, R): its ratings and its template, weighing the same."""
    rating_BR = -(soft_ratings(teacher_BRA) * answer.rating_BRAR).sum(-1).mean(dim=2)
    return rating_BR + format_loss(answer, template)


class Targets(NamedTuple):
    """The answers that free completions out of format should have been: what was read, the teacher's ratings elsewhere.

    Completions with the same target share its row; R is the most that a prompt has.
    """

    ratings_BRA: Tensor
    rows: Rows
    row_BG: Tensor  # each completion's target; any for those that are their own
    teacher_BA: Tensor


def is_canonical(rollouts: Rollouts) -> Tensor:
    """Which completions are the expected answer token by token, (B, G): they are their own target."""
    in_format_BG = (rollouts.correct_BGT | (rollouts.aspect_BGT == PADDING)).all(dim=2)
    return in_format_BG & ~rollouts.ratings_BGA.isnan().any(dim=2)


def target_answers(rollouts: Rollouts, teacher_BA: Tensor, template: AnswerTemplate) -> Targets:
    """For rollouts that are not all canonical."""
    rounded_B1A = (teacher_BA + 0.5).floor().clamp(1, 10)[:, None]
    ratings_BGA = torch.where(rollouts.ratings_BGA.isnan(), rounded_B1A, rollouts.ratings_BGA).long()
    rows_of_prompts, row_BG = [], torch.zeros(ratings_BGA.shape[:2], dtype=torch.long, device=ratings_BGA.device)
    for b, is_own_G in enumerate(is_canonical(rollouts)):
        different, row_BG[b, ~is_own_G] = ratings_BGA[b, ~is_own_G].unique(dim=0, return_inverse=True)
        rows_of_prompts.append(different)
    most = max(map(len, rows_of_prompts))
    filled = [
        torch.cat([rows, ratings_BGA[b, :1].expand(most - len(rows), -1)]) for b, rows in enumerate(rows_of_prompts)
    ]
    ratings_BRA = torch.stack(filled)
    return Targets(ratings_BRA, slots_rows(template, ratings_BRA), row_BG, teacher_BA)


def joined(first: Rows, second: Rows) -> Rows:
    """Rows of both, filled up to the longer."""
    longest = max(first.ids_BRT.shape[2], second.ids_BRT.shape[2])
    parts = [[lengthened(values, longest) for values in rows] for rows in (first, second)]
    return Rows(*(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)))


def lengthened(values_BRT: Tensor, places: int) -> Tensor:
    return torch.nn.functional.pad(values_BRT, (0, places - values_BRT.shape[2]))


def free_loss(
    logits_BRTV: Tensor,
    rollouts: Rollouts,
    token_advantages: tuple[Tensor, Tensor],
    targets: Targets | None,
    template: AnswerTemplate,
    weights: LossWeights,
) -> LossParts:
    """`targets`: None where every completion is canonical; their rows stand behind the completions'."""
    g, places = rollouts.rows.ids_BRT.shape[1:]
    own_BGTV = logits_BRTV[:, :g, :places]
    policy_BGTV = own_BGTV if weights.temperature == 1 else own_BGTV / weights.temperature
    sampled_BGT, no_zero_BGT = sampled_log_probs(policy_BGTV, rollouts, template)
    value_BGT, format_BGT = (advantage.float() for advantage in token_advantages)
    # that no `0` follows is part of the rating before: its advantage moves on by one place
    behind_BGT = torch.nn.functional.pad(value_BGT[..., :-1], (1, 0))
    aspects = rollouts.ratings_BGA.shape[2]
    value_BG = -(value_BGT * sampled_BGT + behind_BGT * no_zero_BGT).sum(2) / aspects
    tokens_BG = (rollouts.aspect_BGT == FORMAT).sum(2).clamp(min=1)
    format_reward_BG = -(format_BGT * (sampled_BGT - no_zero_BGT)).sum(2) / tokens_BG

    read_BGA = ~rollouts.ratings_BGA.isnan()
    none_BG, all_BG = ~read_BGA.any(2), read_BGA.all(2)
    if weights.temperature != 1:
        sampled_BGT, no_zero_BGT = sampled_log_probs(own_BGTV, rollouts, template)
    format_BG = -((sampled_BGT - no_zero_BGT) * (rollouts.aspect_BGT == FORMAT)).sum(2) / tokens_BG
    teacher_BG = torch.zeros_like(format_BG)
    if targets is not None:
        target_format_BG, teacher_BG = target_losses(logits_BRTV[:, g:], targets, template)
        format_BG = torch.where(is_canonical(rollouts), format_BG, target_format_BG)
    lambda_BG = torch.where(all_BG, weights.format_read, weights.format_unread) * ~none_BG
    zero_B = torch.zeros(len(value_BG), device=value_BG.device)
    return LossParts(
        value=value_BG.mean(1),
        format=(lambda_BG * format_BG).mean(1),
        format_reward=weights.format_reward * (format_reward_BG * ~none_BG).mean(1),
        teacher=(teacher_BG * none_BG).mean(1),
        kl=zero_B,
        divergence=zero_B + float("nan"),
        entropy=mean_entropy(policy_BGTV.detach(), rollouts.rows.kept_BRT),
    )


def target_losses(logits_BRTV: Tensor, targets: Targets, template: AnswerTemplate) -> tuple[Tensor, Tensor]:
    """(6) and the cross-entropy to the teacher of every completion's target, (B, G) each."""
    rows = Rows(*(lengthened(values, logits_BRTV.shape[2]) for values in targets.rows))
    answer = answer_log_probs(logits_BRTV, rows, targets.ratings_BRA, template)
    teacher_BRA = targets.teacher_BA[:, None].expand_as(targets.ratings_BRA)
    losses = format_loss(answer, template), teacher_loss(answer, teacher_BRA, template)
    return losses[0].gather(1, targets.row_BG), losses[1].gather(1, targets.row_BG)


def sampled_log_probs(logits_BGTV: Tensor, rollouts: Rollouts, template: AnswerTemplate) -> tuple[Tensor, Tensor]:
    """log P of every token, and log P(not '0') where the token before is a rating of 1 (0 elsewhere), (B, G, T)."""
    log_probs_BGT = token_log_probs(logits_BGTV, rollouts.rows)[0] * (rollouts.aspect_BGT != PADDING)
    no_zero_BGT = torch.zeros_like(log_probs_BGT)
    if template.ratings.ten_is_split:
        aspect_BGT = rollouts.aspect_BGT
        rating_BGT = rollouts.ratings_BGA.gather(2, aspect_BGT.clamp(min=0))
        is_one_BGT = (aspect_BGT >= 0) & (rating_BGT == 1) & (rollouts.rows.ids_BRT == template.ratings.ten[0])
        behind_BGT = torch.nn.functional.pad(is_one_BGT[..., :-1], (1, 0)) & (aspect_BGT == FORMAT)
        if behind_BGT.any():
            no_zero_BGT[behind_BGT] = zero_or_other(logits_BGTV[behind_BGT], template.ratings.ten[1])[1][..., 0]
    return log_probs_BGT, no_zero_BGT


def mean_entropy(logits_BGTV: Tensor, kept_BGT: Tensor) -> Tensor:
    """Mean over the sampled tokens, (B,)."""
    log_probs = logits_BGTV.log_softmax(dim=-1)
    entropy_BGT = -(log_probs.exp() * log_probs).sum(-1) * kept_BGT
    return entropy_BGT.sum((1, 2)) / kept_BGT.sum((1, 2)).clamp(min=1)


def with_divergence(
    parts: LossParts, logits_BGTV: Tensor, base_logits_BGTV: Tensor, rows: Rows, weight: float
) -> LossParts:
    """`parts` of free rollouts with the KL divergence over the vocabulary, mean over the sampled tokens."""
    difference_BGT = divergence(logits_BGTV.log_softmax(-1), base_logits_BGTV.log_softmax(-1)) * rows.kept_BRT
    mean_B = difference_BGT.sum((1, 2)) / rows.kept_BRT.sum((1, 2)).clamp(min=1)
    return parts._replace(kl=weight * mean_B if weight else parts.kl, divergence=mean_B.detach())
