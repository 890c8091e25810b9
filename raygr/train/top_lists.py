"""Top-N lists of the test users: how often the target is in them, how relevant and how diverse they are.

Shape suffixes: `B` users of a batch, `E` targets, `I` items, `N` items of a list.
"""

from typing import Any

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
from raygr.metrics.ranking import metric_values
from raygr.models.embeddings import standardise
from raygr.schema import TEST
from raygr.train.batches import is_last_of_user
from raygr.train.loop import TARGETS_AT_ONCE, Training, item_scores, left_out


@torch.inference_mode()
def list_metrics(training: Training) -> dict[str, Any]:
    """Means over the last test targets: of lists `ranked` as the recommender does, and `reranked` by MMR."""
    training.model.eval()
    config, targets = training.config, training.inputs.targets[TEST]
    rows_ID, unit_ID = training.model.embedding.item_rows(), list_space(training)
    found: dict[str, list[dict[str, Tensor]]] = {"ranked": [], "reranked": []}
    last_E = torch.from_numpy(is_last_of_user(targets.user_E.numpy())).nonzero()[:, 0]
    for example_B in last_E.split(TARGETS_AT_ONCE):
        relevance_BI = scaled_relevance(
            item_scores(training, targets, example_B, rows_ID).float(), *left_out(training, targets, example_B)
        )
        ranked = top_lists(relevance_BI, config.list_length)
        reranked = mmr_lists(relevance_BI, unit_ID, weight=config.mmr_weight, length=config.list_length)
        target_B = training.inputs.items_N[targets.target_at_E[example_B]].to(training.device)
        for name, lists in (("ranked", ranked), ("reranked", reranked)):
            found[name].append(metrics_of_lists(lists, target_B, unit_ID, weight=config.mmr_weight))
    means = {
        name: {key: torch.cat([one[key] for one in parts]).mean().item() for key in parts[0]}
        for name, parts in found.items()
    }
    return {"length": config.list_length, "mmr_weight": config.mmr_weight, "scores": config.list_scores, **means}


def list_space(training: Training) -> Tensor:
    """Unit vectors of items 1..I whose cosine is the similarity: `list_scores`, or the model's refined vectors."""
    scores_IA = training.inputs.list_scores_IA
    if scores_IA is None:
        return unit_rows(training.model.embedding.item_rows())
    return unit_rows(torch.as_tensor(standardise(scores_IA)[0], device=training.device))


def metrics_of_lists(lists: Lists, target_B: Tensor, unit_ID: Tensor, *, weight: float) -> dict[str, Tensor]:
    """(B,) each; recall and NDCG are of the whole list's length."""
    similarity_BNN = list_similarity(lists, unit_ID)
    is_target_BN = (lists.place_BN + 1 == target_B[:, None]) & (lists.relevance_BN > -torch.inf)
    is_hit_B = is_target_BN.any(1)
    length = lists.place_BN.shape[1]
    rank_B = torch.where(is_hit_B, is_target_BN.int().argmax(1) + 1, length + 1)
    return {
        "recall": is_hit_B.double(),
        "ndcg": torch.from_numpy(metric_values(f"ndcg_at_{length}", rank_B.cpu().numpy())),
        "mmr": list_mmr(lists.relevance_BN, similarity_BNN, weight=weight),
        "intra_list_diversity": intra_list_diversity(lists.relevance_BN, similarity_BNN),
    }
