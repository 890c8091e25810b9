"""A finished train run as a recommender in Python, without Ray: user ids or histories in, items out.

    recommender = load_recommender("outputs/quickstart/train/shipped")
    recommender.recommend("U17", n=5)                      # after the user's whole history
    recommender.recommend(["I3", "I250", "I41"], n=5)      # after a history, oldest item first

Items of the history are never recommended, unless the data keep repeat purchases (`keep_duplicate: all`). Somebody who
is no user of the data has no guided vector of their own: the average one stands in for it. Shape suffixes: `B`
histories, `I` items, `D` width, `N` items of a list.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from raygr import files, runs
from raygr.config import check_config
from raygr.data.interactions import read_ids
from raygr.data.vector_tables import align_items, named, read_vectors
from raygr.metrics.diversity import Lists, mmr_lists, scaled_relevance, top_lists, unit_rows
from raygr.metrics.ranking import full_ranks
from raygr.models.embeddings import RefinedEmbedding, ScoreParts, standardise
from raygr.models.workers import Share
from raygr.schema import ITEMS, MODEL, USERS
from raygr.train.batches import Targets
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs, with_absolute_paths
from raygr.train.loop import Training, encoder_states, item_scores, left_out, start_training, user_states


class Recommendation(NamedTuple):
    item_id: str
    score: float
    """<state, item>, before any activation; comparable between the items of one history only."""


class Histories(NamedTuple):
    """B histories, oldest item first, in one array."""

    items_N: np.ndarray
    """item_index."""
    length_B: np.ndarray
    """At least 1 each."""
    user_B: np.ndarray
    """user_index, or the number of users for somebody who is none of them."""


@dataclasses.dataclass(frozen=True)
class Recommender:
    """Made by `load_recommender`."""

    training: Training
    rows_ID: Tensor
    unit_ID: Tensor
    """In which re-ranked lists are diverse."""
    item_ids_I: np.ndarray
    user_ids_U: np.ndarray
    index_of_item: dict[str, int]
    index_of_user: dict[str, int]

    def recommend(
        self, who: str | Sequence[str], n: int = 10, *, mmr_weight: float | None = None
    ) -> list[Recommendation]:
        """The best `n` items, fewer where fewer are left, for a user id or after a history of item ids.

        `mmr_weight` re-ranks by maximal marginal relevance. ValueError names what the data does not hold.
        """
        histories = self.of_users([who]) if isinstance(who, str) else self.of_items([who])
        lists, score_BN = self.lists(histories, n, mmr_weight=mmr_weight)
        found = zip(lists.place_BN[0].tolist(), lists.relevance_BN[0].tolist(), score_BN[0].tolist(), strict=True)
        return [Recommendation(str(self.item_ids_I[i]), score) for i, relevance, score in found if relevance > -np.inf]

    def of_users(self, user_ids: Sequence[str]) -> Histories:
        """Whole histories: train, validation and test."""
        check_known(user_ids, self.index_of_user, "user", self.training.config.data)
        user_B = np.array([self.index_of_user[one] for one in user_ids])
        return self.up_to(user_B, self.training.inputs.first_U[user_B + 1])

    def up_to(self, user_B: np.ndarray, end_B: np.ndarray) -> Histories:
        """Users' histories before `end_B`, places in the flat array of interactions."""
        first_B, items_N = self.training.inputs.first_U[user_B], self.training.inputs.items_N.numpy()
        parts = [items_N[first:end] for first, end in zip(first_B, end_B, strict=True)]
        return Histories(np.concatenate(parts), end_B - first_B, user_B)

    def of_items(self, histories: Sequence[Sequence[str]]) -> Histories:
        flat = [item for history in histories for item in history]
        check_known(flat, self.index_of_item, "item", self.training.config.data)
        length_B = np.array([len(history) for history in histories])
        if not length_B.all():
            raise ValueError(f"history {int(np.argmin(length_B)) + 1} is empty: give one item id at least")
        items_N = np.array([self.index_of_item[item] for item in flat])
        return Histories(items_N, length_B, np.full(len(histories), len(self.user_ids_U)))

    @torch.inference_mode()
    def lists(self, histories: Histories, n: int, *, mmr_weight: float | None = None) -> tuple[Lists, Tensor]:
        """The best items of each history, unseen ones where none come back, and their scores (B, N)."""
        training, targets = self.aimed(histories)
        example_B = torch.arange(len(histories.length_B))
        scores_BI = item_scores(training, targets, example_B, self.rows_ID).float()
        relevance_BI = scaled_relevance(scores_BI, *left_out(training, targets, example_B))
        if mmr_weight is None:
            lists = top_lists(relevance_BI, n)
        else:
            lists = mmr_lists(relevance_BI, self.unit_ID, weight=mmr_weight, length=n)
        return lists, scores_BI.gather(1, lists.place_BN)

    @torch.inference_mode()
    def states(self, histories: Histories) -> Tensor:
        """(B, D): vectors whose products with `rows_ID` are the scores."""
        training, targets = self.aimed(histories)
        return user_states(training, targets, torch.arange(len(histories.length_B)), self.rows_ID)

    @torch.inference_mode()
    def score_and_rank(self, histories: Histories, item: int) -> tuple[Tensor, Tensor]:
        """<state, item> of an item_index after each history, its rank among what `lists` may hold: (B,) each."""
        training, targets = self.aimed(histories)
        example_B = torch.arange(len(histories.length_B))
        scores_BI = item_scores(training, targets, example_B, self.rows_ID).float()
        target_B = torch.full_like(example_B, item).to(training.device)
        rank_B = full_ranks(scores_BI, target_B, *left_out(training, targets, example_B))
        return scores_BI[:, item - 1], rank_B

    @torch.inference_mode()
    def split_scores(self, histories: Histories, item_C: Tensor) -> ScoreParts:
        """The scores of items, as item_index, after each history: a base part and a term per aspect."""
        training, targets = self.aimed(histories)
        states = encoder_states(training, targets, torch.arange(len(histories.length_B)), self.rows_ID)
        return training.model.embedding.split_score(*states, item_C.to(training.device))

    def aimed(self, histories: Histories) -> tuple[Training, Targets]:
        """What the loop's functions need to score the item after each whole history."""
        inputs = self.training.inputs._replace(items_N=torch.from_numpy(histories.items_N))
        targets = targets_behind(histories, max_history=self.training.config.max_history)
        return dataclasses.replace(self.training, inputs=inputs), targets


