"""Next-item losses in fp32, and the negatives that they take.

All return the sum over positions, so that a caller divides by the count of all workers' positions. Cross-entropy,
its sampled form and the published BCE with one negative (Kang and McAuley 2018) take packed positions (N, D). TOP1
and BPR (Hidasi et al. 2016) and BPR-max (Hidasi and Karatzoglou 2018) take steps side by side (L, B, D): the other
histories' targets at the same step are negatives, as in a session-parallel batch, and further ones are shared by
the whole batch. Unlike there, a user's own train items, the target among them, are never negatives (of data that keep
repeat purchases, the target alone is none); a position whose user has no other item counts 0. `rows_ID` may be the rows
of a batch's items alone: ids are then places in these.
Shape suffixes: `N` positions in the loss, `L` steps, `B` own histories, `M` all histories of the batch, `K` shared
negatives, `J` all negatives of a position, `D` width, `I` items, `U` users, `P` owned (user, item) pairs.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.models.embeddings import padded

POSITIONS_AT_ONCE = 512  # 512 x 3,000 items x 4 bytes = 6 MB of scores
LOGITS_AT_ONCE = 3 << 16  # x 4 bytes = 0.8 MB: stays in a core's cache with their softmax
LEAST_POSITIONS = 64  # with many items: below it the gradient of the rows is read and written too often
GPU_SCORES_AT_ONCE = 1 << 26  # x 4 bytes = 0.3 GB, and some ten such tensors at a time: few kernels, each a large one


class TiledCrossEntropy(torch.autograd.Function):
    """-log softmax(state @ rows.T)[target], summed; makes both gradients tile by tile and keeps no logits."""

    @staticmethod
    def forward(ctx, state_ND: Tensor, rows_ID: Tensor, target_N: Tensor) -> Tensor:
        # `target_N` counts from 0 here
        state_grad_ND, rows_grad_ID = torch.empty_like(state_ND), torch.zeros_like(rows_ID)
        total = state_ND.new_zeros(())
        tile = logits_tile(state_ND, len(rows_ID))
        for first in range(0, len(state_ND), tile):
            part = slice(first, first + tile)
            state, target_N1 = state_ND[part], target_N[part, None]
            logits_NI = state @ rows_ID.T
            share_NI = logits_NI.softmax(1)
            # log of the sum of exponentials: the greatest share is exp(greatest logit) / sum, and never 0
            total += (logits_NI.amax(1) - share_NI.amax(1).log()).sum() - logits_NI.gather(1, target_N1).sum()
            share_NI.scatter_add_(1, target_N1, torch.full_like(target_N1, -1.0, dtype=share_NI.dtype))
            torch.mm(share_NI, rows_ID, out=state_grad_ND[part])  # shares, 1 less at the target: the logits' gradient
            rows_grad_ID.addmm_(share_NI.T, state)
        ctx.save_for_backward(state_grad_ND, rows_grad_ID)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        state_grad_ND, rows_grad_ID = ctx.saved_tensors
        return state_grad_ND * upstream, rows_grad_ID * upstream, None


def logits_tile(state_ND: Tensor, items: int) -> int:
    """Positions whose logits are made at once."""
    if state_ND.device.type != "cpu":
        return positions_at_once(state_ND, items)
    return max(LEAST_POSITIONS, LOGITS_AT_ONCE // items)


def positions_at_once(state: Tensor, scores: int) -> int:
    """Positions in a tile where each has so many scores."""
    if state.device.type == "cpu":
        return POSITIONS_AT_ONCE
    return max(LEAST_POSITIONS, GPU_SCORES_AT_ONCE // scores)


def cross_entropy(state_ND: Tensor, rows_ID: Tensor, target_N: Tensor) -> Tensor:
    """Sum over positions of -log softmax over all items; `target_N` is item_index, 1..I."""
    return TiledCrossEntropy.apply(state_ND.float(), rows_ID.float(), target_N - 1)


def bce(state_ND: Tensor, rows_ID: Tensor, target_N: Tensor, negative_N: Tensor) -> Tensor:
    """Sum over positions of -log sigmoid(target's score) - log(1 - sigmoid(negative's score)), as in SASRec.

    A position without a negative, 0, counts 0.
    """
    state_ND, rows_ID = state_ND.float(), rows_ID.float()
    target_score_N = (state_ND * rows_ID[target_N - 1]).sum(1)
    negative_score_N = (state_ND * rows_ID[negative_N - 1]).sum(1)
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(log_sigmoid(target_score_N) + log_sigmoid(-negative_score_N))[negative_N > 0].sum()


class InTiles(torch.autograd.Function):
    """Sum of a loss over tiles along the first dimension; makes all gradients tile by tile and keeps no scores.

    The first `cuts` tensors are cut into tiles, the others take part in each: `loss_of(part, *tensors)` is one's loss.
    """

    @staticmethod
    def forward(ctx, loss_of: Callable[..., Tensor], tile: int, cuts: int, *tensors: Tensor) -> Tensor:
        grads = [torch.zeros_like(tensor) for tensor in tensors]
        total = tensors[0].new_zeros(())
        for first in range(0, len(tensors[0]), tile):
            part = slice(first, first + tile)
            seen = [tensor[part] if place < cuts else tensor for place, tensor in enumerate(tensors)]
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in seen]
                loss = loss_of(part, *leaves)
            total += loss.detach()
            for place, grad in enumerate(torch.autograd.grad(loss, leaves)):
                if place < cuts:
                    grads[place][part] = grad
                else:
                    grads[place] += grad
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(grad * upstream for grad in ctx.saved_tensors)


def sampled_cross_entropy(
    state_ND: Tensor,
    rows_ID: Tensor,
    target_N: Tensor,
    negative_K: Tensor,
    is_owned_NK: Tensor,
    *,
    expected_K: Tensor,
) -> Tensor:
    """Sum over positions of -log softmax over the target and those of `negative_K` that the user has not.

    A negative's score is less the log of `expected_K`, how often its item is drawn on average: the sum of exponentials
    is then on average that of the target and all items that the user has not, whatever they are drawn by. The target
    is always there, once.
    """
    log_expected_K = expected_K.log()

    def tile_loss(part: slice, state_ND: Tensor, target_ND: Tensor, negative_KD: Tensor) -> Tensor:
        target_score_N1 = (state_ND * target_ND).sum(1, keepdim=True)
        others_NK = (state_ND @ negative_KD.T - log_expected_K).masked_fill(is_owned_NK[part], -torch.inf)
        scores_NJ = torch.cat([target_score_N1, others_NK], dim=1)
        return (scores_NJ.logsumexp(1) - target_score_N1[:, 0]).sum()

    rows = (rows_ID[target_N - 1].float(), rows_ID[negative_K - 1].float())
    tile = positions_at_once(state_ND, 1 + len(negative_K))
    return InTiles.apply(tile_loss, tile, 2, state_ND.float(), *rows)


class OwnedPairs(NamedTuple):
    """The train items of a batch's users: (row of the batch, item) pairs."""

    row_P: Tensor
    item_P: Tensor


