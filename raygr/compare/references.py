"""Popularity and chance, the references of every comparison, computed from the prepared interactions without training.

Popularity ranks items by their train interactions, under the run's own protocol and tie rule. Chance is the mean of the
metrics over all orders of the candidates. Shape letters: `E` targets, `B` targets of a batch, `I` items, `U` users,
`C` candidates, `N` interactions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from raygr import files, runs
from raygr.data.interactions import Interactions, read_interactions
from raygr.metrics.rank_tables import Ranking, candidates_of
from raygr.metrics.ranking import mean_ranks
from raygr.schema import CANDIDATES, TRAIN
from raygr.train.batches import Targets, seen_pairs

POPULARITY, CHANCE = "popularity", "chance"
TARGETS_AT_ONCE = 1 << 14


def why_not(data: str, protocol: Mapping[str, Any]) -> str | None:
    """Why popularity and chance cannot be computed; None if they can."""
    if not runs.is_finished(data):
        return f"{data} is not there any more"
    if protocol["data"] != files.fingerprint(data):
        return f"{data} has other content than the runs were trained on"
    return None


def reference_rankings(run: str, data: str, rankings: Mapping[str, Ranking]) -> dict[str, dict[str, Ranking]]:
    """Ranks the targets of `rankings` by popularity and by chance: POPULARITY or CHANCE -> ranking's name -> ranking.

    `run` is the train run of these rankings; sampled candidates are read from it.
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
    """(U, C): the sampled candidates of each user, as item_index."""
    table = files.read_table(files.join(run, CANDIDATES)).filter(pc.field("candidates") == name)
    # chunk by chunk, because 32-bit offsets may be too small for all of them
    items = [chunk.flatten().to_numpy() for chunk in table["items"].chunks]
    return np.concatenate(items).astype(np.int64).reshape(len(table), -1)


def popularity_ranks(
    found: Interactions, ranking: Ranking, train_count_I: np.ndarray, candidates_UC: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Each target's rank by train interactions, and the number of items in the ranking with the target: (E,) each.

    The ranking is over the whole catalogue if `candidates_UC` is None.
    """
    user_E, position_E = (column.astype(np.int64) for column in (ranking.user_E, ranking.position_E))
    first_E = np.searchsorted(found.user_N, user_E)
    columns = (user_E, first_E, position_E, first_E, first_E + position_E)
    targets, items_N = Targets(*map(torch.from_numpy, columns)), torch.from_numpy(found.item_N)
    sorted_I = np.sort(train_count_I)
    parts = []
    for example_B in torch.arange(len(user_E)).split(TARGETS_AT_ONCE):
        target_B = items_N[targets.target_at_E[example_B]].numpy()
        if candidates_UC is None:
            # seen items are left out, unless users may interact with an item again
            seen_by_B = example_B[:0] if found.repeats else example_B
            row_N, seen_N = (column.numpy() for column in seen_pairs(items_N, targets, seen_by_B))
            parts.append(catalogue_ranks(target_B, row_N, seen_N, train_count_I, sorted_I))
        else:
            others_BC = candidates_UC[user_E[example_B]]
            counts = (torch.from_numpy(train_count_I[items - 1]) for items in (others_BC, target_B[:, None]))
            parts.append((mean_ranks(*counts).numpy(), np.full(len(target_B), others_BC.shape[1] + 1)))
    rank_E, among_E = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rank_E, among_E


def catalogue_ranks(
    target_B: np.ndarray, row_N: np.ndarray, item_N: np.ndarray, count_I: np.ndarray, sorted_I: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks among all unseen items, and the number of these items: (B,) each.

    Seen items are pairs of a row of the batch and an item_index; `sorted_I` is `count_I` in ascending order.
    """
    items, rows = len(count_I), len(target_B)
    own_B = count_I[target_B - 1]
    greater_B = items - np.searchsorted(sorted_I, own_B, side="right")
    equal_B = items - greater_B - np.searchsorted(sorted_I, own_B) - 1
    # pairs may repeat, and the target may be one of the seen items
    row_N, place_N = np.divmod(np.unique(row_N * items + item_N - 1), items)
    is_other_N = place_N != target_B[row_N] - 1
    row_N, seen_N = row_N[is_other_N], count_I[place_N[is_other_N]]
    greater_B = greater_B - np.bincount(row_N[seen_N > own_B[row_N]], minlength=rows)
    equal_B = equal_B - np.bincount(row_N[seen_N == own_B[row_N]], minlength=rows)
    return 1 + greater_B + equal_B / 2, items - np.bincount(row_N, minlength=rows)
