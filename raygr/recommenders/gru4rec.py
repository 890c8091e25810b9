"""GRU4Rec (Hidasi et al. 2016) and GRU4Rec+ (Hidasi and Karatzoglou 2018): a GRU over a history.

Both are this network; what sets GRU4Rec+ apart, BPR-max with additional negatives, is in losses.py. Item tables are
tied, as in the constrained embedding of the second paper, their rows scaled by the root of the width on the way in, as
in SASRec. A history is one session: trained on all of its positions at once, with the gradient through its whole
length. Left out: session-parallel batches that carry the state over from one batch to the next (histories lie side by
side in a batch instead), several layers, momentum.
Shape suffixes: `B` histories in batch, `L` history length, `D` width, `H` hidden width, `I` items.
"""

import math

import torch
from torch import Tensor, nn

from raygr.embeddings import RefinedEmbedding, padded
from raygr.recommenders.dropout import dropout


class GRU4Rec(nn.Module):
    """History -> state; the embedding is shared by input and output."""

    def __init__(self, embedding: RefinedEmbedding, *, hidden_width: int | None, dropout: float, input_dropout: float):
        super().__init__()
        width, hidden = embedding.width, hidden_width or embedding.width
        self.embedding, self.dropout, self.input_dropout = embedding, dropout, input_dropout
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.to_width = nn.Linear(hidden, width) if hidden != width else nn.Identity()

    def forward(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after each interaction, (B, L, D); padded positions hold noise."""
        items_BLD = nn.functional.embedding(history_BL, padded(rows_ID)) * math.sqrt(self.embedding.width)
        hidden_BLH, _ = self.gru(dropout(items_BLD, self.input_dropout, training=self.training))
        return self.to_width(dropout(hidden_BLH, self.dropout, training=self.training))

    def last_state(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after the whole history, (B, D)."""
        state_BLD = self(rows_ID, history_BL, length_B)
        return state_BLD[torch.arange(len(length_B), device=length_B.device), length_B - 1]
