"""Rules that read ratings, on hand-written and random completions, and P(1..10) from hand-worked probabilities."""

import math
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raygr.score.answer_format import parse_ratings
from raygr.score.engine import rating_probabilities

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
        # the rating's digits stand at its place
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


TWO = ("tension level", "formality")


@pytest.mark.parametrize(
    ("completion", "ratings"),
    [
        ("| aspect | rating |\n|---|---|\n| tension level | 8 |\n| formality | 3 |", (8, 3)),
        (
            "| # | aspect | scale | rating |\n| 1 | **Tension level** | 1-10 | **8/10** |\n| 2 | formality | | 3 |",
            (8, 3),
        ),
        ("tension level - 8\nformality - 3", (8, 3)),
        ("1. Tension Level – 8 (gripping)\n2. Formality – 3/10 – casual", (8, 3)),
        ("tension_level: 8\nFormality: 3", (8, 3)),
        ('{"tension-level": 8, "formality": 3}', (8, 3)),
        ("tension level [1-10]: 8\nformality [1-10]: 3", (8, 3)),
        ("Tension level\n8\nFormality\n3", (8, 3)),
        ("### Tension level:\n\n**8/10**\nIt grips.\n\n### Formality\n**Rating:** 3", (8, 3)),
        ("Rating 1-10: tension level 8, formality 3", (8, 3)),
        ("The film has tension level 8; formality 3.", (8, 3)),
        ("**tension level:** 10/10\n**formality:** 1/10", (10, 1)),
        ("_tension level_: 8\n__formality__ \uff1a 3", (8, 3)),
        # a number behind a colon comes first
        ("tension level 3, formality 3\ntension level: 8\nformality: 9", (8, 9)),
    ],
)
def test_plain_answers_of_other_forms_are_read(completion, ratings):
    parsed = parse_ratings(completion, TWO)
    assert (parsed.ratings, parsed.reason) == (ratings, "ok")


@pytest.mark.parametrize(
    "completion",
    [
        "In terms of tension level 3 scenes stand out.",
        "tension level 7 or 8",
        "tension level 1-10",
        "tension level 8, 9",
        "tension level - 7-8",
        "tension level - 2. formality",
        "tension level - 3 out of 5",
        "tension level -8",
        "tension level (8)",
        "tension level 1 - calm\ntension level 10 - extreme",
        "| tension level | 8 | 9 |",
        "| tension level | 1-10 |",
        "| 8 | tension level |",
        "| tension level | formality |\n|---|---|\n| 8 | 3 |",
        "Aspects:\n1. Tension level\n2. Formality",
        "Tension level\n4/5",
        "Tension level\n8 scenes",
        "8\nTension level\n3\nFormality",  # the number stands above its name
        "plot_tension level: 8",
    ],
)
def test_what_may_be_something_else_is_no_rating(completion):
    assert parse_ratings(completion, TWO).ratings == (None, None)


@pytest.mark.parametrize(
    ("completion", "ratings"),
    [
        ("<think>maybe tension level: 3, formality: 2.</think>\ntension level: 8\nformality: 9", (8, 9)),
        ("tension level: 3</think>\nformality: 9", (None, 9)),  # the prompt opened the block
        ("<think>tension level: 3, formality: 2", (None, None)),  # cut off within the reasoning
        ("<think>a</think>tension level: 3<think>b</think>tension level: 8, formality: 9", (8, 9)),
        ("[THINK]tension level: 3[/THINK]tension level: 8, formality: 9", (8, 9)),
        ("<Thinking>\nformality: 2\n</Thinking>\n\ntension level: 8\nformality: 9", (8, 9)),
    ],
)
def test_reasoning_is_not_the_answer(completion, ratings):
    parsed = parse_ratings(completion, TWO)
    assert parsed.ratings == ratings
    for rating, start, end in zip(parsed.ratings, parsed.starts, parsed.ends, strict=True):
        assert rating is None or completion[start:end] == str(rating)


