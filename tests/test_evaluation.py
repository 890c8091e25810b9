"""Ranks, metrics and intervals against hand-worked numbers, naive loops and torchmetrics."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from raygr import evaluation
from raygr.evaluation import (
    METRICS,
    candidate_ranks,
    full_ranks,
    metric_values,
    paired_bootstrap,
    paired_bootstraps,
    rank_metrics,
    two_sided_p,
    user_means,
)

NONE = torch.zeros(0, dtype=torch.int64)


def naive_rank(scores: list[float], target: int, excluded: set[int]) -> float:
    """One target among items 1..I by plain loops."""
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


def test_bootstrap_of_a_constant_gain_has_no_width():
    base_RU = np.random.default_rng(0).random((2, 50))
    gain = paired_bootstrap(base_RU + 0.1, base_RU, samples=200, seed=0)
    assert (gain.difference, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    assert gain.relative == pytest.approx(100 * 0.1 / base_RU.mean())
    assert gain.relative_low < gain.relative < gain.relative_high


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    generator = np.random.default_rng(1)
    base_RU, noise_RU = generator.random((1, 2000)), generator.normal(0.02, 0.3, (1, 2000))
    gain = paired_bootstrap(base_RU + noise_RU, base_RU, samples=2000, seed=0)
    half_width = 1.96 * noise_RU.std() / math.sqrt(2000)
    assert gain.high - gain.low == pytest.approx(2 * half_width, rel=0.1)
    assert gain.low < gain.difference < gain.high


def test_bootstrap_over_runs_widens_the_interval():
    """Two runs whose gains are -0.1 and +0.3 for every user: resampling runs must show it."""
    base_RU = np.full((2, 100), 0.5)
    gain = paired_bootstrap(base_RU + np.array([[-0.1], [0.3]]), base_RU, samples=500, seed=0)
    assert (gain.low, gain.difference, gain.high) == pytest.approx((-0.1, 0.1, 0.3))


def test_two_sided_p_by_hand():
    """2 of 9 samples at or below 0: 2 * (2 + 1) / (9 + 1); zeros count on both sides."""
    assert two_sided_p(np.array([-1, 0, 7, 1, 2, 3, 4, 5, 6.0])) == pytest.approx(0.6)
    assert two_sided_p(np.full(99, -1.0)) == two_sided_p(np.full(99, 2.0)) == pytest.approx(2 / 100)
    assert two_sided_p(np.zeros(10)) == 1.0


def test_p_agrees_with_the_t_test():
    """1,000 users, a gain of about two standard errors."""
    generator = np.random.default_rng(4)
    base_RU, noise_RU = generator.random((1, 1000)), generator.normal(0.02, 0.3, (1, 1000))
    found = paired_bootstrap(base_RU + noise_RU, base_RU, samples=10_000, seed=0).p
    expected = scipy.stats.ttest_rel((base_RU + noise_RU)[0], base_RU[0]).pvalue
    assert 0.001 < expected < 0.5 and found == pytest.approx(expected, abs=0.01)


def test_more_runs_of_the_same_users_are_no_more_evidence():
    """Two equal runs say what one says: users are the unit, not user times run."""
    generator = np.random.default_rng(4)
    base_RU, noise_RU = generator.random((1, 500)), generator.normal(0.02, 0.3, (1, 500))
    one = paired_bootstrap(base_RU + noise_RU, base_RU, samples=5000, seed=0)
    two = paired_bootstrap(*(np.repeat(v, 2, axis=0) for v in (base_RU + noise_RU, base_RU)), samples=5000, seed=0)
    assert two == pytest.approx(one)


def test_metrics_resampled_together_are_those_resampled_alone(monkeypatch: pytest.MonkeyPatch):
    """In chunks of three samples, too."""
    generator = np.random.default_rng(6)
    arm_MRU, base_MRU = generator.random((3, 2, 50)), generator.random((3, 2, 50))
    together = paired_bootstraps(arm_MRU, base_MRU, samples=100, seed=3)
    monkeypatch.setattr(evaluation, "DRAWS_AT_ONCE", 150)
    for metric, gain in enumerate(together):
        alone = paired_bootstrap(arm_MRU[metric], base_MRU[metric], samples=100, seed=3)
        assert alone == pytest.approx(gain)


def test_user_means_by_hand():
    assert user_means(np.array([1.0, 3.0, 10.0]), np.array([7, 7, 9])).tolist() == [2.0, 10.0]
