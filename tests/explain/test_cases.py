"""Which item and users are picked where they are not given, on ratings small enough to see it."""

import numpy as np
import pytest
from toy_data import interaction_arrays

from raygr.explain.cases import choose_case

# Item 2: held-out ratings 4 and 2. Item 3: 5 and 1, but 5 in train. Item 4: 3 and 1, held out. Item 1 opens histories.
CASE = interaction_arrays([
    (0, 1, 5, "train"), (0, 3, 5, "train"), (0, 4, 3, "validation"), (0, 2, 4, "test"),
    (1, 1, 1, "train"), (1, 5, 3, "train"), (1, 4, 1, "validation"), (1, 3, 1, "test"),
    (2, 1, 3, "train"), (2, 5, 3, "train"), (2, 4, 3, "validation"), (2, 2, 2, "test"),
])  # fmt: skip
ALL = {"scored_I": np.ones(5, bool), "valued_U": np.ones(3, bool)}


def test_the_widest_held_out_span_is_picked_and_of_those_the_most_rated():
    case = choose_case(CASE, None, [], **ALL)  # items 2 and 4 span 2 each: 4 has three ratings
    assert (case.item, case.users) == (4, [0, 1])
    assert case.chosen == "item and users picked by the widest span of held-out ratings (3 and 1)"
    rarer = CASE._replace(rating_N=np.where((CASE.user_N == 0) & (CASE.item_N == 2), 5, CASE.rating_N))
    assert choose_case(rarer, None, [], **ALL)[:2] == (2, [0, 2])


def test_train_ratings_are_the_last_resort():
    case = choose_case(CASE, 3, [], **ALL)
    assert (case.item, case.users, case.chosen) == (3, [0, 1], "users picked by the widest span of ratings (5 and 1)")
    case = choose_case(CASE, None, [1, 0], **ALL)  # users 0 and 1 differ by 2 on item 4 held out, by 4 on item 3 not
    assert (case.item, case.users) == (4, [1, 0])
    case = choose_case(CASE, 5, [], **ALL)  # alike: any two who rated it
    assert (case.item, case.users) == (5, [1, 2])


def test_only_items_with_scores_and_users_with_values_are_picked():
    unscored = ALL | {"scored_I": np.array([True, True, True, False, True])}
    assert choose_case(CASE, None, [], **unscored)[:2] == (2, [0, 2])
    unvalued = ALL | {"valued_U": np.array([True, False, True])}
    assert choose_case(CASE, None, [], **unvalued)[:2] == (2, [0, 2])
    with pytest.raises(ValueError, match=r"two unlike ratings.*--item"):
        choose_case(CASE, None, [1], **ALL)
    with pytest.raises(ValueError, match=r"nobody with values has rated the item.*--user"):
        choose_case(CASE, 1, [], **ALL)  # nobody has a history before item 1
    with pytest.raises(ValueError, match="two unlike ratings"):
        choose_case(CASE._replace(rating_N=np.full(12, np.nan)), None, [], **ALL)