MANY = (*NAMES, "sci-fi", "2D art", "formality", "x_y")
FORMS = {
    "plain": "{name}: {rating}",
    "bold": "**{name}:** {rating}/10",
    "bullet": "- **{Name}**: I say {rating} out of 10, as it is.",
    "scale": "{name} (1 to 10): {rating}",
    "square scale": "{name} [1-10]: {rating}",
    "equals": "{name} = {rating}.0",
    "dash": "* {name} - {rating}",
    "en dash": "{Name} – {rating}/10 – so it is",
    "underscores": "{under}: {rating}",
    "no colon": "{name} {rating},",
    "table": "| {name} | {rating} |",
    "table with reasons": "|{name}|**{rating}**|all 3 parts|",
    "next line": "{Name}\n{rating}",
    "heading": "### {Name}:\n\n**{rating}/10**\n",
    "labelled": "## {Name}\nRating: {rating}",
}
BEFORE = (
    "",
    "Sure! Here are 3 of them:\n\n",
    "<think>\ncomplexity: 4\nformality - 2</think>\n",
    "| aspect | rating |\n",
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(MANY), st.integers(1, 10)), min_size=1, unique_by=lambda pair: pair[0]),
    st.sampled_from(sorted(FORMS)),
    st.sampled_from(BEFORE),
    st.sampled_from([MANY, MANY[::-1]]),
)
def test_what_is_written_is_read(written, form, before, names):
    lines = [
        FORMS[form].format(name=name, Name=name.capitalize(), under=name.replace(" ", "_"), rating=rating)
        for name, rating in written
    ]
    completion = before + "\n".join(lines)
    parsed = parse_ratings(completion, names)
    assert dict(zip(names, parsed.ratings, strict=True)) == dict.fromkeys(names) | dict(written)
    for start, end, rating in zip(parsed.starts, parsed.ends, parsed.ratings, strict=True):
        assert rating is None or float(completion[start:end]) == rating
    assert parsed.reason == ("ok" if len(written) == len(names) else "some_aspects_missing")


PIECES = [
    *MANY,
    *":-|=,.\n*_/[()0 ",
    "8",
    "10",
    "/10",
    "7.5",
    "11",
    " – ",
    "[1-10]",
    "<think>",
    "</think>",
    "\uff18",
    "é",
]


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
@example("tension level:\n\n8" + "\u2028")
def test_any_text_is_read_without_an_error_and_within_the_scale(completion):
    parsed = parse_ratings(completion, MANY)
    for rating, start, end in zip(parsed.ratings, parsed.starts, parsed.ends, strict=True):
        assert (rating is None) == (start is None) == (end is None)
        if rating is not None:
            assert 1 <= rating <= 10 and rating == math.floor(float(completion[start:end]) + 0.5)
    read = sum(rating is not None for rating in parsed.ratings)
    assert (parsed.reason == "ok") == (read == len(MANY)) and (parsed.reason != "no_aspect_read" or not read)


def test_a_split_ten_shares_the_probability_of_one():
    # P('1') = .4, P('2') = .1, the other digits 0; P('0' | '1') = .25
    logs = np.full((1, 10), -np.inf)
    logs[0, :2] = np.log([0.4, 0.1])
    probabilities = rating_probabilities(logs, np.log([0.25]))
    assert probabilities[0] == pytest.approx([0.6, 0.2, 0, 0, 0, 0, 0, 0, 0, 0.2])
    certain_ten = rating_probabilities(logs, np.array([0.0]))
    assert certain_ten[0] == pytest.approx([0, 0.2, 0, 0, 0, 0, 0, 0, 0, 0.8])


def test_a_ten_of_one_token_is_normalised_like_the_others():
    logs = np.log(np.arange(1, 11) / 1000)[None]
    assert rating_probabilities(logs, None)[0] == pytest.approx(np.arange(1, 11) / 55)
