"""The guided user state: what a user looks for now on each aspect, from the history so far (4.2.1; 9a, 9b).

The state u of a user is the sum of parts, each through a learned (A, A) map that starts at 0. The parts are made from
the standardised scores of the history's items:

- all: the mean over all items, times the root of their number;
- rated: the mean weighted by the rating minus the mean rating so far, in standard deviations of all train ratings,
  times the root of the number of ratings;
- recent: the mean over the last two items, times the root of their number;
- user: the user's own standardised vector (LLM scores or profile), where there is one.

The root makes the size of a part independent of the length of the history. A score is
<encoder's state, item row> + <u, standardised scores of the item>: both factors of the second product are in units that
do not depend on the size of the catalogue. Only items before a target enter its state, so no position knows its target.

Shape suffixes: `B` histories, `L` history length, `A` aspects, `F` features made of all aspects, `J` items that a batch
touches. X stands for the targets of one history.
"""

from typing import Literal

import torch
from torch import Tensor, nn

Part = Literal["all", "rated", "recent", "user"]
HISTORY_PARTS: tuple[Part, ...] = ("all", "rated", "recent")
RECENT = 2  # items


class GuidedState(nn.Module):
    """Maps a history, and the user's vector where there is one, to the user's state on the aspects."""

    rating_deviation: Tensor

    def __init__(self, aspects: int, parts: tuple[Part, ...], *, rating_deviation: float = 1.0):
        """`parts` are HISTORY_PARTS, "user", or both in this order. `rating_deviation` is that of all train ratings."""
        super().__init__()
        self.parts = parts
        self.map_FA = nn.Parameter(torch.zeros(len(parts) * aspects, aspects))
        self.register_buffer("rating_deviation", torch.tensor(float(rating_deviation)))

    def at_positions(
        self, scores_JA: Tensor, history_BL: Tensor, rating_BL: Tensor, users_BA: Tensor | None, *, masked: bool
    ) -> Tensor:
        """The state for the target of each position, (B, L, A).

        The target is the item after the position. With `masked` it is the item at the position, and all visible items
        of the history count, before and after it. `scores_JA` are standardised scores of the items that `history_BL`
        counts from 1; 0 is padding, and J + 1 a [MASK]. `rating_BL` is NaN where there is no rating.
        """
        place_L = torch.arange(history_BL.shape[1], device=history_BL.device) + (0 if masked else 1)
        return self.state(scores_JA, history_BL, rating_BL, users_BA, place_L[None], masked=masked)

    def at_end(
        self, scores_JA: Tensor, history_BL: Tensor, length_B: Tensor, rating_BL: Tensor, users_BA: Tensor | None
    ) -> Tensor:
        """The state after whole histories, (B, A)."""
        return self.state(scores_JA, history_BL, rating_BL, users_BA, length_B[:, None], masked=False)[:, 0]

    def state(
        self,
        scores_JA: Tensor,
        history_BL: Tensor,
        rating_BL: Tensor,
        users_BA: Tensor | None,
        place_BX: Tensor,
        *,
        masked: bool,
    ) -> Tensor:
        """The state for targets at places of the histories, (B, X, A); `place_BX` may be one row for all histories."""
        parts_BXF: list[Tensor] = []
        if self.parts[0] != "user":
            gap_BXL = place_BX[:, :, None] - torch.arange(history_BL.shape[1], device=history_BL.device)
            counts_BXL = gap_BXL != 0 if masked else gap_BXL > 0
            parts_BXF.append(self.history_parts(scores_JA, history_BL, rating_BL, counts_BXL, gap_BXL.abs() <= RECENT))
        if users_BA is not None:
            parts_BXF.append(users_BA[:, None].expand(-1, place_BX.shape[1], -1))
        return torch.cat(parts_BXF, dim=2) @ self.map_FA

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)  # a difference of sums, which fp16 would round away
    def history_parts(
        self, scores_JA: Tensor, history_BL: Tensor, rating_BL: Tensor, counts_BXL: Tensor, is_near_BXL: Tensor
    ) -> Tensor:
        """The three parts of the history side by side, (B, X, F). They hold nothing that is learned."""
        # a column of ones counts items; padding and [MASK] have rows of zeros
        table_JX = nn.functional.pad(nn.functional.pad(scores_JA, (0, 1), value=1.0), (0, 0, 1, 1))
        seen_BLX = nn.functional.embedding(history_BL, table_JX)
        is_rated_BL1, rating_BL1 = ~rating_BL.isnan()[:, :, None], rating_BL.nan_to_num()[:, :, None]
        weighted_BLX = torch.cat(
            [seen_BLX, is_rated_BL1 * seen_BLX, rating_BL1 / self.rating_deviation * seen_BLX], dim=2
        )
        all_BXF, rated_BXF, by_rating_BXF = (counts_BXL.to(seen_BLX.dtype) @ weighted_BLX).chunk(3, dim=2)
        recent_BXF = (counts_BXL & is_near_BXL).to(seen_BLX.dtype) @ seen_BLX
        mean_BX1 = by_rating_BXF[:, :, -1:] / rated_BXF[:, :, -1:].clamp(min=1)
        centred_BXA = (by_rating_BXF - mean_BX1 * rated_BXF)[:, :, :-1]
        parts = [all_BXF[:, :, :-1], centred_BXA, recent_BXF[:, :, :-1]]
        counts = [one[:, :, -1:].clamp(min=1).sqrt() for one in (all_BXF, rated_BXF, recent_BXF)]
        return torch.cat([part / count for part, count in zip(parts, counts, strict=True)], dim=2)
