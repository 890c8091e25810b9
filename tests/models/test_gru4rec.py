"""GRU4Rec is causal, ignores padding, and equals a GRU written out by hand."""

import math

import torch

from raygr.models.embeddings import Fusion, RefinedEmbedding
from raygr.models.gru4rec import GRU4Rec


def small_model(*, hidden_width: int | None = None, dropout: float = 0.0, input_dropout: float = 0.0) -> GRU4Rec:
    torch.manual_seed(0)
    embedding = RefinedEmbedding(12, 8, fusion=Fusion())
    return GRU4Rec(embedding, hidden_width=hidden_width, dropout=dropout, input_dropout=input_dropout).eval()


def states(model: GRU4Rec, histories: list[list[int]]) -> torch.Tensor:
    history_BL = torch.tensor(histories)
    return model(model.embedding.item_rows(), history_BL, (history_BL > 0).sum(1))


def test_a_state_depends_on_every_earlier_item_and_on_no_later_one():
    model = small_model()
    for changed in range(4):
        history = [1, 2, 3, 4]
        history[changed] = 9
        differs_L = (states(model, [history]) != states(model, [[1, 2, 3, 4]])).any(2)[0]
        assert differs_L.tolist() == [step >= changed for step in range(4)]


def test_padding_changes_nothing_and_the_last_state_is_the_newest_interactions():
    model = small_model()
    batched = states(model, [[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    torch.testing.assert_close(batched[:1, :3], states(model, [[1, 2, 3]]))
    history_BL = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    last_BD = model.encode(model.embedding.item_rows(), history_BL, torch.tensor([3, 5]))
    assert torch.equal(last_BD, torch.stack([batched[0, 2], batched[1, 4]]))


def test_the_state_is_that_of_the_formula_written_out():
    """r, z = sigmoid(W x + U h); n = tanh(W x + r * (U h)); h = (1 - z) n + z h, from h = 0."""
    model = small_model()
    weights = dict(model.gru.named_parameters())
    state = torch.zeros(8)
    for item in (3, 5):
        row = model.embedding.base_ID[item - 1] * math.sqrt(8)
        inputs = (weights["weight_ih_l0"] @ row + weights["bias_ih_l0"]).split(8)
        before = (weights["weight_hh_l0"] @ state + weights["bias_hh_l0"]).split(8)
        reset, update = (inputs[0] + before[0]).sigmoid(), (inputs[1] + before[1]).sigmoid()
        state = (1 - update) * (inputs[2] + reset * before[2]).tanh() + update * state
    torch.testing.assert_close(states(model, [[3, 5]])[0, 1], state, rtol=1e-4, atol=1e-6)


def test_another_hidden_width_is_projected_to_the_item_tables():
    model = small_model(hidden_width=5)
    assert states(model, [[1, 2, 3]]).shape == (1, 3, 8)
    assert model.gru.hidden_size == 5
    assert not list(small_model(hidden_width=8).to_width.parameters())


def test_both_dropouts_are_off_in_evaluation_and_on_in_training():
    for rates in ({"dropout": 0.5}, {"input_dropout": 0.5}):
        model = small_model(**rates)
        assert torch.equal(states(model, [[1, 2]]), states(model, [[1, 2]]))
        model.train()
        assert not torch.equal(states(model, [[1, 2]]), states(model, [[1, 2]]))


def test_sessions_side_by_side_have_the_states_of_each_alone():
    """Two lanes, step by step: 1 2 3 then 9, and 4 5 then 6 7; a lane's next session begins anew."""
    model = small_model(hidden_width=5)
    rows_ID = model.embedding.item_rows()
    steps = [([1, 4], [False, False]), ([2, 5], [True, True]), ([3, 6], [True, False]), ([9, 7], [False, True])]
    found, hidden_BD = [], None
    for items, goes_on in steps:
        state_BLD, hidden_BD = model.next_states(
            rows_ID, torch.tensor(items)[:, None], torch.tensor(goes_on), hidden_BD
        )
        found.append(state_BLD[:, 0])
    first, second = torch.stack([step[0] for step in found]), torch.stack([step[1] for step in found])
    alone = [states(model, [history])[0] for history in ([1, 2, 3], [9], [4, 5], [6, 7])]
    torch.testing.assert_close(first, torch.cat(alone[:2]))
    torch.testing.assert_close(second, torch.cat(alone[2:]))


def test_no_gradient_reaches_back_into_the_step_before():
    model = small_model()
    rows_ID = model.embedding.item_rows()
    _, hidden_BD = model.next_states(rows_ID, torch.tensor([[1]]), torch.tensor([False]), None)
    model.next_states(rows_ID, torch.tensor([[2]]), torch.tensor([True]), hidden_BD)[0].sum().backward()
    assert (model.embedding.base_ID.grad.abs().sum(1) > 0).nonzero()[:, 0].tolist() == [1]
