"""Evaluation of a model during and after training: ranks of targets, shares of the score, and recommended lists.

The model scores items as models/inference.py says. Shape letters: `E` targets, `B` targets of a batch,
`I` items, `D` width, `Y` places of a list.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raygr.metrics.diversity import (
    Lists,
    intra_list_diversity,
    list_mmr,
    list_similarity,
    mmr_lists,
    scaled_relevance,
    top_lists,
    unit_rows,
)
from raygr.metrics.ranking import candidate_ranks, full_ranks, metric_values
from raygr.metrics.z_scores import standardise
from raygr.models.inference import UserStates, base_parts, encode_users, relative_change, score_items
from raygr.schema import CALIBRATED, TEST
from raygr.train.batches import (
    Targets,
    history_batch,
    is_last_of_user,
    ranked_items,
    seen_pairs,
)
from raygr.train.run_metrics import ListFigures
from raygr.train.state import Training

TARGETS_AT_ONCE = 256  # 256 x 30,000 items x 4 bytes = 31 MB of scores
SHARES_OF_USERS = 512  # test users whose scores `score_shares` and `base_moved` look at


def user_states(training: Training, targets: Targets, example_B: Tensor, rows_ID: Tensor) -> UserStates:
    """The users' states right before their targets; `example_B` are places among the targets."""
    inputs, start_B, length_B = training.inputs, targets.start_E[example_B], targets.length_E[example_B]
    history_BL = history_batch(inputs.items_N, start_B, length_B)
    rating_BL = history_batch(inputs.rating_N, start_B, length_B, padding=torch.nan)
    return encode_users(training.model, rows_ID, history_BL, length_B, rating_BL, targets.user_E[example_B])


def item_scores(training: Training, targets: Targets, example_B: Tensor, rows_ID: Tensor) -> Tensor:
    """The scores of items 1..I for each target, (B, I)."""
    return score_items(training.model, rows_ID, user_states(training, targets, example_B, rows_ID))


def left_out(training: Training, targets: Targets, example_B: Tensor) -> tuple[Tensor, Tensor]:
    """(row in the batch, item_index) pairs that are not ranked: the seen items, or none in data with repeats.

    New items that the user had before count as seen, although no history holds them.
    """
    inputs, device = training.inputs, training.device
    example_B = example_B[:0] if inputs.repeats else example_B
    row_N, item_N = seen_pairs(inputs.items_N, targets, example_B, inputs.new)
    return row_N.to(device), item_N.to(device)


# --- ranks ---------------------------------------------------------------------------------------


@torch.inference_mode()
def target_ranks(
    training: Training, part: str, candidate_sets: Sequence[str], offset: float = 0.0
) -> dict[str, Tensor]:
    """The rank of every target of the part in each candidate set, (E,). The workers share the targets.

    `offset` is added to the scores of new items in the candidate set CALIBRATED.
    """
    training.model.eval()
    targets, share = training.inputs.targets[part], training.share
    ranks = {name: torch.zeros(len(targets.user_E)) for name in candidate_sets}
    rows_ID = training.model.embedding.item_rows()
    for example_B in torch.arange(share.rank, len(targets.user_E), share.workers).split(TARGETS_AT_ONCE):
        scores_BI = item_scores(training, targets, example_B, rows_ID)
        for name, rank_E in ranks.items():
            rank_E[example_B] = batch_ranks(training, targets, example_B, scores_BI, name, offset).cpu()
    # the sum gathers: every worker left the other workers' targets at 0
    return {name: share.total(rank_E.to(training.device)).cpu() for name, rank_E in ranks.items()}


def batch_ranks(
    training: Training, targets: Targets, example_B: Tensor, scores_BI: Tensor, candidate_set: str, offset: float
) -> Tensor:
    inputs, device = training.inputs, training.device
    target_B = targets.items(inputs.items_N, example_B).to(device)
    if candidate_set in inputs.candidates:
        candidates_BC = inputs.candidates[candidate_set][targets.user_E[example_B]].long().to(device)
        return candidate_ranks(scores_BI, target_B, candidates_BC)
    first, end = ranked_items(candidate_set, inputs.items, inputs.new_items)
    if candidate_set == CALIBRATED:
        known = inputs.items - inputs.new_items
        scores_BI = torch.cat([scores_BI[:, :known], scores_BI[:, known:] + offset], dim=1)
    row_N, item_N = left_out(training, targets, example_B)
    is_ranked_N = (item_N > first) & (item_N <= end)
    seen = row_N[is_ranked_N], item_N[is_ranked_N] - first
    return full_ranks(scores_BI[:, first:end], target_B - first, *seen)


