"""Losses against torch's own and hand-worked numbers."""

import math

import numpy as np
import pytest
import torch

from raygr.models import cpu_kernels
from raygr.models.losses import (
    PairLoss,
    StepNegatives,
    activated,
    bce,
    cross_entropy,
    pair_losses,
    sampled_cross_entropy,
    step_loss,
)
from raygr.models.negatives import (
    OwnedPairs,
    expected_counts,
    owned_items,
    owned_pairs,
    popularity_sums,
    sample_negatives,
    shared_negatives,
)


@pytest.mark.parametrize("positions", [1, 3, 700])  # 700 is more than one tile
def test_cross_entropy_and_its_gradients_equal_torch(positions: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_kernels, "LOGITS_AT_ONCE", 21 * 128)
    generator = torch.Generator().manual_seed(0)
    state_ND = torch.randn(positions, 8, generator=generator, requires_grad=True)
    rows_ID = torch.randn(21, 8, generator=generator, requires_grad=True)
    target_N = torch.randint(1, 22, (positions,), generator=generator)
    ours = cross_entropy(state_ND, rows_ID, target_N)
    our_grads = torch.autograd.grad(0.3 * ours, (state_ND, rows_ID))
    reference = torch.nn.functional.cross_entropy(state_ND @ rows_ID.T, target_N - 1, reduction="sum")
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    for ours_grad, torch_grad in zip(our_grads, torch.autograd.grad(0.3 * reference, (state_ND, rows_ID)), strict=True):
        torch.testing.assert_close(ours_grad, torch_grad, rtol=1e-4, atol=1e-5)


