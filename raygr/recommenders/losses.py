"""Next-item losses on packed positions, in fp32: full cross-entropy, and the published BCE with one negative.

Both return the sum over positions, so that a caller divides by the count of all workers' positions.
Shape suffixes: `N` positions in the loss, `D` width, `I` items, `U` users, `K` owned (user, item) pairs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

POSITIONS_AT_ONCE = 512  # 512 x 3,000 items x 4 bytes = 6 MB of logits: stays in the processor's cache


class TiledCrossEntropy(torch.autograd.Function):
    """-log softmax(state @ rows.T)[target], summed; makes both gradients tile by tile and keeps no logits."""

    @staticmethod
    def forward(ctx, state_ND: Tensor, rows_ID: Tensor, target_N: Tensor) -> Tensor:
        # `target_N` counts from 0 here
        state_grad_ND, rows_grad_ID = torch.empty_like(state_ND), torch.zeros_like(rows_ID)
        total = state_ND.new_zeros(())
        for tile in torch.arange(len(state_ND), device=state_ND.device).split(POSITIONS_AT_ONCE):
            part = slice(int(tile[0]), int(tile[-1]) + 1)
            state, target_N1 = state_ND[part], target_N[part, None]
            logits_NI = state @ rows_ID.T
            logits_NI -= logits_NI.amax(dim=1, keepdim=True)
            total -= logits_NI.gather(1, target_N1).sum()
            sum_N1 = logits_NI.exp_().sum(dim=1, keepdim=True)
            total += sum_N1.log().sum()
            logits_NI /= sum_N1  # now probabilities; minus 1 at the target it is the gradient
            logits_NI.scatter_add_(1, target_N1, torch.full_like(sum_N1, -1.0))
            state_grad_ND[part] = logits_NI @ rows_ID
            rows_grad_ID.addmm_(logits_NI.T, state)
        ctx.save_for_backward(state_grad_ND, rows_grad_ID)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        state_grad_ND, rows_grad_ID = ctx.saved_tensors
        return state_grad_ND * upstream, rows_grad_ID * upstream, None


def cross_entropy(state_ND: Tensor, rows_ID: Tensor, target_N: Tensor) -> Tensor:
    """Sum over positions of -log softmax over all items; `target_N` is item_index, 1..I."""
    return TiledCrossEntropy.apply(state_ND.float(), rows_ID.float(), target_N - 1)


def bce(state_ND: Tensor, rows_ID: Tensor, target_N: Tensor, negative_N: Tensor) -> Tensor:
    """Sum over positions of -log sigmoid(target's score) - log(1 - sigmoid(negative's score)), as in SASRec."""
    state_ND, rows_ID = state_ND.float(), rows_ID.float()
    target_score_N = (state_ND * rows_ID[target_N - 1]).sum(1)
    negative_score_N = (state_ND * rows_ID[negative_N - 1]).sum(1)
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(log_sigmoid(target_score_N) + log_sigmoid(-negative_score_N)).sum()


class OwnedItems(NamedTuple):
    """Every user's distinct train items, for sampling around them."""

    free_before_K: Tensor
    """Per owned item, user * (I + 1) + the items below it that the user has not: sorted."""
    offset_U: Tensor
    count_U: Tensor
    items: int


def owned_items(user_N: np.ndarray, item_N: np.ndarray, *, users: int, items: int) -> OwnedItems:
    """`item_N` is item_index, 1..I."""
    pair_K = np.unique(user_N.astype(np.int64) * (items + 1) + item_N)
    user_K, item_K = np.divmod(pair_K, items + 1)
    count_U = np.bincount(user_K, minlength=users)
    offset_U = np.cumsum(count_U) - count_U
    owned_below_K = np.arange(len(pair_K)) - offset_U[user_K]
    free_before_K = user_K * (items + 1) + (item_K - 1 - owned_below_K)
    return OwnedItems(*(torch.from_numpy(column) for column in (free_before_K, offset_U, count_U)), items)


def sample_negatives(owned: OwnedItems, user_N: Tensor, *, generator: torch.Generator) -> Tensor:
    """One item_index per position, uniform over the items its user has not: the r-th of them for a random r.

    Held-out items may be drawn: sparing them would tell the model which they are.
    """
    free_N = owned.items - owned.count_U[user_N]
    drawn_N = (torch.rand(len(user_N), generator=generator, dtype=torch.float64) * free_N).long()
    key_N = user_N * (owned.items + 1) + drawn_N
    skipped_N = torch.searchsorted(owned.free_before_K, key_N, right=True) - owned.offset_U[user_N]
    return drawn_N + skipped_N + 1
