"""One training step: the batch of a model, and its summed loss. Differences between models are here only.

Every worker builds the whole batch from ids, so that masks and negatives do not depend on the number of workers, and
then takes its part. Shape letters: `J` items that a batch touches, `K` negatives, `A` aspects.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.models.bert4rec import BERT4Rec
from raygr.models.gru4rec import GRU4Rec
from raygr.models.inference import SequenceModel
from raygr.models.losses import PairLoss, StepNegatives, bce, cross_entropy, sampled_cross_entropy, step_loss
from raygr.models.negatives import (
    OwnedPairs,
    expected_counts,
    is_owned,
    owned_items,
    owned_pairs,
    sample_negatives,
    shared_negatives,
)
from raygr.train.batches import (
    Batch,
    Masking,
    epoch_batches,
    masked_batch,
    session_batch,
    session_lanes,
    training_batch,
)
from raygr.train.config import TrainConfig
from raygr.train.inputs import Inputs


class Draws(NamedTuple):
    """Separate random streams of one epoch, so that the use of one does not change the others."""

    dropout_seed: int
    """Differs between workers."""
    masks: torch.Generator
    """Like `negatives`, the same on all workers."""
    negatives: torch.Generator
    items: torch.Generator
    """Like `negatives`: of `item_dropout`."""


class WholeBatch(NamedTuple):
    """One batch of all workers; every worker builds it."""

    batch: Batch
    shared_K: Tensor
    """Negatives that all positions share."""
    expected_K: Tensor
    """The expected number of draws of each."""
    is_kept_J: Tensor | None = None
    """Marks items whose learned row is not dropped, of all items or of `item_J`; None without `item_dropout`."""
    item_J: Tensor | None = None
    """The sorted items that the batch touches: its ids are places in them, from 1. None: its ids are item_index."""

    def positions(self) -> int:
        """The number of targets in the loss; 0 only occurs with `session_parallel`."""
        return int(self.batch.in_loss_BL.sum())


def epoch_draws(seed: int, epoch: int, rank: int) -> Draws:
    """The streams depend on (seed, epoch), the dropout seed also on the worker's rank, which must be below 1,007."""
    first = (seed * 100_003 + epoch) * 1_009
    return Draws(
        first + rank,
        torch.Generator().manual_seed(first + 1_008),
        torch.Generator().manual_seed(first + 1_007),
        torch.Generator().manual_seed(-first - 1),
    )


def epoch_contents(config: TrainConfig, inputs: Inputs, epoch: int) -> list[Tensor]:
    """The examples of each batch of the epoch; the same for every worker and after a restart."""
    examples, size = len(inputs.windows.user_E), config.batch_size
    if config.session_parallel:
        lengths_E, lanes = inputs.windows.length_E, min(size, examples)
        return list(session_lanes(lengths_E, lanes=lanes, seed=config.seed, epoch=epoch))
    return epoch_batches(examples, batch_size=size, seed=config.seed, epoch=epoch)


def whole_batch(config: TrainConfig, inputs: Inputs, content: Tensor, popularity_I: Tensor, draws: Draws) -> WholeBatch:
    """Builds histories and targets of one of `epoch_contents`, with its negatives.

    The rows of `content` are examples, or with `session_parallel` the examples and steps of the lanes. `popularity_I`
    comes from negatives.popularity_sums.
    """
    match config.model:
        case "gru4rec" if config.session_parallel:
            batch = session_batch(inputs.items_N, inputs.windows, *content.unbind(1))
        case "gru4rec" | "sasrec":
            batch = training_batch(inputs.items_N, inputs.rating_N, inputs.windows, content)
        case "bert4rec":
            masking = Masking(config.mask_rate, config.mask_last_rate, config.max_history, inputs.items + 1)
            rows = (inputs.items_N, inputs.rating_N, inputs.windows, content)
            batch = masked_batch(*rows, masking=masking, generator=draws.masks)
    if config.loss == "bce":
        batch.negative_BL[batch.in_loss_BL] = one_negative_each(inputs, batch, draws.negatives)
    shared_K = shared_negatives(popularity_I, config.negatives, generator=draws.negatives)
    is_kept_J = None
    if config.item_dropout:
        is_kept_J = torch.rand(inputs.items, generator=draws.items) >= config.item_dropout
    return WholeBatch(batch, shared_K, expected_counts(popularity_I, shared_K), is_kept_J)


def one_negative_each(inputs: Inputs, batch: Batch, generator: torch.Generator) -> Tensor:
    """One negative for every position in the loss, in the order of `in_loss_BL`."""
    if not inputs.repeats:
        return sample_negatives(inputs.owned, batch.user_B[batch.in_loss_BL.nonzero()[:, 0]], generator=generator)
    # repeat purchases: any item but the target, so each position is treated as a user who owns the target only
    target_N = batch.target_BL[batch.in_loss_BL]
    place_N = torch.arange(len(target_N))
    known = inputs.items - inputs.new_items
    owned = owned_items(place_N.numpy(), target_N.numpy(), users=len(target_N), items=known)
    return sample_negatives(owned, place_N, generator=generator)


