"""How far the base part of a score hangs on aspects: the encoder reads those of the history.

Measured by giving the encoder every item with its aspects at the catalogue's mean. Shape suffixes: `B` users,
`I` items.
"""

import torch
from torch import Tensor

from raygr.schema import TEST
from raygr.train.batches import Targets
from raygr.train.loop import SHARES_OF_USERS, Training, encoder_states


def base_moved(training: Training) -> float | None:
    """`relative_change` of the test users' base parts; None for a base model."""
    if training.inputs.scores is None:
        return None
    training.model.eval()
    targets = training.inputs.targets[TEST]
    return relative_change(*base_parts(training, targets, torch.arange(min(len(targets.user_E), SHARES_OF_USERS))))


@torch.inference_mode()
def base_parts(training: Training, targets: Targets, example_B: Tensor) -> tuple[Tensor, Tensor]:
    """Base parts of all items' scores: with every aspect of the history at its mean, and as they are; (B, I) each."""
    embedding = training.model.embedding
    tables = (embedding.rows_at_mean(), embedding.item_rows())
    at_mean_BI, as_is_BI = (
        embedding.base_scores(encoder_states(training, targets, example_B, rows_ID)[0]) for rows_ID in tables
    )
    return at_mean_BI, as_is_BI


def relative_change(changed_BI: Tensor, scores_BI: Tensor) -> float:
    """Size of the change in that of the scores, each without its row's mean, which ranks nothing. It may exceed 1."""
    change_BI, centred_BI = (one - one.mean(dim=1, keepdim=True) for one in (changed_BI - scores_BI, scores_BI))
    return (change_BI.norm() / centred_BI.norm().clamp_min(1e-30)).item()
