"""SASRec (Kang and McAuley 2018): causal self-attention over a history, one state per position.

The published block has its layer norm before both halves. Here the norm applies to queries, keys and values alike:
the original code normalises the queries only, which modern ports correct. Left out: the L2 penalty on embeddings.
Shape letters: `B` histories, `L` history length, `D` width, `H` heads, `I` items.
"""

import math

import torch
from torch import Tensor, nn

from raygr.models.cpu_kernels import causal_attention, dropout
from raygr.models.embeddings import RefinedEmbedding, position_rows


class SASRecBlock(nn.Module):
    """Attention, then a position-wise network of the same width, each with a residual connection."""

    def __init__(self, width: int, *, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, input_BLD: Tensor) -> Tensor:
        middle_BLD = input_BLD + self.drop(self.attention(self.attention_norm(input_BLD)))
        inner_BLD = self.drop(torch.relu(self.inner(self.network_norm(middle_BLD))))
        return middle_BLD + self.drop(self.outer(inner_BLD))

    def attention(self, normed_BLD: Tensor) -> Tensor:
        # (B, L, 3D) -> three of (B, H, L, D/H)
        parts = self.queries_keys_values(normed_BLD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed_BHLD = causal_attention(query, key, value, self.dropout, self.training)
        return self.merge(mixed_BHLD.transpose(1, 2).flatten(2))

    def drop(self, values: Tensor) -> Tensor:
        return dropout(values, self.dropout, training=self.training)


class SASRec(nn.Module):
    """Maps a history to a state. Input and output share the embedding."""

    def __init__(self, embedding: RefinedEmbedding, *, blocks: int, heads: int, dropout: float, max_history: int):
        super().__init__()
        width = embedding.width
        self.embedding, self.dropout, self.max_history = embedding, dropout, max_history
        self.position_LD = nn.Parameter(torch.randn(max_history, width) * embedding.std)
        self.blocks = nn.ModuleList(SASRecBlock(width, heads=heads, dropout=dropout) for _ in range(blocks))
        self.final_norm = nn.LayerNorm(width)

    def forward(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after each interaction, (B, L, D); states of padded positions are meaningless."""
        items_BLD = nn.functional.embedding(history_BL, self.embedding.input_table(rows_ID)) * math.sqrt(
            self.embedding.width
        )
        places_BL = position_rows(history_BL, length_B, self.max_history)
        state_BLD = items_BLD + nn.functional.embedding(places_BL, self.position_LD)
        state_BLD = dropout(state_BLD, self.dropout, training=self.training)
        for block in self.blocks:
            state_BLD = block(state_BLD)
        return self.final_norm(state_BLD)

    def encode(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after the whole history, (B, D)."""
        state_BLD = self(rows_ID, history_BL, length_B)
        return state_BLD[torch.arange(len(length_B), device=length_B.device), length_B - 1]
