"""GRU4Rec (Hidasi et al. 2016) and GRU4Rec+ (Hidasi and Karatzoglou 2018): a GRU over a history.

Both are this network; GRU4Rec+ differs in its loss, BPR-max with additional negatives (losses.py). Input and output
item tables are tied, as in the constrained embedding of the second paper; input rows are scaled by the root of the
width, as in SASRec. A history is one session. Training takes all of its positions at once, with the gradient through
the whole length; or, with `session_parallel` and as published, one step at a time beside the sessions of other lanes,
with the hidden state passed from batch to batch. Left out: several layers, momentum.
Shape letters: `B` histories, `L` history length, `D` width: of the hidden state too, `I` items.
"""

import math

import torch
from torch import Tensor, nn

from raygr.models.cpu_kernels import dropout
from raygr.models.embeddings import RefinedEmbedding, padded


class GRU4Rec(nn.Module):
    """Maps a history to a state. Input and output share the embedding."""

    def __init__(self, embedding: RefinedEmbedding, *, hidden_width: int | None, dropout: float, input_dropout: float):
        super().__init__()
        width, hidden = embedding.width, hidden_width or embedding.width
        self.embedding, self.dropout, self.input_dropout = embedding, dropout, input_dropout
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.to_width = nn.Linear(hidden, width) if hidden != width else nn.Identity()

    def forward(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after each interaction, (B, L, D); states of padded positions are meaningless."""
        return self.states_after(rows_ID, history_BL, None)[0]

    def next_states(
        self, rows_ID: Tensor, item_BL: Tensor, goes_on_B: Tensor, before_BD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States (B, L, D) after the next items of sessions, and the hidden state (B, D).

        `before_BD` is the hidden state after the last batch, None for the first one. A row that does not go on begins
        anew. The hidden state is detached: no gradient reaches back into the last batch.
        """
        if before_BD is None:
            before_BD = torch.zeros(len(item_BL), self.gru.hidden_size, device=rows_ID.device)
        state_BLD, after_BD = self.states_after(rows_ID, item_BL, torch.where(goes_on_B[:, None], before_BD, 0.0))
        return state_BLD, after_BD.detach()

    def states_after(self, rows_ID: Tensor, item_BL: Tensor, before_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """States (B, L, D) at each item and the last hidden state (B, D).

        `before_BD` is the hidden state before the items; None for zeros.
        """
        items_BLD = nn.functional.embedding(item_BL, padded(rows_ID)) * math.sqrt(self.embedding.width)
        first_1BD = None if before_BD is None else before_BD[None]
        hidden_BLD, last_1BD = self.gru(dropout(items_BLD, self.input_dropout, training=self.training), first_1BD)
        return self.to_width(dropout(hidden_BLD, self.dropout, training=self.training)), last_1BD[0]

    def encode(self, rows_ID: Tensor, history_BL: Tensor, length_B: Tensor) -> Tensor:
        """The encoder's state after the whole history, (B, D)."""
        state_BLD = self(rows_ID, history_BL, length_B)
        return state_BLD[torch.arange(len(length_B), device=length_B.device), length_B - 1]
