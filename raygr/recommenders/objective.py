"""What a batch asks of a model: its histories and targets, and their summed loss. Models differ here and nowhere else.

A batch is built from ids, whole on every worker, so that masks and shared negatives do not depend on how many
workers there are; each then takes its part. Shape suffixes as in losses.py, and `A` aspects.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.config import TrainConfig
from raygr.data.batches import Batch, Masking, epoch_batches, masked_batch, session_batch, session_lanes, training_batch
from raygr.recommenders.bert4rec import BERT4Rec
from raygr.recommenders.gru4rec import GRU4Rec
from raygr.recommenders.inputs import Inputs
from raygr.recommenders.losses import (
    PairLoss,
    StepNegatives,
    bce,
    cross_entropy,
    owned_items,
    owned_matrix,
    sample_negatives,
    sampled_cross_entropy,
    shared_negatives,
    step_loss,
)
from raygr.recommenders.sasrec import SASRec

Recommender = GRU4Rec | SASRec | BERT4Rec


class Draws(NamedTuple):
    """Generators of one epoch."""

    own: torch.Generator
    """Negatives of this worker's own positions."""
    common: torch.Generator
    """What all workers draw alike: masks and shared negatives."""


class WholeBatch(NamedTuple):
    """One batch as every worker knows it."""

    batch: Batch
    shared_K: Tensor
    """Negatives shared by all its positions, as item_index."""

    def positions(self) -> int:
        """Targets in the loss; 0 is possible with `session_parallel` alone."""
        return int(self.batch.in_loss_BL.sum())


def epoch_draws(seed: int, epoch: int, rank: int) -> Draws:
    """`rank` below 1,008."""
    first = (seed * 100_003 + epoch) * 1_009
    return Draws(torch.Generator().manual_seed(first + rank), torch.Generator().manual_seed(first + 1_008))


def epoch_contents(config: TrainConfig, inputs: Inputs, epoch: int) -> list[Tensor]:
    """What `whole_batch` makes each batch of the epoch from; the same for every worker and after a restart."""
    examples, size = len(inputs.windows.user_E), config.batch_size
    if config.session_parallel:
        lengths_E, lanes = inputs.windows.length_E, min(size, examples)
        return list(session_lanes(lengths_E, lanes=lanes, seed=config.seed, epoch=epoch))
    return epoch_batches(examples, batch_size=size, seed=config.seed, epoch=epoch)


def whole_batch(
    config: TrainConfig, inputs: Inputs, content: Tensor, popularity_I: Tensor, common: torch.Generator
) -> WholeBatch:
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
            batch = masked_batch(inputs.items_N, inputs.windows, content, masking=masking, generator=common)
    return WholeBatch(batch, shared_negatives(popularity_I, config.negatives, generator=common))


def summed_loss(
    config: TrainConfig, inputs: Inputs, model: Recommender, whole: WholeBatch, own: Batch, draws: Draws
) -> Tensor:
    """Loss of every position of `own`, a worker's part of the batch, in fp32."""
    device = model.embedding.base_ID.device
    rows_ID = model.embedding.item_rows()
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
    row_N = own.in_loss_BL.nonzero()[:, 0]
    match config.loss:
        case "cross_entropy":
            return cross_entropy(state_ND, rows_ID, target_N)
        case "sampled_cross_entropy":
            is_owned_BK = owned_matrix(inputs.owned, own.user_B)[:, whole.shared_K].to(device)
            # the target is no negative of its own, although nothing is owned where items come back
            is_spared_NK = is_owned_BK[row_N.to(device)] | (whole.shared_K.to(device) == target_N[:, None])
            return sampled_cross_entropy(state_ND, rows_ID, target_N, whole.shared_K.to(device), is_spared_NK)
        case "bce":
            owned, owner_N = inputs.owned, own.user_B[row_N]
            if inputs.repeats:  # anything but the target: each position is drawn for as a user who has it alone
                owner_N = torch.arange(len(row_N))
                owned = owned_items(owner_N.numpy(), target_N.cpu().numpy(), users=len(row_N), items=inputs.items)
            negative_N = sample_negatives(owned, owner_N, generator=draws.own)
            return bce(state_ND, rows_ID, target_N, negative_N.to(device))


def pairwise_loss(
    config: TrainConfig, inputs: Inputs, state_BLD: Tensor, rows_ID: Tensor, whole: WholeBatch, own: Batch
) -> Tensor:
    """TOP1, BPR or BPR-max with every history's targets of the same step and the shared items as negatives."""
    device, steps = rows_ID.device, state_BLD.shape[1]
    target_BL = torch.where(own.in_loss_BL, own.target_BL, 0)
    negatives = StepNegatives(
        whole.batch.target_BL[:, :steps].T.contiguous().to(device),
        whole.shared_K.to(device),
        owned_matrix(inputs.owned, own.user_B).to(device),
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