class StepNegatives(NamedTuple):
    """What a batch offers as negatives; 0 where a history has no target at a step."""

    batch_LM: Tensor
    """Every history's target at the step, the own ones among them."""
    shared_K: Tensor
    owned: OwnedPairs


class PairLoss(NamedTuple):
    """A loss of the target's score against those of its negatives."""

    kind: Literal["top1", "bpr", "bpr_max"]
    activation: Literal["linear", "tanh", "elu-0.5"] = "linear"
    """Of every score, inside the loss only."""
    score_penalty: float = 0.0
    """bpr_max only: bpreg."""


def step_loss(
    loss: PairLoss, state_LBD: Tensor, rows_ID: Tensor, target_LB: Tensor, negatives: StepNegatives
) -> Tensor:
    """Sum of the loss over the positions whose target is not 0; one without any negative counts 0."""
    rows_B = state_LBD.shape[1]
    shared_is_owned_BK = is_owned(negatives.owned, rows_B, negatives.shared_K)

    def tile_loss(part: slice, state_LBD: Tensor, target_LBD: Tensor, batch_LMD: Tensor, shared_KD: Tensor) -> Tensor:
        target_score_LB = (state_LBD * target_LBD).sum(2)
        in_batch_LBM = state_LBD @ batch_LMD.transpose(1, 2)
        scores_LBJ = torch.cat([in_batch_LBM, state_LBD @ shared_KD.T], dim=2)
        item_LM = negatives.batch_LM[part]
        batch_is_owned_LBM = is_owned(negatives.owned, rows_B, item_LM.flatten()).unflatten(1, item_LM.shape)
        batch_is_owned_LBM = batch_is_owned_LBM.transpose(0, 1)
        is_owned_LBJ = torch.cat([batch_is_owned_LBM, shared_is_owned_BK.expand(len(state_LBD), -1, -1)], dim=2)
        batch_is_target_LBM = negatives.batch_LM[part][:, None] == target_LB[part][:, :, None]
        shared_is_target_LBK = negatives.shared_K == target_LB[part][:, :, None]
        # the target is no negative of its own, although nothing is owned where items come back
        is_spared_LBJ = is_owned_LBJ | torch.cat([batch_is_target_LBM, shared_is_target_LBK], dim=2)
        kept_LB = target_LB[part] > 0
        return pair_losses(loss, target_score_LB[kept_LB], scores_LBJ[kept_LB], ~is_spared_LBJ[kept_LB]).sum()

    table_ID = padded(rows_ID.float())
    rows = (table_ID[target_LB], table_ID[negatives.batch_LM], table_ID[negatives.shared_K])
    scores = negatives.batch_LM.shape[1] + len(negatives.shared_K)
    steps = max(1, positions_at_once(state_LBD, scores) // rows_B)
    return InTiles.apply(tile_loss, steps, 3, state_LBD.float(), *rows)


def pair_losses(loss: PairLoss, target_N: Tensor, others_NJ: Tensor, is_negative_NJ: Tensor) -> Tensor:
    """(N,) losses of the targets' scores against the marked ones of `others_NJ`; 0 where none is marked."""
    target_N1, others_NJ = activated(target_N, loss.activation)[:, None], activated(others_NJ, loss.activation)
    match loss.kind:
        case "top1":
            return mean_over((others_NJ - target_N1).sigmoid() + others_NJ.square().sigmoid(), is_negative_NJ)
        case "bpr":
            return mean_over(-torch.nn.functional.logsigmoid(target_N1 - others_NJ), is_negative_NJ)
        case "bpr_max":
            return bpr_max(target_N1, others_NJ, is_negative_NJ, loss.score_penalty)


def activated(scores: Tensor, activation: str) -> Tensor:
    match activation:
        case "tanh":
            return scores.tanh()
        case "elu-0.5":
            return torch.nn.functional.elu(scores, alpha=0.5)
    return scores


def mean_over(values_NJ: Tensor, is_negative_NJ: Tensor) -> Tensor:
    return (values_NJ * is_negative_NJ).sum(1) / is_negative_NJ.sum(1).clamp(min=1)


def bpr_max(target_N1: Tensor, others_NJ: Tensor, is_negative_NJ: Tensor, score_penalty: float) -> Tensor:
    """-log sum_j s_j sigmoid(target - r_j) + penalty * sum_j s_j r_j^2, s the softmax of the negatives r.

    In logarithms throughout; the gradient flows through s too, as published.
    """
    has_any_N1 = is_negative_NJ.any(1, keepdim=True)
    # a row of nothing but -inf has no softmax: it keeps its scores and is set to 0 at the end
    log_weight_NJ = others_NJ.masked_fill(~is_negative_NJ & has_any_N1, -torch.inf).log_softmax(1)
    log_sigmoid_NJ = torch.nn.functional.logsigmoid(target_N1 - others_NJ)
    loss_N = -(log_weight_NJ + log_sigmoid_NJ).logsumexp(1)
    if score_penalty:
        loss_N = loss_N + score_penalty * (log_weight_NJ.exp() * others_NJ.square()).sum(1)
    return loss_N.masked_fill(~has_any_N1[:, 0], 0.0)


class OwnedItems(NamedTuple):
    """Every user's distinct train items, for sampling around them."""

    item_P: Tensor
    """item_index, sorted by (user, item)."""
    free_before_P: Tensor
    """Per owned item, user * (I + 1) + the items below it that the user has not: sorted."""
    offset_U: Tensor
    count_U: Tensor
    items: int


def owned_items(user_N: np.ndarray, item_N: np.ndarray, *, users: int, items: int) -> OwnedItems:
    """`item_N` is item_index, 1..I."""
    pair_P = np.unique(user_N.astype(np.int64) * (items + 1) + item_N)
    user_P, item_P = np.divmod(pair_P, items + 1)
    count_U = np.bincount(user_P, minlength=users)
    offset_U = np.cumsum(count_U) - count_U
    owned_below_P = np.arange(len(pair_P)) - offset_U[user_P]
    free_before_P = user_P * (items + 1) + (item_P - 1 - owned_below_P)
    return OwnedItems(*(torch.from_numpy(column) for column in (item_P, free_before_P, offset_U, count_U)), items)


def sample_negatives(owned: OwnedItems, user_N: Tensor, *, generator: torch.Generator) -> Tensor:
    """One item_index per position, uniform over the items its user has not: the r-th of them for a random r.

    0 where the user has every item.
    Held-out items may be drawn: sparing them would tell the model which they are.
    """
    free_N = owned.items - owned.count_U[user_N]
    drawn_N = (torch.rand(len(user_N), generator=generator, dtype=torch.float64) * free_N).long()
    key_N = user_N * (owned.items + 1) + drawn_N
    skipped_N = torch.searchsorted(owned.free_before_P, key_N, right=True) - owned.offset_U[user_N]
    return torch.where(free_N > 0, drawn_N + skipped_N + 1, 0)


def owned_pairs(owned: OwnedItems, user_B: Tensor, item_J: Tensor) -> OwnedPairs:
    """Those of the users' train items that are among `item_J`, sorted, as places in it from 1."""
    count_B = owned.count_U[user_B]
    row_P = torch.repeat_interleave(torch.arange(len(user_B)), count_B)
    step_P = torch.arange(len(row_P)) - (count_B.cumsum(0) - count_B)[row_P]
    item_P = owned.item_P[owned.offset_U[user_B][row_P] + step_P]
    is_there_P, place_P = places(item_J, item_P)
    return OwnedPairs(row_P[is_there_P], place_P[is_there_P] + 1)


def places(sorted_J: Tensor, value_P: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each value is among the sorted ones, and where it is or would be."""
    place_P = torch.searchsorted(sorted_J, value_P).clamp(max=len(sorted_J) - 1)
    return sorted_J[place_P] == value_P, place_P


def is_owned(owned: OwnedPairs, rows: int, item_K: Tensor) -> Tensor:
    """(B, K) whether the row's user has each item; true for the padding, 0.

    As wide as the distinct items that are asked for, never as the catalogue.
    """
    if not len(item_K):
        return torch.zeros(rows, 0, dtype=torch.bool, device=item_K.device)
    distinct_J, place_K = item_K.unique(return_inverse=True)
    is_asked_P, place_P = places(distinct_J, owned.item_P)
    is_owned_BJ = (distinct_J == 0).expand(rows, -1).clone()
    is_owned_BJ[owned.row_P[is_asked_P], place_P[is_asked_P]] = True
    return is_owned_BJ[:, place_K]


def popularity_sums(train_count_I: np.ndarray, alpha: float) -> Tensor:
    """Cumulative sampling weights train count ** alpha of items 1..I, the last 1; `shared_negatives` draws by them."""
    weight_I = train_count_I.astype(np.float64) ** alpha
    return torch.from_numpy(np.cumsum(weight_I) / weight_I.sum())


def shared_negatives(sums_I: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """(K,) item_index drawn with replacement."""
    drawn_K = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.searchsorted(sums_I, drawn_K, right=True).clamp(max=len(sums_I) - 1) + 1


def expected_counts(sums_I: Tensor, drawn_K: Tensor) -> Tensor:
    """(K,) how often each of the drawn items is drawn on average, in as many draws."""
    chance_I = sums_I.diff(prepend=sums_I.new_zeros(1))
    return (len(drawn_K) * chance_I[drawn_K - 1]).float()
