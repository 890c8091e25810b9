"""GRU4Rec (Hidasi et al. 2016) and GRU4Rec+ (Hidasi and Karatzoglou 2018): a GRU over a history.

Both are this network; what sets GRU4Rec+ apart, BPR-max with additional negatives, is in losses.py. Item tables are
tied, as in the constrained embedding of the second paper, their rows scaled by the root of the width on the way in, as
in SASRec. A history is one session: trained on all of its positions at once with the gradient through its whole
length, or, with `session_parallel`, step by step beside the sessions of other lanes, the state carried from batch to
batch, as published. Left out: several layers, momentum.
Shape suffixes: `B` histories in batch, `L` history length, `D` width, `H` hidden width, `I` items.
"""

import math

import torch
from torch import Tensor, nn

from raygr.models.cpu_kernels import dropout
from raygr.models.embeddings import RefinedEmbedding, padded


class GRU4Rec(nn.Module):
    """History -> state; the embedding is shared by input and output."""

    def __init__(self, embedding: RefinedEmbedding, *, hidden_width: int | None, dropout: float, input_dropout: float):
        super().__init__()
        width, hidden = embedding.width, hidden_width or embedding.width
        self.embedding, self.dropout, self.input_dropout = embedding, dropout, input_dropout
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.carried_BH: Tensor | None = None  # of sessions side by side; no part of a checkpoint: an epoch begins anew
        self.to_width = nn.Linear(hidden, width) if hidden != width else nn.Identity()

    def forward(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after each interaction, (B, L, D); padded positions hold noise."""
        return self.states_after(self.scaled_items(rows_ID, history_BL), None)[0]

    def next_states(self, rows_ID: Tensor, item_BL: Tensor, goes_on_B: Tensor) -> Tensor:
        """As `forward` for the next steps of sessions side by side, (B, L, D), after those of the last call.

        A row that does not go on begins anew. No gradient reaches back into the last call.
        """
        if self.carried_BH is None or len(self.carried_BH) != len(item_BL):
            self.carried_BH = torch.zeros(len(item_BL), self.gru.hidden_size, device=rows_ID.device)
        before_BH = torch.where(goes_on_B[:, None], self.carried_BH, 0.0)
        state_BLD, after_BH = self.states_after(self.scaled_items(rows_ID, item_BL), before_BH)
        self.carried_BH = after_BH.detach()
        return state_BLD

    def scaled_items(self, rows_ID: Tensor, item_BL: Tensor) -> Tensor:
        return nn.functional.embedding(item_BL, padded(rows_ID)) * math.sqrt(self.embedding.width)

    def states_after(self, items_BLD: Tensor, before_BH: Tensor | None) -> tuple[Tensor, Tensor]:
        """States at each of the items, from the hidden state before them, and the hidden state after them."""
        first_1BH = None if before_BH is None else before_BH[None]
        hidden_BLH, last_1BH = self.gru(dropout(items_BLD, self.input_dropout, training=self.training), first_1BH)
        return self.to_width(dropout(hidden_BLH, self.dropout, training=self.training)), last_1BH[0]

    def last_state(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after the whole history, (B, D)."""
        state_BLD = self(rows_ID, history_BL, length_B)
        return state_BLD[torch.arange(len(length_B), device=length_B.device), length_B - 1]
