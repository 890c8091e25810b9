"""Popularity, chance, classic recommenders and the truth of simulated shoppers: the references of a comparison.

Popularity ranks items by their train interactions, under the run's own protocol and tie rule. Chance is the mean of the
metrics over all orders of the candidates. Classic recommenders (classic.py) and the truth, which is the model that
simulated shoppers choose by, rank after the same interactions as the arms. Shape letters: `E` targets, `B` targets of a
batch, `I` items, `U` users, `C` candidates, `N` interactions.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from raygr import files, runs
from raygr.compare.classic import EASE, LARGEST_EASE, Scorer, chosen_model, scores_after
from raygr.data.interactions import Interactions, NewTargets, read_ids, read_interactions, read_new_targets
from raygr.metrics.rank_tables import NEW_TARGETS, Ranking, candidates_of
from raygr.metrics.ranking import candidate_ranks, full_ranks, mean_ranks
from raygr.schema import CANDIDATES, ITEMS, TRAIN, USERS
from raygr.simulate.truth import RECENT, ShopTruth, read_truth, true_logits
from raygr.train.batches import Targets, new_item_targets, ranked_items, seen_pairs, with_new_before

POPULARITY, CHANCE = "popularity", "chance"
TRUTH, TASTELESS = "truth", "truth without tastes"
TARGETS_AT_ONCE = 1 << 14
SCORED_AT_ONCE = 1 << 10  # targets times 20,000 items times 8 bytes = 160 MB of scores


def why_not(data: str, protocol: Mapping[str, Any]) -> str | None:
    """Why popularity and chance cannot be computed; None if they can."""
    if not runs.is_finished(data):
        return f"{data} is not there any more"
    if protocol["data"] != files.fingerprint(data):
        return f"{data} has other content than the runs were trained on"
    return None


def reference_rankings(
    run: str, data: str, rankings: Mapping[str, Ranking], *, shop: str | None = None
) -> dict[str, dict[str, Ranking]]:
    """Ranks the targets of `rankings` by each reference: its name -> ranking's name -> ranking.

    References are popularity and chance, and, for a simulate run `shop`, the truth with and without tastes. `run` is
    the train run of these rankings; sampled candidates are read from it.
    """
    found, new = read_interactions(data), read_new_targets(data)
    train_count_I = np.bincount(found.item_N[found.split_N == TRAIN] - 1, minlength=found.items)
    made: dict[str, dict[str, Ranking]] = {POPULARITY: {}, CHANCE: {}}
    if shop:
        made |= {TRUTH: {}, TASTELESS: {}}
        truth = read_truth(shop, user_ids_U=read_ids(data, USERS, "user"), item_ids_I=read_ids(data, ITEMS, "item"))
    for name, ranking in rankings.items():
        rank_E, among_E = popularity_ranks(run, found, new, name, ranking, train_count_I)
        made[POPULARITY][name] = ranking._replace(rank_E=rank_E)
        made[CHANCE][name] = ranking._replace(rank_E=(among_E + 1) / 2, among_E=among_E)
        if shop:
            for reference, tastes in ((TRUTH, True), (TASTELESS, False)):
                rank_E = truth_ranks(run, found, name, ranking, truth, tastes=tastes)
                made[reference][name] = ranking._replace(rank_E=rank_E)
    return made


class ClassicRankings(NamedTuple):
    """A classic recommender's rankings of the test targets, by name, and the settings that validation chose."""

    rankings: dict[str, Ranking]
    settings: dict[str, float]


def classic_rankings(
    run: str, data: str, rankings: Mapping[str, Ranking], names: Sequence[str]
) -> dict[str, ClassicRankings | str]:
    """Ranks the targets of `rankings` by each recommender of `classic.GRIDS`, or says why one is left out."""
    found, new = read_interactions(data), read_new_targets(data)

    def ranks(candidates: str, scorer: Scorer, targets: Targets) -> np.ndarray:
        return score_ranks(
            run, found, new, candidates, targets, lambda example_B: scores_after(scorer, found, targets, example_B, new)
        )

    made: dict[str, ClassicRankings | str] = {}
    for name in names:
        if name == EASE and found.items > LARGEST_EASE:
            made[name] = f"it inverts a matrix of {found.items:,} x {found.items:,} items, more than {LARGEST_EASE:,}"
            continue
        scorer, settings = chosen_model(name, found, partial(ranks, "full"))
        made[name] = ClassicRankings(
            {
                one: ranking._replace(
                    rank_E=ranks(candidates_of(one), scorer, ranked_targets(found, new, one, ranking))
                )
                for one, ranking in rankings.items()
            },
            settings,
        )
    return made


