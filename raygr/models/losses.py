"""Next-item losses in fp32.

All return the sum over positions; the caller divides by the number of positions of all workers. Cross-entropy, its
sampled form and the published BCE with one negative (Kang and McAuley 2018) take packed positions (N, D). TOP1 and BPR
(Hidasi et al. 2016) and BPR-max (Hidasi and Karatzoglou 2018) take steps side by side (L, B, D): the targets of the
other histories at the same step are negatives, as in a session-parallel batch, and the whole batch shares further ones.
Unlike there, a user's own items are never negatives (see negatives.py); a position whose user has no other item counts
0. `rows_ID` may hold the rows of a batch's items only: ids are then places in these rows. They are taken by
`embedding`, because the gradient of an index depends on the order in which threads add to it.
Shape letters: `N` interactions that a loss predicts, `L` steps, `B` histories, `W` histories of all workers,
`K` negatives that a batch shares, `C` candidates: the negatives (after the target), `D` width, `I` items.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from raygr.models.cpu_kernels import InTiles, TiledCrossEntropy, positions_at_once
from raygr.models.embeddings import padded
from raygr.models.negatives import OwnedPairs, is_owned


def cross_entropy(state_ND: Tensor, rows_ID: Tensor, target_N: Tensor) -> Tensor:
    """Sum over positions of -log softmax(scores of all items)[target]; `target_N` is item_index, 1..I."""
    return TiledCrossEntropy.apply(state_ND.float(), rows_ID.float(), target_N - 1)


def bce(state_ND: Tensor, rows_ID: Tensor, target_N: Tensor, negative_N: Tensor) -> Tensor:
    """Sum over positions of -log sigmoid(target score) - log(1 - sigmoid(negative score)), as in SASRec.

    A position whose negative is 0 has none, and counts 0.
    """
    state_ND, rows_ID = state_ND.float(), rows_ID.float()
    target_score_N = (state_ND * embedding(target_N - 1, rows_ID)).sum(1)
    # where there is no negative, any row will do: the position does not count
    negative_score_N = (state_ND * embedding((negative_N - 1).clamp(min=0), rows_ID)).sum(1)
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(log_sigmoid(target_score_N) + log_sigmoid(-negative_score_N))[negative_N > 0].sum()


def sampled_cross_entropy(
    state_ND: Tensor,
    rows_ID: Tensor,
    target_N: Tensor,
    negative_K: Tensor,
    is_owned_NK: Tensor,
    *,
    expected_K: Tensor,
) -> Tensor:
    """Sum over positions of -log softmax over the target and the shared negatives not marked in `is_owned_NK`.

    The log of `expected_K`, the expected number of draws of an item, is subtracted from the score of a negative. The
    sum of exponentials then equals on average that of the target and all items that the user does not own, whatever
    the sampling weights. The target takes part exactly once.
    """
    log_expected_K = expected_K.log()

    def tile_loss(part: slice, state_ND: Tensor, target_ND: Tensor, negative_KD: Tensor) -> Tensor:
        target_score_N1 = (state_ND * target_ND).sum(1, keepdim=True)
        others_NK = (state_ND @ negative_KD.T - log_expected_K).masked_fill(is_owned_NK[part], -torch.inf)
        scores_NC = torch.cat([target_score_N1, others_NK], dim=1)
        return (scores_NC.logsumexp(1) - target_score_N1[:, 0]).sum()

    rows = (embedding(target_N - 1, rows_ID).float(), embedding(negative_K - 1, rows_ID).float())
    tile = positions_at_once(state_ND, 1 + len(negative_K))
    return InTiles.apply(tile_loss, tile, 2, state_ND.float(), *rows)


Activation = Literal["linear", "tanh", "elu-0.5"]


class StepNegatives(NamedTuple):
    """The negatives that a batch offers; 0 where a history has no target at a step."""

    batch_LW: Tensor
    """The target of every history at the step, those of this worker included."""
    shared_K: Tensor
    owned: OwnedPairs


class PairLoss(NamedTuple):
    """A loss that compares the target's score with the scores of its negatives."""

    kind: Literal["top1", "bpr", "bpr_max"]
    activation: Activation = "linear"
    """Applied to every score, inside the loss only."""
    score_penalty: float = 0.0
    """bpr_max only: the weight of the squared scores (bpreg)."""


