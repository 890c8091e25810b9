"""The rules of extraction on hand-written completions, and P(1..10) on hand-worked probabilities."""

import re

import numpy as np
import pytest

from raygr.aspects.parsing import parse_ratings, rating_probabilities

NAMES = ("tension level", "dialogue complexity", "complexity", "movie length (duration)")
PLAIN = "tension level: 7\ndialogue complexity: 10\ncomplexity: 1\nmovie length (duration): 3"


@pytest.mark.parametrize(
    "completion",
    [
        PLAIN,
        "\n".join(reversed(PLAIN.split("\n"))),
        "Sure! Here it is:\n"
        + PLAIN.replace("tension level: 7", "- **Tension Level**: I would say 7 because it is 3 hours")
        + "\nEnjoy!",
        PLAIN.replace(": 7", ": 7/10").replace(": 1\n", ": 1.\n"),
        PLAIN.replace(": 7", ": 6.5").replace("\n", ", "),
        PLAIN.replace("tension level:", "1. tension level (1 to 10):"),
        PLAIN + "\ntension level: 2",
        "tension level: <rating>\n" + PLAIN,
        "tension level: The suspense (e.g., 1 for no tension, 10 for extremely tense).\n" + PLAIN,
    ],
    ids=["plain", "other order", "extra words", "of ten", "half", "scale in brackets", "twice", "echo", "description"],
)
def test_all_aspects_are_read(completion):
    parsed = parse_ratings(completion, NAMES)
    assert parsed.ratings == (7, 10, 1, 3)
    assert parsed.reason == "ok"


@pytest.mark.parametrize(
    ("completion", "ratings", "reason"),
    [
        ("", (None,) * 4, "no_aspect_read"),
        ("I cannot rate movies.", (None,) * 4, "no_aspect_read"),
        ("tension level: seven", (None,) * 4, "no_aspect_read"),
        ("tension level: 4/5", (None,) * 4, "no_aspect_read"),
        ("tension level: 7\ncomplexity: 5", (7, None, 5, None), "some_aspects_missing"),
        (PLAIN.replace(": 7", ": 11"), (None, 10, 1, 3), "out_of_range"),
        (PLAIN.replace(": 7", ": 0"), (None, 10, 1, 3), "out_of_range"),
        (PLAIN.replace(": 7", ": -3"), (None, 10, 1, 3), "out_of_range"),
        (PLAIN.replace(": 7", ": 1990s"), (None, 10, 1, 3), "some_aspects_missing"),
    ],
)
def test_what_is_not_read_has_a_reason(completion, ratings, reason):
    parsed = parse_ratings(completion, NAMES)
    assert (parsed.ratings, parsed.reason) == (ratings, reason)


@pytest.mark.parametrize(
    ("written", "rating", "digits"),
    [
        # the rating's own digits: what stands at its place
        ("7", 7, "7"),
        ("10", 10, "10"),
        ("8/10", 8, "8/10"),
        ("8 / 10", 8, "8 / 10"),
        ("8/10.", 8, "8/10."),
        ("8 out of 10", 8, "8 out of 10"),
        ("**8**", 8, "8**"),
        ("**8**/10", 8, "8**/10"),
        ("score: 8", 8, "8"),
        ("8.", 8, "8."),
        ("8 - very tense", 8, "8 - very"),
        ("8 to ten", 8, "8 to ten"),
        ("+4", 4, "4"),
        ("07", 7, "7"),
        ("007", 7, "7"),
        ("8.49", 8, "8.49"),
        ("8.5", 9, "8.5"),
        ("1.0", 1, "1.0"),
        ("10.0", 10, "10.0"),
        ("(1-10) 6", 6, "6"),
        ("in the 1990s a 7", 7, "7"),
    ],
)
def test_what_is_read_and_where(written, rating, digits):
    completion = f"Ratings, 3 of them.\ntension level: {written}\ncomplexity: 2"
    parsed = parse_ratings(completion, ("tension level", "complexity"))
    assert (parsed.ratings, parsed.reason) == ((rating, 2), "ok")
    assert completion[parsed.starts[0] :].startswith(digits)
    assert completion[parsed.starts[0] : parsed.ends[0]] == re.match(r"\d+(\.\d+)?", digits)[0]
    assert completion[parsed.starts[1] : parsed.ends[1]] == "2"


@pytest.mark.parametrize(
    "written",
    [
        *["7-8", "7 - 8", "7–8", "7 – 8", "7 to 8", "**7**-**8**", "7/10 - 8/10", "7-11", "1-10", "1 to 10, say 7"],
        *["4/5", "4 out of 5", "80/100", "1,000", "7,5", "1e3", "1.2.3", "8.5%", "٣", "８", "v8", "-", "+"],
    ],
)
def test_what_is_no_rating_leaves_the_aspect_to_a_later_line(written):
    alone = parse_ratings(f"tension level: {written}", ("tension level",))
    assert (alone.ratings, alone.starts, alone.reason) == ((None,), (None,), "no_aspect_read")
    followed = parse_ratings(f"tension level: {written}\ntension level: 6", ("tension level",))
    assert (followed.ratings, followed.reason) == ((6,), "ok")


@pytest.mark.parametrize(
    "written", ["0", "11", "10.4", "10.01", "0.6", "0.99", "-3", "−3", "-0", "00", "11/10", "1000", "9" * 400]
)
def test_a_first_rating_out_of_range_does_not_give_way_to_a_later_one(written):
    completion = f"tension level: {written}\ntension level: 6\ncomplexity: 2"
    parsed = parse_ratings(completion, ("tension level", "complexity"))
    assert (parsed.ratings, parsed.reason) == ((None, 2), "out_of_range")
    assert (parsed.starts[0], parsed.ends[0]) == (None, None)


def test_a_later_rating_out_of_range_is_nothing():
    twice = "tension level: 6\ntension level: 11"
    assert parse_ratings(twice, ("tension level",)).reason == "ok"
    missing = parse_ratings(twice, ("tension level", "complexity"))
    assert (missing.ratings, missing.reason) == ((6, None), "some_aspects_missing")


def test_a_split_ten_shares_the_probability_of_one():
    # P('1') = .4, P('2') = .1, the other digits nothing; behind a '1' a '0' has .25
    logs = np.full((1, 10), -np.inf)
    logs[0, :2] = np.log([0.4, 0.1])
    probabilities = rating_probabilities(logs, np.log([0.25]))
    assert probabilities[0] == pytest.approx([0.6, 0.2, 0, 0, 0, 0, 0, 0, 0, 0.2])
    certain_ten = rating_probabilities(logs, np.array([0.0]))
    assert certain_ten[0] == pytest.approx([0, 0.2, 0, 0, 0, 0, 0, 0, 0, 0.8])


def test_a_ten_of_one_token_is_normalised_like_the_others():
    logs = np.log(np.arange(1, 11) / 1000)[None]
    assert rating_probabilities(logs, None)[0] == pytest.approx(np.arange(1, 11) / 55)