def read_candidates(run: str, name: str) -> np.ndarray:
    """(U, C): the sampled candidates of each user, as item_index."""
    table = files.read_table(files.join(run, CANDIDATES)).filter(pc.field("candidates") == name)
    # chunk by chunk, because 32-bit offsets may be too small for all of them
    items = [chunk.flatten().to_numpy() for chunk in table["items"].chunks]
    return np.concatenate(items).astype(np.int64).reshape(len(table), -1)


def popularity_ranks(
    run: str, found: Interactions, new: NewTargets | None, name: str, ranking: Ranking, train_count_I: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each target's rank by train interactions, and the number of items in the ranking with the target: (E,) each.

    New items have no train interactions and share the last ranks.
    """
    candidates, targets = candidates_of(name), ranked_targets(found, new, name, ranking)
    items_N = torch.from_numpy(found.item_N)
    sampled = candidates.endswith("-100")
    candidates_UC = read_candidates(run, candidates) if sampled else None
    first, end = ranked_items(candidates, found.items, found.new_items)
    count_I = train_count_I[first:end]
    sorted_I = np.sort(count_I)
    parts = []
    for example_B in torch.arange(len(targets.user_E)).split(TARGETS_AT_ONCE):
        target_B = targets.items(items_N, example_B).numpy()
        if candidates_UC is None:
            # seen items are left out, unless users may interact with an item again
            seen_by_B = example_B[:0] if found.repeats else example_B
            row_N, seen_N = (one.numpy() for one in seen_pairs(items_N, targets, seen_by_B, new))
            is_ranked_N = (seen_N > first) & (seen_N <= end)
            seen = row_N[is_ranked_N], seen_N[is_ranked_N] - first
            parts.append(catalogue_ranks(target_B - first, *seen, count_I, sorted_I))
        else:
            others_BC = candidates_UC[targets.user_E[example_B]]
            counts = (torch.from_numpy(train_count_I[items - 1]) for items in (others_BC, target_B[:, None]))
            parts.append((mean_ranks(*counts).numpy(), np.full(len(target_B), others_BC.shape[1] + 1)))
    rank_E, among_E = (np.concatenate(column) for column in zip(*parts, strict=True))
    return rank_E, among_E


def truth_ranks(
    run: str, found: Interactions, name: str, ranking: Ranking, truth: ShopTruth, *, tastes: bool
) -> np.ndarray:
    """Each target's rank by the shoppers' own choice model, (E,). The data have no new items (`check_truth`)."""
    targets, items_N = ranked_targets(found, None, name, ranking), torch.from_numpy(found.item_N)

    def logits(example_B: Tensor) -> Tensor:
        user_B, at_B = targets.user_E[example_B], targets.target_at_E[example_B]
        # Where only one interaction is before the target, it stands for all recent ones: their mean is the same.
        at_BL = torch.maximum(at_B[:, None] - torch.arange(RECENT, 0, -1), targets.first_seen_E[example_B][:, None])
        return torch.from_numpy(true_logits(truth, user_B.numpy(), items_N[at_BL].numpy(), tastes=tastes))

    return score_ranks(run, found, None, candidates_of(name), targets, logits)


def score_ranks(
    run: str,
    found: Interactions,
    new: NewTargets | None,
    candidates: str,
    targets: Targets,
    scores_of: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """Each target's rank by scores of all items, (E,), in the candidate set of this name.

    `scores_of` takes places among the targets and returns their scores, (B, I).
    """
    items_N, parts = torch.from_numpy(found.item_N), []
    candidates_UC = read_candidates(run, candidates) if candidates.endswith("-100") else None
    first, end = ranked_items(candidates, found.items, found.new_items)
    for example_B in torch.arange(len(targets.user_E)).split(SCORED_AT_ONCE):
        scores_BI, target_B = scores_of(example_B), targets.items(items_N, example_B)
        if candidates_UC is None:
            row_N, item_N = seen_pairs(items_N, targets, example_B[:0] if found.repeats else example_B, new)
            is_ranked_N = (item_N > first) & (item_N <= end)
            seen = row_N[is_ranked_N], item_N[is_ranked_N] - first
            parts.append(full_ranks(scores_BI[:, first:end], target_B - first, *seen))
        else:
            parts.append(
                candidate_ranks(scores_BI, target_B, torch.from_numpy(candidates_UC[targets.user_E[example_B]]))
            )
    return torch.cat(parts).double().numpy()


def ranked_targets(found: Interactions, new: NewTargets | None, name: str, ranking: Ranking) -> Targets:
    """The targets of a ranking; those with new items are in the order of the prepare run, as the ranks are."""
    if new is not None and name.endswith(NEW_TARGETS):
        return new_item_targets(new, found.user_N, max_history=1)
    user_E, position_E = (column.astype(np.int64) for column in (ranking.user_E, ranking.position_E))
    first_E = np.searchsorted(found.user_N, user_E)
    targets = Targets(*map(torch.from_numpy, (user_E, first_E, position_E, first_E, first_E + position_E)))
    return targets if new is None else with_new_before(targets, new)


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