def step_loss(
    loss: PairLoss, state_LBD: Tensor, rows_ID: Tensor, target_LB: Tensor, negatives: StepNegatives
) -> Tensor:
    """Sum of the loss over the positions whose target is not 0; a position without negatives counts 0."""
    rows_B = state_LBD.shape[1]
    shared_is_owned_BK = is_owned(negatives.owned, rows_B, negatives.shared_K)

    def tile_loss(part: slice, state_LBD: Tensor, target_LBD: Tensor, batch_LWD: Tensor, shared_KD: Tensor) -> Tensor:
        target_score_LB = (state_LBD * target_LBD).sum(2)
        in_batch_LBW = state_LBD @ batch_LWD.transpose(1, 2)
        scores_LBC = torch.cat([in_batch_LBW, state_LBD @ shared_KD.T], dim=2)
        item_LW = negatives.batch_LW[part]
        batch_is_owned_LBW = is_owned(negatives.owned, rows_B, item_LW.flatten()).unflatten(1, item_LW.shape)
        batch_is_owned_LBW = batch_is_owned_LBW.transpose(0, 1)
        is_owned_LBC = torch.cat([batch_is_owned_LBW, shared_is_owned_BK.expand(len(state_LBD), -1, -1)], dim=2)
        batch_is_target_LBW = negatives.batch_LW[part][:, None] == target_LB[part][:, :, None]
        shared_is_target_LBK = negatives.shared_K == target_LB[part][:, :, None]
        # the target is never a negative, although nothing counts as owned in data with repeat purchases
        is_spared_LBC = is_owned_LBC | torch.cat([batch_is_target_LBW, shared_is_target_LBK], dim=2)
        kept_LB = target_LB[part] > 0
        return pair_losses(loss, target_score_LB[kept_LB], scores_LBC[kept_LB], ~is_spared_LBC[kept_LB]).sum()

    table_ID = padded(rows_ID.float())
    rows = [embedding(item, table_ID) for item in (target_LB, negatives.batch_LW, negatives.shared_K)]
    scores = negatives.batch_LW.shape[1] + len(negatives.shared_K)
    steps = max(1, positions_at_once(state_LBD, scores) // rows_B)
    return InTiles.apply(tile_loss, steps, 3, state_LBD.float(), *rows)


def pair_losses(loss: PairLoss, target_N: Tensor, others_NC: Tensor, is_negative_NC: Tensor) -> Tensor:
    """The loss of each target score against the marked scores of `others_NC`, (N,); 0 where none is marked."""
    target_N1, others_NC = activated(target_N, loss.activation)[:, None], activated(others_NC, loss.activation)
    match loss.kind:
        case "top1":
            return mean_over((others_NC - target_N1).sigmoid() + others_NC.square().sigmoid(), is_negative_NC)
        case "bpr":
            return mean_over(-torch.nn.functional.logsigmoid(target_N1 - others_NC), is_negative_NC)
        case "bpr_max":
            return bpr_max(target_N1, others_NC, is_negative_NC, loss.score_penalty)


def activated(scores: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "linear":
            return scores
        case "tanh":
            return scores.tanh()
        case "elu-0.5":
            return torch.nn.functional.elu(scores, alpha=0.5)


def mean_over(values_NC: Tensor, is_negative_NC: Tensor) -> Tensor:
    return (values_NC * is_negative_NC).sum(1) / is_negative_NC.sum(1).clamp(min=1)


def bpr_max(target_N1: Tensor, others_NC: Tensor, is_negative_NC: Tensor, score_penalty: float) -> Tensor:
    """-log sum_j s_j sigmoid(target - r_j) + penalty * sum_j s_j r_j^2, s the softmax of the negatives r.

    Computed in logarithms. The gradient flows through s too, as published.
    """
    has_any_N1 = is_negative_NC.any(1, keepdim=True)
    # a row of only -inf has no softmax: it keeps its scores, and its loss is set to 0 at the end
    log_weight_NC = others_NC.masked_fill(~is_negative_NC & has_any_N1, -torch.inf).log_softmax(1)
    log_sigmoid_NC = torch.nn.functional.logsigmoid(target_N1 - others_NC)
    loss_N = -(log_weight_NC + log_sigmoid_NC).logsumexp(1)
    if score_penalty:
        loss_N = loss_N + score_penalty * (log_weight_NC.exp() * others_NC.square()).sum(1)
    return loss_N.masked_fill(~has_any_N1[:, 0], 0.0)
