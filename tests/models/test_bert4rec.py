"""BERT4Rec reads both sides, ignores padding, and predicts at a [MASK] within the same maximum length."""

import math

import pytest
import torch
from toy_data import random_scores

from raygr.models.bert4rec import BERT4Rec, BERT4RecBlock
from raygr.models.cpu_kernels import bidirectional_attention
from raygr.models.embeddings import Fusion, RefinedEmbedding, position_rows

MASK = 13


def small_model(
    *, max_history: int = 6, dropout: float = 0.0, fusion: Fusion | None = None, scores_IA=None
) -> BERT4Rec:
    torch.manual_seed(0)
    embedding = RefinedEmbedding(12, 8, fusion=fusion or Fusion(), scores_IA=scores_IA)
    return BERT4Rec(embedding, blocks=2, heads=2, dropout=dropout, max_history=max_history).eval()


def states(model: BERT4Rec, histories: list[list[int]]) -> torch.Tensor:
    history_BL = torch.tensor(histories)
    return model(model.embedding.item_rows(), history_BL, (history_BL > 0).sum(1))


def test_the_masks_state_depends_on_the_items_of_both_sides():
    model = small_model()
    before = states(model, [[1, 2, MASK, 4, 5]])[:, 2]
    for changed in (0, 1, 3, 4):
        history = [1, 2, MASK, 4, 5]
        history[changed] = 9
        assert not torch.allclose(states(model, [history])[:, 2], before, atol=1e-4)


def test_padding_changes_nothing():
    model = small_model()
    batched = states(model, [[1, MASK, 3, 0, 0], [4, 5, 6, 7, 8]])
    torch.testing.assert_close(batched[:1, :3], states(model, [[1, MASK, 3]]))


def test_a_mask_follows_the_history_and_the_oldest_item_makes_room_for_it():
    model = small_model(max_history=4)
    history_BL, length_B = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 0, 0, 0]]), torch.tensor([4, 3, 1])
    asked_BL, asked_length_B = model.with_mask(history_BL, length_B, mask=MASK)
    assert asked_BL.tolist() == [[2, 3, 4, MASK], [5, 6, 7, MASK], [8, MASK, 0, 0]]
    assert asked_length_B.tolist() == [4, 4, 2]
    last_BD = model.encode(model.embedding.item_rows(), history_BL, length_B)
    all_BLD = states(model, asked_BL.tolist())
    assert torch.equal(last_BD, torch.stack([all_BLD[0, 3], all_BLD[1, 3], all_BLD[2, 1]]))


def test_short_histories_grow_by_the_mask():
    asked_BL, length_B = small_model().with_mask(torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1]), mask=MASK)
    assert asked_BL.tolist() == [[1, 2, MASK], [3, MASK, 0]]
    assert length_B.tolist() == [3, 2]


def test_the_last_step_of_a_history_has_the_last_position():
    steps = position_rows(torch.tensor([[1, 2, 3], [1, 0, 0]]), torch.tensor([3, 1]), small_model().max_history)
    assert steps[0].tolist() == [3, 4, 5]
    assert steps[1, 0].item() == 5


@pytest.mark.parametrize("form", ["concat", "add"])
def test_the_mask_has_no_guided_part(form: str):
    """The state of a history of [MASK] alone does not depend on the scores; the state of an item does."""
    models = []
    for seed in (0, 1):
        model = small_model(fusion=Fusion(form), scores_IA=random_scores(12, 2, seed=seed))
        with torch.no_grad():
            if form == "add":
                model.embedding.item_map_FD += torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
        models.append(model)
    first, second = models
    assert torch.equal(states(first, [[MASK, MASK]]), states(second, [[MASK, MASK]]))
    assert not torch.allclose(states(first, [[3, MASK]]), states(second, [[3, MASK]]), atol=1e-5)


def test_attention_equals_the_formula_written_out():
    """softmax(Q K^T / sqrt(d)) V per head over the three real positions, with nn.Linear's own weights."""
    torch.manual_seed(1)
    block, input_BLD = BERT4RecBlock(8, heads=2, dropout=0.0).eval(), torch.randn(1, 4, 8)
    query, key, value = block.queries_keys_values(input_BLD)[0].split(8, dim=1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights_LL = (query[:, part] @ key[:3, part].T / math.sqrt(4)).softmax(dim=1)
        heads.append(weights_LL @ value[:3, part])
    expected = block.merge(torch.cat(heads, dim=1))
    torch.testing.assert_close(block.attention(input_BLD, torch.tensor([3]))[0], expected, rtol=1e-4, atol=1e-5)


def test_attention_in_training_is_torchs_where_dropping_changes_next_to_nothing():
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 2, 7, 4).unbind(0)
    length_B = torch.tensor([7, 3])
    expected = bidirectional_attention(query, key, value, length_B, 0.5, False)
    torch.testing.assert_close(bidirectional_attention(query, key, value, length_B, 1e-7, True), expected)
    dropped = bidirectional_attention(query, key, value, length_B, 0.5, True)
    assert not torch.allclose(dropped, expected)


def test_a_block_norms_after_each_half():
    """Post-norm as published: the block's output is that of a layer norm, mean 0 and deviation 1 at the start."""
    torch.manual_seed(0)
    output_BLD = BERT4RecBlock(8, heads=2, dropout=0.0).eval()(5 + 3 * torch.randn(1, 4, 8), torch.tensor([4]))
    torch.testing.assert_close(output_BLD.mean(2), torch.zeros(1, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output_BLD.std(2, correction=0), torch.ones(1, 4), atol=1e-3, rtol=0)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model = small_model(dropout=0.5)
    assert torch.equal(states(model, [[1, 2]]), states(model, [[1, 2]]))
    model.train()
    assert not torch.equal(states(model, [[1, 2]]), states(model, [[1, 2]]))
