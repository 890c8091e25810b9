"""Popularity and chance, beside which every comparison stands: from the prepared interactions, without training.

Popularity ranks items by their train interactions, under the run's own protocol and tie rule. Chance is the mean of the
metrics over all orders of the candidates. Shape suffixes: `E` targets, `B` those of a batch, `I` items, `U` users,
`C` candidates.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from raygr import runs
from raygr.data.batches import Targets, seen_pairs
from raygr.data.prepared import Interactions, read_interactions
from raygr.evaluation import candidate_ranks, full_ranks
from raygr.rankings import Ranking, candidates_of
from raygr.schema import CANDIDATES, TRAIN

POPULARITY, CHANCE = "popularity", "chance"
SCORES_AT_ONCE = 1 << 23


def why_not(data: str, protocol: Mapping[str, Any]) -> str | None:
    """What keeps popularity and chance from being computed; None if nothing does."""
    if not runs.is_finished(data):
        return f"{data} is not there any more"
    if protocol["data"] != runs.fingerprint(data):
        return f"{data} has other content than the runs were trained on"
    return None


def reference_rankings(run: str, data: str, rankings: Mapping[str, Ranking]) -> dict[str, dict[str, Ranking]]:
    """POPULARITY and CHANCE -> their rankings of the same targets, by name.

    `run` is a train run with these rankings: sampled candidates are read from it.
    """
    found = read_interactions(data)
    train_count_I = np.bincount(found.item_N[found.split_N == TRAIN] - 1, minlength=found.items)
    made: dict[str, dict[str, Ranking]] = {POPULARITY: {}, CHANCE: {}}
    for name, ranking in rankings.items():
        candidates = candidates_of(name)
        candidates_UC = None if candidates == "full" else read_candidates(run, candidates)
        rank_E, among_E = popularity_ranks(found, ranking, train_count_I, candidates_UC)
        made[POPULARITY][name] = ranking._replace(rank_E=rank_E)
        made[CHANCE][name] = ranking._replace(rank_E=(among_E + 1) / 2, among_E=among_E)
    return made


def read_candidates(run: str, name: str) -> np.ndarray:
    """(U, C) item_index."""
    table = runs.read_table(runs.join(run, CANDIDATES)).filter(pc.field("candidates") == name).sort_by("user_index")
    items = table["items"].combine_chunks()
    return items.flatten().to_numpy().astype(np.int64).reshape(len(table), -1)


def popularity_ranks(
    found: Interactions, ranking: Ranking, train_count_I: np.ndarray, candidates_UC: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each target's rank by train interactions, and among how many items it is ranked, itself counted: (E,) each."""
    items_N, score_I = torch.from_numpy(found.item_N), torch.from_numpy(train_count_I.astype(np.float64))
    user_E, position_E = (column.astype(np.int64) for column in (ranking.user_E, ranking.position_E))
    first_E = np.searchsorted(found.user_N, user_E)
    columns = (user_E, first_E, position_E, first_E, first_E + position_E)
    targets = Targets(*map(torch.from_numpy, columns))
    rank_E, among_E = np.zeros(len(user_E)), np.zeros(len(user_E), np.int64)
    for example_B in torch.arange(len(user_E)).split(max(1, SCORES_AT_ONCE // found.items)):
        target_B, scores_BI = items_N[targets.target_at_E[example_B]], score_I.expand(len(example_B), -1)
        if candidates_UC is None:
            seen = seen_pairs(items_N, targets, example_B)
            rank_E[example_B] = full_ranks(scores_BI, target_B, *seen)
            among_E[example_B] = ranked_items(found.items, target_B, *seen)
        else:
            candidates_BC = torch.from_numpy(candidates_UC[user_E[example_B]])
            rank_E[example_B] = candidate_ranks(scores_BI, target_B, candidates_BC)
            among_E[example_B] = candidates_BC.shape[1] + 1
    return rank_E, among_E


def ranked_items(
    items: int, target_B: torch.Tensor, seen_row_N: torch.Tensor, seen_item_N: torch.Tensor
) -> torch.Tensor:
    """(B,): the unseen items and the target."""
    is_ranked_BI = torch.ones(len(target_B), items, dtype=torch.bool)
    is_ranked_BI[seen_row_N, seen_item_N - 1] = False
    return is_ranked_BI.scatter_(1, target_B[:, None] - 1, True).sum(1)
