"""Guided scores in the item table: normalisation (A.5; 8a, 8b), refined embedding (9a, 9b), split of the score.

The encoder's input and the output share one table. The table has no padding row: `padded` puts a constant zero row
before it, so item_index 0 has neither a guided part nor a gradient.

Shape letters: `I` items, `D` width, `A` aspects, `F` features of all aspects, `B` histories, `L` history length,
`C` candidates, `U` users. A guided vector is as wide as its aspects with `concat`, as the item table with `add`.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raygr.metrics.z_scores import standardise, standardised_like
from raygr.models.guided_state import GuidedState, Part

LEVELS = 10
MAP_STD = 0.0  # learned maps start at 0, so the refined model starts as the base model


class Fusion(NamedTuple):
    """How guided scores enter the item table and the user's state."""

    form: Literal["concat", "add", "none"] = "add"
    """`none`: item rows are learned alone, and scores enter by the guided user state."""
    add_map: Literal["levels", "linear"] = "levels"
    linear_map: bool = False
    user_side: Literal["add", "concat", "off"] = "off"
    """(9b) for the users' vectors."""
    weight: float = 1.0
    """lambda of (9a, 9b)."""
    state: tuple[Part, ...] = ()
    """The parts of the guided user state; empty for none. It takes the place of (9b)."""


class ScoreParts(NamedTuple):
    """The parts of scores: `base + encoder.sum(-1) + user.sum(-1)` is the score."""

    base_BC: Tensor
    encoder_BCA: Tensor
    """The encoder's state times the item's part of each aspect."""
    user_BCA: Tensor
    """The user's part of each aspect times the item."""


def xavier_std(rows: int, width: int) -> float:
    """The Xavier standard deviation of a table (A.5)."""
    return math.sqrt(2 / (rows + width))


def soft_levels(scores_IA: np.ndarray, catalogue_IA: np.ndarray | None = None) -> np.ndarray:
    """Triangular weights over ten levels, (I, A * 10): 1 at the score, 1/2 one level away; 0 for a missing score.

    An aspect with values outside 1..10 (custom vectors, the random control) is first stretched onto 1..10. The values
    of `catalogue_IA` decide that; None takes `scores_IA`. A score beyond the scale counts as its end.
    """
    if catalogue_IA is None:
        catalogue_IA = scores_IA
    low_A, high_A = np.nanmin(catalogue_IA, axis=0), np.nanmax(catalogue_IA, axis=0)
    stretched_IA = 1 + (LEVELS - 1) * (scores_IA - low_A) / np.where(high_A > low_A, high_A - low_A, 1.0)
    rated_IA = np.where((low_A >= 1) & (high_A <= LEVELS), scores_IA, stretched_IA)
    distance = np.abs(np.clip(rated_IA, 1, LEVELS)[:, :, None] - np.arange(1, LEVELS + 1))
    return np.nan_to_num(np.maximum(0.0, 1 - distance / 2), nan=0.0).reshape(len(scores_IA), -1)


def padded(rows_ID: Tensor) -> Tensor:
    """(I, D) -> (I + 1, D), with a zero row for item_index 0."""
    return nn.functional.pad(rows_ID, (0, 0, 1, 0))


def position_rows(history_BL: Tensor, length_B: Tensor, max_history: int) -> Tensor:
    """The row of a position table for each step, (B, L). The newest step has the last row, as with left padding."""
    step_L = torch.arange(history_BL.shape[1], device=history_BL.device)
    return (max_history - length_B[:, None] + step_L).clamp(max=max_history - 1)


