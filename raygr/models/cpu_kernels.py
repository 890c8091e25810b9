"""Dropout, and causal and bidirectional attention with dropout, for training on a CPU.

torch draws each bit of a CPU dropout mask serially, which takes a large part of an epoch; comparing vectorised
uniform numbers takes a third of that. Both are one step of autograd each, which keeps what its gradient needs: a mask
that is a factor already, and of attention the weights before and after their dropping.
On other devices, and outside training, these are torch's own functions.

Shape suffixes: `B` histories in batch, `H` heads, `N` both of them, `L` history length, `K` width of a head.
"""

import math

import torch
from torch import Tensor, nn


def dropout(values: Tensor, rate: float, *, training: bool) -> Tensor:
    """`nn.functional.dropout`, from another stream of random numbers."""
    if values.device.type != "cpu" or not training or rate == 0:
        return nn.functional.dropout(values, rate, training)
    return Dropout.apply(values, rate)


def kept_factors(shape: torch.Size, rate: float) -> Tensor:
    """0 where dropped, 1 / (1 - rate) elsewhere."""
    return (torch.rand(shape) >= rate).float().mul_(1 / (1 - rate))


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, rate: float) -> Tensor:
        factors = kept_factors(values.shape, rate)
        ctx.save_for_backward(factors)
        return values * factors

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.saved_tensors[0], None


def causal_attention(query_BHLK: Tensor, key_BHLK: Tensor, value_BHLK: Tensor, rate: float, training: bool) -> Tensor:
    """Attention to the own and all earlier positions, its weights dropped at `rate`: (B, H, L, K)."""
    if query_BHLK.device.type != "cpu" or not training or rate == 0:
        attend = nn.functional.scaled_dot_product_attention
        return attend(query_BHLK, key_BHLK, value_BHLK, dropout_p=rate if training else 0.0, is_causal=True)
    length = query_BHLK.shape[2]
    later_1LL = torch.full((1, length, length), -math.inf).triu(1)
    return DroppedAttention.apply(query_BHLK, key_BHLK, value_BHLK, later_1LL, rate)


def bidirectional_attention(
    query_BHLK: Tensor, key_BHLK: Tensor, value_BHLK: Tensor, length_B: Tensor, rate: float, training: bool
) -> Tensor:
    """Attention to all of the first `length_B` positions, its weights dropped at `rate`: (B, H, L, K)."""
    step_L = torch.arange(query_BHLK.shape[2], device=length_B.device)
    is_key_B11L = step_L < length_B[:, None, None, None]
    if query_BHLK.device.type != "cpu" or not training or rate == 0:
        attend = nn.functional.scaled_dot_product_attention
        return attend(query_BHLK, key_BHLK, value_BHLK, attn_mask=is_key_B11L, dropout_p=rate if training else 0.0)
    outside_B1L = torch.zeros(is_key_B11L.shape).masked_fill_(~is_key_B11L, -math.inf)[:, 0]
    outside_N1L = outside_B1L.repeat_interleave(query_BHLK.shape[1], dim=0)
    return DroppedAttention.apply(query_BHLK, key_BHLK, value_BHLK, outside_N1L, rate)


class DroppedAttention(torch.autograd.Function):
    """Dropped softmax(query key^T / sqrt(K) + bias), times value: (B, H, L, K). No bias row may be all -inf."""

    @staticmethod
    def forward(ctx, query_BHLK: Tensor, key_BHLK: Tensor, value_BHLK: Tensor, bias: Tensor, rate: float) -> Tensor:
        query_NLK, key_NLK, value_NLK = (part.flatten(0, 1) for part in (query_BHLK, key_BHLK, value_BHLK))
        scale = 1 / math.sqrt(query_NLK.shape[2])
        weight_NLL = torch.baddbmm(bias, query_NLK, key_NLK.transpose(1, 2), alpha=scale).softmax(2)
        dropped_NLL = weight_NLL * kept_factors(weight_NLL.shape, rate)
        mixed_NLK = torch.bmm(dropped_NLL, value_NLK)
        ctx.save_for_backward(query_NLK, key_NLK, value_NLK, weight_NLL, dropped_NLL, mixed_NLK)
        return mixed_NLK.view(query_BHLK.shape)

    @staticmethod
    def backward(ctx, upstream_BHLK: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_NLK, key_NLK, value_NLK, weight_NLL, dropped_NLL, mixed_NLK = ctx.saved_tensors
        shape, upstream_NLK = upstream_BHLK.shape, upstream_BHLK.flatten(0, 1)
        # softmax: weight * (g - sum(weight * g)) with g the gradient of a weight. Here g is its factor times upstream @
        # value, so weight * g is dropped * (upstream @ value), and its sum is upstream @ mixed (as in FlashAttention).
        sum_NL1 = (upstream_NLK * mixed_NLK).sum(2, keepdim=True)
        grad_NLL = torch.bmm(upstream_NLK, value_NLK.transpose(1, 2)).mul_(dropped_NLL)
        grad_NLL.addcmul_(weight_NLL, sum_NL1, value=-1)
        scale = 1 / math.sqrt(query_NLK.shape[2])
        query_grad_NLK = torch.bmm(grad_NLL, key_NLK).mul_(scale)
        key_grad_NLK = torch.bmm(grad_NLL.transpose(1, 2), query_NLK).mul_(scale)
        value_grad_NLK = torch.bmm(dropped_NLL.transpose(1, 2), upstream_NLK)
        return query_grad_NLK.view(shape), key_grad_NLK.view(shape), value_grad_NLK.view(shape), None, None
