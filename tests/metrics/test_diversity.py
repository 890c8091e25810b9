"""MMR and intra-list diversity by hand, and the vectorised greedy choice against a plain loop."""

import math

import pytest
import torch

from raygr.metrics import diversity
from raygr.metrics.diversity import (
    Lists,
    intra_list_diversity,
    list_mmr,
    list_similarity,
    mmr_lists,
    mmr_order,
    scaled_relevance,
    top_lists,
    unit_rows,
)

NONE = torch.zeros(0, dtype=torch.int64)
# items 0 and 1 point the same way, 2 stands at a right angle, 3 is opposite to 0
VECTORS = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
RELEVANCE = torch.tensor([[1.0, 0.9, 0.5, 0.0]])


def naive_order(relevance: list[float], similarity: list[list[float]], weight: float, length: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < length:
        values = {}
        for place, relevant in enumerate(relevance):
            if place not in taken:
                redundant = max((similarity[place][other] for other in taken), default=0.0)
                values[place] = weight * relevant - (1 - weight) * redundant
        taken.append(max(values, key=values.get))
    return taken


def test_relevance_is_the_score_on_0_to_1_over_unseen_items():
    scores_BI = torch.tensor([[5.0, -3.0, 1.0, 9.0], [2.0, 2.0, 2.0, 2.0]])
    found = scaled_relevance(scores_BI, torch.tensor([0]), torch.tensor([4]))
    assert found.tolist() == [[1.0, 0.0, 0.5, -math.inf], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("items", "length"), [(7 * 128 + 5, 1), (50 * 128, 3), (41 * 128 + 100, 10)])
def test_the_best_of_a_large_catalogue_are_those_of_a_full_sort(items: int, length: int):
    relevance_BI = torch.randn(5, items, generator=torch.Generator().manual_seed(0))
    relevance_BI[1, 2:] = -torch.inf  # nearly nothing is left
    relevance_BI[2, -length:] = 9.0  # the best lie behind the last whole group
    found, (relevance_BY, place_BI) = top_lists(relevance_BI, length), relevance_BI.sort(dim=1, descending=True)
    assert torch.equal(found.relevance_BY, relevance_BY[:, :length])
    for user in (0, 3, 4):
        assert torch.equal(found.place_BY[user], place_BI[user, :length])
    assert all(len(set(places)) == length for places in found.place_BY.tolist())
    assert torch.equal(relevance_BI.gather(1, found.place_BY), found.relevance_BY)


def test_mmr_by_hand():
    """Weight .5, after item 0: item 1 has .45 - .5 = -.05, item 2 .25 - 0, item 3 0 + .5. Then 2: .25 - 0."""
    unit_ID = unit_rows(VECTORS)
    assert mmr_lists(RELEVANCE, unit_ID, weight=0.5, length=4).place_BY.tolist() == [[0, 3, 2, 1]]
    # weight .8, after 0: item 1 .72 - .2 = .52, item 2 .4, item 3 0 + .2
    assert mmr_lists(RELEVANCE, unit_ID, weight=0.8, length=3).place_BY.tolist() == [[0, 1, 2]]


def test_weight_1_keeps_the_recommenders_order():
    relevance_BI = torch.rand(6, 40, generator=torch.Generator().manual_seed(0))
    unit_ID = unit_rows(torch.randn(40, 5, generator=torch.Generator().manual_seed(1)))
    found = mmr_lists(relevance_BI, unit_ID, weight=1.0, length=10)
    assert torch.equal(found.place_BY, top_lists(relevance_BI, 10).place_BY)
    assert torch.equal(found.relevance_BY, relevance_BI.gather(1, found.place_BY))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_vectorised_choice_equals_a_plain_loop(weight: float):
    generator = torch.Generator().manual_seed(3)
    relevance_BC = torch.rand(8, 15, generator=generator)
    unit_BCD = torch.nn.functional.normalize(torch.randn(8, 15, 4, generator=generator), dim=2)
    similarity_BCC = unit_BCD @ unit_BCD.transpose(1, 2)
    found = mmr_order(relevance_BC, similarity_BCC, weight=weight, length=7).tolist()
    for row in range(8):
        assert found[row] == naive_order(relevance_BC[row].tolist(), similarity_BCC[row].tolist(), weight, 7)


def test_seen_items_come_only_after_all_others(monkeypatch: pytest.MonkeyPatch):
    """This holds even at weight 0, where a seen item with an opposite vector would be chosen first."""
    relevance_BI = torch.tensor([[1.0, 0.9, 0.5, -math.inf]])
    found = mmr_lists(relevance_BI, unit_rows(VECTORS), weight=0.0, length=4)
    assert found.place_BY.tolist()[0][3] == 3 and found.relevance_BY[0, 3] == -math.inf
    assert sorted(found.place_BY[0].tolist()) == [0, 1, 2, 3]
    monkeypatch.setattr(diversity, "POOL", 2)
    assert mmr_lists(RELEVANCE, unit_rows(VECTORS), weight=0.0, length=2).place_BY.tolist() == [[0, 1]]


def test_list_metrics_by_hand():
    """The list 0, 1, 2 with relevance 1, .9, .5 and weight .6; cosines 1, 0, 0 of the three pairs."""
    lists = Lists(torch.tensor([[0, 1, 2]]), RELEVANCE[:, :3])
    similarity_BYY = list_similarity(lists, unit_rows(VECTORS))
    expected = (0.6 * 1 + (0.6 * 0.9 - 0.4 * 1) + 0.6 * 0.5) / 3
    assert list_mmr(lists.relevance_BY, similarity_BYY, weight=0.6).item() == pytest.approx(expected)
    assert intra_list_diversity(lists.relevance_BY, similarity_BYY).item() == pytest.approx((0 + 1 + 1) / 3)


def test_places_that_could_not_be_filled_count_in_no_metric():
    whole = Lists(torch.tensor([[0, 2]]), torch.tensor([[1.0, 0.5]]))
    short = Lists(torch.tensor([[0, 2, 3]]), torch.tensor([[1.0, 0.5, -math.inf]]))
    unit_ID = unit_rows(VECTORS)
    for metric in (lambda r, s: list_mmr(r, s, weight=0.5), intra_list_diversity):
        found, expected = (metric(x.relevance_BY, list_similarity(x, unit_ID)) for x in (short, whole))
        torch.testing.assert_close(found, expected)


def test_re_ranking_trades_relevance_for_diversity():
    generator = torch.Generator().manual_seed(5)
    relevance_BI, unit_ID = torch.rand(50, 80, generator=generator), unit_rows(torch.randn(80, 6, generator=generator))
    diversities, relevances = [], []
    for weight in (1.0, 0.6, 0.2):
        lists = mmr_lists(relevance_BI, unit_ID, weight=weight, length=10)
        diversities.append(intra_list_diversity(lists.relevance_BY, list_similarity(lists, unit_ID)).mean().item())
        relevances.append(lists.relevance_BY.mean().item())
    assert diversities == sorted(diversities) and relevances == sorted(relevances, reverse=True)
    assert diversities[2] > diversities[0] + 0.05


def test_a_row_of_zeros_is_similar_to_nothing():
    assert unit_rows(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [
        [0.0, 0.0],
        [pytest.approx(0.6), pytest.approx(0.8)],
    ]
