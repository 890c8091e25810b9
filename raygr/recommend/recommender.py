"""A finished train run as a recommender in Python, without Ray: user ids or histories in, items out.

    recommender = load_recommender("outputs/quickstart/train/shipped")
    recommender.recommend("U17", n=5)                      # after the user's whole history
    recommender.recommend(["I3", "I250", "I41"], n=5)      # after a history, oldest item first
    recommender.looks_for("U17")                           # {"tension level": 1.3, "pace": -0.4, ...}
    recommender.recommend("U17", steer={"pace": 1.0})      # the same, with more pace
    wider = recommender.with_new_items({"N1": {"pace": 7, "tension level": 9}})  # items that nobody has bought yet
    wider.recommend("U17", n=5)                            # may hold N1

Items of the history are never recommended, unless the data keep repeat purchases (`keep_duplicate: all`). Somebody who
is no user of the data has no guided vector; the average of all users takes its place. Shape letters: `B` histories,
`L` history length, `I` items, `U` users, `A` aspects, `D` width, `Y` places of a list, `C` candidates.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raygr.data.vector_tables import named
from raygr.metrics.diversity import Lists, mmr_lists, scaled_relevance, top_lists, unit_rows
from raygr.metrics.ranking import full_ranks
from raygr.metrics.z_scores import standardise
from raygr.models.embeddings import RefinedEmbedding, ScoreParts
from raygr.models.inference import SequenceModel, UserStates, base_parts, encode_users, user_vectors
from raygr.recommend.score_rows import NewItems, read_score_rows
from raygr.train.batches import history_batch
from raygr.train.config import TrainConfig
from raygr.train.inputs import read_list_scores
from raygr.train.serving import read_model, read_serving

ITEMS_AT_ONCE = 1024
# Scores of a block of users and all items, which stay in a processor's cache while they are looked through.
SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}


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
    rating_N: np.ndarray
    """The user's ratings of the items; NaN where there is none."""


