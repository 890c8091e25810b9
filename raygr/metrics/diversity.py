"""Diversity of recommended lists: maximal marginal relevance (Carbonell and Goldstein 1998), intra-list diversity.

MMR takes items one by one, each time the item with the greatest

    weight * relevance - (1 - weight) * greatest similarity to an item taken before     (similarity 0 for the first)

Relevance is the recommender's score, scaled per user to [0, 1] over the items that may be recommended: weight 1 keeps
the recommender's order. Similarity is the cosine of item vectors, refined or guided. As a metric, the MMR of a list is
the mean of the same expression over its places, in [-1, 1]; greater is better.
Shape suffixes: `B` users, `I` items, `D` dimensions, `P` items of a pool, `N` items of a list.
"""

from typing import NamedTuple

import torch
from torch import Tensor

POOL = 100  # re-ranked lists are taken from this many most relevant items of the user
UNAVAILABLE = -3.0  # below every value of MMR, and above that of an item already taken


class Lists(NamedTuple):
    """Recommended items, best first. Relevance is -inf where a user has fewer items left than the list has places."""

    place_BN: Tensor
    """item_index - 1."""
    relevance_BN: Tensor


def unit_rows(vectors_ID: Tensor) -> Tensor:
    """Rows of length 1, whose products are cosines. A row of zeros stays 0 and is similar to nothing."""
    return torch.nn.functional.normalize(vectors_ID.float(), dim=1)


def scaled_relevance(scores_BI: Tensor, seen_row_N: Tensor, seen_item_N: Tensor) -> Tensor:
    """Scales scores to [0, 1] over the unseen items of each user; -inf for the seen (row, item_index) pairs.

    If all unseen items have the same score, all become 0.
    """
    unseen_BI = torch.ones_like(scores_BI, dtype=torch.bool)
    unseen_BI[seen_row_N, seen_item_N - 1] = False
    low_B1 = scores_BI.masked_fill(~unseen_BI, torch.inf).amin(dim=1, keepdim=True)
    high_B1 = scores_BI.masked_fill(~unseen_BI, -torch.inf).amax(dim=1, keepdim=True)
    spread_B1 = (high_B1 - low_B1).clamp_min(1e-12)
    return ((scores_BI - low_B1) / spread_B1).masked_fill(~unseen_BI, -torch.inf)


def top_lists(relevance_BI: Tensor, length: int) -> Lists:
    """The `length` most relevant items, at most the catalogue. Items of equal relevance come in any order."""
    relevance_BN, place_BN = relevance_BI.topk(min(length, relevance_BI.shape[1]), dim=1)
    return Lists(place_BN, relevance_BN)


def mmr_lists(relevance_BI: Tensor, unit_ID: Tensor, *, weight: float, length: int) -> Lists:
    """Takes lists greedily by MMR from each user's `POOL` most relevant items (or `length`, if that is more)."""
    pool = top_lists(relevance_BI, max(POOL, length))
    unit_BPD = unit_ID[pool.place_BN]
    chosen_BN = mmr_order(pool.relevance_BN, unit_BPD @ unit_BPD.transpose(1, 2), weight=weight, length=length)
    return Lists(pool.place_BN.gather(1, chosen_BN), pool.relevance_BN.gather(1, chosen_BN))


def mmr_order(relevance_BP: Tensor, similarity_BPP: Tensor, *, weight: float, length: int) -> Tensor:
    """Places in the pool of the items that MMR takes, in the order in which it takes them, (B, N)."""
    row_B = torch.arange(len(relevance_BP), device=relevance_BP.device)
    is_there_BP = relevance_BP > -torch.inf
    gain_BP = weight * relevance_BP.masked_fill(~is_there_BP, 0.0)
    redundancy_BP = torch.zeros_like(gain_BP)
    taken_BP = torch.zeros_like(is_there_BP)
    chosen = []
    for step in range(min(length, relevance_BP.shape[1])):
        value_BP = (gain_BP - (1 - weight) * redundancy_BP).masked_fill(~is_there_BP, UNAVAILABLE)
        chosen_B = value_BP.masked_fill(taken_BP, -torch.inf).argmax(dim=1)
        chosen.append(chosen_B)
        taken_BP[row_B, chosen_B] = True
        to_chosen_BP = similarity_BPP[row_B, chosen_B]
        # similarities may be negative: those to the first item replace the 0 of the empty list
        redundancy_BP = torch.maximum(redundancy_BP, to_chosen_BP) if step else to_chosen_BP
    return torch.stack(chosen, dim=1)


def list_similarity(lists: Lists, unit_ID: Tensor) -> Tensor:
    """Cosines between the items of each list, (B, N, N)."""
    unit_BND = unit_ID[lists.place_BN]
    return unit_BND @ unit_BND.transpose(1, 2)


def list_mmr(relevance_BN: Tensor, similarity_BNN: Tensor, *, weight: float) -> Tensor:
    """The mean over places of weight * relevance - (1 - weight) * greatest similarity to an earlier place, (B,)."""
    length = relevance_BN.shape[1]
    is_earlier_NN = torch.ones(length, length, dtype=torch.bool, device=relevance_BN.device).tril(-1)
    redundancy_BN = similarity_BNN.masked_fill(~is_earlier_NN, -torch.inf).amax(dim=2)
    redundancy_BN[:, 0] = 0.0
    is_there_BN = relevance_BN > -torch.inf
    value_BN = (weight * relevance_BN - (1 - weight) * redundancy_BN).masked_fill(~is_there_BN, 0.0)
    return value_BN.sum(1) / is_there_BN.sum(1).clamp_min(1)


def intra_list_diversity(relevance_BN: Tensor, similarity_BNN: Tensor) -> Tensor:
    """The mean of 1 - cosine over pairs of items of a list, (B,), in [0, 2]; 0 for lists of one item."""
    is_there_BN = relevance_BN > -torch.inf
    is_pair_BNN = is_there_BN[:, :, None] & is_there_BN[:, None, :]
    is_pair_BNN = is_pair_BNN.triu(1)
    distance_BNN = (1 - similarity_BNN).masked_fill(~is_pair_BNN, 0.0)
    return distance_BNN.sum((1, 2)) / is_pair_BNN.sum((1, 2)).clamp_min(1)
