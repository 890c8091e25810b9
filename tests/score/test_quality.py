"""Quality of a score run on hand-made scores."""

import numpy as np
import pyarrow as pa
import pytest

from raygr.score.quality import aspect_quality, effective_rank, score_quality


def test_quality_counts_reasons_and_finds_dead_aspects():
    table = pa.table(
        {
            "reason": ["ok", "ok", "no_aspect_read", "ok"],
            "expected": [[2.0, 5.0], [4.0, 5.0], [None, None], [6.0, 5.0]],
            "ratings": pa.array([[2, 5], [2, 5], [None, None], [6, 5]], type=pa.list_(pa.int8())),
        }
    )
    quality = score_quality(table, ("tension", "pace"))
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
    assert (alike.dead, alike.identical_share) == (True, 1.0) and alike.spread > 0.2
    assert aspect_quality(np.linspace(6.6, 7.4, 200), nearly).dead is False  # 98.5%
    flat = aspect_quality(7.5 + np.linspace(-0.08, 0.08, 200), np.repeat([7.0, 8.0], 100))
    assert flat.dead and flat.identical_share == 0.5  # all within a tenth: the integers are rounding
    assert aspect_quality(np.full(4, np.nan), np.full(4, np.nan)).dead


def test_effective_rank_counts_independent_aspects():
    generator = np.random.default_rng(0)
    one = generator.normal(size=(500, 1))
    assert effective_rank(np.repeat(one, 4, axis=1)) == pytest.approx(1.0)
    assert effective_rank(generator.normal(size=(5000, 4))) == pytest.approx(4.0, abs=0.01)
    assert effective_rank(np.full((1, 4), 5.0)) is None