@dataclasses.dataclass(frozen=True)
class Recommender:
    """A trained model with its ids and the users' histories; made by `load_recommender`."""

    run: str
    config: TrainConfig
    """With absolute paths."""
    model: SequenceModel
    rows_ID: Tensor
    """Refined item rows, item_index 1..I. Where new items have an offset, it is the last column."""
    unit_ID: Tensor
    """Unit vectors in which re-ranked lists are diverse."""
    repeats: bool
    """Items of the history may be recommended."""
    item_ids_I: np.ndarray
    user_ids_U: np.ndarray
    items_N: np.ndarray
    """item_index of all interactions, sorted by (user, position)."""
    rating_N: np.ndarray
    """NaN where an interaction has no rating."""
    first_U: np.ndarray
    """The first interaction of each user, and the end of the last."""
    aspects: tuple[str, ...]
    """The names of the item scores; empty for a base model."""
    catalogue_IA: np.ndarray | None
    """The item scores of the training, on whose scale new scores are measured; None for a base model."""
    new_items: int
    """Number of items, the last ones, that training did not know."""
    new_item_offset: float
    """What is added to the scores of new items, to make them comparable with the others."""
    list_scores: str | None
    """Vectors in which re-ranked lists are diverse; None for the refined item rows."""
    index_of_item: dict[str, int]
    index_of_user: dict[str, int]

    def recommend(
        self,
        who: str | Sequence[str],
        n: int = 10,
        *,
        mmr_weight: float | None = None,
        steer: Mapping[str, float] | None = None,
    ) -> list[Recommendation]:
        """The best `n` items, fewer where fewer are left, for a user id or after a history of item ids.

        `mmr_weight` re-ranks by maximal marginal relevance. `steer` moves what the user looks for: see `steered`.
        ValueError names unknown ids and aspects.
        """
        lists, score_BY = self.lists(self.histories_of(who), n, mmr_weight=mmr_weight, steer=steer)
        found = zip(lists.place_BY[0].tolist(), lists.relevance_BY[0].tolist(), score_BY[0].tolist(), strict=True)
        return [Recommendation(str(self.item_ids_I[i]), score) for i, relevance, score in found if relevance > -np.inf]

    def with_new_items(self, new_items: NewItems) -> "Recommender":
        """A recommender whose catalogue also holds these items, which have no learned part.

        `new_items` maps item ids to scores by aspect, or to scores in the order of `aspects`; or it names a score run
        or a CSV, Parquet or `.npy` file of ids and scores. Scores are measured on the scale of the training's
        catalogue; a missing one (NaN) adds nothing. New items may stand in histories. ValueError says what is wrong.
        """
        found = read_score_rows(new_items, self.config, self.aspects, self.index_of_item)
        assert self.catalogue_IA is not None  # a base model was refused
        model = copy.deepcopy(self.model)
        model.embedding.append_items(found.scores_SA, self.catalogue_IA)
        wider = dataclasses.replace(
            self,
            model=model,
            item_ids_I=np.concatenate([self.item_ids_I, found.ids_S]),
            new_items=self.new_items + len(found.ids_S),
        )
        return with_rows(wider)

    def looks_for(self, who: str | Sequence[str]) -> dict[str, float]:
        """What a user, or somebody with this history, looks for now: the guided user state by aspect.

        A value is what one standard deviation of the item's score adds to the score of the item, so 0 is indifference.
        ValueError names unknown ids, and a run without a guided user state.
        """
        return dict(zip(self.aspects, self.guided(self.histories_of(who))[0].tolist(), strict=True))

    def guided(self, histories: Histories) -> Tensor:
        """(B, A): what `looks_for` returns, after each history. ValueError names a run without a guided user state."""
        guided_BA = self.encoded(histories).guided_BA
        if self.model.embedding.state is None or guided_BA is None:
            raise ValueError(f"{self.run} has no guided user state: train with item_scores and user_scores: history")
        return guided_BA

    def histories_of(self, who: str | Sequence[str]) -> Histories:
        return self.of_users([who]) if isinstance(who, str) else self.of_items([who])

    def of_users(self, user_ids: Sequence[str]) -> Histories:
        """The users' whole histories: train, validation and test."""
        check_known(user_ids, self.index_of_user, "user", self.config.data)
        user_B = np.array([self.index_of_user[one] for one in user_ids])
        return self.up_to(user_B, self.first_U[user_B + 1])

    def up_to(self, user_B: np.ndarray, end_B: np.ndarray) -> Histories:
        """The users' histories before `end_B`, places in the array of all interactions."""
        first_B = self.first_U[user_B]
        at_N = np.concatenate([np.arange(first, end) for first, end in zip(first_B, end_B, strict=True)])
        return Histories(self.items_N[at_N], end_B - first_B, user_B, self.rating_N[at_N])

    def of_items(self, histories: Sequence[Sequence[str]]) -> Histories:
        """Histories of item ids, of people who are no users of the data."""
        flat = [item for history in histories for item in history]
        check_known(flat, self.index_of_item, "item", self.config.data)
        length_B = np.array([len(history) for history in histories])
        if not length_B.all():
            raise ValueError(f"history {int(np.argmin(length_B)) + 1} is empty: give one item id at least")
        items_N = np.array([self.index_of_item[item] for item in flat])
        return Histories(items_N, length_B, np.full(len(histories), len(self.user_ids_U)), unrated(len(items_N)))

    @torch.inference_mode()
    def lists(
        self,
        histories: Histories,
        n: int,
        *,
        mmr_weight: float | None = None,
        steer: Mapping[str, float] | None = None,
    ) -> tuple[Lists, Tensor]:
        """The best items after each history, and their scores (B, Y).

        Relevance is the score, or with `mmr_weight` the score scaled to [0, 1]; -inf where no item is left.
        """
        check_steer(steer or {}, self.aspects, self.config)
        vectors_BD = self.vectors(self.steered(self.encoded(histories), steer or {}))
        row_N, item_N = self.left_out(histories)
        step = max(1, SCORES_AT_ONCE[self.rows_ID.device.type] // len(self.rows_ID))
        found = []
        for first in range(0, len(vectors_BD), step):
            scores_BI = (vectors_BD[first : first + step] @ self.rows_ID.T).float()
            is_here_N = (row_N >= first) & (row_N < first + step)
            seen = row_N[is_here_N] - first, item_N[is_here_N] - 1
            if mmr_weight is None:
                scores_BI[seen] = -torch.inf
                lists = top_lists(scores_BI, n)
            else:
                relevance_BI = scaled_relevance(scores_BI, seen[0], seen[1] + 1)
                lists = mmr_lists(relevance_BI, self.unit_ID, weight=mmr_weight, length=n)
            found.append((*lists, scores_BI.gather(1, lists.place_BY)))
        place_BY, relevance_BY, score_BY = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Lists(place_BY, relevance_BY), score_BY

    @torch.inference_mode()
    def states(self, histories: Histories) -> Tensor:
        """(B, D): vectors whose products with `rows_ID` are the scores."""
        return self.vectors(self.encoded(histories))

    def vectors(self, states: UserStates) -> Tensor:
        """(B, D): the users' vectors of these states; 1 meets the offset of new items."""
        vectors_BD = user_vectors(self.model, states)
        return nn.functional.pad(vectors_BD, (0, self.rows_ID.shape[1] - vectors_BD.shape[1]), value=1.0)

    def scores(self, states: UserStates) -> Tensor:
        """(B, I): the scores of all items, with the offset of new ones."""
        return (self.vectors(states) @ self.rows_ID.T).float()

    @torch.inference_mode()
    def score_and_rank(self, histories: Histories, item: int) -> tuple[Tensor, Tensor, Tensor]:
        """The score of an item_index after each history, its rank among what `lists` may hold, and the standard
        deviation of all items' scores: (B,) each."""
        scores_BI = self.scores(self.encoded(histories))
        target_B = torch.full((len(scores_BI),), item, device=scores_BI.device)
        rank_B = full_ranks(scores_BI, target_B, *self.left_out(histories))
        return scores_BI[:, item - 1], rank_B, scores_BI.std(dim=1, correction=0)

    @torch.inference_mode()
    def split_scores(self, histories: Histories, item_C: Tensor) -> ScoreParts:
        """The scores of items, as item_index, after each history: a base part and one term per aspect.

        The offset of a new item belongs to its base part.
        """
        parts = self.model.embedding.split_score(*self.encoded(histories), item_C.to(self.rows_ID.device))
        return parts._replace(base_BC=parts.base_BC + self.offsets()[item_C - 1])

    @torch.inference_mode()
    def average_terms(self, histories: Histories) -> Tensor:
        """Each aspect's encoder and user term together after each history, averaged over all items, (B, A)."""
        total_BA = torch.zeros(len(histories.length_B), self.model.embedding.aspects, dtype=torch.float64)
        for item_C in torch.arange(1, len(self.item_ids_I) + 1).split(ITEMS_AT_ONCE):
            parts = self.split_scores(histories, item_C)
            total_BA += (parts.encoder_BCA + parts.user_BCA).double().sum(1).cpu()
        return total_BA / len(self.item_ids_I)

    @torch.inference_mode()
    def base_parts(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """The base parts of all scores, (B, I) each: with history aspects at their mean, and unchanged."""
        history_BL, _, length_B = self.padded(histories)
        at_mean_BI, unchanged_BI = base_parts(self.model, history_BL, length_B)
        return at_mean_BI + self.offsets(), unchanged_BI + self.offsets()

    def offsets(self) -> Tensor:
        """What is added to the score of each item, (I,): 0 for all but new ones."""
        offset_I = torch.zeros(len(self.item_ids_I), device=self.model.embedding.base_ID.device)
        offset_I[len(offset_I) - self.new_items :] = self.new_item_offset
        return offset_I

    def steered(self, states: UserStates, steer: Mapping[str, float]) -> UserStates:
        """The states with some aspects of what the users look for moved, by the given amounts in `looks_for`'s unit.

        The sum of an aspect's scores over a list never falls if the aspect is moved up.
        """
        guided_BA = states.guided_BA
        if not steer or guided_BA is None:
            return states
        moved_A = torch.tensor([float(steer.get(name, 0.0)) for name in self.aspects], device=guided_BA.device)
        return states._replace(guided_BA=guided_BA + moved_A)

    @torch.inference_mode()
    def encoded(self, histories: Histories) -> UserStates:
        history_BL, rating_BL, length_B = self.padded(histories)
        user_B = torch.tensor(histories.user_B)
        return encode_users(self.model, self.rows_ID, history_BL, length_B, rating_BL, user_B)

    def padded(self, histories: Histories) -> tuple[Tensor, Tensor, Tensor]:
        """The newest `max_history` items of each history and their ratings, (B, L) each, and their number, (B,)."""
        length_B = torch.from_numpy(np.minimum(histories.length_B, self.config.max_history).astype(np.int64))
        start_B = torch.from_numpy(np.cumsum(histories.length_B).astype(np.int64)) - length_B
        items_N, rating_N = torch.from_numpy(histories.items_N), torch.tensor(histories.rating_N, dtype=torch.float32)
        history_BL = history_batch(items_N, start_B, length_B)
        return history_BL, history_batch(rating_N, start_B, length_B, padding=torch.nan), length_B

    def left_out(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """(row of the batch, item_index) pairs that no list may hold."""
        device = self.rows_ID.device
        if self.repeats:
            return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        row_N = np.repeat(np.arange(len(histories.length_B)), histories.length_B)
        return torch.from_numpy(row_N).to(device), torch.from_numpy(histories.items_N).to(device)


def load_recommender(
    run: str, *, list_scores: str | None = None, new_item_offset: float | None = None, device: str = "cpu"
) -> Recommender:
    """The recommender of a finished train run. The run folder is enough: it may have been moved.

    `list_scores`: id -> vectors in which lists re-ranked by MMR are diverse; None takes the refined item rows.
    `new_item_offset` is added to the scores of items that training did not know; None takes the one that training
    calibrated. RunError where the run is unfinished, or was trained by a version that kept no files for serving.
    """
    serving = read_serving(run)
    model = read_model(run, serving).to(device)
    if model.embedding.users_UA is not None:
        add_average_user(model.embedding)
    recommender = Recommender(
        run=run,
        config=serving.config,
        model=model,
        rows_ID=torch.empty(0),
        unit_ID=torch.empty(0),
        repeats=serving.repeats,
        item_ids_I=serving.item_ids_I,
        user_ids_U=serving.user_ids_U,
        items_N=serving.items_N,
        rating_N=serving.rating_N,
        first_U=serving.first_U,
        aspects=serving.aspects,
        catalogue_IA=serving.scores_IA,
        new_items=serving.new_items,
        new_item_offset=serving.new_item_offset if new_item_offset is None else new_item_offset,
        list_scores=list_scores,
        index_of_item={},
        index_of_user={one: place for place, one in enumerate(serving.user_ids_U.tolist())},
    )
    return with_rows(recommender)


def with_rows(recommender: Recommender) -> Recommender:
    """The recommender with what follows from its model and its item ids."""
    embedding, ids_I = recommender.model.embedding, recommender.item_ids_I
    rows_ID, list_ID = embedding.item_rows().detach(), embedding.input_rows().detach()
    if recommender.new_items and recommender.new_item_offset:
        rows_ID = torch.cat([rows_ID, recommender.offsets()[:, None]], dim=1)
    if recommender.list_scores is not None:
        vectors_IA = read_list_scores(recommender.config, recommender.list_scores, ids_I)
        list_ID = torch.from_numpy(standardise(vectors_IA)[0]).to(rows_ID.device)
    return dataclasses.replace(
        recommender,
        rows_ID=rows_ID,
        unit_ID=unit_rows(list_ID),
        index_of_item={one: place for place, one in enumerate(ids_I.tolist(), start=1)},
    )


def add_average_user(embedding: RefinedEmbedding) -> None:
    """Appends a row to the users' vectors, for people who are no users of the data.

    The mean of standardised vectors is 0. Of vectors that were trained further, it is the mean of what training added.
    """
    assert embedding.users_UA is not None
    embedding.users_UA = torch.cat([embedding.users_UA, torch.zeros_like(embedding.users_UA[:1])])
    if embedding.tuning_UA is not None:
        tuning_UA = embedding.tuning_UA.detach()
        embedding.tuning_UA = torch.nn.Parameter(torch.cat([tuning_UA, tuning_UA.mean(0, keepdim=True)]))


def check_steer(steer: Mapping[str, float], aspects: Sequence[str], config: TrainConfig) -> None:
    """ValueError for aspects that the run does not have, and for a run without a guided user state."""
    if steer and (config.user_side != "learned" or config.item_scores is None or config.user_scores == "none"):
        raise ValueError(f"steer: {config.output} has no guided user state: train with user_scores: history")
    unknown = [name for name in steer if name not in aspects]
    if unknown:
        raise ValueError(f"steer: no aspect {', '.join(unknown)}; the run has: {', '.join(aspects)}")


def unrated(items: int) -> np.ndarray:
    return np.full(items, np.nan, np.float32)


def check_known(ids: Sequence[str], known: dict[str, int], kind: str, data: str) -> None:
    """ValueError names the ids that the data do not hold."""
    unknown = np.array([one for one in dict.fromkeys(ids) if one not in known])
    if len(unknown):
        raise ValueError(f"{data} has no {kind} {named(unknown)} ({len(unknown)} unknown, {len(known)} known {kind}s)")
