"""Texts of simulated reviews: short, and written so that a reader can guess the tastes."""

from collections.abc import Sequence

import numpy as np

ASPECT_PHRASES = {  # aspect -> phrases for a low and for a high score
    "story complexity": ("the simple, straightforward story", "the intricate, many-layered story"),
    "dialogue complexity": ("the plain, easy dialogue", "the clever, demanding dialogue"),
    "intellectual challenge": ("how little thinking it asks for", "how hard it makes you think"),
    "emotional intensity": ("the light, unemotional tone", "the deep, overwhelming emotion"),
    "visual & auditory intensity": ("the quiet, modest look and sound", "the spectacular visuals and sound"),
    "tension level": ("the relaxed mood without any suspense", "the nail-biting suspense"),
    "pace": ("the slow, reflective pace", "the fast, action-packed pace"),
    "realism vs. fantasy": ("how realistic and true to life it is", "the wild fantasy world"),
    "historical vs. contemporary": ("the historical setting", "the modern, present-day setting"),
    "social value alignment": ("the lack of any message", "the strong message about society"),
    "individual viewing vs. group viewing": ("that it is best watched alone", "that it is great fun for a whole group"),
    "movie length (duration)": ("the short running time", "the long running time"),
}
TITLES = {
    1: ("Could not finish it", "A waste of an evening", "Terrible"),
    2: ("Disappointing", "Not for me", "Expected more"),
    3: ("It was okay", "Mixed feelings", "Average"),
    4: ("Really good", "Enjoyed it", "Well worth watching"),
    5: ("Loved it", "A favorite", "Perfect"),
}
TEXTS = {
    1: (
        "I could not stand {first}, and {second} made it worse.",
        "Awful. What I hated most: {first}. And also {second}.",
    ),
    2: (
        "I did not care for {first}. I also disliked {second}.",
        "Not my kind of film, because of {first} and {second}.",
    ),
    3: (
        "An average film for me. I noticed {first} and {second}, and neither won me over.",
        "Okay for one evening. What stays with me: {first}, and {second}.",
    ),
    4: (
        "I liked {first}, and {second} was a plus.",
        "A good choice. I enjoyed {first} and {second}.",
    ),
    5: (
        "I loved {first}! And {second} is just what I look for.",
        "One of my favorites, because of {first} and {second}.",
    ),
}
LIKED, DISLIKED = 4, 2  # a rating of LIKED or more praises; one of DISLIKED or less complains
FILM_SHARE = 0.15  # weight of the film's extreme aspects, relative to those that the shopper cares about


def review_text(
    rating: int, aspects: Sequence[str], taste_A: np.ndarray, levels_A: np.ndarray, *, generator: np.random.Generator
) -> str:
    """One or two sentences about the two aspects that explain the rating best.

    `taste_A` (A,) is the taste of the shopper, `levels_A` (A,) the standardised scores of the film.
    """
    first, second = explaining_aspects(rating, taste_A, levels_A)
    words = [ASPECT_PHRASES[aspects[aspect]][int(levels_A[aspect] > 0)] for aspect in (first, second)]
    return choice(TEXTS[rating], generator=generator).format(first=words[0], second=words[1])


def explaining_aspects(rating: int, taste_A: np.ndarray, levels_A: np.ndarray) -> tuple[int, int]:
    """Two aspects that explain the rating.

    They are those of the best fit for a good rating, of the worst for a bad one, and the strongest for a medium one.
    """
    fit_A = taste_A * levels_A
    if rating <= DISLIKED:
        fit_A = -fit_A
    elif rating < LIKED:
        fit_A = np.abs(fit_A)
    first, second = np.argsort(-(fit_A + FILM_SHARE * np.abs(levels_A)), kind="stable")[:2]
    return int(first), int(second)


def choice(texts: Sequence[str], *, generator: np.random.Generator) -> str:
    return texts[int(generator.integers(len(texts)))]
