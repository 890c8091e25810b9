"""Losses against torch's own and hand-worked numbers; negatives against brute force."""

import math

import numpy as np
import pytest
import torch

from raygr.recommenders import losses
from raygr.recommenders.losses import bce, cross_entropy, owned_items, sample_negatives


@pytest.mark.parametrize("positions", [1, 3, 700])  # 700 is more than one tile
def test_cross_entropy_and_its_gradients_equal_torch(positions: int):
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
    loss = cross_entropy(torch.tensor([[1.0]]), torch.tensor([[900.0], [0.0]]), torch.tensor([2]))
    assert loss.item() == pytest.approx(900.0)


def test_bce_by_hand():
    """Target's score 1, negative's -2: log(1 + e^-1) + log(1 + e^-2)."""
    loss = bce(torch.tensor([[1.0]]), torch.tensor([[1.0], [-2.0]]), torch.tensor([1]), torch.tensor([2]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + math.log1p(math.exp(-2)), rel=1e-6)


def test_half_precision_states_give_fp32_losses():
    state_ND, rows_ID = torch.randn(2, 4).half(), torch.randn(5, 4)
    assert cross_entropy(state_ND, rows_ID, torch.tensor([1, 2])).dtype == torch.float32
    assert bce(state_ND, rows_ID, torch.tensor([1, 2]), torch.tensor([3, 3])).dtype == torch.float32


def test_negatives_are_never_the_users_own_and_uniform_over_the_rest():
    owned = {0: [1, 2, 5, 5], 1: [6], 2: [3, 4, 6]}
    user_N = np.concatenate([np.full(len(items), user) for user, items in owned.items()])
    item_N = np.concatenate([np.array(items) for items in owned.values()])
    table = owned_items(user_N, item_N, users=3, items=6)
    drawn_N = sample_negatives(
        table, torch.arange(3).repeat_interleave(6000), generator=torch.Generator().manual_seed(0)
    )
    for user, items in owned.items():
        free = sorted(set(range(1, 7)) - set(items))
        counts = np.bincount(drawn_N[user * 6000 : (user + 1) * 6000], minlength=7)
        assert np.flatnonzero(counts).tolist() == free
        assert counts[free] == pytest.approx(6000 / len(free), rel=0.1)


def test_tiles_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch):
    state_ND, rows_ID = torch.randn(10, 4, dtype=torch.float32), torch.randn(7, 4)
    target_N = torch.arange(10) % 7 + 1
    whole = cross_entropy(state_ND, rows_ID, target_N)
    monkeypatch.setattr(losses, "POSITIONS_AT_ONCE", 3)
    torch.testing.assert_close(cross_entropy(state_ND, rows_ID, target_N), whole)