def renumbered(whole: WholeBatch, items: int) -> WholeBatch:
    """The batch with ids that count only the items it touches, for losses that need no others.

    [MASK] follows the last of them.
    """
    batch = whole.batch
    columns = [batch.history_BL, batch.target_BL, batch.negative_BL, whole.shared_K]
    touched = torch.cat([column.flatten() for column in columns]).unique()
    item_J = touched[(touched > 0) & (touched <= items)]
    *parts, shared_K = [torch.searchsorted(item_J, column, right=True) + (column > items) for column in columns]
    history_BL, target_BL, negative_BL = parts
    batch = batch._replace(history_BL=history_BL, target_BL=target_BL, negative_BL=negative_BL)
    is_kept_J = None if whole.is_kept_J is None else whole.is_kept_J[item_J - 1]
    return WholeBatch(batch, shared_K, whole.expected_K, is_kept_J, item_J)


# --- loss ----------------------------------------------------------------------------------------


def summed_loss(
    config: TrainConfig,
    inputs: Inputs,
    model: SequenceModel,
    whole: WholeBatch,
    own: Batch,
    session_BD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The summed fp32 loss of the positions of `own`, and the hidden state after them.

    `own` is a part of the whole batch. `session_BD` is the hidden state of the lanes before the batch. Both hidden
    states are None without `session_parallel`.
    """
    embedding = model.embedding
    device = embedding.base_ID.device
    item_J, is_kept_J = (None if one is None else one.to(device) for one in (whole.item_J, whole.is_kept_J))
    rows_ID = embedding.item_rows(item_J, is_kept_J)
    with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
        history_BL = own.history_BL.to(device)
        if config.session_parallel:
            assert isinstance(model, GRU4Rec) and own.goes_on_B is not None
            encoder_BLD, session_BD = model.next_states(rows_ID, history_BL, own.goes_on_B.to(device), session_BD)
        else:
            encoder_BLD = model(rows_ID, history_BL, own.length_B.to(device))
        users_BA = None
        if inputs.user_vectors is not None:
            known_BA = inputs.user_vectors.training_UA[own.user_B.numpy()].astype(np.float32)
            users_BA = embedding.tuned_users(torch.from_numpy(known_BA).to(device), own.user_B.to(device))
        guided_BLA = None if users_BA is None else users_BA[:, None]
        if embedding.state is not None:
            scores_JA, rating_BL = embedding.standard_rows(item_J), own.rating_BL.to(device)
            masked = isinstance(model, BERT4Rec)
            guided_BLA = embedding.state.at_positions(scores_JA, history_BL, rating_BL, users_BA, masked=masked)
        state_BLD = embedding.refined_state(encoder_BLD, guided_BLA)
    match config.loss:
        case "cross_entropy" | "sampled_cross_entropy" | "bce" as kind:
            return pointwise_loss(kind, inputs, state_BLD, rows_ID, whole, own), session_BD
        case "top1" | "bpr" | "bpr_max" as kind:
            loss = PairLoss(kind, config.final_activation, config.score_penalty)
            return pairwise_loss(loss, inputs, state_BLD, rows_ID, whole, own), session_BD


def pointwise_loss(
    kind: Literal["cross_entropy", "sampled_cross_entropy", "bce"],
    inputs: Inputs,
    state_BLD: Tensor,
    rows_ID: Tensor,
    whole: WholeBatch,
    own: Batch,
) -> Tensor:
    """A cross-entropy, full or sampled, or BCE of the positions in the loss, packed."""
    device = rows_ID.device
    state_ND, target_N = state_BLD[own.in_loss_BL.to(device)], own.target_BL[own.in_loss_BL].to(device)
    match kind:
        case "cross_entropy":
            return cross_entropy(state_ND, rows_ID[: inputs.items - inputs.new_items], target_N)
        case "sampled_cross_entropy":
            assert whole.item_J is not None
            pairs = owned_pairs(inputs.owned, own.user_B, whole.item_J)
            is_owned_BK = is_owned(pairs, len(own.user_B), whole.shared_K).to(device)
            negative_K, expected_K = whole.shared_K.to(device), whole.expected_K.to(device)
            # the target is never a negative, although nothing counts as owned in data with repeat purchases
            is_spared_NK = is_owned_BK[own.in_loss_BL.nonzero()[:, 0].to(device)] | (negative_K == target_N[:, None])
            return sampled_cross_entropy(state_ND, rows_ID, target_N, negative_K, is_spared_NK, expected_K=expected_K)
        case "bce":
            return bce(state_ND, rows_ID, target_N, own.negative_BL[own.in_loss_BL].to(device))


def pairwise_loss(
    loss: PairLoss, inputs: Inputs, state_BLD: Tensor, rows_ID: Tensor, whole: WholeBatch, own: Batch
) -> Tensor:
    """TOP1, BPR or BPR-max; negatives are the targets of all histories at the same step and the shared items."""
    device, steps = rows_ID.device, state_BLD.shape[1]
    target_BL = torch.where(own.in_loss_BL, own.target_BL, 0)
    assert whole.item_J is not None
    pairs = owned_pairs(inputs.owned, own.user_B, whole.item_J)
    negatives = StepNegatives(
        whole.batch.target_BL[:, :steps].T.contiguous().to(device),
        whole.shared_K.to(device),
        OwnedPairs(pairs.row_O.to(device), pairs.item_O.to(device)),
    )
    return step_loss(loss, state_BLD.transpose(0, 1), rows_ID, target_BL.T.to(device), negatives)
