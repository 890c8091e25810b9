"""BERT4Rec (Sun et al. 2019): attention in both directions; the state at a [MASK] predicts the hidden item.

As published: learned positions, layer norm after each half of a block (post-norm), GELU, an inner network four times
as wide, and a head (linear, GELU, layer norm) before the tied table. Left out: the head's output bias per item, because
a score is <state, item> here and exported vectors must reproduce it (the bias of the layer norm, times the item, can
express the same); the segment row; and the initial standard deviation of 0.02, which suits widths of 768: torch's
default follows the width and learned the synthetic sequences of the tests faster.
Shape letters: `B` histories, `L` history length, `D` width, `H` heads, `I` items.
"""

import torch
from torch import Tensor, nn

from raygr.models.cpu_kernels import bidirectional_attention, dropout
from raygr.models.embeddings import RefinedEmbedding, position_rows


class BERT4RecBlock(nn.Module):
    """Attention, then a position-wise network, each followed by a residual connection and a layer norm."""

    def __init__(self, width: int, *, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.queries_keys_values, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, input_BLD: Tensor, length_B: Tensor) -> Tensor:
        middle_BLD = self.attention_norm(input_BLD + self.drop(self.attention(input_BLD, length_B)))
        inner_BLD = nn.functional.gelu(self.inner(middle_BLD))
        return self.network_norm(middle_BLD + self.drop(self.outer(inner_BLD)))

    def attention(self, input_BLD: Tensor, length_B: Tensor) -> Tensor:
        # (B, L, 3D) -> three of (B, H, L, D/H)
        parts = self.queries_keys_values(input_BLD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed_BHLD = bidirectional_attention(query, key, value, length_B, self.dropout, self.training)
        return self.merge(mixed_BHLD.transpose(1, 2).flatten(2))

    def drop(self, values: Tensor) -> Tensor:
        return dropout(values, self.dropout, training=self.training)


class BERT4Rec(nn.Module):
    """Maps a history with [MASK]s (item_index I + 1) to states. Input and output share the embedding."""

    def __init__(self, embedding: RefinedEmbedding, *, blocks: int, heads: int, dropout: float, max_history: int):
        super().__init__()
        width = embedding.width
        self.embedding, self.dropout, self.max_history = embedding, dropout, max_history
        self.mask_D = nn.Parameter(torch.randn(embedding.base_width) * embedding.std)
        self.position_LD = nn.Parameter(torch.randn(max_history, width) * embedding.std)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(BERT4RecBlock(width, heads=heads, dropout=dropout) for _ in range(blocks))
        self.head, self.head_norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The head's state at each of at most `max_history` positions, (B, L, D); those of padding are meaningless."""
        # [MASK] has learned dimensions only: like the padding, it has no guided part
        mask_1D = nn.functional.pad(self.mask_D, (0, self.embedding.width - len(self.mask_D)))[None]
        table = torch.cat([self.embedding.input_table(rows_ID), mask_1D])
        places_BL = position_rows(history_BL, length_B, self.max_history)
        state_BLD = nn.functional.embedding(history_BL, table) + nn.functional.embedding(places_BL, self.position_LD)
        state_BLD = dropout(self.input_norm(state_BLD), self.dropout, training=self.training)
        for block in self.blocks:
            state_BLD = block(state_BLD, length_B)
        return self.head_norm(nn.functional.gelu(self.head(state_BLD)))

    def encode(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The head's state at a [MASK] after the history, (B, D); it displaces the oldest of `max_history` items."""
        asked_BL, asked_length_B = self.with_mask(history_BL, length_B, mask=len(rows_ID) + 1)
        state_BLD = self(rows_ID, asked_BL, asked_length_B)
        return state_BLD[torch.arange(len(length_B), device=length_B.device), asked_length_B - 1]

    def with_mask(self, history_BL: Tensor, length_B: Tensor, *, mask: int) -> tuple[Tensor, Tensor]:
        """Appends a [MASK] to each history, within `max_history` steps; returns the histories and their lengths."""
        dropped_B = (length_B + 1 - self.max_history).clamp(min=0)
        length_B = length_B + 1 - dropped_B
        step_L = torch.arange(int(length_B.max()), device=history_BL.device)
        at_BL = (step_L + dropped_B[:, None]).clamp(max=history_BL.shape[1] - 1)
        item_BL = torch.where(step_L == length_B[:, None] - 1, mask, history_BL.gather(1, at_BL))
        return torch.where(step_L < length_B[:, None], item_BL, 0), length_B