def load_recommender(run: str, *, list_scores: str | None = None, device: str = "cpu") -> Recommender:
    """The recommender of a finished train run; its data and scores must be where they were.

    `list_scores`: id -> vectors, in which lists re-ranked by MMR are diverse; None takes the refined item vectors.
    """
    return open_recommender(read_train_config(run), run, list_scores=list_scores, device=device)


def read_train_config(run: str) -> TrainConfig:
    """Of a finished train run, with absolute paths and without what only an evaluation needs.

    RunError where data or scores are gone, or have changed: other items would stand behind the model's rows.
    """
    record = runs.read_run(run, job="train")
    for path, digest in record["inputs"].items():
        if not files.exists(path):
            raise runs.RunError(f"{run} was trained on {path}, which is not there: put it back, or train again")
        if files.fingerprint(path) != digest:
            raise runs.RunError(f"{run} was trained on other content of {path}: train it again")
    config = check_config(TrainConfig, record["config"], source=f"{run}/run.json")
    return dataclasses.replace(with_absolute_paths(config), candidates=("full",), list_scores=None)


def open_recommender(config: TrainConfig, run: str, *, list_scores: str | None, device: str) -> Recommender:
    training = start_training(config, load_inputs(config), torch.device(device), Share())
    filesystem, inner = files.filesystem_of(files.join(run, MODEL))
    training.model.load_state_dict(safetensors.torch.load(filesystem.cat_file(inner)))
    training.model.eval()
    if training.model.embedding.has_user_side:
        add_average_user(training.model.embedding)
    rows_ID = training.model.embedding.item_rows().detach()
    item_ids_I, user_ids_U = read_ids(config.data, ITEMS, "item"), read_ids(config.data, USERS, "user")
    return Recommender(
        training=training,
        rows_ID=rows_ID,
        unit_ID=unit_rows(rows_ID if list_scores is None else guided_rows(list_scores, config, item_ids_I)).to(device),
        item_ids_I=item_ids_I,
        user_ids_U=user_ids_U,
        index_of_item={one: place for place, one in enumerate(item_ids_I.tolist(), start=1)},
        index_of_user={one: place for place, one in enumerate(user_ids_U.tolist())},
    )


def guided_rows(list_scores: str, config: TrainConfig, item_ids_I: np.ndarray) -> Tensor:
    vectors = read_vectors(list_scores, subjects="items", column=config.score_column, aspects=None)
    scores = align_items(vectors, item_ids_I, missing=config.missing_scores, control="none", seed=0)
    return torch.from_numpy(standardise(scores.scores_IA)[0])


def add_average_user(embedding: RefinedEmbedding) -> None:
    """One more row of users' standardised vectors, for somebody who is none of them: the mean is 0.

    Of vectors that were trained further it is the mean of what training added.
    """
    embedding.users_UA = torch.cat([embedding.users_UA, torch.zeros_like(embedding.users_UA[:1])])
    if embedding.tuning_UA is not None:
        tuning_UA = embedding.tuning_UA.detach()
        embedding.tuning_UA = torch.nn.Parameter(torch.cat([tuning_UA, tuning_UA.mean(0, keepdim=True)]))


def targets_behind(histories: Histories, *, max_history: int) -> Targets:
    """One target after each whole history; what it is nobody knows."""
    end_B = np.cumsum(histories.length_B)
    first_B = end_B - histories.length_B
    start_B = np.maximum(first_B, end_B - max_history)
    columns = (histories.user_B, start_B, end_B - start_B, first_B, end_B)
    return Targets(*(torch.from_numpy(column.astype(np.int64)) for column in columns))


def check_known(ids: Sequence[str], known: dict[str, int], kind: str, data: str) -> None:
    unknown = np.array([one for one in dict.fromkeys(ids) if one not in known])
    if len(unknown):
        raise ValueError(f"{data} has no {kind} {named(unknown)} ({len(unknown)} unknown, {len(known)} known {kind}s)")
