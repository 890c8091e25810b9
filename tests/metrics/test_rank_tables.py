"""Rankings out of RANK rows: by hand, with several targets of a user and the cold-start bucket."""

import math

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from raygr.metrics.gains import gains
from raygr.metrics.rank_tables import (
    Ranking,
    candidates_of,
    cold_metrics,
    count_edges,
    counted_ranking,
    ranking_metrics,
    read_rankings,
    user_values,
)
from raygr.metrics.ranking import METRICS
from raygr.schema import RANK_SCHEMA

# user 3 has three test targets (positions 7, 8, 9) and user 5 one; the rows are out of order
ROWS = [
    (3, 9, True, "test", "full", 11, 4.0, 2),
    (5, 2, True, "test", "full", 12, 2.0, 50),
    (3, 7, False, "test", "full", 13, 1.0, 9),
    (3, 8, False, "test", "full", 14, 20.0, 10),
    (3, 6, True, "validation", "full", 15, 999.0, 0),
]


def ranks(rows: list[tuple] = ROWS) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, RANK_SCHEMA, strict=True)]
    return pa.table(arrays, schema=RANK_SCHEMA)


def test_last_and_every_target_of_the_same_rows():
    found = read_rankings(ranks(), part="test", targets=("last", "every"))
    assert list(found) == ["full", "full, every target"]
    last, every = found.values()
    assert list(zip(last.user_E, last.rank_E, strict=True)) == [(3, 4.0), (5, 2.0)]
    assert list(zip(every.user_E, every.position_E, every.rank_E, strict=True)) == [
        (3, 7, 1.0),
        (3, 8, 20.0),
        (3, 9, 4.0),
        (5, 2, 2.0),
    ]


def test_a_user_weighs_the_same_however_many_targets_it_has():
    """MRR of user 3: (1 + 1/20 + 1/4) / 3; of user 5: 1/2; then the mean of the two."""
    every = read_rankings(ranks(), part="test", targets=("every",))["full, every target"]
    assert user_values(every, "mrr") == pytest.approx([(1 + 1 / 20 + 1 / 4) / 3, 1 / 2])
    metrics = ranking_metrics(every)
    assert tuple(metrics) == METRICS
    assert metrics["mrr"] == pytest.approx(((1 + 1 / 20 + 1 / 4) / 3 + 1 / 2) / 2)
    assert metrics["recall_at_5"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["ndcg_at_10"] == pytest.approx(((1 + 1 / math.log2(5)) / 3 + 1 / math.log2(3)) / 2)


def test_cold_targets_have_fewer_than_k_train_interactions():
    """Below 10: ranks 1 and 4 of user 3, with 9 and 2 train interactions; 10 itself is not below."""
    every = read_rankings(ranks(), part="test", targets=("every",))["full, every target"]
    cold = cold_metrics(every, 10)
    assert (cold["targets"], cold["users"]) == (2, 1)
    assert cold["metrics"]["mrr"] == pytest.approx((1 + 1 / 4) / 2)
    assert cold_metrics(every, 2) == {"targets": 0, "users": 0, "metrics": None}


def test_one_target_a_user_gives_the_plain_mean():
    rank_E = np.random.default_rng(0).integers(1, 30, 50).astype(float)
    rows = [(u, 4, True, "test", "full", 1, float(rank), 5) for u, rank in enumerate(rank_E)]
    found = read_rankings(ranks(rows), part="test", targets=("last", "every"))
    assert found["full"].rank_E.tolist() == found["full, every target"].rank_E.tolist() == rank_E.tolist()
    assert ranking_metrics(found["full"])["mrr"] == pytest.approx(np.mean(1 / rank_E))


def test_groups_by_train_count_have_about_equally_many_targets_and_those_without_any_are_apart():
    def edges(counts: list[int], bins: int) -> list[int]:
        [ranking] = read_rankings(
            ranks([(u, 1, True, "test", "full", 1, 1.0, n) for u, n in enumerate(counts)]),
            part="test",
            targets=("last",),
        ).values()
        return count_edges(ranking, bins)

    assert edges([0, 0, 0, 9, 4, 5, 6, 7, 8], 3) == [0, 4, 6, 8]
    assert edges([7, 7, 7, 7, 8, 9], 3) == [7, 8]  # equal counts stay together
    assert edges([3], 5) == [3] and edges([0, 0], 5) == [0]


def test_a_group_by_train_count_holds_both_its_ends_but_not_the_next_groups_least():
    [_, every] = read_rankings(ranks(), part="test", targets=("last", "every")).values()
    kept = counted_ranking(every, least=9, below=50)
    assert list(zip(kept.rank_E, kept.train_count_E, strict=True)) == [(1.0, 9), (20.0, 10)]


def test_an_interval_over_several_targets_is_over_users():
    """The t interval of the users' mean differences; five targets per user make it narrower than one."""
    generator, users = np.random.default_rng(0), 60
    halves = []
    for targets in (1, 5):
        user_E = np.repeat(np.arange(users), targets)
        arm, base = (generator.integers(1, 40, len(user_E)).astype(float) for _ in range(2))
        rankings = [Ranking(user_E, np.arange(len(user_E)), rank_E, user_E) for rank_E in (arm, base)]
        values_2U = np.stack([user_values(ranking, "mrr") for ranking in rankings])
        [gain] = gains(values_2U[:1, None], values_2U[1:, None], paired=True)
        by_user_U = ((1 / arm - 1 / base).reshape(users, targets)).mean(axis=1)
        half = scipy.stats.t.ppf(0.975, users - 1) * by_user_U.std(ddof=1) / np.sqrt(users)
        assert (gain.low, gain.high) == pytest.approx((by_user_U.mean() - half, by_user_U.mean() + half))
        halves.append(half)
    assert halves[1] < 0.7 * halves[0]


def test_targets_with_new_items_have_names_of_their_own():
    rows = [*ROWS, (3, 4, False, "new", "new-items", 21, 2.0, 0), (3, 4, True, "new", "new-items", 22, 4.0, 0)]
    found = read_rankings(ranks(rows), part="new", targets=("new",))
    assert list(found) == ["new-items, new targets"] and candidates_of("new-items, new targets") == "new-items"
    assert user_values(found["new-items, new targets"], "mrr") == pytest.approx([(1 / 2 + 1 / 4) / 2])
    assert list(read_rankings(ranks(rows), part="test", targets=("last",))) == ["full"]
