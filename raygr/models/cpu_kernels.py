"""Autograd functions of our own, and what each gains over torch's operations on a CPU.

The gains are those of `python benchmarks/cpu_kernels.py` (one thread, width 64, forward and backward, two cores without
other work, 2026-11-27); docs/results/speed.md has whole epochs. `dropout` and the two attentions take torch's own
functions on other devices and outside training. The two tiled sums keep no scores, so they also bound the memory on a
GPU.
Shape letters: `B` histories, `H` heads, `L` history length, `D` width: in the attention that of a head, `I` items,
`N` interactions that a loss predicts. `X` is histories times heads.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

POSITIONS_AT_ONCE = 512  # 512 x 3,000 items x 4 bytes = 6 MB of scores
LOGITS_AT_ONCE = 3 << 16  # x 4 bytes = 0.8 MB: the logits and their softmax stay in a core's cache
LEAST_POSITIONS = 64  # smaller tiles would read and write the gradient of the rows too often
GPU_SCORES_AT_ONCE = 1 << 26  # x 4 bytes = 0.3 GB, and about ten such tensors at a time: few kernels, each a large one


def dropout(values: Tensor, rate: float, *, training: bool) -> Tensor:
    """Does what `nn.functional.dropout` does, with other random numbers.

    torch draws each bit of a CPU mask serially; this compares vectorised uniform numbers: 1.5 times as fast at
    128 x 50 x 64, and a quarter off the epochs of all three models (commit be41cfc).
    """
    if values.device.type != "cpu" or not training or rate == 0:
        return nn.functional.dropout(values, rate, training)
    return Dropout.apply(values, rate)


def kept_factors(shape: torch.Size, rate: float) -> Tensor:
    """Draws 0 where a value is dropped, 1 / (1 - rate) elsewhere."""
    return (torch.rand(shape) >= rate).float().mul_(1 / (1 - rate))


class Dropout(torch.autograd.Function):
    """Multiplies by 0 or 1 / (1 - rate), and keeps these factors for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rate: float) -> Tensor:
        factors = kept_factors(values.shape, rate)
        ctx.save_for_backward(factors)
        return values * factors

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.saved_tensors[0], None


def causal_attention(query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, rate: float, training: bool) -> Tensor:
    """Attends to the same and all earlier positions, with dropout of the weights: (B, H, L, D).

    1.5 times as fast as torch's `scaled_dot_product_attention` with dropout, at 32 histories of 50 and 2 heads of 32.
    """
    if query_BHLD.device.type != "cpu" or not training or rate == 0:
        attend = nn.functional.scaled_dot_product_attention
        return attend(query_BHLD, key_BHLD, value_BHLD, dropout_p=rate if training else 0.0, is_causal=True)
    length = query_BHLD.shape[2]
    later_1LL = torch.full((1, length, length), -math.inf).triu(1)
    return DroppedAttention.apply(query_BHLD, key_BHLD, value_BHLD, later_1LL, rate)


def bidirectional_attention(
    query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, length_B: Tensor, rate: float, training: bool
) -> Tensor:
    """Attends to the first `length_B` positions, with dropout of the weights: (B, H, L, D); gains as above."""
    step_L = torch.arange(query_BHLD.shape[2], device=length_B.device)
    is_key_B11L = step_L < length_B[:, None, None, None]
    if query_BHLD.device.type != "cpu" or not training or rate == 0:
        attend = nn.functional.scaled_dot_product_attention
        return attend(query_BHLD, key_BHLD, value_BHLD, attn_mask=is_key_B11L, dropout_p=rate if training else 0.0)
    outside_B1L = torch.zeros(is_key_B11L.shape).masked_fill_(~is_key_B11L, -math.inf)[:, 0]
    outside_X1L = outside_B1L.repeat_interleave(query_BHLD.shape[1], dim=0)
    return DroppedAttention.apply(query_BHLD, key_BHLD, value_BHLD, outside_X1L, rate)


