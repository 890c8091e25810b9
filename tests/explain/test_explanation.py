"""The sentences of an explanation, word by word."""

from raygr.explain.explanation import AspectTerm, UserExplanation, level_word, sentence


def term(aspect: str, item: float, user: float, encoder: float, average: float = 0.0) -> AspectTerm:
    return AspectTerm(aspect, item, user, item - user, level_word(user), encoder, 0.1, average)


def test_the_sentence_is_made_of_the_numbers():
    terms = (term("pace", 7, 7.5, 0.4), term("mood", 2, 8.25, -0.3), term("length", 3, 3.5, 0.9, average=0.95))
    user = UserExplanation("u7", "test", 2.0, 9, 1.3, 12.5, 300, 1.25, 0.75, 0.333, terms, 0, 0.0, 0.0, 0.0)
    assert sentence("Heat (1995)", user) == (
        "u7 rated “Heat (1995)” 2, and the model ranks it 12.5 of 300 for this user: it is within one level of the "
        "user's value in 2 of 3 aspects and furthest from it in mood (2.0 against 8.2); against the average item, pace "
        "lifts the score most (+0.50) and mood lowers it most (-0.20); recommend items of high pace (7.5), high mood "
        "(8.2) and low length (3.5). The base part depends on aspects too, because the encoder reads those of the "
        "history: with all of them at the catalogue's mean it would be 0.75 instead of 1.25 for this item, and over "
        "all items it would change by 33% of its spread."
    )
    calm = UserExplanation(
        "u8", None, None, 9, 1.3, 1.0, 300, 0.5, 0.5, 0.0, (term("pace", 5, 5.5, 0.4),), 2, 0.0, 0.0, 0.0
    )
    assert sentence("Heat (1995)", calm).startswith(
        "u8 has not seen “Heat (1995)”, and the model ranks it 1 of 300 for this user: it is within one level of the "
        "user's value in 1 of 1 aspects; against the average item, pace lifts the score most (+0.50); recommend items "
        "of moderate levels."
    )


def test_levels_are_thirds_of_the_axis():
    assert [level_word(value) for value in (1, 3.9, 4, 7, 7.1, 10)] == ["low", "low", *["moderate"] * 2, "high", "high"]
