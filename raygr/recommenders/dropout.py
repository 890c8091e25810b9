"""Dropout, and causal and bidirectional attention with dropout, for training on a CPU.

torch draws each bit of a CPU dropout mask serially, which takes a large part of an epoch; comparing vectorised
uniform numbers takes a third of that.
On other devices, and outside training, these are torch's own functions.

Shape suffixes: `B` histories in batch, `H` heads, `L` history length, `K` width of a head.
"""

import math

import torch
from torch import Tensor, nn


def dropout(values: Tensor, rate: float, *, training: bool) -> Tensor:
    """`nn.functional.dropout`, from another stream of random numbers."""
    if values.device.type != "cpu" or not training or rate == 0:
        return nn.functional.dropout(values, rate, training)
    return values * (torch.rand_like(values) >= rate) * (1 / (1 - rate))


def causal_attention(query_BHLK: Tensor, key_BHLK: Tensor, value_BHLK: Tensor, rate: float, training: bool) -> Tensor:
    """Attention to the own and all earlier positions, its weights dropped at `rate`: (B, H, L, K)."""
    if query_BHLK.device.type != "cpu" or not training or rate == 0:
        attend = nn.functional.scaled_dot_product_attention
        return attend(query_BHLK, key_BHLK, value_BHLK, dropout_p=rate if training else 0.0, is_causal=True)
    length, width = query_BHLK.shape[2:]
    later_LL = torch.full((length, length), -math.inf).triu(1)
    logits_BHLL = (query_BHLK * (1 / math.sqrt(width))) @ key_BHLK.transpose(2, 3) + later_LL
    return dropout(logits_BHLL.softmax(3), rate, training=training) @ value_BHLK


def bidirectional_attention(
    query_BHLK: Tensor, key_BHLK: Tensor, value_BHLK: Tensor, length_B: Tensor, rate: float, training: bool
) -> Tensor:
    """Attention to all of the first `length_B` positions, its weights dropped at `rate`: (B, H, L, K)."""
    step_L = torch.arange(query_BHLK.shape[2], device=length_B.device)
    is_key_B11L = step_L < length_B[:, None, None, None]
    if query_BHLK.device.type != "cpu" or not training or rate == 0:
        attend = nn.functional.scaled_dot_product_attention
        return attend(query_BHLK, key_BHLK, value_BHLK, attn_mask=is_key_B11L, dropout_p=rate if training else 0.0)
    scaled_BHLK = query_BHLK * (1 / math.sqrt(query_BHLK.shape[3]))
    logits_BHLL = (scaled_BHLK @ key_BHLK.transpose(2, 3)).masked_fill(~is_key_B11L, -math.inf)
    return dropout(logits_BHLL.softmax(3), rate, training=training) @ value_BHLK
