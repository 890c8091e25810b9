"""SASRec is causal, ignores padding, and equals an attention written out by hand."""

import math

import pytest
import torch

from raygr.models.embeddings import Fusion, RefinedEmbedding, position_rows
from raygr.models.sasrec import SASRec, SASRecBlock


def small_model(*, dropout: float = 0.0) -> SASRec:
    torch.manual_seed(0)
    embedding = RefinedEmbedding(12, 8, fusion=Fusion())
    return SASRec(embedding, blocks=2, heads=2, dropout=dropout, max_history=6).eval()


def states(model: SASRec, histories: list[list[int]]) -> torch.Tensor:
    history_BL = torch.tensor(histories)
    return model(model.embedding.item_rows(), history_BL, (history_BL > 0).sum(1))


def test_a_state_does_not_change_with_later_items():
    model = small_model()
    before, after = states(model, [[1, 2, 3, 4]]), states(model, [[1, 2, 3, 9]])
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_a_state_depends_on_every_earlier_item():
    model = small_model()
    for changed in range(4):
        history = [1, 2, 3, 4]
        history[changed] = 9
        assert not torch.allclose(states(model, [history])[:, 3], states(model, [[1, 2, 3, 4]])[:, 3], atol=1e-4)


def test_padding_changes_nothing():
    model = small_model()
    alone = states(model, [[1, 2, 3]])
    batched = states(model, [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    torch.testing.assert_close(batched[:1, :3], alone)


def test_last_state_is_that_of_the_newest_interaction():
    model = small_model()
    history_BL, length_B = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([3, 4])
    last_BD = model.encode(model.embedding.item_rows(), history_BL, length_B)
    all_BLD = states(model, history_BL.tolist())
    assert torch.equal(last_BD, torch.stack([all_BLD[0, 2], all_BLD[1, 3]]))


def test_the_newest_interaction_has_the_last_position():
    model = small_model()
    steps = position_rows(torch.tensor([[1, 2, 3], [1, 0, 0]]), torch.tensor([3, 1]), model.max_history)
    assert steps[0].tolist() == [3, 4, 5]
    assert steps[1, 0].item() == 5


def test_attention_equals_the_formula_written_out():
    """softmax(Q K^T / sqrt(d) + causal mask) V per head, with nn.Linear's own weights."""
    torch.manual_seed(1)
    block, input_BLD = SASRecBlock(8, heads=2, dropout=0.0).eval(), torch.randn(1, 4, 8)
    query, key, value = block.queries_keys_values(input_BLD)[0].split(8, dim=1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores_LL = query[:, part] @ key[:, part].T / math.sqrt(4)
        scores_LL[torch.ones(4, 4).triu(1).bool()] = -math.inf
        heads.append(scores_LL.softmax(dim=1) @ value[:, part])
    expected = block.merge(torch.cat(heads, dim=1))
    torch.testing.assert_close(block.attention(input_BLD)[0], expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model = small_model(dropout=0.5)
    assert torch.equal(states(model, [[1, 2]]), states(model, [[1, 2]]))
    model.train()
    assert not torch.equal(states(model, [[1, 2]]), states(model, [[1, 2]]))


def test_longest_history_is_accepted_and_a_longer_one_refused():
    model = small_model()
    assert states(model, [[1, 2, 3, 4, 5, 6]]).shape == (1, 6, 8)
    with pytest.raises(IndexError):
        states(model, [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1]])
