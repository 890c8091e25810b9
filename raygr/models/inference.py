"""Scores of a trained model: the one way from histories to item scores.

Evaluation, recommendation, export and explanation use these functions. Put the model in eval mode first.
Shape letters: `B` histories, `L` history length, `I` items, `D` width, `A` aspects.
"""

from typing import NamedTuple

from torch import Tensor

from raygr.models.bert4rec import BERT4Rec
from raygr.models.gru4rec import GRU4Rec
from raygr.models.sasrec import SASRec

SequenceModel = GRU4Rec | SASRec | BERT4Rec


class UserStates(NamedTuple):
    """What the scores of B histories are made from, before (9b) joins the two."""

    encoder_BD: Tensor
    guided_BA: Tensor | None
    """The guided vectors of the users; None where the model has no user side."""


def encode_users(
    model: SequenceModel, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor, user_B: Tensor
) -> UserStates:
    """Encodes histories of item_index, oldest first and padded by 0 on the right, each with its user_index.

    `rows_ID` is the item table, `model.embedding.item_rows()`.
    """
    device, embedding = rows_ID.device, model.embedding
    encoder_BD = model.encode(rows_ID, history_BL.to(device), length_B.to(device))
    if not embedding.has_user_side:
        return UserStates(encoder_BD, None)
    user_B = user_B.to(device)
    return UserStates(encoder_BD, embedding.tuned_users(embedding.users_UA[user_B], user_B))


def user_vectors(model: SequenceModel, states: UserStates) -> Tensor:
    """(9b): the vectors whose products with item rows are the scores, (B, D)."""
    return model.embedding.refined_state(states.encoder_BD[:, None], states.guided_BA)[:, 0]


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
