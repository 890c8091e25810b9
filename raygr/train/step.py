"""What a batch asks of a model: its histories and targets, and their summed loss. Models differ here and nowhere else.

A batch is built from ids, whole on every worker, so that masks and negatives do not depend on how many workers there
are; each then takes its part. Shape suffixes as in losses.py, and `A` aspects.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.models.bert4rec import BERT4Rec
from raygr.models.gru4rec import GRU4Rec
from raygr.models.losses import (
    OwnedPairs,
    PairLoss,
    StepNegatives,
    bce,
    cross_entropy,
    expected_counts,
    is_owned,
    owned_items,
    owned_pairs,
    sample_negatives,
    sampled_cross_entropy,
    shared_negatives,
    step_loss,
)
from raygr.models.sasrec import SASRec
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

Recommender = GRU4Rec | SASRec | BERT4Rec


class Draws(NamedTuple):
    """The random numbers of one epoch, by purpose: how many one takes changes none of the others."""

    dropout_seed: int
    """The worker's own."""
    masks: torch.Generator
    """As `negatives` the same on all workers."""
    negatives: torch.Generator


class WholeBatch(NamedTuple):
    """One batch as every worker knows it."""

    batch: Batch
    shared_K: Tensor
    """Negatives shared by all its positions."""
    expected_K: Tensor
    """How often each of them is drawn on average."""
    item_J: Tensor | None = None
    """The items that it touches, sorted; its ids are places in them, from 1. None: all, its ids are item_index."""

    def positions(self) -> int:
        """Targets in the loss; 0 is possible with `session_parallel` alone."""
        return int(self.batch.in_loss_BL.sum())


def epoch_draws(seed: int, epoch: int, rank: int) -> Draws:
    """`rank` below 1,007."""
    first = (seed * 100_003 + epoch) * 1_009
    return Draws(
        first + rank, torch.Generator().manual_seed(first + 1_008), torch.Generator().manual_seed(first + 1_007)
    )


def epoch_contents(config: TrainConfig, inputs: Inputs, epoch: int) -> list[Tensor]:
    """What `whole_batch` makes each batch of the epoch from; the same for every worker and after a restart."""
    examples, size = len(inputs.windows.user_E), config.batch_size
    if config.session_parallel:
        lengths_E, lanes = inputs.windows.length_E, min(size, examples)
        return list(session_lanes(lengths_E, lanes=lanes, seed=config.seed, epoch=epoch))
    return epoch_batches(examples, batch_size=size, seed=config.seed, epoch=epoch)


def whole_batch(config: TrainConfig, inputs: Inputs, content: Tensor, popularity_I: Tensor, draws: Draws) -> WholeBatch:
    """One of `epoch_contents` as histories and targets; `popularity_I` as losses.popularity_sums makes it.

    Its rows are examples, or with `session_parallel` the lanes' examples and steps.
    """
    match config.model:
        case "gru4rec" if config.session_parallel:
            batch = session_batch(inputs.items_N, inputs.windows, *content.unbind(1))
        case "gru4rec" | "sasrec":
            batch = training_batch(inputs.items_N, inputs.windows, content)
        case "bert4rec":
            masking = Masking(config.mask_rate, config.mask_last_rate, config.max_history, inputs.items + 1)
            batch = masked_batch(inputs.items_N, inputs.windows, content, masking=masking, generator=draws.masks)
    if config.loss == "bce":
        batch.negative_BL[batch.in_loss_BL] = one_negative_each(inputs, batch, draws.negatives)
    shared_K = shared_negatives(popularity_I, config.negatives, generator=draws.negatives)
    return WholeBatch(batch, shared_K, expected_counts(popularity_I, shared_K))


def one_negative_each(inputs: Inputs, batch: Batch, generator: torch.Generator) -> Tensor:
    """For every position in the loss, in the order of `in_loss_BL`."""
    if not inputs.repeats:
        return sample_negatives(inputs.owned, batch.user_B[batch.in_loss_BL.nonzero()[:, 0]], generator=generator)
    # anything but the target: each position is drawn for as a user who has it alone
    target_N = batch.target_BL[batch.in_loss_BL]
    place_N = torch.arange(len(target_N))
    owned = owned_items(place_N.numpy(), target_N.numpy(), users=len(target_N), items=inputs.items)
    return sample_negatives(owned, place_N, generator=generator)


