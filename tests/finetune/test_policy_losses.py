"""Losses and gradients of a tiny policy agree with naive full passes, enumeration and finite differences."""

from itertools import product

import numpy as np
import pytest
import torch
from tiny_policy import JOINED, NAMES, PROMPTS, SPLIT, template, tiny_policy, tokenizer

from raygr.finetune.losses import (
    LogProbsAt,
    LossWeights,
    answer_log_probs,
    free_loss,
    is_canonical,
    log_complement,
    loss_rows,
    rating_entropy,
    sampled_log_probs,
    slots_loss,
    soft_ratings,
    target_answers,
    teacher_loss,
    token_log_probs,
)
from raygr.finetune.policy import adapter_weights
from raygr.finetune.prefix_cache import completion_logits, packed_logits, prefill
from raygr.finetune.sampling import answer_ids, free_rollouts, sample_slots, slots_rollouts, slots_rows
from raygr.score.shared_prefix import register_attention

RATINGS_BGA = torch.tensor([[[1, 10], [5, 3]], [[10, 1], [9, 10]], [[1, 1], [2, 7]]])


def gradient(model, loss) -> torch.Tensor:
    weights = list(adapter_weights(model).values())
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])


def naive_log_probs(model, prompt, completion) -> torch.Tensor:
    """Log-probability of every token of one completion, by a separate pass."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def shared_logits(model, rows, *, packed: bool):
    if packed:
        return packed_logits(model, PROMPTS, rows)
    return completion_logits(model, prefill(model, PROMPTS), rows)


@pytest.mark.parametrize("packed", [False, True], ids=["cache", "packed"])
@pytest.mark.parametrize("answer", [SPLIT, JOINED], ids=["split ten", "one token"])
def test_log_probabilities_and_gradients_are_those_of_naive_full_passes(answer, packed):
    model = tiny_policy()
    rollouts = slots_rollouts(answer, RATINGS_BGA)
    log_probs = token_log_probs(shared_logits(model, rollouts.rows, packed=packed), rollouts.rows)[0]
    shared = (log_probs * rollouts.rows.kept_BRT).sum(2)
    pairs = list(product(range(3), range(2)))
    completions = {(b, g): [*answer_ids(answer, RATINGS_BGA[b, g].tolist()), *answer.ending] for b, g in pairs}
    naive = torch.stack([naive_log_probs(model, PROMPTS[b], completions[b, g]).sum() for b, g in pairs]).view(3, 2)
    torch.testing.assert_close(shared, naive, rtol=1e-4, atol=1e-4)
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]])
    ours, theirs = gradient(model, (shared * weight).sum()), gradient(model, (naive * weight).sum())
    assert theirs.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-6)


def test_one_prompt_alone_and_prompts_with_nothing_in_common_give_the_same():
    model = tiny_policy()
    rows = slots_rows(SPLIT, RATINGS_BGA[:1])
    alone = completion_logits(model, prefill(model, PROMPTS[:1]), rows)
    other = ((9, 8, 7, 6), PROMPTS[0])
    beside = completion_logits(model, prefill(model, other), slots_rows(SPLIT, RATINGS_BGA[:1].repeat(2, 1, 1)))
    torch.testing.assert_close(alone[0], beside[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("answer", [SPLIT, JOINED], ids=["split ten", "one token"])
def test_ratings_and_template_make_up_the_whole_answers_probability(answer):
    model = tiny_policy()
    rows = slots_rows(answer, RATINGS_BGA)
    logits = shared_logits(model, rows, packed=False)
    parts = answer_log_probs(logits, rows, RATINGS_BGA, answer)
    rating_BR = parts.rating_BRAQ.gather(-1, (RATINGS_BGA - 1)[..., None]).sum((2, 3))
    whole_BR = (token_log_probs(logits, rows)[0] * rows.kept_BRT).sum(2)
    torch.testing.assert_close(rating_BR + parts.template_BRT.sum(2), whole_BR, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("answer", [SPLIT, JOINED], ids=["split ten", "one token"])
def test_slots_sampled_with_their_gradient_need_no_pass_of_their_own(answer):
    model = tiny_policy()
    uniform_BGA = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(1))
    slots = sample_slots(model, prefill(model, PROMPTS), answer, uniform_BGA)
    rows = slots_rows(answer, slots.ratings_BGA)
    logits = completion_logits(model, prefill(model, PROMPTS), rows)
    assert {1, 10} & set(slots.ratings_BGA.flatten().tolist())  # the ratings that are special where `10` is two tokens
    torch.testing.assert_close(slots.logits_BGTV, logits, rtol=1e-4, atol=1e-4)
    weight_BRT = torch.randn(3, 4, answer.places, generator=torch.Generator().manual_seed(2)) * rows.kept_BRT
    ours, theirs = (
        gradient(model, (token_log_probs(found, rows)[0] * weight_BRT).sum()) for found in (slots.logits_BGTV, logits)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["cache", "packed"])
def test_attention_without_copied_keys_is_the_same(packed):
    rows = slots_rows(SPLIT, RATINGS_BGA)
    plain, grouped = tiny_policy(), tiny_policy()
    grouped.get_base_model().set_attn_implementation(register_attention())
    ours, theirs = (shared_logits(model, rows, packed=packed) for model in (grouped, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = gradient(grouped, ours.square().sum()), gradient(plain, theirs.square().sum())
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
    torch.testing.assert_close(  # without a mask
        grouped(torch.tensor(PROMPTS[:1])).logits, plain(torch.tensor(PROMPTS[:1])).logits, rtol=1e-4, atol=1e-5
    )


def test_log_probabilities_at_some_tokens_and_their_gradient():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    token = torch.tensor([[[0, 6], [2, 2], [5, 1]], [[3, 3], [4, 0], [6, 5]]])
    picked = LogProbsAt.apply(logits, token)
    torch.testing.assert_close(picked, logits.log_softmax(-1).gather(-1, token))
    assert torch.autograd.gradcheck(LogProbsAt.apply, (logits, token))


def test_the_complement_of_a_probability_is_exact_and_its_slope_bounded():
    log_p = torch.tensor([-0.5, -3.0, 0.0], requires_grad=True)
    exact = torch.tensor([np.log1p(-np.exp(-0.5)), np.log1p(-np.exp(-3.0)), -40.0]).float()
    value = log_complement(log_p, exact)
    torch.testing.assert_close(value, exact)
    (slope,) = torch.autograd.grad(value.sum(), log_p)
    p = np.exp([-0.5, -3.0])
    assert slope.tolist() == pytest.approx([*(-p / (1 - p)), -1e4], rel=1e-5)


def reward_of(ratings: torch.Tensor) -> torch.Tensor:
    """A function of the ratings that is not additive."""
    return ((ratings[..., 0] - ratings[..., 1]).abs() == 9).float() + 0.1 * ratings[..., 0]


def all_answers() -> torch.Tensor:
    return torch.tensor([[[first, second] for first, second in product(range(1, 11), range(1, 11))]])


def expected_reward(model, temperature: float) -> torch.Tensor:
    """Expected reward of one prompt, by enumerating all 100 answers."""
    rows = slots_rows(SPLIT, all_answers())
    logits = completion_logits(model, prefill(model, PROMPTS[:1]), rows)
    log_probs = (answer_log_probs(logits, rows, all_answers(), SPLIT).rating_BRAQ / temperature).log_softmax(-1)
    chosen = log_probs.gather(-1, (all_answers() - 1)[..., None])[..., 0].sum(2)
    return (chosen.exp() * reward_of(all_answers())).sum()


def test_the_policy_gradient_is_that_of_the_expected_reward_by_finite_differences():
    model, temperature = tiny_policy().double(), 0.8
    for _, weight in adapter_weights(model).items():
        weight.data = weight.data.double()
    rollouts = slots_rollouts(SPLIT, all_answers())
    logits = completion_logits(model, prefill(model, PROMPTS[:1]), rollouts.rows).double()
    with torch.no_grad():
        ratings = answer_log_probs(logits, rollouts.rows, all_answers(), SPLIT).rating_BRAQ / temperature
        probability = ratings.log_softmax(-1).gather(-1, (all_answers() - 1)[..., None])[..., 0].sum(2).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    # the mean over samples becomes a sum over all answers, weighted by their probabilities
    advantage = (probability * reward_of(all_answers()) * 100)[..., None].expand(1, 100, 2)
    weights = LossWeights(temperature=temperature, format_read=0.0)
    loss = slots_loss(logits, rollouts, advantage, SPLIT, weights, None).total.sum()
    ours = -2 * gradient(model, loss)  # the loss is a mean over two aspects
    direction = torch.randn(len(ours), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction / direction.norm() + ours.double() / ours.norm().double()
    step, values = 1e-2, []
    for sign in (1, -1):
        move(model, sign * step * direction)
        with torch.no_grad():
            values.append(expected_reward(model, temperature).item())
        move(model, -sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((ours.double() @ direction).item(), rel=1e-2)


def move(model, direction: torch.Tensor) -> None:
    weights = list(adapter_weights(model).values())
    for weight, part in zip(weights, direction.split([weight.numel() for weight in weights]), strict=True):
        weight.data += part.view_as(weight)


def test_the_slots_loss_worked_by_hand():
    # one prompt, one completion, [5, 10]; uniform logits over 100 tokens everywhere
    rollouts = slots_rollouts(SPLIT, torch.tensor([[[5, 10]]]))
    logits = torch.zeros(1, 1, SPLIT.places, 100)
    parts = slots_loss(logits, rollouts, torch.tensor([[[1.0, -0.5]]]), SPLIT, LossWeights(format_read=0.1), None)
    # P(r) is 1/100 for 2..9, 0.99/100 for 1, 0.01/100 for 10; of the ten together 0.09
    policy = {5: 1 / 9, 10: 0.01 / 9}
    assert parts.value.item() == pytest.approx(-(np.log(policy[5]) - 0.5 * np.log(policy[10])) / 2, rel=1e-5)
    assert parts.format.item() == pytest.approx(0.1 * np.log(100), rel=1e-5)  # template tokens only
    shares = [0.99 / 9, *[1 / 9] * 8, 0.01 / 9]
    assert parts.entropy.item() == pytest.approx(-sum(p * np.log(p) for p in shares), rel=1e-5)


def test_the_kl_divergence_is_zero_at_the_base_and_its_weight_adds_to_the_loss():
    rollouts = slots_rollouts(SPLIT, torch.tensor([[[5, 10]]]))
    logits = torch.randn(1, 1, SPLIT.places, 100, generator=torch.Generator().manual_seed(0))
    advantage = torch.zeros(1, 1, 2)
    weights = LossWeights(format_read=0.0, kl=2.0)
    assert slots_loss(logits, rollouts, advantage, SPLIT, weights, logits).divergence.item() == pytest.approx(
        0, abs=1e-6
    )
    parts = slots_loss(logits, rollouts, advantage, SPLIT, weights, torch.zeros_like(logits))
    assert parts.divergence.item() > 0
    assert parts.total.item() == pytest.approx(2 * parts.divergence.item())


def test_the_entropy_bonus_worked_by_hand():
    """Two equally likely ratings at the first slot, log 2 nats, and ten at the second, log 10."""
    rollouts = slots_rollouts(JOINED, torch.tensor([[[2, 3]]]))
    logits = torch.zeros(1, 1, JOINED.places, 100)
    first, second = JOINED.first_A
    logits[0, 0, first, 2:4] = 50.0
    logits.requires_grad_()
    parts = slots_loss(logits, rollouts, torch.zeros(1, 1, 2), JOINED, LossWeights(entropy=0.5, format_read=0.0), None)
    expected = (np.log(2) + np.log(10)) / 2
    assert parts.entropy.item() == pytest.approx(expected, rel=1e-5)
    assert parts.total.item() == parts.entropy_bonus.item() == pytest.approx(-0.5 * expected, rel=1e-5)
    pushed = logits.detach().clone()
    pushed[0, 0, second, 5] = 1.0  # a rating that became more likely than the others
    pushed.requires_grad_()
    slots_loss(pushed, rollouts, torch.zeros(1, 1, 2), JOINED, LossWeights(entropy=0.5), None).total.sum().backward()
    slope = pushed.grad[0, 0, second, list(range(1, 10))]
    assert slope[4] > 0 and (slope[[0, 1, 2, 3, 5, 6, 7, 8]] < 0).all()  # a step of descent evens them out
    parts = slots_loss(logits, rollouts, torch.zeros(1, 1, 2), JOINED, LossWeights(format_read=0.0), None)
    assert parts.entropy_bonus.item() == parts.total.item() == 0


def test_the_entropy_bonus_of_free_completions_is_of_their_ratings_alone():
    rollouts = free_case([TEXTS[1], TEXTS[2]])  # one rating is read, at one token
    logits = torch.zeros(1, 2, rollouts.rows.ids_BRT.shape[2], 49_152)
    [place] = (rollouts.aspect_BGT[0, 0] == 0).nonzero().flatten().tolist()
    logits[0, 0, place, :4] = 50.0
    entropy = rating_entropy(logits, rollouts.aspect_BGT)
    assert entropy.tolist() == pytest.approx([np.log(4)], rel=1e-5)
    assert rating_entropy(logits, rollouts.aspect_BGT.clamp(max=-1)).tolist() == [0]
    weights = LossWeights(format_reward=0.0, format_read=0.0, format_unread=0.0, entropy=0.1)
    rollouts = free_case([TEXTS[0]])
    logits = torch.zeros(1, 1, rollouts.rows.ids_BRT.shape[2], 49_152)
    parts = free_loss(logits, rollouts, torch.zeros(1, 1, 2), template(), weights, None, None)
    assert parts.total.item() == parts.entropy_bonus.item() == pytest.approx(-0.1 * np.log(49_152), rel=1e-5)


def test_a_teachers_rating_between_two_is_shared_by_them():
    weights = soft_ratings(torch.tensor([7.3, 10.0, 1.0]))
    assert weights[0].tolist() == pytest.approx([0] * 6 + [0.7, 0.3, 0, 0], abs=1e-6)
    assert (weights @ torch.arange(1.0, 11)).tolist() == pytest.approx([7.3, 10, 1], abs=1e-5)


def test_the_teachers_loss_worked_by_hand():
    rows = slots_rows(SPLIT, torch.tensor([[[10, 1]]]))
    answer = answer_log_probs(torch.zeros(1, 1, SPLIT.places, 100), rows, torch.tensor([[[10, 1]]]), SPLIT)
    loss = teacher_loss(answer, torch.tensor([[[10.0, 1.0]]]), SPLIT)
    ratings = -(np.log(0.01 * 0.01) + np.log(0.01 * 0.99)) / 2
    # after the rating of 1, where no 0 may follow, the ending is one of 99 tokens
    template_part = (3 * np.log(100) + np.log(99)) / 4
    assert loss.item() == pytest.approx(ratings + template_part, rel=1e-5)


TEXTS = ["tension level: 1\nhumor: 10<|im_end|>", "tension level: 4, humor? 3", "I like films<|im_end|>"]


def free_case(texts: list[str]):
    completions = [[tokenizer().encode(text) for text in texts]]
    return free_rollouts(tokenizer(), completions, NAMES, template(), torch.device("cpu"))


def test_free_losses_take_the_three_cases():
    model, answer, rollouts = tiny_policy(), template(), free_case(TEXTS)
    assert is_canonical(rollouts).tolist() == [[True, False, False]]
    assert (~rollouts.ratings_BGA.isnan()).sum(2).tolist() == [[2, 1, 0]]
    teacher_BA = torch.tensor([[7.5, 2.0]], dtype=torch.float64)
    targets = target_answers(rollouts, teacher_BA, answer)
    assert targets.ratings_BRA.tolist() == [[[4, 2], [8, 2]]]
    assert targets.row_BG[0, 1:].tolist() == [0, 1]
    prompts = PROMPTS[:1]
    logits = completion_logits(model, prefill(model, prompts), loss_rows(rollouts, targets))
    advantage_BGA = torch.tensor([[[0.5, -0.25], [1.0, 2.0], [3.0, 3.0]]])
    parts = free_loss(logits, rollouts, advantage_BGA, answer, LossWeights(format_reward=1.0), None, targets)

    with torch.no_grad():
        own = [naive_log_probs(model, prompts[0], tokenizer().encode(text)) for text in TEXTS]
        target_rows = targets.rows
        alone = completion_logits(model, prefill(model, prompts), target_rows)
        target = answer_log_probs(alone, target_rows, targets.ratings_BRA, answer)
        probe = [*tokenizer().encode("tension level: 1")]
        zero = model(torch.tensor([[*prompts[0], *probe]])).logits[0, -1].softmax(-1)[answer.ratings.ten[1]]
    place = [rollouts.aspect_BGT[0, g].tolist() for g in range(3)]
    one = own[0][place[0].index(0)] + torch.log(1 - zero)
    ten = sum(own[0][t] for t, aspect in enumerate(place[0]) if aspect == 1)
    value = -(0.5 * one - 0.25 * ten + 1.0 * own[1][place[1].index(0)]) / (3 * 2)
    assert parts.value.item() == pytest.approx(value.item(), rel=1e-4)
    nll = -target.template_BRT[0].sum(1) / answer.is_template().sum()
    format_tokens = [t for t, aspect in enumerate(place[0]) if aspect == -1]
    own_nll = -(own[0][format_tokens].sum() - torch.log(1 - zero)) / len(format_tokens)
    assert parts.format.item() == pytest.approx((0.1 * own_nll + 1.0 * nll[0]).item() / 3, rel=1e-4)
    # the mean format rewards are 1, -1 and -1: the unread one counts in the others' baseline but has no term itself
    second_nll = -own[1][[t for t, aspect in enumerate(place[1]) if aspect == -1]].mean()
    advantage = (1 - (-1 - 1) / 2, -1 - (1 - 1) / 2)
    expected = (advantage[0] * own_nll + advantage[1] * second_nll).item() / 3
    assert parts.format_reward.item() == pytest.approx(expected, rel=1e-4)
    soft = 0.5 * target.rating_BRAQ[0, 1, 0, [6, 7]].sum() + target.rating_BRAQ[0, 1, 1, 1]
    assert parts.teacher.item() == pytest.approx((nll[1] - soft / 2).item() / 3, rel=1e-4)


def test_completions_with_the_same_target_share_its_row_and_canonical_ones_have_none():
    texts = ["no", "tension level: 4", TEXTS[0], "nothing"]
    targets = target_answers(free_case(texts), torch.tensor([[7.0, 2.0]], dtype=torch.float64), template())
    assert targets.ratings_BRA.tolist() == [[[4, 2], [7, 2]]]
    assert targets.row_BG[0, [0, 1, 3]].tolist() == [1, 0, 1]


def test_a_completions_loss_does_not_depend_on_the_targets_of_others():
    model, answer = tiny_policy(), template()
    alone = free_loss_of(model, answer, [TEXTS[0]], LossWeights(format_reward=0.0))
    beside = free_loss_of(model, answer, [TEXTS[0], TEXTS[2]], LossWeights(format_reward=0.0))
    other = free_loss_of(model, answer, [TEXTS[2]], LossWeights(format_reward=0.0))
    assert 2 * beside.total.item() == pytest.approx((alone.total + other.total).item(), rel=1e-4)
    assert alone.format.item() == pytest.approx(2 * beside.format.item(), rel=1e-4)


def free_loss_of(model, answer, texts: list[str], weights: LossWeights):
    rollouts = free_case(texts)
    targets = None
    if not is_canonical(rollouts).all():
        targets = target_answers(rollouts, torch.tensor([[5.0, 5.0]], dtype=torch.float64), answer)
    logits = completion_logits(model, prefill(model, PROMPTS[:1]), loss_rows(rollouts, targets))
    return free_loss(logits, rollouts, torch.ones_like(rollouts.ratings_BGA), answer, weights, None, targets)


def test_that_no_zero_follows_a_rating_of_one_is_credited_to_the_rating():
    answer, rollouts = template(), free_case([TEXTS[0]])
    vocabulary = 49_152
    logits = torch.zeros(1, 1, rollouts.rows.ids_BRT.shape[2], vocabulary)
    behind_one = rollouts.aspect_BGT[0, 0].tolist().index(0) + 1
    logits[0, 0, behind_one, answer.ratings.ten[1]] = np.log(vocabulary - 1)  # P('0' | '1') = 1/2
    advantage_BGA = torch.tensor([[[1.0, 0.0]]])
    parts = free_loss(logits, rollouts, advantage_BGA, answer, LossWeights(format_reward=0.0), None, None)
    assert parts.value.item() == pytest.approx((np.log(vocabulary) + np.log(2)) / 2, rel=1e-5)


def test_free_and_slots_give_an_answer_the_same_probability():
    model, answer, rollouts = tiny_policy(), template(), free_case([TEXTS[0]])
    logits = completion_logits(model, prefill(model, PROMPTS[:1]), rollouts.rows)
    sampled, no_zero = sampled_log_probs(logits, rollouts, answer)
    aspect = rollouts.aspect_BGT
    free_one = sampled[aspect == 0].sum() + no_zero.sum()
    rows = slots_rows(answer, torch.tensor([[[1, 10]]]))
    slots = answer_log_probs(
        completion_logits(model, prefill(model, PROMPTS[:1]), rows), rows, torch.tensor([[[1, 10]]]), answer
    )
    assert free_one.item() == pytest.approx(slots.rating_BRAQ[0, 0, 0, 0].item(), rel=1e-4)
    assert sampled[aspect == 1].sum().item() == pytest.approx(slots.rating_BRAQ[0, 0, 1, 9].item(), rel=1e-4)
    assert (sampled - no_zero)[aspect == -1].sum().item() == pytest.approx(slots.template_BRT.sum().item(), rel=1e-4)