class RefinedEmbedding(nn.Module):
    """The tied item table of a recommender: learned rows, with guided scores beside them or added to them."""

    features_IF: Tensor
    users_UA: Tensor | None
    standard_IA: Tensor

    def __init__(
        self,
        items: int,
        base_width: int,
        *,
        fusion: Fusion,
        scores_IA: np.ndarray | None = None,
        users_UA: np.ndarray | None = None,
        train_users: bool = False,
        sparse: bool = False,
        rating_deviation: float = 1.0,
    ):
        """`scores_IA` are scores of items 1..I, NaN where missing; `users_UA` are standardised vectors of users.

        `train_users` lets (10) train the users' vectors: see `tuned_users`. `sparse` makes the gradient of the learned
        rows sparse where `item_rows` was called for some of the items.
        """
        super().__init__()
        self.fusion, self.base_width, self.sparse = fusion, base_width, sparse
        self.aspects = 0 if scores_IA is None else scores_IA.shape[1]
        self.guided_width = self.aspects if fusion.form == "concat" else 0
        self.width = base_width + self.guided_width
        self.std = xavier_std(items, self.width)
        self.base_ID = nn.Parameter(torch.randn(items, base_width) * self.std)
        if scores_IA is not None and fusion.form != "none":
            self.add_item_side(scores_IA)
        self.state: GuidedState | None = None
        if scores_IA is not None and fusion.state:
            self.register_buffer("standard_IA", torch.as_tensor(standardise(scores_IA)[0], dtype=torch.float32))
            self.state = GuidedState(self.aspects, fusion.state, rating_deviation=rating_deviation)
        self.has_user_side = self.state is None and users_UA is not None and fusion.user_side != "off"
        self.register_buffer("users_UA", None if users_UA is None else torch.as_tensor(users_UA, dtype=torch.float32))
        self.tuning_UA: nn.Parameter | None = None
        if users_UA is not None and self.has_user_side:
            self.add_user_side()
            if train_users:
                self.tuning_UA = nn.Parameter(torch.zeros(users_UA.shape))

    def add_item_side(self, scores_IA: np.ndarray) -> None:
        features_IF = self.item_features(scores_IA, scores_IA)
        self.register_buffer("features_IF", features_IF)
        if self.fusion.form == "add":
            self.item_map_FD = nn.Parameter(torch.randn(features_IF.shape[1], self.width) * MAP_STD)
        else:
            self.item_map_FD, self.item_bias_D = self.guided_map(learned=self.fusion.linear_map)

    def item_features(self, scores_IA: np.ndarray, catalogue_IA: np.ndarray) -> Tensor:
        """The features that enter (9a), on the scale of the catalogue's scores, (I, F)."""
        levels = self.fusion.form == "add" and self.fusion.add_map == "levels"
        both = scores_IA, catalogue_IA
        features_IF = soft_levels(*both) if levels else standardised_like(*both)[0]
        return torch.as_tensor(features_IF, dtype=torch.float32)

    @torch.no_grad()
    def append_items(self, scores_SA: np.ndarray, catalogue_IA: np.ndarray) -> None:
        """Appends items without a learned part to a trained table that has item scores.

        `catalogue_IA` are the scores that the table was trained with; new scores are measured on their scale.
        """
        device = self.base_ID.device
        self.base_ID = nn.Parameter(nn.functional.pad(self.base_ID, (0, 0, 0, len(scores_SA))))
        if self.fusion.form != "none":
            new_SF = self.item_features(scores_SA, catalogue_IA).to(device)
            self.features_IF = torch.cat([self.features_IF, new_SF])
        if self.state is not None:
            new_SA = torch.as_tensor(standardised_like(scores_SA, catalogue_IA)[0], dtype=torch.float32, device=device)
            self.standard_IA = torch.cat([self.standard_IA, new_SA])

    def add_user_side(self) -> None:
        if self.fusion.form == "add":
            self.user_map_AD = nn.Parameter(torch.zeros(self.aspects, self.width))
        else:
            self.user_map_AD, self.user_bias_D = self.guided_map(learned=self.fusion.linear_map)
        if self.fusion.user_side == "concat":
            self.to_base_width = nn.Linear(self.width, self.base_width)

    def guided_map(self, *, learned: bool) -> tuple[nn.Parameter, nn.Parameter]:
        """W and b of (8a, 8b). They start at the scaling of A.5 and stay there unless learned."""
        scaling_AA = torch.eye(self.aspects) * self.std
        bias_A = torch.zeros(self.aspects)
        return nn.Parameter(scaling_AA, requires_grad=learned), nn.Parameter(bias_A, requires_grad=learned)

    def widened(self, guided: Tensor) -> Tensor:
        """Pads guided vectors to the width of the table, (..., D): with `concat` the learned dimensions are 0."""
        return nn.functional.pad(guided, (self.width - guided.shape[-1], 0))

    def item_rows(self, item_J: Tensor | None = None, is_kept_J: Tensor | None = None) -> Tensor:
        """The rows whose products with a user's vector are scores, of items 1..I or of `item_J`, (J, D).

        They are (9a); with a guided user state the standardised scores follow, (J, D + A). Rows that are not marked in
        `is_kept_J` have no learned part; None keeps all.
        """
        rows_JD = self.input_rows(item_J, is_kept_J)
        return rows_JD if self.state is None else torch.cat([rows_JD, self.standard_rows(item_J)], dim=1)

    def standard_rows(self, item_J: Tensor | None = None) -> Tensor:
        """The standardised scores of items that the guided user state reads and is multiplied with, (J, A)."""
        return self.standard_IA if item_J is None else self.standard_IA[item_J - 1]

    def input_table(self, rows_JD: Tensor) -> Tensor:
        """The encoder's table: `item_rows` without the columns of the guided user state, and a zero row before them."""
        return padded(rows_JD[:, : self.width])

    def input_rows(self, item_J: Tensor | None = None, is_kept_J: Tensor | None = None) -> Tensor:
        """(9a): the refined embeddings of items 1..I, (I, D), or of `item_J` only, (J, D)."""
        base_ID: Tensor = self.base_ID
        if item_J is not None:
            base_ID = nn.functional.embedding(item_J - 1, base_ID, sparse=self.sparse)
        if is_kept_J is not None:
            base_ID = base_ID * is_kept_J[:, None]
        if not self.aspects or self.fusion.form == "none":
            return base_ID
        features_IF = self.features_IF if item_J is None else self.features_IF[item_J - 1]
        guided_ID = self.fusion.weight * (features_IF @ self.item_map_FD)
        if self.fusion.form == "add":
            return base_ID + guided_ID
        return torch.cat([base_ID, guided_ID + self.fusion.weight * self.item_bias_D], dim=1)

    def item_parts(self, item_C: Tensor) -> Tensor:
        """The contribution of each aspect to the embedding of items, (C, A, D). `item_C` is item_index, 1..I."""
        if self.fusion.form == "none":
            return self.base_ID.new_zeros(len(item_C), self.aspects, self.width)
        features_CAX = self.features_IF[item_C - 1].unflatten(1, (self.aspects, -1))
        map_AXD = self.item_map_FD.unflatten(0, (self.aspects, -1))
        return self.widened(self.fusion.weight * torch.einsum("cax,axd->cad", features_CAX, map_AXD))

    def user_parts(self, guided_BA: Tensor) -> Tensor:
        """The contribution of each aspect of the user to the state, (B, A, D)."""
        return self.widened(self.fusion.weight * guided_BA[:, :, None] * self.user_map_AD)

    def vectors_of(self, user_B: Tensor) -> Tensor | None:
        """The users' vectors as they enter scores, (B, A); None where they enter none."""
        return None if self.users_UA is None else self.tuned_users(self.users_UA[user_B], user_B)

    def tuned_users(self, guided_BA: Tensor, user_B: Tensor) -> Tensor:
        """The users' standardised vectors plus what training added, (B, A); `guided_BA` itself where they are frozen.

        A user's vectors in training and at evaluation share the trained addition. It is in units of the item table, so
        that a step of the optimizer moves it as far as a learned row.
        """
        if self.tuning_UA is None:
            return guided_BA
        return guided_BA + nn.functional.embedding(user_B, self.tuning_UA) / self.std

    def encoder_part(self, encoder: Tensor) -> Tensor:
        """The encoder's part of the state, (..., D), with the bias of (8b)."""
        if not self.has_user_side:
            return encoder
        if self.fusion.user_side == "concat":
            encoder = nn.functional.pad(self.to_base_width(encoder), (0, self.guided_width))
        return encoder if self.fusion.form == "add" else encoder + self.widened(self.fusion.weight * self.user_bias_D)

    def refined_state(self, encoder_BLD: Tensor, guided_BLA: Tensor | None) -> Tensor:
        """(9b): the encoder's output joined with the user's guided vector at every position, (B, L, D).

        A vector that is the same at all positions is (B, 1, A). A guided user state follows the encoder's output,
        (B, L, D + A).
        """
        if self.state is not None and guided_BLA is not None:
            return torch.cat([encoder_BLD, guided_BLA], dim=2)
        state_BLD = self.encoder_part(encoder_BLD)
        if not self.has_user_side or guided_BLA is None:
            return state_BLD
        return state_BLD + self.widened(self.fusion.weight * (guided_BLA @ self.user_map_AD))

    def split_score(self, encoder_BD: Tensor, guided_BA: Tensor | None, item_C: Tensor) -> ScoreParts:
        """Splits <state, item> into a base part and one term per aspect, which explain a recommendation.

        The base part is the encoder's state times learned rows, plus the biases of (8a, 8b). The split of this product
        is exact, but it does not separate causes: the encoder made its state from the aspects of the history's items
        (`inference.base_parts` measures how far the base part depends on them).
        """
        rows_CD = self.input_rows()[item_C - 1]
        state_BD, parts_CAD = self.encoder_part(encoder_BD), self.item_parts(item_C)
        encoder_BCA = torch.einsum("bd,cad->bca", state_BD, parts_CAD)
        user_BCA = torch.zeros_like(encoder_BCA)
        if self.state is not None and guided_BA is not None:
            user_BCA = guided_BA[:, None] * self.standard_rows(item_C)
        elif self.has_user_side and guided_BA is not None:
            user_BCA = torch.einsum("bad,cd->bca", self.user_parts(guided_BA), rows_CD)
        return ScoreParts(state_BD @ (rows_CD - parts_CAD.sum(1)).T, encoder_BCA, user_BCA)

    def score_shares(self, encoder_BD: Tensor, guided_BA: Tensor | None) -> dict[str, float]:
        """The share of each part in the variance of a user's scores over all items; the three sum to 1.

        The share is the covariance of the part with the score, relative to the variance, so it may be negative.
        """
        rows_ID = self.input_rows()
        guided_ID = rows_ID - self.unguided_rows()
        state_BD = self.encoder_part(encoder_BD)
        parts = {"base": state_BD @ (rows_ID - guided_ID).T, "encoder_guided": state_BD @ guided_ID.T}
        parts["user_guided"] = torch.zeros_like(parts["base"])
        if self.state is not None and guided_BA is not None:
            parts["user_guided"] = guided_BA @ self.standard_IA.T
        elif self.has_user_side and guided_BA is not None:
            parts["user_guided"] = self.user_parts(guided_BA).sum(1) @ rows_ID.T
        return variance_shares(parts)

    def rows_at_mean(self) -> Tensor:
        """Item rows with every aspect at the catalogue's mean, (I, D): they tell an encoder nothing about aspects."""
        unguided_ID = self.unguided_rows()
        return unguided_ID + (self.input_rows() - unguided_ID).mean(dim=0)

    def base_scores(self, encoder_BD: Tensor) -> Tensor:
        """The base parts of all items' scores, (B, I)."""
        return self.encoder_part(encoder_BD) @ self.unguided_rows().T

    def unguided_rows(self) -> Tensor:
        """Item rows without the contribution of aspects, (I, D): learned dimensions and the bias of (8a)."""
        if self.fusion.form != "concat":
            return self.base_ID
        bias_D = self.fusion.weight * self.item_bias_D
        return torch.cat([self.base_ID, bias_D.expand(len(self.base_ID), -1)], dim=1)


def variance_shares(parts: dict[str, Tensor]) -> dict[str, float]:
    """The covariance of each (B, I) part with their sum, the score, relative to the variance of the score."""
    centred = {name: part - part.mean(dim=1, keepdim=True) for name, part in parts.items()}
    total_BI = torch.stack(list(centred.values())).sum(0)
    variance = (total_BI * total_BI).mean().clamp_min(1e-30)
    return {name: ((part * total_BI).mean() / variance).item() for name, part in centred.items()}
