"""The guided user state by hand; it knows nothing of its target; scores are the sum of both products."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_data import random_scores

from raygr.metrics.z_scores import standardise
from raygr.models.embeddings import Fusion, RefinedEmbedding
from raygr.models.guided_state import HISTORY_PARTS, GuidedState

ITEMS, ASPECTS = 6, 2
SCORES_IA = torch.tensor([[1.0, 0], [0, 2], [-1, 1], [3, -1], [0.5, 0.5], [-2, -2]])
NAN = math.nan


def state_of(*parts: str, deviation: float = 1.0) -> GuidedState:
    """A state of these parts with the identity as each map."""
    state = GuidedState(ASPECTS, parts, rating_deviation=deviation)
    with torch.no_grad():
        state.map_FA.copy_(torch.eye(ASPECTS).repeat(len(parts), 1))
    return state


def part_of(name: str, *, deviation: float = 1.0) -> GuidedState:
    """The state of all parts of the history with only the named one let through."""
    state = state_of(*HISTORY_PARTS, deviation=deviation)
    with torch.no_grad():
        state.map_FA.unflatten(0, (3, ASPECTS))[[part != name for part in HISTORY_PARTS]] = 0
    return state


def test_the_parts_by_hand():
    """Items 1, 2, 4 with ratings 5, 2 and none; the ratings' deviation is 1.5."""
    history, rating = torch.tensor([[1, 2, 4]]), torch.tensor([[5.0, 2.0, NAN]])
    expected = {
        "all": [[1, 0], [1 / 2**0.5, 2 / 2**0.5], [4 / 3**0.5, 1 / 3**0.5]],
        # one rating is its own mean; then the mean is 3.5, and both ratings are 1.5, one deviation, off
        "rated": [[0, 0], [1 / 2**0.5, -2 / 2**0.5], [1 / 2**0.5, -2 / 2**0.5]],
        "recent": [[1, 0], [1 / 2**0.5, 2 / 2**0.5], [3 / 2**0.5, 1 / 2**0.5]],
    }
    for name, rows in expected.items():
        found = part_of(name, deviation=1.5).at_positions(SCORES_IA, history, rating, None, masked=False)
        torch.testing.assert_close(found[0], torch.tensor(rows, dtype=torch.float32), msg=name)


def test_a_masked_position_reads_both_sides_and_not_itself():
    """Item 2 is hidden in the middle: its state is made of items 1 and 4, whatever was rated at its place."""
    history, rating = torch.tensor([[1, ITEMS + 1, 4]]), torch.tensor([[5.0, 2.0, 3.0]])
    found = part_of("all").at_positions(SCORES_IA, history, rating, None, masked=True)
    torch.testing.assert_close(found[0, 1], torch.tensor([4.0, -1.0]) / 2**0.5)
    rated = part_of("rated").at_positions(SCORES_IA, history, rating, None, masked=True)
    torch.testing.assert_close(rated[0, 1], (SCORES_IA[0] - SCORES_IA[3]) / 2**0.5)


def test_the_users_own_vector_is_one_more_part_at_every_position():
    state, users_BA = state_of("user"), torch.tensor([[1.0, -2.0]])
    history, rating = torch.tensor([[1, 2, 4]]), torch.full((1, 3), NAN)
    assert state.at_positions(SCORES_IA, history, rating, users_BA, masked=False)[0].tolist() == [[1, -2]] * 3
    both = state_of(*HISTORY_PARTS, "user").at_positions(SCORES_IA, history, rating, users_BA, masked=False)
    without = state_of(*HISTORY_PARTS).at_positions(SCORES_IA, history, rating, None, masked=False)
    torch.testing.assert_close(both - without, users_BA[:, None].expand_as(both))


histories = st.lists(st.integers(1, ITEMS), min_size=2, max_size=9)


@given(histories, st.integers(0, 8), st.integers(1, ITEMS), st.floats(1, 5))
def test_no_position_knows_its_target_or_what_follows(items: list[int], place: int, other: int, stars: float):
    place = 1 + place % (len(items) - 1)
    state, rating = state_of(*HISTORY_PARTS), torch.linspace(1, 5, len(items))[None]
    before = state.at_positions(SCORES_IA, torch.tensor([items]), rating, None, masked=False)
    changed, changed_rating = list(items), rating.clone()
    changed[place], changed_rating[0, place] = other, stars
    after = state.at_positions(SCORES_IA, torch.tensor([changed]), changed_rating, None, masked=False)
    assert torch.equal(before[0, :place], after[0, :place])


@given(histories, st.integers(0, 3))
def test_the_state_at_the_end_is_that_of_the_last_position_and_padding_changes_nothing(items: list[int], padding: int):
    state, rating = state_of(*HISTORY_PARTS), torch.linspace(1, 5, len(items))[None]
    last = state.at_positions(SCORES_IA, torch.tensor([items]), rating, None, masked=False)[:, -1]
    padded = torch.tensor([items + [0] * padding])
    padded_rating = torch.nn.functional.pad(rating, (0, padding), value=NAN)
    found = state.at_end(SCORES_IA, padded, torch.tensor([len(items)]), padded_rating, None)
    torch.testing.assert_close(found, last)


@pytest.mark.parametrize("form", ["add", "concat", "none"])
def test_scores_are_the_base_models_at_first_and_then_both_products(form: str):
    raw_IA = random_scores(20, ASPECTS, seed=0)
    torch.manual_seed(0)
    fusion = Fusion(form, state=HISTORY_PARTS, weight=0.7)
    embedding = RefinedEmbedding(20, 8, fusion=fusion, scores_IA=raw_IA)
    assert embedding.state is not None
    history, rating, length = torch.tensor([[3, 7, 20]]), torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([3])
    encoder_1D = torch.randn(1, embedding.width)
    for is_learned in (False, True):
        if is_learned:
            torch.nn.init.normal_(embedding.state.map_FA)
        state_1A = embedding.state.at_end(embedding.standard_rows(), history, length, rating, None)
        scores_1I = embedding.refined_state(encoder_1D[:, None], state_1A[:, None])[:, 0] @ embedding.item_rows().T
        base_1I = encoder_1D @ embedding.input_rows().T
        standard_IA = torch.tensor(standardise(raw_IA)[0], dtype=torch.float32)
        torch.testing.assert_close(scores_1I, base_1I + state_1A @ standard_IA.T)
        # not bit for bit: a product with more columns may add up in another order
        assert torch.allclose(scores_1I, base_1I, atol=1e-5) != is_learned


def test_the_state_has_the_same_size_in_a_catalogue_of_any_size():
    """(9b) has the weight 2 / (items + width); here the same history has the same state in 20 and in 2,000 items."""
    found = []
    for items in (20, 2000):
        raw_IA = np.tile(random_scores(20, ASPECTS, seed=0), (items // 20, 1))
        embedding = RefinedEmbedding(items, 8, fusion=Fusion("none", state=HISTORY_PARTS), scores_IA=raw_IA)
        assert embedding.state is not None
        torch.nn.init.ones_(embedding.state.map_FA)
        history, rating = torch.tensor([[3, 7, 20]]), torch.full((1, 3), NAN)
        state_1A = embedding.state.at_end(embedding.standard_rows(), history, torch.tensor([3]), rating, None)
        found.append(state_1A @ embedding.standard_rows()[:20].T)
    torch.testing.assert_close(found[0], found[1])
