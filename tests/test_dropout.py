"""Our CPU dropout against what torch's does: the kept share, the scale, and attention with nothing dropped."""

import torch
from torch import nn

from raygr.recommenders.dropout import causal_attention, dropout


def test_kept_values_are_scaled_so_that_the_mean_stays():
    torch.manual_seed(0)
    dropped = dropout(torch.ones(200_000), 0.4, training=True)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert abs(dropped.mean().item() - 1) < 0.01  # five standard errors of the kept share


def test_gradients_pass_where_values_did():
    values = torch.randn(1000, requires_grad=True)
    dropped = dropout(values, 0.3, training=True)
    dropped.sum().backward()
    torch.testing.assert_close(values.grad, (dropped != 0) / 0.7)


def test_nothing_is_dropped_outside_training():
    values = torch.randn(50)
    assert torch.equal(dropout(values, 0.9, training=False), values)


def test_attention_is_torchs_where_dropping_changes_next_to_nothing():
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 2, 2, 7, 4).unbind(0)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    # at this rate none of the 196 weights falls, so what remains is the arithmetic
    torch.testing.assert_close(causal_attention(query, key, value, 1e-7, True), expected)
    torch.testing.assert_close(causal_attention(query, key, value, 0.5, False), expected)


def test_dropped_attention_has_the_mean_of_the_undropped():
    torch.manual_seed(2)
    query, key, value = torch.randn(3, 1, 1, 5, 4).unbind(0)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    many = [part.expand(20_000, -1, -1, -1) for part in (query, key, value)]
    mean = causal_attention(*many, 0.4, True).mean(0, keepdim=True)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0)
