"""Normalisation by hand; refined tables; the score's split adds up in every form."""

import itertools
import math

import numpy as np
import pytest
import torch
from toy_data import random_scores

from raygr.metrics.z_scores import standardise
from raygr.models.embeddings import Fusion, RefinedEmbedding, padded, soft_levels, variance_shares, xavier_std

ITEMS, ASPECTS, USERS = 20, 3, 5
SCORES_IA = random_scores(ITEMS, ASPECTS, seed=0)
USERS_UA = np.random.default_rng(1).standard_normal((USERS, ASPECTS))
FORMS = [
    Fusion(form, add_map, linear_map, user_side, 0.7)
    for form, add_map, linear_map, user_side in itertools.product(
        ["concat", "add"], ["levels", "linear"], [False, True], ["add", "concat", "off"]
    )
    if not (form == "add" and (linear_map or user_side == "concat"))
]


def stirred(fusion: Fusion, *, base_width: int = 8, users: bool = True) -> RefinedEmbedding:
    """A refined embedding with every learned number moved from its start, so that no term is 0 by accident."""
    torch.manual_seed(0)
    users_UA = USERS_UA if users else None
    embedding = RefinedEmbedding(ITEMS, base_width, fusion=fusion, scores_IA=SCORES_IA, users_UA=users_UA)
    with torch.no_grad():
        for parameter in embedding.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    return embedding


def test_what_is_there_is_standardised_and_what_is_missing_is_0():
    """2 of 20 items have a score. Their spread is 1; filling the other 18 with the mean would change it."""
    scores_IA = np.full((20, 1), np.nan)
    scores_IA[[3, 8], 0] = [2.0, 8.0]
    values_IA, flat_A = standardise(scores_IA)
    assert (values_IA[3, 0], values_IA[8, 0], flat_A.tolist()) == (-1, 1, [False])
    assert np.delete(values_IA, [3, 8]).tolist() == [0] * 18
    levels = soft_levels(scores_IA)
    assert levels[0].tolist() == [0] * 10
    assert levels[8].tolist() == [0, 0, 0, 0, 0, 0, 0.5, 1, 0.5, 0]


def test_soft_levels_by_hand():
    """7 is level 7 and half of 6 and 8; 7.5 is three quarters of 7 and 8 and a quarter of 6 and 9; 1 has no level 0."""
    levels = soft_levels(np.array([[7.0], [7.5], [1.0]]))
    assert levels[0].tolist() == [0, 0, 0, 0, 0, 0.5, 1, 0.5, 0, 0]
    assert levels[1].tolist() == [0, 0, 0, 0, 0, 0.25, 0.75, 0.75, 0.25, 0]
    assert levels[2].tolist() == [1, 0.5, 0, 0, 0, 0, 0, 0, 0, 0]


def test_vectors_outside_the_scale_are_stretched_onto_it():
    levels = soft_levels(np.array([[-3.0], [0.0], [3.0]]))
    assert levels.argmax(axis=1).tolist()[::2] == [0, 9]


def test_concat_holds_the_scaled_scores_unlearned():
    """(A.5): deviation sqrt(2 / (items + total width)) per aspect, times lambda."""
    fusion = Fusion("concat", weight=2.0)
    embedding = RefinedEmbedding(ITEMS, 8, fusion=fusion, scores_IA=SCORES_IA)
    guided_IA = embedding.item_rows()[:, 8:]
    expected = 2.0 * math.sqrt(2 / (ITEMS + 11))
    assert guided_IA.std(dim=0, correction=0).tolist() == pytest.approx([expected] * 3, rel=1e-5)
    assert guided_IA.mean(dim=0).abs().max() < 1e-6
    assert not guided_IA.requires_grad or torch.autograd.grad(guided_IA.sum(), embedding.base_ID)[0].abs().max() == 0
    assert [name for name, p in embedding.named_parameters() if p.requires_grad] == ["base_ID"]
    assert embedding.width == 11 and xavier_std(ITEMS, 11) == pytest.approx(embedding.std)


