"""Diversity of recommended lists: maximal marginal relevance (Carbonell and Goldstein 1998), intra-list diversity.

MMR takes items one by one, each time the item with the greatest

    weight * relevance - (1 - weight) * greatest similarity to an item taken before     (similarity 0 for the first)

Relevance is the recommender's score, scaled per user to [0, 1] over the items that may be recommended: weight 1 keeps
the recommender's order. Similarity is the cosine of item vectors, refined or guided. As a metric, the MMR of a list is
the mean of the same expression over its places, in [-1, 1]; greater is better.
Shape letters: `B` users, `I` items, `D` width, `C` candidates: the pool, `Y` places of a list.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 128  # items whose greatest relevance is looked at before the items themselves
POOL = 100  # re-ranked lists are taken from this many most relevant items of the user
UNAVAILABLE = -3.0  # below every value of MMR, and above that of an item already taken


class Lists(NamedTuple):
    """Recommended items, best first. Relevance is -inf where a user has fewer items left than the list has places."""

    place_BY: Tensor
    """item_index - 1."""
    relevance_BY: Tensor


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
    """The `length` most relevant items, at most the catalogue. Items of equal relevance come in any order.

    The best Y items lie in the Y groups with the greatest maxima. Of a large catalogue only these are sorted, because a
    maximum takes a fraction of the time of `topk`.
    """
    items = relevance_BI.shape[1]
    length, groups = min(length, items), items // GROUP
    if groups <= 4 * length:
        relevance_BY, place_BY = relevance_BI.topk(length, dim=1)
        return Lists(place_BY, relevance_BY)
    greatest_BX = relevance_BI[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(2)
    group_BY = greatest_BX.topk(length, dim=1, sorted=False).indices
    place_I = torch.arange(items, device=relevance_BI.device)
    grouped_BC = place_I[: groups * GROUP].view(groups, GROUP)[group_BY].flatten(1)
    place_BC = torch.cat([grouped_BC, place_I[groups * GROUP :].expand(len(grouped_BC), -1)], dim=1)
    relevance_BY, at_BY = relevance_BI.gather(1, place_BC).topk(length, dim=1)
    return Lists(place_BC.gather(1, at_BY), relevance_BY)


def mmr_lists(relevance_BI: Tensor, unit_ID: Tensor, *, weight: float, length: int) -> Lists:
    """Takes lists greedily by MMR from each user's `POOL` most relevant items (or `length`, if that is more)."""
    pool = top_lists(relevance_BI, max(POOL, length))
    unit_BCD = unit_ID[pool.place_BY]
    chosen_BY = mmr_order(pool.relevance_BY, unit_BCD @ unit_BCD.transpose(1, 2), weight=weight, length=length)
    return Lists(pool.place_BY.gather(1, chosen_BY), pool.relevance_BY.gather(1, chosen_BY))


def mmr_order(relevance_BC: Tensor, similarity_BCC: Tensor, *, weight: float, length: int) -> Tensor:
    """Places in the pool of the items that MMR takes, in the order in which it takes them, (B, Y)."""
    row_B = torch.arange(len(relevance_BC), device=relevance_BC.device)
    is_there_BC = relevance_BC > -torch.inf
    gain_BC = weight * relevance_BC.masked_fill(~is_there_BC, 0.0)
    redundancy_BC = torch.zeros_like(gain_BC)
    taken_BC = torch.zeros_like(is_there_BC)
    chosen = []
    for step in range(min(length, relevance_BC.shape[1])):
        value_BC = (gain_BC - (1 - weight) * redundancy_BC).masked_fill(~is_there_BC, UNAVAILABLE)
        chosen_B = value_BC.masked_fill(taken_BC, -torch.inf).argmax(dim=1)
        chosen.append(chosen_B)
        taken_BC[row_B, chosen_B] = True
        to_chosen_BC = similarity_BCC[row_B, chosen_B]
        # similarities may be negative: those to the first item replace the 0 of the empty list
        redundancy_BC = torch.maximum(redundancy_BC, to_chosen_BC) if step else to_chosen_BC
    return torch.stack(chosen, dim=1)


def list_similarity(lists: Lists, unit_ID: Tensor) -> Tensor:
    """Cosines between the items of each list, (B, Y, Y)."""
    unit_BYD = unit_ID[lists.place_BY]
    return unit_BYD @ unit_BYD.transpose(1, 2)


def list_mmr(relevance_BY: Tensor, similarity_BYY: Tensor, *, weight: float) -> Tensor:
    """The mean over places of weight * relevance - (1 - weight) * greatest similarity to an earlier place, (B,)."""
    length = relevance_BY.shape[1]
    is_earlier_YY = torch.ones(length, length, dtype=torch.bool, device=relevance_BY.device).tril(-1)
    redundancy_BY = similarity_BYY.masked_fill(~is_earlier_YY, -torch.inf).amax(dim=2)
    redundancy_BY[:, 0] = 0.0
    is_there_BY = relevance_BY > -torch.inf
    value_BY = (weight * relevance_BY - (1 - weight) * redundancy_BY).masked_fill(~is_there_BY, 0.0)
    return value_BY.sum(1) / is_there_BY.sum(1).clamp_min(1)


def intra_list_diversity(relevance_BY: Tensor, similarity_BYY: Tensor) -> Tensor:
    """The mean of 1 - cosine over pairs of items of a list, (B,), in [0, 2]; 0 for lists of one item."""
    is_there_BY = relevance_BY > -torch.inf
    is_pair_BYY = is_there_BY[:, :, None] & is_there_BY[:, None, :]
    is_pair_BYY = is_pair_BYY.triu(1)
    distance_BYY = (1 - similarity_BYY).masked_fill(~is_pair_BYY, 0.0)
    return distance_BYY.sum((1, 2)) / is_pair_BYY.sum((1, 2)).clamp_min(1)
