"""Users' raw values, worked by hand."""

import numpy as np
import pytest
from toy_data import interaction_arrays

from raygr.explain.raw_scores import Values, user_values


def test_values_are_those_of_the_liked_train_items_without_the_item_itself():
    # user 1: train items 1 (5), 2 (2), 3 (4), 4 (5), then 5 (5) held out
    found = interaction_arrays([(0, 5, 1, "train"), (1, 1, 5, "train"), (1, 2, 2, "train"), (1, 3, 4, "train"),
                          (1, 4, 5, "train"), (1, 5, 5, "test")])  # fmt: skip
    values = Values(("a",), np.array([[1.0], [2.0], [4.0], [9.0], [10.0]]), np.ones(5), None, np.ones(2), "")
    assert user_values(values, found, 1, 5) == pytest.approx([(1 + 4 + 9) / 3])  # mean rating 4: 1, 3, 4 are liked
    assert user_values(values, found, 1, 4) == pytest.approx([(1 + 4) / 2])  # mean rating 3.67 of 1, 2, 3
    assert np.isnan(user_values(values, found, 0, 5)).all()
    unrated = found._replace(rating_N=np.full(6, np.nan))
    assert user_values(values, unrated, 1, 5) == pytest.approx([(1 + 2 + 4 + 9) / 4])