def test_add_starts_as_the_base_model_and_keeps_the_width():
    embedding = RefinedEmbedding(ITEMS, 8, fusion=Fusion("add"), scores_IA=SCORES_IA)
    assert embedding.width == 8
    assert embedding.item_map_FD.shape == (ASPECTS * 10, 8)
    assert torch.equal(embedding.item_rows(), embedding.base_ID)


@pytest.mark.parametrize("form", ["concat", "add"])
def test_padding_has_no_guided_part_and_no_gradient(form: str):
    embedding = stirred(Fusion(form), users=False)
    table = padded(embedding.item_rows())
    assert table.shape == (ITEMS + 1, embedding.width)
    assert table[0].abs().sum() == 0
    history_BL = torch.tensor([[3, 0, 0]])
    torch.nn.functional.embedding(history_BL, table).sum().backward()
    assert embedding.base_ID.grad[2].tolist() == [1.0] * 8
    assert embedding.base_ID.grad.abs().sum() == 8


@pytest.mark.parametrize("fusion", FORMS)
def test_the_score_splits_exactly(fusion: Fusion):
    embedding = stirred(fusion)
    encoder_BD, guided_BA = torch.randn(USERS, embedding.width), embedding.users_UA if embedding.has_user_side else None
    item_C = torch.tensor([1, 5, 20])
    scores_BC = embedding.refined_state(encoder_BD[:, None], guided_BA)[:, 0] @ embedding.item_rows()[item_C - 1].T
    parts = embedding.split_score(encoder_BD, guided_BA, item_C)
    total_BC = parts.base_BC + parts.encoder_BCA.sum(-1) + parts.user_BCA.sum(-1)
    torch.testing.assert_close(total_BC, scores_BC, rtol=1e-4, atol=1e-4)
    assert (parts.user_BCA.abs().sum() > 0) == (fusion.user_side != "off")


@pytest.mark.parametrize("fusion", FORMS)
def test_shares_agree_with_the_split_and_sum_to_one(fusion: Fusion):
    embedding = stirred(fusion)
    encoder_BD, guided_BA = torch.randn(USERS, embedding.width), embedding.users_UA if embedding.has_user_side else None
    shares = embedding.score_shares(encoder_BD, guided_BA)
    parts = embedding.split_score(encoder_BD, guided_BA, torch.arange(1, ITEMS + 1))
    sums = {"base": parts.base_BC, "encoder_guided": parts.encoder_BCA.sum(-1), "user_guided": parts.user_BCA.sum(-1)}
    assert shares == pytest.approx(variance_shares(sums), abs=1e-4)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


def test_an_aspect_without_spread_explains_nothing():
    scores_IA = SCORES_IA.copy()
    scores_IA[:, 1] = 4
    embedding = RefinedEmbedding(ITEMS, 8, fusion=Fusion("concat"), scores_IA=scores_IA)
    parts = embedding.split_score(torch.randn(2, 11), None, torch.arange(1, ITEMS + 1))
    assert parts.encoder_BCA[:, :, 1].abs().sum() == 0
    assert parts.encoder_BCA[:, :, 0].abs().sum() > 0


def test_concat_user_side_is_9b_to_the_letter():
    """The state's guided dimensions are lambda times the user's scaled scores, whatever the encoder says."""
    embedding = stirred(Fusion("concat", user_side="concat", weight=0.7))
    state_BLD = embedding.refined_state(torch.randn(USERS, 4, embedding.width), embedding.users_UA)
    expected_BA = 0.7 * embedding.std * torch.as_tensor(USERS_UA, dtype=torch.float32)
    torch.testing.assert_close(state_BLD[:, :, 8:], expected_BA[:, None].expand(-1, 4, -1))


def test_add_user_side_touches_the_guided_dimensions_only():
    embedding = stirred(Fusion("concat", user_side="add"))
    encoder_BLD = torch.randn(USERS, 4, embedding.width)
    change_BLD = embedding.refined_state(encoder_BLD, embedding.users_UA) - encoder_BLD
    assert change_BLD[..., :8].abs().sum() == 0
    assert (change_BLD[..., 8:].abs() > 0).all()
