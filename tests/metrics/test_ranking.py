"""Ranks and metrics against hand-worked numbers, naive loops and torchmetrics, on inputs of hypothesis too."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from raygr.metrics.ranking import (
    METRICS,
    candidate_ranks,
    chance_values,
    full_ranks,
    metric_values,
    rank_metrics,
    user_means,
)

NONE = torch.zeros(0, dtype=torch.int64)


def naive_rank(scores: list[float], target: int, excluded: set[int]) -> float:
    """Rank of one target among items 1..I by plain loops."""
    greater = equal = 0
    for item, score in enumerate(scores, start=1):
        if item != target and item not in excluded:
            greater += score > scores[target - 1]
            equal += score == scores[target - 1]
    return 1 + greater + equal / 2


def test_ranks_equal_a_naive_loop_with_ties_and_seen_items():
    generator = torch.Generator().manual_seed(0)
    scores_BI = torch.randint(0, 6, (40, 25), generator=generator).float()  # few values, so many ties
    target_B = torch.randint(1, 26, (40,), generator=generator)
    seen = [set(torch.randint(1, 26, (5,), generator=generator).tolist()) for _ in range(40)]
    rows = torch.tensor([row for row, items in enumerate(seen) for _ in items])
    items = torch.tensor([item for found in seen for item in found])
    expected = [naive_rank(scores_BI[b].tolist(), int(target_B[b]), seen[b]) for b in range(40)]
    assert full_ranks(scores_BI, target_B, rows, items).tolist() == expected


def test_a_seen_item_does_not_push_the_target_down_and_a_seen_target_is_still_ranked():
    scores_BI = torch.tensor([[3.0, 2.0, 1.0]])
    row, target_B = torch.tensor([0]), torch.tensor([2])
    assert full_ranks(scores_BI, target_B, row, torch.tensor([1])).item() == 1
    assert full_ranks(scores_BI, target_B, row, torch.tensor([2])).item() == 2


def test_constant_scores_give_the_middle_rank():
    """101 equal scores: 1 + 100 / 2 = 51."""
    scores_BI = torch.zeros(3, 101)
    assert full_ranks(scores_BI, torch.tensor([1, 50, 101]), NONE, NONE).tolist() == [51, 51, 51]
    candidates_BC = torch.arange(2, 102)[None]
    assert candidate_ranks(scores_BI[:1], torch.tensor([1]), candidates_BC).tolist() == [51]


def test_candidate_rank_counts_candidates_only():
    scores_BI = torch.tensor([[5.0, 4.0, 3.0, 2.0, 3.0]])
    assert candidate_ranks(scores_BI, torch.tensor([3]), torch.tensor([[2, 5]])).item() == 1 + 1 + 0.5


def test_scores_that_are_not_numbers_are_refused_instead_of_ranking_first():
    with pytest.raises(ValueError, match="not finite"):
        full_ranks(torch.tensor([[torch.nan, 1.0]]), torch.tensor([1]), NONE, NONE)


def test_metrics_by_hand():
    """Ranks 1, 3 and 30: NDCG@5 = (1 + 1/2 + 0) / 3, MRR = (1 + 1/3 + 1/30) / 3."""
    metrics = rank_metrics(np.array([1.0, 3.0, 30.0]))
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 30) / 3)
    assert metrics["ndcg_at_5"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert [metrics[f"recall_at_{k}"] for k in (1, 5, 20)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert tuple(metrics) == METRICS


def test_metrics_equal_torchmetrics():
    scores_BI = torch.rand(30, 50, generator=torch.Generator().manual_seed(1))  # torchmetrics drops scores below 0
    target_B = torch.arange(1, 31)
    rank_B = full_ranks(scores_BI, target_B, NONE, NONE).numpy()
    for b, target in enumerate(target_B.tolist()):
        relevant_I = torch.zeros(50, dtype=torch.bool)
        relevant_I[target - 1] = True
        found = {"mrr": retrieval_reciprocal_rank(scores_BI[b], relevant_I)}
        for k in (1, 5, 10, 20):
            found[f"recall_at_{k}"] = retrieval_hit_rate(scores_BI[b], relevant_I, top_k=k)
            found[f"ndcg_at_{k}"] = retrieval_normalized_dcg(scores_BI[b], relevant_I, top_k=k)
        for metric in METRICS:
            assert metric_values(metric, rank_B[b : b + 1])[0] == pytest.approx(float(found[metric]), abs=1e-6)


def test_user_means_by_hand():
    assert user_means(np.array([1.0, 3.0, 10.0]), np.array([7, 7, 9])).tolist() == [2.0, 10.0]


# --- properties ---------------------------------------------------------------------------------

SCORES = st.lists(st.integers(0, 5), min_size=2, max_size=30)  # few values, so many ties


@settings(max_examples=60, deadline=None)
@given(SCORES, st.data())
def test_a_rank_equals_the_naive_loop_and_no_order_of_the_items_moves_it(scores: list[int], data: st.DataObject):
    target = data.draw(st.integers(1, len(scores)))
    seen = data.draw(st.sets(st.integers(1, len(scores))))
    order = data.draw(st.permutations(range(len(scores))))
    place = {item: order.index(item - 1) + 1 for item in range(1, len(scores) + 1)}
    moved = [scores[item] for item in order]
    found = [
        full_ranks(
            torch.tensor([values], dtype=torch.float),
            torch.tensor([at]),
            torch.zeros(len(excluded), dtype=torch.int64),
            torch.tensor(sorted(excluded), dtype=torch.int64),
        ).item()
        for values, at, excluded in ((scores, target, seen), (moved, place[target], {place[item] for item in seen}))
    ]
    assert found == [naive_rank(scores, target, seen)] * 2
    assert 1 <= found[0] <= len(scores)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1, 200), min_size=2, max_size=20))
def test_metrics_lie_in_0_to_1_and_never_rise_with_the_rank(ranks: list[float]):
    for metric in METRICS:
        values = metric_values(metric, np.sort(ranks))
        assert (values >= 0).all() and (values <= 1).all() and (np.diff(values) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_a_metric_equals_torchmetrics_at_any_rank(rank: int, items: int):
    items = max(items, rank)
    scores_I, relevant_I = torch.arange(items, 0, -1).float(), torch.zeros(items, dtype=torch.bool)
    relevant_I[rank - 1] = True
    for k in (1, 5, 10, 20):
        hit = retrieval_hit_rate(scores_I, relevant_I, top_k=min(k, items))
        gain = retrieval_normalized_dcg(scores_I, relevant_I, top_k=min(k, items))
        assert metric_values(f"recall_at_{k}", np.array([rank]))[0] == float(hit)
        if k > 1:
            assert metric_values(f"ndcg_at_{k}", np.array([rank]))[0] == pytest.approx(float(gain), abs=1e-6)
    assert metric_values("mrr", np.array([rank]))[0] == pytest.approx(
        float(retrieval_reciprocal_rank(scores_I, relevant_I)), abs=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=10), st.sampled_from(METRICS))
def test_chance_is_the_mean_over_all_ranks(among: list[int], metric: str):
    """Constant scores have the mean of those ranks, too."""
    expected = [metric_values(metric, np.arange(1, m + 1)).mean() for m in among]
    assert chance_values(metric, np.array(among)) == pytest.approx(expected)
    constant = full_ranks(torch.zeros(1, among[0]), torch.tensor([1]), NONE, NONE).item()
    assert constant == np.arange(1, among[0] + 1).mean()
