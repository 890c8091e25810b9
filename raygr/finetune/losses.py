"""The losses (5), (6) and (7) of the paper for sampled completions, in fp32, from the logits of prefix_cache.py.

(5) is the policy gradient: minus advantage times log-probability of each rating, over G completions and A aspects.
(6) is the cross-entropy of the answer's template with the ratings masked. Where `10` is two tokens, the token after a
rating of 1 is conditioned on not being a `0`, because the `0` belongs to the rating.
(7) adds them in three cases. All aspects were read: (5) plus the small lambda times (6). Some were read: (5) of the
ratings that were read plus the large lambda times (6). None was read: cross-entropy to a teacher's answer alone.
The settings can add a KL penalty, and a bonus for the entropy of the ratings, which the paper does not have.
Every update is on policy: there is no ratio, no clipping, no second pass over the same rollouts, and advantages are not
divided by their standard deviation.
Shape letters: `B` prompts, `G` completions, `R` completions, then target answers, `A` aspects, `T` tokens,
`V` vocabulary, `Q` levels 1..10. `X` is a number of chosen tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from raygr.finetune.prefix_cache import TokenRows
from raygr.finetune.rewards import FORMAT, PADDING, token_advantages
from raygr.finetune.sampling import AnswerTemplate, Rollouts, slots_rows
from raygr.score.shared_prefix import zero_or_other


class LossWeights(NamedTuple):
    """Weights of the parts of (7), and the sampling temperature; a weight of 0 switches its part off."""

    temperature: float = 1.0
    format_reward: float = 1.0
    format_read: float = 0.1  # lambda of (7) where all aspects were read
    format_unread: float = 1.0  # lambda of (7) where some were not read
    kl: float = 0.0
    entropy: float = 0.0


class LossParts(NamedTuple):
    """Parts of the loss, (B,) each; the last two are logged and not learned from."""

    value: Tensor  # (5)
    format: Tensor  # lambda times (6)
    format_reward: Tensor  # policy gradient of the format tokens (A.3)
    teacher: Tensor  # cross-entropy to the teacher's answer where no rating was read
    kl: Tensor  # KL penalty: weight times divergence
    entropy_bonus: Tensor  # minus weight times the entropy of the ratings
    divergence: Tensor  # KL divergence to the reference policy; NaN where its logits were not given
    entropy: Tensor

    @property
    def total(self) -> Tensor:
        """(7) of each prompt, (B,)."""
        return self.value + self.format + self.format_reward + self.teacher + self.kl + self.entropy_bonus


def slots_loss(
    logits_BGTV: Tensor,
    rollouts: Rollouts,
    advantage_BGA: Tensor,
    template: AnswerTemplate,
    weights: LossWeights,
    reference_BGTV: Tensor | None,
) -> LossParts:
    """(7) of rollouts in slots: all aspects are read, and no format token is sampled.

    `reference_BGTV`: logits of the reference policy; None where no KL divergence is wanted.
    """
    ratings_BGA = rollouts.ratings_BGA.long()
    answer = answer_log_probs(logits_BGTV, rollouts.rows, ratings_BGA, template)
    policy_BGAQ = (answer.rating_BRAQ / weights.temperature).log_softmax(dim=-1)
    chosen_BGA = policy_BGAQ.gather(-1, (ratings_BGA - 1)[..., None])[..., 0]
    zero_B = torch.zeros(len(chosen_BGA), device=chosen_BGA.device)
    divergence_B = zero_B + float("nan")
    if reference_BGTV is not None:
        reference = answer_log_probs(reference_BGTV, rollouts.rows, ratings_BGA, template)
        log_p, log_q = answer.rating_BRAQ.log_softmax(-1), reference.rating_BRAQ.log_softmax(-1)
        divergence_B = kl_divergence(log_p, log_q).mean((1, 2))
    entropy_B = -(policy_BGAQ.exp() * policy_BGAQ).sum(-1).mean((1, 2))
    return LossParts(
        value=-(advantage_BGA.float() * chosen_BGA).mean(dim=(1, 2)),
        format=weights.format_read * format_loss(answer, template).mean(dim=1),
        format_reward=zero_B,
        teacher=zero_B,
        kl=weights.kl * divergence_B if weights.kl else zero_B,
        entropy_bonus=-weights.entropy * entropy_B if weights.entropy else zero_B,
        divergence=divergence_B.detach(),
        entropy=entropy_B.detach(),
    )


def free_loss(
    logits_BRTV: Tensor,
    rollouts: Rollouts,
    advantage_BGA: Tensor,
    template: AnswerTemplate,
    weights: LossWeights,
    reference_BGTV: Tensor | None,
    targets: "TargetAnswers | None",
) -> LossParts:
    """(7) of free rollouts.

    `logits_BRTV` are those of `loss_rows(rollouts, targets)`. `reference_BGTV`: logits of the reference policy for the
    completions alone; None where no KL divergence is wanted.
    """
    g, places = rollouts.rows.ids_BRT.shape[1:]
    own_BGTV = logits_BRTV[:, :g, :places]
    policy_BGTV = own_BGTV if weights.temperature == 1 else own_BGTV / weights.temperature
    sampled_BGT, no_zero_BGT = sampled_log_probs(policy_BGTV, rollouts, template)
    is_format_BGT, kept_BGT = rollouts.aspect_BGT == FORMAT, rollouts.rows.kept_BRT
    tokens_BG = is_format_BGT.sum(2).clamp(min=1)
    read_BGA = ~rollouts.ratings_BGA.isnan()
    none_BG, all_BG = ~read_BGA.any(2), read_BGA.all(2)

    # (5), and the same for format tokens
    advantages = token_advantages(advantage_BGA, rollouts.aspect_BGT, rollouts.correct_BGT)
    rating_BGT, format_BGT = (advantage.float() for advantage in advantages)
    # that no `0` follows is part of the rating before: its advantage moves on by one place
    behind_BGT = pad(rating_BGT[..., :-1], (1, 0))
    value_BG = -(rating_BGT * sampled_BGT + behind_BGT * no_zero_BGT).sum(2) / read_BGA.shape[2]
    format_reward_BG = -(format_BGT * (sampled_BGT - no_zero_BGT)).sum(2) / tokens_BG

    # (6), and the teacher's answer
    if weights.temperature != 1:
        sampled_BGT, no_zero_BGT = sampled_log_probs(own_BGTV, rollouts, template)
    format_BG = -((sampled_BGT - no_zero_BGT) * is_format_BGT).sum(2) / tokens_BG
    teacher_BG = torch.zeros_like(format_BG)
    if targets is not None:
        target_format_BG, teacher_BG = target_losses(logits_BRTV[:, g:], targets, template)
        format_BG = torch.where(is_canonical(rollouts), format_BG, target_format_BG)

    # the three cases of (7)
    lambda_BG = torch.where(all_BG, weights.format_read, weights.format_unread) * ~none_BG
    zero_B = torch.zeros(len(value_BG), device=value_BG.device)
    divergence_B = zero_B + float("nan")
    if reference_BGTV is not None:
        log_p, log_q = logits_BRTV[:, :g, :places].log_softmax(-1), reference_BGTV.log_softmax(-1)
        divergence_B = mean_of_kept(kl_divergence(log_p, log_q), kept_BGT)
    log_probs_BGTV = policy_BGTV.detach().log_softmax(dim=-1)
    return LossParts(
        value=value_BG.mean(1),
        format=(lambda_BG * format_BG).mean(1),
        format_reward=weights.format_reward * (format_reward_BG * ~none_BG).mean(1),
        teacher=(teacher_BG * none_BG).mean(1),
        kl=weights.kl * divergence_B if weights.kl else zero_B,
        entropy_bonus=-weights.entropy * rating_entropy(policy_BGTV, rollouts.aspect_BGT)
        if weights.entropy
        else zero_B,
        divergence=divergence_B.detach(),
        entropy=mean_of_kept(-(log_probs_BGTV.exp() * log_probs_BGTV).sum(-1), kept_BGT),
    )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def rating_entropy(logits_BGTV: Tensor, aspect_BGT: Tensor) -> Tensor:
    """Mean entropy over the vocabulary where a rating's token is sampled, in nats, (B,); 0 where none was read.

    Format tokens take no part: their entropy is not wanted.
    """
    is_rating_BGT = aspect_BGT >= 0
    log_probs_XV = logits_BGTV[is_rating_BGT].log_softmax(dim=-1)
    entropy_BGT = torch.zeros_like(logits_BGTV[..., 0])
    entropy_BGT[is_rating_BGT] = -(log_probs_XV.exp() * log_probs_XV).sum(-1)
    return mean_of_kept(entropy_BGT, is_rating_BGT)


def mean_of_kept(values_BGT: Tensor, kept_BGT: Tensor) -> Tensor:
    """Mean over the kept tokens, (B,)."""
    return (values_BGT * kept_BGT).sum((1, 2)) / kept_BGT.sum((1, 2)).clamp(min=1)


class LogProbsAt(torch.autograd.Function):
    """log softmax at chosen tokens of every place: (..., V) logits and (..., X) token ids -> (..., X).

    The backward pass writes the gradient of the logits, the largest tensor of all, once instead of once per use.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, token_TX: Tensor) -> Tensor:
        total_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
        ctx.save_for_backward(logits_TV, total_T1, token_TX)
        return logits_TV.gather(-1, token_TX) - total_T1

    @staticmethod
    def backward(ctx: Any, gradient_TX: Tensor) -> tuple[Tensor, None]:
        logits_TV, total_T1, token_TX = ctx.saved_tensors
        gradient_TV = torch.sub(logits_TV, total_T1).exp_().mul_(-gradient_TX.sum(-1, keepdim=True))
        return gradient_TV.scatter_add_(-1, token_TX, gradient_TX), None