def renumbered(whole: WholeBatch, items: int) -> WholeBatch:
    """With the items that it touches alone, for losses that need no others; [MASK] follows the last of them."""
    batch = whole.batch
    columns = [batch.history_BL, batch.target_BL, batch.negative_BL, whole.shared_K]
    touched = torch.cat([column.flatten() for column in columns]).unique()
    item_J = touched[(touched > 0) & (touched <= items)]
    *parts, shared_K = [torch.searchsorted(item_J, column, right=True) + (column > items) for column in columns]
    history_BL, target_BL, negative_BL = parts
    batch = batch._replace(history_BL=history_BL, target_BL=target_BL, negative_BL=negative_BL)
    return WholeBatch(batch, shared_K, whole.expected_K, item_J)


def summed_loss(config: TrainConfig, inputs: Inputs, model: Recommender, whole: WholeBatch, own: Batch) -> Tensor:
    """Loss of every position of `own`, a worker's part of the batch, in fp32."""
    device = model.embedding.base_ID.device
    rows_ID = model.embedding.item_rows(None if whole.item_J is None else whole.item_J.to(device))
    with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
        history_BL = own.history_BL.to(device)
        if config.session_parallel:
            encoder_BLD = model.next_states(rows_ID, history_BL, own.goes_on_B.to(device))
        else:
            encoder_BLD = model(rows_ID, history_BL, own.length_B.to(device))
        guided_BA = training_vectors(inputs, model, own)
        state_BLD = model.embedding.refined_state(encoder_BLD, guided_BA)
    if config.loss in ("top1", "bpr", "bpr_max"):
        return pairwise_loss(config, inputs, state_BLD, rows_ID, whole, own)
    state_ND, target_N = state_BLD[own.in_loss_BL.to(device)], own.target_BL[own.in_loss_BL].to(device)
    match config.loss:
        case "cross_entropy":
            return cross_entropy(state_ND, rows_ID, target_N)
        case "sampled_cross_entropy":
            pairs = owned_pairs(inputs.owned, own.user_B, whole.item_J)
            is_owned_BK = is_owned(pairs, len(own.user_B), whole.shared_K).to(device)
            negative_K, expected_K = whole.shared_K.to(device), whole.expected_K.to(device)
            # the target is no negative of its own, although nothing is owned where items come back
            is_spared_NK = is_owned_BK[own.in_loss_BL.nonzero()[:, 0].to(device)] | (negative_K == target_N[:, None])
            return sampled_cross_entropy(state_ND, rows_ID, target_N, negative_K, is_spared_NK, expected_K=expected_K)
        case "bce":
            return bce(state_ND, rows_ID, target_N, own.negative_BL[own.in_loss_BL].to(device))


def pairwise_loss(
    config: TrainConfig, inputs: Inputs, state_BLD: Tensor, rows_ID: Tensor, whole: WholeBatch, own: Batch
) -> Tensor:
    """TOP1, BPR or BPR-max with every history's targets of the same step and the shared items as negatives."""
    device, steps = rows_ID.device, state_BLD.shape[1]
    target_BL = torch.where(own.in_loss_BL, own.target_BL, 0)
    pairs = owned_pairs(inputs.owned, own.user_B, whole.item_J)
    negatives = StepNegatives(
        whole.batch.target_BL[:, :steps].T.contiguous().to(device),
        whole.shared_K.to(device),
        OwnedPairs(pairs.row_P.to(device), pairs.item_P.to(device)),
    )
    loss = PairLoss(config.loss, config.final_activation, config.score_penalty)
    return step_loss(loss, state_BLD.transpose(0, 1), rows_ID, target_BL.T.to(device), negatives)


def training_vectors(inputs: Inputs, model: Recommender, batch: Batch) -> Tensor | None:
    """The users' guided vectors that training may know, (B, A)."""
    if inputs.user_vectors is None:
        return None
    device = model.embedding.base_ID.device
    known_BA = inputs.user_vectors.training_UA[batch.user_B.numpy()].astype(np.float32)
    return model.embedding.tuned_users(torch.from_numpy(known_BA).to(device), batch.user_B.to(device))
