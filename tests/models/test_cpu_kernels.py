"""Our CPU dropout against what torch's does: the kept share, the scale, and attention with nothing dropped."""

import math

import pytest
import torch
from torch import Tensor, nn

from raygr.models.cpu_kernels import bidirectional_attention, causal_attention, dropout, kept_factors


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


def composed(query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor, factors: Tensor) -> Tensor:
    """Attention composed of torch's own operations."""
    logits = (query @ key.transpose(2, 3)) / math.sqrt(query.shape[3])
    return (logits.masked_fill(~is_seen, -math.inf).softmax(3) * factors) @ value


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_gradients_of_dropped_attention_are_those_of_its_parts(kind: str):
    torch.manual_seed(3)
    parts = torch.randn(3, 2, 3, 5, 4, dtype=torch.float32).requires_grad_()
    upstream, length_B = torch.randn(2, 3, 5, 4), torch.tensor([5, 2])
    torch.manual_seed(4)
    factors = kept_factors(torch.Size([6, 5, 5]), 0.4).view(2, 3, 5, 5)
    assert 0 < (factors == 0).sum() < factors.numel()
    torch.manual_seed(4)
    if kind == "causal":
        is_seen = torch.ones(5, 5).tril().bool()
        ours = causal_attention(*parts, 0.4, True)
    else:
        is_seen = (torch.arange(5) < length_B[:, None])[:, None, None]
        ours = bidirectional_attention(*parts, length_B, 0.4, True)
    theirs = composed(*parts, is_seen, factors)
    torch.testing.assert_close(ours, theirs)
    our_grad, their_grad = (torch.autograd.grad(mixed, parts, upstream)[0] for mixed in (ours, theirs))
    torch.testing.assert_close(our_grad, their_grad)
