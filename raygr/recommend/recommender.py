"""A finished train run as a recommender in Python, without Ray: user ids or histories in, items out.

    recommender = load_recommender("outputs/quickstart/train/shipped")
    recommender.recommend("U17", n=5)                      # after the user's whole history
    recommender.recommend(["I3", "I250", "I41"], n=5)      # after a history, oldest item first

Items of the history are never recommended, unless the data keep repeat purchases (`keep_duplicate: all`). Somebody who
is no user of the data has no guided vector; the average of all users takes its place. Shape letters: `B` histories,
`L` history length, `I` items, `U` users, `D` width, `Y` places of a list, `C` candidates.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.data.vector_tables import named
from raygr.metrics.diversity import Lists, mmr_lists, scaled_relevance, top_lists, unit_rows
from raygr.metrics.ranking import full_ranks
from raygr.metrics.z_scores import standardise
from raygr.models.embeddings import RefinedEmbedding, ScoreParts
from raygr.models.inference import SequenceModel, UserStates, base_parts, encode_users, score_items, user_vectors
from raygr.train.batches import history_batch
from raygr.train.config import TrainConfig
from raygr.train.inputs import read_list_scores
from raygr.train.serving import read_model, read_serving


class Recommendation(NamedTuple):
    item_id: str
    score: float
    """<state, item>, before any activation. Scores are comparable between the items of one history only."""


class Histories(NamedTuple):
    """B histories in one array, oldest item first."""

    items_N: np.ndarray
    """item_index."""
    length_B: np.ndarray
    """At least 1 each."""
    user_B: np.ndarray
    """user_index, or the number of users for somebody who is no user of the data."""


@dataclasses.dataclass(frozen=True)
class Recommender:
    """A trained model with its ids and the users' histories; made by `load_recommender`."""

    run: str
    config: TrainConfig
    """With absolute paths."""
    model: SequenceModel
    rows_ID: Tensor
    """Refined item rows, item_index 1..I."""
    unit_ID: Tensor
    """Unit vectors in which re-ranked lists are diverse."""
    repeats: bool
    """Items of the history may be recommended."""
    item_ids_I: np.ndarray
    user_ids_U: np.ndarray
    items_N: np.ndarray
    """item_index of all interactions, sorted by (user, position)."""
    first_U: np.ndarray
    """The first interaction of each user, and the end of the last."""
    index_of_item: dict[str, int]
    index_of_user: dict[str, int]

    def recommend(
        self, who: str | Sequence[str], n: int = 10, *, mmr_weight: float | None = None
    ) -> list[Recommendation]:
        """The best `n` items, fewer where fewer are left, for a user id or after a history of item ids.

        `mmr_weight` re-ranks by maximal marginal relevance. ValueError names unknown ids.
        """
        histories = self.of_users([who]) if isinstance(who, str) else self.of_items([who])
        lists, score_BY = self.lists(histories, n, mmr_weight=mmr_weight)
        found = zip(lists.place_BY[0].tolist(), lists.relevance_BY[0].tolist(), score_BY[0].tolist(), strict=True)
        return [Recommendation(str(self.item_ids_I[i]), score) for i, relevance, score in found if relevance > -np.inf]

    def of_users(self, user_ids: Sequence[str]) -> Histories:
        """The users' whole histories: train, validation and test."""
        check_known(user_ids, self.index_of_user, "user", self.config.data)
        user_B = np.array([self.index_of_user[one] for one in user_ids])
        return self.up_to(user_B, self.first_U[user_B + 1])

    def up_to(self, user_B: np.ndarray, end_B: np.ndarray) -> Histories:
        """The users' histories before `end_B`, places in the array of all interactions."""
        first_B = self.first_U[user_B]
        parts = [self.items_N[first:end] for first, end in zip(first_B, end_B, strict=True)]
        return Histories(np.concatenate(parts), end_B - first_B, user_B)

    def of_items(self, histories: Sequence[Sequence[str]]) -> Histories:
        """Histories of item ids, of people who are no users of the data."""
        flat = [item for history in histories for item in history]
        check_known(flat, self.index_of_item, "item", self.config.data)
        length_B = np.array([len(history) for history in histories])
        if not length_B.all():
            raise ValueError(f"history {int(np.argmin(length_B)) + 1} is empty: give one item id at least")
        items_N = np.array([self.index_of_item[item] for item in flat])
        return Histories(items_N, length_B, np.full(len(histories), len(self.user_ids_U)))

    @torch.inference_mode()
    def lists(self, histories: Histories, n: int, *, mmr_weight: float | None = None) -> tuple[Lists, Tensor]:
        """The best items after each history, and their scores (B, Y)."""
        scores_BI = score_items(self.model, self.rows_ID, self.encoded(histories)).float()
        relevance_BI = scaled_relevance(scores_BI, *self.left_out(histories))
        if mmr_weight is None:
            lists = top_lists(relevance_BI, n)
        else:
            lists = mmr_lists(relevance_BI, self.unit_ID, weight=mmr_weight, length=n)
        return lists, scores_BI.gather(1, lists.place_BY)

    @torch.inference_mode()
    def states(self, histories: Histories) -> Tensor:
        """(B, D): vectors whose products with `rows_ID` are the scores."""
        return user_vectors(self.model, self.encoded(histories))

    @torch.inference_mode()
    def score_and_rank(self, histories: Histories, item: int) -> tuple[Tensor, Tensor]:
        """The score of an item_index after each history, and its rank among what `lists` may hold: (B,) each."""
        scores_BI = score_items(self.model, self.rows_ID, self.encoded(histories)).float()
        target_B = torch.full((len(scores_BI),), item, device=scores_BI.device)
        return scores_BI[:, item - 1], full_ranks(scores_BI, target_B, *self.left_out(histories))

    @torch.inference_mode()
    def split_scores(self, histories: Histories, item_C: Tensor) -> ScoreParts:
        """The scores of items, as item_index, after each history: a base part and one term per aspect."""
        return self.model.embedding.split_score(*self.encoded(histories), item_C.to(self.rows_ID.device))

    @torch.inference_mode()
    def base_parts(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """The base parts of all scores, (B, I) each: with history aspects at their mean, and unchanged."""
        history_BL, length_B = self.padded(histories)
        return base_parts(self.model, history_BL, length_B)

    def encoded(self, histories: Histories) -> UserStates:
        history_BL, length_B = self.padded(histories)
        return encode_users(self.model, self.rows_ID, history_BL, length_B, torch.tensor(histories.user_B))

    def padded(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """The newest `max_history` items of each history, (B, L), and their number, (B,)."""
        end_B = np.cumsum(histories.length_B)
        length_B = torch.from_numpy(np.minimum(histories.length_B, self.config.max_history).astype(np.int64))
        items_N = torch.from_numpy(histories.items_N)
        return history_batch(items_N, torch.from_numpy(end_B.astype(np.int64)) - length_B, length_B), length_B

    def left_out(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """(row of the batch, item_index) pairs that no list may hold."""
        device = self.rows_ID.device
        if self.repeats:
            return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        row_N = np.repeat(np.arange(len(histories.length_B)), histories.length_B)
        return torch.from_numpy(row_N).to(device), torch.from_numpy(histories.items_N).to(device)


def load_recommender(run: str, *, list_scores: str | None = None, device: str = "cpu") -> Recommender:
    """The recommender of a finished train run. The run folder is enough: it may have been moved.

    `list_scores`: id -> vectors in which lists re-ranked by MMR are diverse; None takes the refined item rows. RunError
    where the run is unfinished, or was trained by a version that kept no files for serving.
    """
    serving = read_serving(run)
    model = read_model(run, serving.config).to(device)
    if model.embedding.has_user_side:
        add_average_user(model.embedding)
    rows_ID = model.embedding.item_rows().detach()
    item_ids_I, user_ids_U = serving.item_ids_I, serving.user_ids_U
    list_ID = rows_ID
    if list_scores is not None:
        list_ID = torch.from_numpy(standardise(read_list_scores(serving.config, list_scores, item_ids_I))[0])
    return Recommender(
        run=run,
        config=serving.config,
        model=model,
        rows_ID=rows_ID,
        unit_ID=unit_rows(list_ID).to(device),
        repeats=serving.repeats,
        item_ids_I=item_ids_I,
        user_ids_U=user_ids_U,
        items_N=serving.items_N,
        first_U=serving.first_U,
        index_of_item={one: place for place, one in enumerate(item_ids_I.tolist(), start=1)},
        index_of_user={one: place for place, one in enumerate(user_ids_U.tolist())},
    )


def add_average_user(embedding: RefinedEmbedding) -> None:
    """Appends a row to the users' vectors, for people who are no users of the data.

    The mean of standardised vectors is 0. Of vectors that were trained further, it is the mean of what training added.
    """
    embedding.users_UA = torch.cat([embedding.users_UA, torch.zeros_like(embedding.users_UA[:1])])
    if embedding.tuning_UA is not None:
        tuning_UA = embedding.tuning_UA.detach()
        embedding.tuning_UA = torch.nn.Parameter(torch.cat([tuning_UA, tuning_UA.mean(0, keepdim=True)]))


def check_known(ids: Sequence[str], known: dict[str, int], kind: str, data: str) -> None:
    """ValueError names the ids that the data do not hold."""
    unknown = np.array([one for one in dict.fromkeys(ids) if one not in known])
    if len(unknown):
        raise ValueError(f"{data} has no {kind} {named(unknown)} ({len(unknown)} unknown, {len(known)} known {kind}s)")
