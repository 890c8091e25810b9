"""The parts of an explanation by hand: the choice of item and users, raw values, and the sentences word by word."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from toy_data import interaction_arrays

from raygr.explain.case_choice import choose_case
from raygr.explain.explanation import Values, user_values
from raygr.explain.sentences import AspectTerm, UserExplanation, level_word, sentence

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
    with pytest.raises(ValueError, match=r"two different ratings.*set item"):
        choose_case(CASE, None, [1], **ALL)
    with pytest.raises(ValueError, match=r"no user with values has rated the item.*set users"):
        choose_case(CASE, 1, [], **ALL)  # nobody has a history before item 1
    with pytest.raises(ValueError, match="two different ratings"):
        choose_case(CASE._replace(rating_N=np.full(12, np.nan)), None, [], **ALL)


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


def term(aspect: str, item: float, user: float, encoder: float, average: float = 0.0) -> AspectTerm:
    return AspectTerm(aspect, item, user, item - user, level_word(user), 0.0, encoder, 0.1, average)


def test_the_sentence_is_made_of_the_numbers():
    terms = (term("pace", 7, 7.5, 0.4), term("mood", 2, 8.25, -0.3), term("length", 3, 3.5, 0.9, average=0.95))
    user = UserExplanation("u7", "test", 2.0, 9, 1.3, 12.5, 300, 1.0, 1.25, 0.75, 0.333, terms, 0, 0.0, 0.0, 0.0)
    assert sentence("Heat (1995)", user) == (
        "u7 rated “Heat (1995)” 2, and the model ranks it 12.5 of 300 for this user: it is within one level of the "
        "user's value in 2 of 3 aspects and furthest from it in mood (2.0 against 8.2); against the average item, pace "
        "lifts the score most (+0.50) and mood lowers it most (-0.20); recommend items of high pace (7.5), high mood "
        "(8.2) and low length (3.5). The base part depends on aspects too, because the encoder reads those of the "
        "history: with all of them at the catalogue's mean it would be 0.75 instead of 1.25 for this item, and over "
        "all items it would change by 33% of its spread."
    )
    calm = UserExplanation(
        "u8", None, None, 9, 1.3, 1.0, 300, 1.0, 0.5, 0.5, 0.0, (term("pace", 5, 5.5, 0.4),), 2, 0.0, 0.0, 0.0
    )
    assert sentence("Heat (1995)", calm).startswith(
        "u8 has not seen “Heat (1995)”, and the model ranks it 1 of 300 for this user: it is within one level of the "
        "user's value in 1 of 1 aspects; against the average item, pace lifts the score most (+0.50); recommend items "
        "of moderate levels."
    )


def test_terms_that_are_small_beside_the_spread_of_the_scores_are_not_named():
    terms = (term("pace", 7, 7.5, 0.4), term("mood", 2, 8.25, -0.3), term("length", 3, 3.5, 0.9, average=0.95))
    first = UserExplanation("u", None, None, 9, 1.3, 1.0, 300, 1.0, 1.25, 1.25, 0.0, terms, 0, 0.0, 0.0, 0.0)
    shown = {spread: dataclasses.replace(first, spread=spread) for spread in (9.9, 10.1)}
    assert "pace lifts the score most (+0.50); " in sentence("Heat", shown[9.9])  # 5% are 0.495, and mood has -0.20
    assert (
        "; aspects do not speak here: none moves the score from the average item's by 5% of the spread of this user's "
        "scores; recommend items" in sentence("Heat", shown[10.1])
    )
    assert " lifts " not in sentence("Heat", shown[10.1]) and "+0" not in sentence("Heat", shown[10.1])


def test_levels_are_thirds_of_the_axis():
    assert [level_word(value) for value in (1, 3.9, 4, 7, 7.1, 10)] == ["low", "low", *["moderate"] * 2, "high", "high"]


def test_explaining_an_item_needs_no_ray():
    code = "import sys, raygr.explain.explanation\nprint('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "False"
