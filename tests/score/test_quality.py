"""Quality of a score run on hand-made scores."""

import numpy as np
import pyarrow as pa
import pytest

from raygr.score.quality import score_quality


def quality_of(expected_SA: np.ndarray, ratings_SA: np.ndarray, *, rows: int = 64) -> dict:
    """The quality of scores that arrive in parts of `rows`; a row with a NaN of all aspects has no score."""
    names = tuple(f"aspect {a}" for a in range(expected_SA.shape[1]))
    lists = [[None if np.isnan(row).all() else row.tolist() for row in array] for array in (expected_SA, ratings_SA)]
    reasons = ["ok" if row else "no_aspect_read" for row in lists[0]]
    columns = (pa.array(one, pa.list_(pa.float64())) for one in lists)
    table = pa.table([pa.array(reasons), *columns], names=["reason", "expected", "ratings"])
    return score_quality(table.to_batches(max_chunksize=rows), names)


def aspect_quality(expected_S: np.ndarray, ratings_S: np.ndarray) -> dict:
    return quality_of(expected_S[:, None], ratings_S[:, None])["aspects"]["aspect 0"]


def test_quality_counts_reasons_and_finds_dead_aspects():
    table = pa.table(
        {
            "reason": ["ok", "ok", "no_aspect_read", "ok"],
            "expected": [[2.0, 5.0], [4.0, 5.0], [None, None], [6.0, 5.0]],
            "ratings": pa.array([[2, 5], [2, 5], [None, None], [6, 5]], type=pa.list_(pa.int8())),
        }
    )
    quality = score_quality(table.to_batches(max_chunksize=3), ("tension", "pace"))
    assert quality["by_reason"] == {"ok": 3, "no_aspect_read": 1}
    assert quality["valid_share"] == 0.75
    assert quality["aspects"]["tension"]["mean"] == 4.0
    assert quality["aspects"]["tension"]["spread"] == pytest.approx((8 / 3) ** 0.5)
    assert quality["aspects"]["tension"]["identical_share"] == pytest.approx(2 / 3)
    assert [quality["aspects"][name]["dead"] for name in ("tension", "pace")] == [False, True]


def test_an_aspect_with_one_answer_for_all_is_dead_whatever_its_decimals():
    """100% identical ratings once came with `dead: no`, because the expected ratings differed slightly."""
    alike, nearly = aspect_quality(np.linspace(6.6, 7.4, 200), np.full(200, 7.0)), np.full(200, 7.0)
    nearly[:3] = 6
    assert (alike["dead"], alike["identical_share"]) == (True, 1.0) and alike["spread"] > 0.2
    assert aspect_quality(np.linspace(6.6, 7.4, 200), nearly)["dead"] is False  # 98.5%
    flat = aspect_quality(7.5 + np.linspace(-0.08, 0.08, 200), np.repeat([7.0, 8.0], 100))
    assert flat["dead"] and flat["identical_share"] == 0.5  # all within a tenth: the integers are rounding
    assert aspect_quality(np.full(4, np.nan), np.full(4, np.nan))["dead"]


def test_effective_rank_counts_independent_aspects():
    generator = np.random.default_rng(0)
    one = generator.normal(size=(500, 1))
    assert rank_of(np.repeat(one, 4, axis=1)) == pytest.approx(1.0)
    assert rank_of(generator.normal(size=(5000, 4))) == pytest.approx(4.0, abs=0.01)
    assert rank_of(np.full((1, 4), 5.0)) is None
    assert rank_of(np.full((9, 4), 5.0)) == 0.0


def rank_of(expected_SA: np.ndarray) -> float | None:
    return quality_of(expected_SA, np.rint(expected_SA))["effective_rank"]


def test_the_parts_do_not_matter_and_figures_are_those_of_all_rows():
    generator = np.random.default_rng(0)
    expected_SA = 5 + generator.normal(size=(300, 3)) @ generator.normal(size=(3, 3))
    expected_SA[generator.random((300, 3)) < 0.1] = np.nan
    found = quality_of(expected_SA, np.rint(expected_SA), rows=7)
    aspects = found["aspects"].values()
    assert [one["mean"] for one in aspects] == pytest.approx(np.nanmean(expected_SA, axis=0))
    assert [one["spread"] for one in aspects] == pytest.approx(np.nanstd(expected_SA, axis=0))
    # by singular values of all complete rows, instead of their summed products
    full = expected_SA[~np.isnan(expected_SA).any(axis=1)]
    singular = np.linalg.svd((full - full.mean(0)) / full.std(0), compute_uv=False)
    shares = singular / singular.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