def token_log_probs(logits_BRTV: Tensor, rows: TokenRows, others: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """log P of every token, (B, R, T), and of `others` at every place, (B, R, T, X).

    A token follows the last kept token before it. Of two neighbouring places at least one must be kept, except at the
    end of a row.
    """
    next_BRT = pad(rows.ids_BRT[..., 1:], (0, 1))
    others_BRTX = torch.tensor(others, dtype=torch.long, device=next_BRT.device).expand(*next_BRT.shape, -1)
    log_probs_BRTX = LogProbsAt.apply(
        logits_BRTV, torch.cat([rows.ids_BRT[..., None], next_BRT[..., None], others_BRTX], -1)
    )
    # the logits at place t follow the token at place t - 1; those at place 0 follow the prompt
    is_behind_kept_BRT = pad(rows.kept_BRT[..., :-1], (1, 0), value=True)
    earlier_BRT = pad(log_probs_BRTX[..., :-1, 1], (1, 0))
    return torch.where(is_behind_kept_BRT, log_probs_BRTX[..., 0], earlier_BRT), log_probs_BRTX[..., 2:]


class AnswerLogProbs(NamedTuple):
    """Log-probabilities of rows in the layout of `slots`."""

    rating_BRAQ: Tensor  # log P(1..10) at every slot, not normalised to the ten
    template_BRT: Tensor  # of template tokens; 0 at ratings


def answer_log_probs(
    logits_BRTV: Tensor, rows: TokenRows, ratings_BRA: Tensor, template: AnswerTemplate
) -> AnswerLogProbs:
    """Log-probabilities of the ratings and of the template of answers in the layout of `slots`.

    `rows` are `slots_rows(template, ratings_BRA)`, possibly with padding after them.
    """
    first_A = torch.as_tensor(template.first_A, device=logits_BRTV.device)
    is_template_T = torch.zeros(rows.ids_BRT.shape[2], dtype=torch.bool, device=first_A.device)
    is_template_T[: template.places] = torch.as_tensor(template.is_template())
    ratings = template.ratings
    log_probs_BRT, digits_BRTX = token_log_probs(logits_BRTV, rows, [*ratings.digits, ratings.ten[-1]])
    log_probs_BRT, slot_BRAX = log_probs_BRT * is_template_T, digits_BRTX[:, :, first_A]
    if not ratings.ten_is_split:
        return AnswerLogProbs(slot_BRAX, log_probs_BRT)
    zero_BRA = digits_BRTX[:, :, first_A + 1, 9]
    other_BRA = log_complement(
        zero_BRA, zero_or_other(logits_BRTV.detach()[:, :, first_A + 1], ratings.ten[1])[1][..., 0]
    )
    one_BRA = slot_BRAX[..., 0]
    rating_BRAQ = torch.cat(
        [(one_BRA + other_BRA)[..., None], slot_BRAX[..., 1:9], (one_BRA + zero_BRA)[..., None]], -1
    )
    no_zero_BRT = torch.zeros_like(log_probs_BRT)
    no_zero_BRT[:, :, first_A + 2] = torch.where(ratings_BRA == 1, other_BRA, 0.0)
    return AnswerLogProbs(rating_BRAQ, log_probs_BRT - no_zero_BRT)


def log_complement(log_p: Tensor, value: Tensor) -> Tensor:
    """log(1 - P) with its gradient through `log_p`; `value` is the exact result, computed without cancellation.

    The slope -P / (1 - P) is limited to -10,000: beyond that it would only amplify rounding errors of log P's gradient.
    """
    slope = -(log_p.detach() - value).exp().clamp(max=1e4)
    return value + slope * (log_p - log_p.detach())


def sampled_log_probs(logits_BGTV: Tensor, rollouts: Rollouts, template: AnswerTemplate) -> tuple[Tensor, Tensor]:
    """log P of every token, and log P(not '0') behind a rating of 1 (0 elsewhere), both (B, G, T)."""
    log_probs_BGT = token_log_probs(logits_BGTV, rollouts.rows)[0] * (rollouts.aspect_BGT != PADDING)
    no_zero_BGT = torch.zeros_like(log_probs_BGT)
    if template.ratings.ten_is_split:
        aspect_BGT = rollouts.aspect_BGT
        rating_BGT = rollouts.ratings_BGA.gather(2, aspect_BGT.clamp(min=0))
        is_one_BGT = (aspect_BGT >= 0) & (rating_BGT == 1) & (rollouts.rows.ids_BRT == template.ratings.ten[0])
        behind_BGT = pad(is_one_BGT[..., :-1], (1, 0)) & (aspect_BGT == FORMAT)
        if behind_BGT.any():
            no_zero_BGT[behind_BGT] = zero_or_other(logits_BGTV[behind_BGT], template.ratings.ten[1])[1][..., 0]
    return log_probs_BGT, no_zero_BGT


def format_loss(answer: AnswerLogProbs, template: AnswerTemplate) -> Tensor:
    """(6) of every row, (B, R): mean cross-entropy over the template's tokens."""
    return -answer.template_BRT.sum(dim=2) / template.is_template().sum()


def soft_ratings(ratings_A: Tensor) -> Tensor:
    """Weights of the levels 1..10 whose mean is the rating, (..., 10): 7.3 is 0.7 of 7 and 0.3 of 8."""
    level_Q = torch.arange(1, 11, device=ratings_A.device)
    return (1 - (ratings_A[..., None] - level_Q).abs()).clamp(min=0).float()


def teacher_loss(answer: AnswerLogProbs, teacher_BRA: Tensor, template: AnswerTemplate) -> Tensor:
    """Cross-entropy of every row to a teacher's answer, (B, R); ratings and template have the same weight."""
    rating_BR = -(soft_ratings(teacher_BRA) * answer.rating_BRAQ).sum(-1).mean(dim=2)
    return rating_BR + format_loss(answer, template)


def probe_loss(log_probs_BAQ: Tensor, teacher_BA: Tensor) -> Tensor:
    """Cross-entropy of the normalised ratings to the teacher's, mean over the aspects, (B,); see `soft_ratings`."""
    return -(soft_ratings(teacher_BA) * log_probs_BAQ).sum(-1).mean(dim=1)


class TargetAnswers(NamedTuple):
    """Answers in format to learn from, R per prompt: those of a teacher, or in place of completions out of format.

    Completions with the same target share its row; R is the most that one prompt has.
    """

    ratings_BRA: Tensor
    rows: TokenRows
    row_BG: Tensor  # the target of each completion; arbitrary for completions that are in format
    teacher_BA: Tensor


def rounded(teacher_BA: Tensor) -> Tensor:
    """Whole ratings 1..10; halves are rounded up."""
    return (teacher_BA + 0.5).floor().clamp(1, 10)


def is_canonical(rollouts: Rollouts) -> Tensor:
    """Which completions are the expected answer token by token, (B, G); they need no target answer."""
    in_format_BG = (rollouts.correct_BGT | (rollouts.aspect_BGT == PADDING)).all(dim=2)
    return in_format_BG & ~rollouts.ratings_BGA.isnan().any(dim=2)


def target_answers(rollouts: Rollouts, teacher_BA: Tensor, template: AnswerTemplate) -> TargetAnswers:
    """Answers with the ratings that were read and the teacher's elsewhere, for the completions that are not canonical.

    At least one completion must not be canonical.
    """
    read_BGA = ~rollouts.ratings_BGA.isnan()
    ratings_BGA = torch.where(read_BGA, rollouts.ratings_BGA, rounded(teacher_BA)[:, None]).long()
    rows_of_prompts, row_BG = [], torch.zeros(ratings_BGA.shape[:2], dtype=torch.long, device=ratings_BGA.device)
    for b, is_own_G in enumerate(is_canonical(rollouts)):
        different, row_BG[b, ~is_own_G] = ratings_BGA[b, ~is_own_G].unique(dim=0, return_inverse=True)
        rows_of_prompts.append(different)
    most = max(map(len, rows_of_prompts))
    filled = [
        torch.cat([rows, ratings_BGA[b, :1].expand(most - len(rows), -1)]) for b, rows in enumerate(rows_of_prompts)
    ]
    ratings_BRA = torch.stack(filled)
    return TargetAnswers(ratings_BRA, slots_rows(template, ratings_BRA), row_BG, teacher_BA)


def loss_rows(rollouts: Rollouts, targets: TargetAnswers | None) -> TokenRows:
    """The completions and then their target answers, padded to the longest row."""
    if targets is None:
        return rollouts.rows
    longest = max(rollouts.rows.ids_BRT.shape[2], targets.rows.ids_BRT.shape[2])
    both = zip(lengthened(rollouts.rows, longest), lengthened(targets.rows, longest), strict=True)
    return TokenRows(*(torch.cat(pair, dim=1) for pair in both))


def lengthened(rows: TokenRows, places: int) -> TokenRows:
    return TokenRows(*(pad(values_BRT, (0, places - values_BRT.shape[2])) for values_BRT in rows))


def target_losses(logits_BRTV: Tensor, targets: TargetAnswers, template: AnswerTemplate) -> tuple[Tensor, Tensor]:
    """(6) and the cross-entropy to the teacher of every completion's target answer, (B, G) each."""
    rows = lengthened(targets.rows, logits_BRTV.shape[2])
    answer = answer_log_probs(logits_BRTV, rows, targets.ratings_BRA, template)
    teacher_BRA = targets.teacher_BA[:, None].expand_as(targets.ratings_BRA)
    losses = format_loss(answer, template), teacher_loss(answer, teacher_BRA, template)
    return losses[0].gather(1, targets.row_BG), losses[1].gather(1, targets.row_BG)