# --- parts of the score --------------------------------------------------------------------------


@torch.inference_mode()
def score_shares(training: Training) -> dict[str, float] | None:
    """The share of each part in the variance of the test users' scores; None for a base model."""
    if training.inputs.scores is None:
        return None
    training.model.eval()
    targets, rows_ID = training.inputs.targets[TEST], training.model.embedding.item_rows()
    example_B = torch.arange(min(len(targets.user_E), SHARES_OF_USERS))
    return training.model.embedding.score_shares(*user_states(training, targets, example_B, rows_ID))


@torch.inference_mode()
def base_moved(training: Training) -> float | None:
    """`relative_change` of the test users' base parts without the history's aspects; None for a base model."""
    if training.inputs.scores is None:
        return None
    training.model.eval()
    targets = training.inputs.targets[TEST]
    length_B = targets.length_E[:SHARES_OF_USERS]
    history_BL = history_batch(training.inputs.items_N, targets.start_E[:SHARES_OF_USERS], length_B)
    return relative_change(*base_parts(training.model, history_BL, length_B))


# --- recommended lists ---------------------------------------------------------------------------


@torch.inference_mode()
def list_metrics(training: Training) -> ListFigures:
    """Mean metrics of the test users' top-N lists: `ranked` by score, and `reranked` by MMR.

    Each list is made before the user's last test target.
    """
    training.model.eval()
    config, targets = training.config, training.inputs.targets[TEST]
    rows_ID, known = training.model.embedding.item_rows(), training.inputs.items - training.inputs.new_items
    unit_ID = list_space(training)[:known]
    found: dict[str, list[dict[str, Tensor]]] = {"ranked": [], "reranked": []}
    last_E = torch.from_numpy(is_last_of_user(targets.user_E.numpy())).nonzero()[:, 0]
    for example_B in last_E.split(TARGETS_AT_ONCE):
        scores_BI = item_scores(training, targets, example_B, rows_ID)[:, :known].float()
        row_N, item_N = left_out(training, targets, example_B)
        is_known_N = item_N <= known
        relevance_BI = scaled_relevance(scores_BI, row_N[is_known_N], item_N[is_known_N])
        ranked = top_lists(relevance_BI, config.list_length)
        reranked = mmr_lists(relevance_BI, unit_ID, weight=config.mmr_weight, length=config.list_length)
        target_B = targets.items(training.inputs.items_N, example_B).to(training.device)
        for name, lists in (("ranked", ranked), ("reranked", reranked)):
            found[name].append(metrics_of_lists(lists, target_B, unit_ID, weight=config.mmr_weight))
    means = {
        name: {key: torch.cat([one[key] for one in parts]).mean().item() for key in parts[0]}
        for name, parts in found.items()
    }
    return ListFigures(config.list_length, config.mmr_weight, config.list_scores, **means)


def list_space(training: Training) -> Tensor:
    """Unit vectors of items 1..I whose cosine is the similarity: of `list_scores`, or of the model's refined rows."""
    scores_IA = training.inputs.list_scores_IA
    if scores_IA is None:
        return unit_rows(training.model.embedding.input_rows())
    return unit_rows(torch.as_tensor(standardise(scores_IA)[0], device=training.device))


def metrics_of_lists(lists: Lists, target_B: Tensor, unit_ID: Tensor, *, weight: float) -> dict[str, Tensor]:
    """One value per user, (B,) each. Recall and NDCG take the whole list."""
    similarity_BYY = list_similarity(lists, unit_ID)
    is_target_BY = (lists.place_BY + 1 == target_B[:, None]) & (lists.relevance_BY > -torch.inf)
    is_hit_B = is_target_BY.any(1)
    length = lists.place_BY.shape[1]
    rank_B = torch.where(is_hit_B, is_target_BY.int().argmax(1) + 1, length + 1)
    return {
        "recall": is_hit_B.double(),
        "ndcg": torch.from_numpy(metric_values(f"ndcg_at_{length}", rank_B.cpu().numpy())),
        "mmr": list_mmr(lists.relevance_BY, similarity_BYY, weight=weight),
        "intra_list_diversity": intra_list_diversity(lists.relevance_BY, similarity_BYY),
    }
