"""Scores of a trained model: the one way from histories to item scores.

Evaluation, recommendation, export and explanation use these functions. Put the model in eval mode first.
Shape letters: `B` histories, `L` history length, `I` items, `D` width, `A` aspects.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from raygr.models.bert4rec import BERT4Rec
from raygr.models.gru4rec import GRU4Rec
from raygr.models.sasrec import SASRec

SequenceModel = GRU4Rec | SASRec | BERT4Rec


class UserStates(NamedTuple):
    """What the scores of B histories are made from, before (9b) joins the two."""

    encoder_BD: Tensor
    guided_BA: Tensor | None
    """The guided user state, or the users' vectors of (9b); None where the model has neither."""


def encode_users(
    model: SequenceModel, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor, rating_BL: Tensor, user_B: Tensor
) -> UserStates:
    """Encodes histories of item_index, oldest first and padded by 0 on the right, each with its user_index.

    `rows_ID` is the item table, `model.embedding.item_rows()`; `rating_BL` is NaN where an item has no rating.
    """
    device, embedding = rows_ID.device, model.embedding
    history_BL, length_B, user_B = history_BL.to(device), length_B.to(device), user_B.to(device)
    # the rows of the histories' items, numbered from 1: models copy the table that they read
    item_J = history_BL.unique()
    item_J = item_J[item_J > 0]
    history_BL = torch.where(history_BL > 0, torch.searchsorted(item_J, history_BL) + 1, 0)
    encoder_BD = model.encode(rows_ID[item_J - 1], history_BL, length_B)
    users_BA = embedding.vectors_of(user_B)
    if embedding.state is None:
        return UserStates(encoder_BD, users_BA)
    scores_JA, rating_BL = embedding.standard_rows(item_J), rating_BL.to(device)
    return UserStates(encoder_BD, embedding.state.at_end(scores_JA, history_BL, length_B, rating_BL, users_BA))


def user_vectors(model: SequenceModel, states: UserStates) -> Tensor:
    """(9b): the vectors whose products with `item_rows` are the scores, (B, D)."""
    guided_B1A = None if states.guided_BA is None else states.guided_BA[:, None]
    return model.embedding.refined_state(states.encoder_BD[:, None], guided_B1A)[:, 0]


def score_items(model: SequenceModel, rows_ID: Tensor, states: UserStates) -> Tensor:
    """<state, item> of items 1..I, (B, I)."""
    return user_vectors(model, states) @ rows_ID.T


def base_parts(model: SequenceModel, history_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Base parts of the scores of all items, (B, I) each: with history aspects at their mean, and unchanged.

    The first tells how far the base part depends on aspects: the encoder reads every item of the history with its
    aspects at the catalogue's mean.
    """
    embedding = model.embedding
    at_mean_BI, unchanged_BI = (
        embedding.base_scores(model.encode(rows_ID, history_BL.to(rows_ID.device), length_B.to(rows_ID.device)))
        for rows_ID in (embedding.rows_at_mean(), embedding.item_rows())
    )
    return at_mean_BI, unchanged_BI


def relative_change(changed_BI: Tensor, scores_BI: Tensor) -> float:
    """The norm of the change divided by the norm of the scores, both without their row means. It may exceed 1.

    The mean of a row changes no ranking.
    """
    change_BI, centred_BI = (one - one.mean(dim=1, keepdim=True) for one in (changed_BI - scores_BI, scores_BI))
    return (change_BI.norm() / centred_BI.norm().clamp_min(1e-30)).item()