def test_cross_entropy_by_hand():
    """Scores 2, 1, 0 and target 1: log(e^2 + e + 1) - 2."""
    loss = cross_entropy(torch.tensor([[1.0]]), torch.tensor([[2.0], [1.0], [0.0]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(math.log(math.exp(2) + math.e + 1) - 2, rel=1e-6)


def test_cross_entropy_of_scores_beyond_the_range_of_exp():
    rows_ID = torch.tensor([[900.0], [0.0]], requires_grad=True)
    loss = cross_entropy(torch.tensor([[1.0]]), rows_ID, torch.tensor([2]))
    assert loss.item() == pytest.approx(900.0)
    assert torch.autograd.grad(loss, rows_ID)[0].tolist() == [[1.0], [-1.0]]


def test_bce_by_hand():
    """Target's score 1, negative's -2: log(1 + e^-1) + log(1 + e^-2)."""
    loss = bce(torch.tensor([[1.0]]), torch.tensor([[1.0], [-2.0]]), torch.tensor([1]), torch.tensor([2]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(-2)), rel=1e-6)


def test_half_precision_states_give_fp32_losses():
    state_ND, rows_ID = torch.randn(2, 4).half(), torch.randn(5, 4)
    assert cross_entropy(state_ND, rows_ID, torch.tensor([1, 2])).dtype == torch.float32
    assert bce(state_ND, rows_ID, torch.tensor([1, 2]), torch.tensor([3, 3])).dtype == torch.float32
    target_N, negative_K, none_NK = torch.tensor([1, 2]), torch.tensor([4]), torch.zeros(2, 1).bool()
    found = sampled_cross_entropy(state_ND, rows_ID, target_N, negative_K, none_NK, expected_K=torch.ones(1))
    assert found.dtype == torch.float32
    negatives = StepNegatives(target_N[None], negative_K, OwnedPairs(torch.tensor([0]), torch.tensor([1])))
    loss = step_loss(PairLoss("bpr_max"), state_ND[None], rows_ID, target_N[None], negatives)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_tiles_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch):
    state_ND, rows_ID = torch.randn(10, 4, dtype=torch.float32), torch.randn(7, 4)
    target_N = torch.arange(10) % 7 + 1
    whole = cross_entropy(state_ND, rows_ID, target_N)
    monkeypatch.setattr(cpu_kernels, "POSITIONS_AT_ONCE", 3)
    torch.testing.assert_close(cross_entropy(state_ND, rows_ID, target_N), whole)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair_loss(kind: str, target: float, others: list[float], **settings) -> float:
    """Of one position; a negative of None is no negative."""
    is_negative_NC = torch.tensor([[other is not None for other in others]])
    others_NC = torch.tensor([[7.0 if other is None else other for other in others]])
    return pair_losses(PairLoss(kind, **settings), torch.tensor([target]), others_NC, is_negative_NC).item()


def test_top1_by_hand():
    """Target 1, negatives 0 and 2: mean of s(-1) + s(0) and s(1) + s(4), s the sigmoid (Hidasi et al. 2016)."""
    expected = (sigmoid(-1) + 0.5 + sigmoid(1) + sigmoid(4)) / 2
    assert pair_loss("top1", 1.0, [0.0, 2.0]) == pytest.approx(expected, rel=1e-6)
    assert pair_loss("top1", 1.0, [0.0, None, 2.0]) == pytest.approx(expected, rel=1e-6)


def test_bpr_by_hand():
    """Target 1, negatives 0 and 2: -(log s(1) + log s(-1)) / 2."""
    expected = -(math.log(sigmoid(1)) + math.log(sigmoid(-1))) / 2
    assert pair_loss("bpr", 1.0, [0.0, 2.0]) == pytest.approx(expected, rel=1e-6)
    assert pair_loss("bpr", 1.0, [0.0, 2.0, None]) == pytest.approx(expected, rel=1e-6)


def test_bpr_max_by_hand():
    """Target 1, negatives 0 and log 3: weights 1/4 and 3/4; the penalty weighs log(3)^2 by 3/4."""
    high = math.log(3)
    inside = 0.25 * sigmoid(1) + 0.75 * sigmoid(1 - high)
    assert pair_loss("bpr_max", 1.0, [0.0, high]) == pytest.approx(-math.log(inside), rel=1e-6)
    penalised = -math.log(inside) + 1.95 * 0.75 * high**2
    assert pair_loss("bpr_max", 1.0, [0.0, high], score_penalty=1.95) == pytest.approx(penalised, rel=1e-6)
    assert pair_loss("bpr_max", 1.0, [None, 0.0, high], score_penalty=1.95) == pytest.approx(penalised, rel=1e-6)


def test_bpr_max_of_scores_beyond_the_range_of_exp():
    """Weights 1 and e^-900: the sum is e^-900 (1 + 1/2), whose logarithm would be infinite if it were made first."""
    assert pair_loss("bpr_max", 0.0, [900.0, 0.0]) == pytest.approx(900.0 - math.log(1.5), rel=1e-6)


def test_equal_scores_start_where_the_formulas_say():
    """A collapsed training stays at these values of the loss."""
    assert pair_loss("bpr", 0.3, [0.3] * 5) == pytest.approx(math.log(2), rel=1e-6)
    assert pair_loss("bpr_max", 0.3, [0.3] * 5) == pytest.approx(math.log(2), rel=1e-6)
    assert pair_loss("top1", 0.0, [0.0] * 5) == pytest.approx(1.0, rel=1e-6)
    state_ND, rows_ID = torch.ones(1, 2), torch.ones(9, 2)
    none_NK, once_K = torch.zeros(1, 8).bool(), torch.ones(8)
    loss = sampled_cross_entropy(state_ND, rows_ID, torch.tensor([1]), torch.arange(2, 10), none_NK, expected_K=once_K)
    assert loss.item() == pytest.approx(math.log(9), rel=1e-6)


def test_final_activation_by_hand():
    """elu-0.5 of -1 is 0.5 (1/e - 1), of 2 is 2; it acts on target and negatives before the loss."""
    scores = torch.tensor([-1.0, 2.0])
    assert activated(scores, "elu-0.5").tolist() == pytest.approx([0.5 * (math.exp(-1) - 1), 2.0])
    assert activated(scores, "tanh").tolist() == pytest.approx([math.tanh(-1), math.tanh(2)])
    low = 0.5 * (math.exp(-1) - 1)
    expected = -math.log(sigmoid(2 - low))
    assert pair_loss("bpr", 2.0, [-1.0], activation="elu-0.5") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["top1", "bpr", "bpr_max"])
def test_a_position_without_any_negative_counts_nothing_and_has_no_gradient(kind: str):
    target_N, others_NC = torch.zeros(2, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    is_negative_NC = torch.tensor([[False] * 3, [True, False, True]])
    losses_N = pair_losses(PairLoss(kind, score_penalty=1.0), target_N, others_NC, is_negative_NC)
    losses_N.sum().backward()
    assert losses_N[0] == 0 < losses_N[1]
    assert target_N.grad[0] == 0 != target_N.grad[1]
    assert others_NC.grad[0].tolist() == [0, 0, 0] and others_NC.grad[1, 1] == 0
    assert others_NC.grad.isfinite().all()


def step_loss_by_loops(
    loss: PairLoss,
    state_LBD: torch.Tensor,
    rows_ID: torch.Tensor,
    target_LB: torch.Tensor,
    owned: list[set[int]],
    *rest,
) -> torch.Tensor:
    """Position by position, with lists."""
    batch_LW, shared_K = rest
    total = torch.zeros(())
    for step, targets_B in enumerate(target_LB.tolist()):
        for row, target in enumerate(targets_B):
            if not target:
                continue
            others = [
                item for item in [*batch_LW[step].tolist(), *shared_K.tolist()] if item and item not in owned[row]
            ]
            score_I = rows_ID @ state_LBD[step, row]
            if others:
                others_1C = score_I[torch.tensor(others) - 1][None]
                total = (
                    total + pair_losses(loss, score_I[target - 1][None], others_1C, torch.ones(1, len(others)) > 0)[0]
                )
    return total


@pytest.mark.parametrize("tile", [1, 5, 512])
@pytest.mark.parametrize("kind", ["top1", "bpr", "bpr_max"])
def test_step_loss_and_its_gradients_equal_plain_loops(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch):
    """Two own histories of three; no padding, no own item and no target is among the negatives."""
    monkeypatch.setattr(cpu_kernels, "POSITIONS_AT_ONCE", tile)
    histories = [{1, 2, 3}, {2, 4, 5, 6}, {1, 7}]
    batch_LW = torch.tensor([[1, 4, 7], [2, 5, 1], [3, 6, 0], [0, 2, 0]])
    target_LB = torch.tensor([[1, 0], [2, 5], [3, 6], [0, 2]])  # the first target of the second is not in the loss
    shared_K = torch.tensor([8, 4, 1, 8])
    user_N = np.concatenate([np.full(len(items), user) for user, items in enumerate(histories)])
    table = owned_items(user_N, np.array([item for items in histories for item in items]), users=3, items=9)
    generator = torch.Generator().manual_seed(0)
    state_LBD = torch.randn(4, 2, 5, generator=generator, requires_grad=True)
    rows_ID = torch.randn(9, 5, generator=generator, requires_grad=True)
    loss = PairLoss(kind, "elu-0.5", 0.7)
    negatives = StepNegatives(batch_LW, shared_K, owned_pairs(table, torch.tensor([0, 1]), torch.arange(1, 10)))
    ours = step_loss(loss, state_LBD, rows_ID, target_LB, negatives)
    plain = step_loss_by_loops(loss, state_LBD, rows_ID, target_LB, histories, batch_LW, shared_K)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    pairs = zip(*(torch.autograd.grad(0.3 * one, (state_LBD, rows_ID)) for one in (ours, plain)), strict=True)
    for our_grad, plain_grad in pairs:
        torch.testing.assert_close(our_grad, plain_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tile", [2, 512])
def test_sampled_cross_entropy_equals_torch_without_the_users_own(tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_kernels, "POSITIONS_AT_ONCE", tile)
    generator = torch.Generator().manual_seed(0)
    state_ND = torch.randn(5, 4, generator=generator, requires_grad=True)
    rows_ID = torch.randn(9, 4, generator=generator, requires_grad=True)
    target_N, negative_K = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([3, 9, 1])
    is_owned_NK = target_N[:, None] == negative_K
    expected_K = torch.tensor([1.0, 0.25, 2.0])
    log_expected = dict(zip(negative_K.tolist(), expected_K.log().tolist(), strict=True))
    ours = sampled_cross_entropy(state_ND, rows_ID, target_N, negative_K, is_owned_NK, expected_K=expected_K)
    plain = torch.zeros(())
    for row, target in enumerate(target_N.tolist()):
        items = [target] + [item for item in negative_K.tolist() if item != target]
        scores = rows_ID[torch.tensor(items) - 1] @ state_ND[row]
        scores = scores - torch.tensor([0.0] + [log_expected[item] for item in items[1:]])
        plain = plain + torch.nn.functional.cross_entropy(scores[None], torch.tensor([0]))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    pairs = zip(*(torch.autograd.grad(one, (state_ND, rows_ID)) for one in (ours, plain)), strict=True)
    for our_grad, plain_grad in pairs:
        torch.testing.assert_close(our_grad, plain_grad, rtol=1e-4, atol=1e-6)


def test_the_sampled_loss_by_hand():
    """Target's score 1; items 2 and 3 with scores log 2 and log 3, drawn 1/2 and 2 times on average: e + 4 + 1.5."""
    rows_ID = torch.tensor([[1.0], [math.log(2)], [math.log(3)]])
    expected_K, none_NK = torch.tensor([0.5, 2.0]), torch.zeros(1, 2).bool()
    loss = sampled_cross_entropy(
        torch.ones(1, 1), rows_ID, torch.tensor([1]), torch.tensor([2, 3]), none_NK, expected_K=expected_K
    )
    assert loss.item() == pytest.approx(math.log(math.e + 5.5) - 1, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_sampled_gradients_are_on_average_those_of_the_full_softmax(alpha: float):
    """Train counts from 1 to 64: without the correction the gradient of popular items would be far too large.

    Scores 0 and a target of 1/8 of the whole by hand: the full gradient of each other item is 1/8 of the state.
    """
    counts, draws = np.array([1, 1, 2, 4, 8, 16, 32, 64]), 4000
    sums_I = popularity_sums(counts, alpha)
    drawn_K = shared_negatives(sums_I, draws, generator=torch.Generator().manual_seed(0))
    rows_ID = torch.zeros(8, 1, requires_grad=True)
    is_owned_NK = (drawn_K == 1)[None]
    expected_K = expected_counts(sums_I, drawn_K)
    loss = sampled_cross_entropy(
        torch.ones(1, 1), rows_ID, torch.tensor([1]), drawn_K, is_owned_NK, expected_K=expected_K
    )
    assert loss.item() == pytest.approx(math.log(8), rel=0.05)
    (gradient_ID,) = torch.autograd.grad(loss, rows_ID)
    assert gradient_ID[:, 0].tolist() == pytest.approx([-7 / 8] + [1 / 8] * 7, abs=0.03)


def test_a_user_who_has_every_item_has_no_negative_and_counts_nothing():
    """User 0 has all three items. User 1 has all but item 2, so every negative is item 2."""
    table = owned_items(np.array([0, 0, 0, 1, 1]), np.array([1, 2, 3, 1, 3]), users=3, items=3)
    user_N = torch.tensor([0, 1, 0, 1])
    negative_N = sample_negatives(table, user_N, generator=torch.Generator().manual_seed(0))
    assert negative_N.tolist() == [0, 2, 0, 2]
    state_ND, rows_ID = torch.ones(4, 1, requires_grad=True), torch.tensor([[1.0], [-2.0], [3.0]])
    loss = bce(state_ND, rows_ID, torch.tensor([1, 1, 3, 1]), negative_N)
    one = math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))
    assert loss.item() == pytest.approx(2 * one, rel=1e-6)
    assert (torch.autograd.grad(loss, state_ND)[0][:, 0] == 0).tolist() == [True, False, True, False]