class DroppedAttention(torch.autograd.Function):
    """dropout(softmax(query key^T / sqrt(D) + bias)) value, (B, H, L, D). No row of the bias may be all -inf.

    It keeps the weights before and after their dropout for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, bias: Tensor, rate: float
    ) -> Tensor:
        query_XLD, key_XLD, value_XLD = (part.flatten(0, 1) for part in (query_BHLD, key_BHLD, value_BHLD))
        scale = 1 / math.sqrt(query_XLD.shape[2])
        weight_XLL = torch.baddbmm(bias, query_XLD, key_XLD.transpose(1, 2), alpha=scale).softmax(2)
        dropped_XLL = weight_XLL * kept_factors(weight_XLL.shape, rate)
        mixed_XLD = torch.bmm(dropped_XLL, value_XLD)
        ctx.save_for_backward(query_XLD, key_XLD, value_XLD, weight_XLL, dropped_XLL, mixed_XLD)
        return mixed_XLD.view(query_BHLD.shape)

    @staticmethod
    def backward(ctx: Any, upstream_BHLD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query_XLD, key_XLD, value_XLD, weight_XLL, dropped_XLL, mixed_XLD = ctx.saved_tensors
        shape, upstream_XLD = upstream_BHLD.shape, upstream_BHLD.flatten(0, 1)
        # gradient of a softmax: weight * (g - sum(weight * g)), with g the gradient of a weight. Here g is the dropout
        # factor times upstream @ value, so weight * g = dropped * (upstream @ value), and its sum is upstream @ mixed
        # (as in FlashAttention).
        sum_XL1 = (upstream_XLD * mixed_XLD).sum(2, keepdim=True)
        grad_XLL = torch.bmm(upstream_XLD, value_XLD.transpose(1, 2)).mul_(dropped_XLL)
        grad_XLL.addcmul_(weight_XLL, sum_XL1, value=-1)
        scale = 1 / math.sqrt(query_XLD.shape[2])
        query_grad_XLD = torch.bmm(grad_XLL, key_XLD).mul_(scale)
        key_grad_XLD = torch.bmm(grad_XLL.transpose(1, 2), query_XLD).mul_(scale)
        value_grad_XLD = torch.bmm(dropped_XLL.transpose(1, 2), upstream_XLD)
        return query_grad_XLD.view(shape), key_grad_XLD.view(shape), value_grad_XLD.view(shape), None, None


class TiledCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(state @ rows.T)[target]; makes both gradients tile by tile and keeps no logits.

    1.7 times as fast as torch's product and `cross_entropy` at 1,536 positions and 3,000 items, 2.5 times at 30,000.
    """

    @staticmethod
    def forward(ctx: Any, state_ND: Tensor, rows_ID: Tensor, target_N: Tensor) -> Tensor:
        # `target_N` counts from 0 here
        state_grad_ND, rows_grad_ID = torch.empty_like(state_ND), torch.zeros_like(rows_ID)
        total = state_ND.new_zeros(())
        if state_ND.device.type == "cpu":
            tile = max(LEAST_POSITIONS, LOGITS_AT_ONCE // len(rows_ID))
        else:
            tile = positions_at_once(state_ND, len(rows_ID))
        for first in range(0, len(state_ND), tile):
            part = slice(first, first + tile)
            state, target_N1 = state_ND[part], target_N[part, None]
            logits_NI = state @ rows_ID.T
            share_NI = logits_NI.softmax(1)
            # the log of the sum of exponentials: the greatest share, exp(greatest logit) / sum, is never 0
            total += (logits_NI.amax(1) - share_NI.amax(1).log()).sum() - logits_NI.gather(1, target_N1).sum()
            share_NI.scatter_add_(1, target_N1, torch.full_like(target_N1, -1.0, dtype=share_NI.dtype))
            torch.mm(share_NI, rows_ID, out=state_grad_ND[part])  # share - 1 at the target: the gradient of the logits
            rows_grad_ID.addmm_(share_NI.T, state)
        ctx.save_for_backward(state_grad_ND, rows_grad_ID)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        state_grad_ND, rows_grad_ID = ctx.saved_tensors
        return state_grad_ND * upstream, rows_grad_ID * upstream, None


def positions_at_once(state: Tensor, scores: int) -> int:
    """The number of positions in a tile, where each position has `scores` scores."""
    if state.device.type == "cpu":
        return POSITIONS_AT_ONCE
    return max(LEAST_POSITIONS, GPU_SCORES_AT_ONCE // scores)


class InTiles(torch.autograd.Function):
    """Sum of a loss over tiles of the first dimension; makes all gradients tile by tile and keeps no scores.

    The first `cuts` tensors are cut into tiles, the others take part whole: `loss_of(part, *tensors)` is the loss of
    one tile. A batch's scores never exist at once. The gain is memory alone: at 1,536 positions and 512 negatives it is
    0.9 times as fast as torch.
    """

    @staticmethod
    def forward(ctx: Any, loss_of: Callable[..., Tensor], tile: int, cuts: int, *tensors: Tensor) -> Tensor:
        grads = [torch.zeros_like(tensor) for tensor in tensors]
        total = tensors[0].new_zeros(())
        for first in range(0, len(tensors[0]), tile):
            part = slice(first, first + tile)
            in_tile = [tensor[part] if place < cuts else tensor for place, tensor in enumerate(tensors)]
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in in_tile]
                loss = loss_of(part, *leaves)
            total += loss.detach()
            for place, grad in enumerate(torch.autograd.grad(loss, leaves)):
                if place < cuts:
                    grads[place][part] = grad
                else:
                    grads[place] += grad
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(grad * upstream for grad in ctx.saved_tensors)
