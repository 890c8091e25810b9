"""The record of an explanation, and the sentences that say it: levels, terms, and what the base part depends on."""

from dataclasses import dataclass
from typing import Literal

from raygr.recommend.faithfulness import SPEAKS

NEAR = 1.0  # an item within this many levels of a user's value suits the user in that aspect
LOW_BELOW, HIGH_ABOVE = 4.0, 7.0  # thirds of 1..10


@dataclass(frozen=True)
class AspectTerm:
    """One aspect of an item for one user. Terms are parts of the score and have its unit."""

    aspect: str
    item_value: float
    """1..10, as the model reads it."""
    user_value: float
    """1..10; see Explanation.user_values."""
    gap: float
    """`item_value - user_value`."""
    level: Literal["low", "moderate", "high"]
    """The user's value in words: the level to recommend to the user."""
    looks_for: float
    """What the user looks for now: the guided user state, which adds `looks_for` times the item's standardised score;
    0 where the model has none."""
    encoder_term: float
    """The encoder's state times the aspect's part of the item embedding."""
    user_term: float
    """The guided user state times the item's standardised score, or the aspect's part of (9b) times the item embedding;
    0 where the model has neither."""
    average_term: float
    """`encoder_term + user_term`, averaged over all items of the catalogue: no ranking depends on it."""

    def lift(self) -> float:
        """How much the aspect raises the score above what it adds to the score of an average item."""
        return self.encoder_term + self.user_term - self.average_term


@dataclass(frozen=True)
class UserExplanation:
    """An item's score for one user: `base_part`, all terms, and the `other_*_terms` without the average add up to it.

    The terms are parts of the score's last product, not its causes: the encoder has read the history's aspects.
    """

    user_id: str
    part: str | None
    """The split's part of the user's interaction with the item; None where the user has not seen the item."""
    rating: float | None
    """The user's rating of the item; None where it is unseen, or where the data has no rating."""
    history: int
    """Interactions that the score is based on: those before the one with the item, or all where the item is unseen."""
    score: float
    """<state, item>, before any final activation; comparable between the items of one user only."""
    rank: float
    """Rank among the items that are not in that history: 1 is best, ties share the mean rank."""
    ranked: int
    """Number of items in that ranking."""
    spread: float
    """Standard deviation of the scores of all items after that history: it tells small terms from large ones."""
    base_part: float
    """The encoder's state times the learned part of the item embedding, and biases."""
    base_part_at_mean: float
    """`base_part` where the encoder reads the history with every aspect at the catalogue's mean."""
    base_moved: float
    """Change of all items' base parts between the two, as a fraction of their spread: 0 is none, it may exceed 1."""
    terms: tuple[AspectTerm, ...]
    other_aspects: int
    """Number of aspects that are not in `terms`."""
    other_encoder_terms: float
    """Sum over these aspects, as are the next two."""
    other_user_terms: float
    other_average_terms: float

    def aspect_part(self) -> float:
        """The score without its base part."""
        return sum(t.encoder_term + t.user_term for t in self.terms) + self.other_encoder_terms + self.other_user_terms

    def speaks(self, value: float) -> bool:
        """Whether a part of the score is large enough beside the spread of the scores to be named."""
        return value != 0 and abs(value) >= SPEAKS * self.spread


@dataclass(frozen=True)
class Explanation:
    """One item's scores for one or more users, made by `explain_item`."""

    item_id: str
    title: str
    """The item's id where the data has no title."""
    chosen: str
    """How the item and the users were chosen."""
    user_values: str
    """What the users' values are."""
    user_side: bool
    """False: the model does not see the users' values, and all user terms are 0."""
    users: tuple[UserExplanation, ...]

    def sentences(self) -> list[str]:
        """One text per user."""
        return [sentence(self.title, user) for user in self.users]


# --- words --------------------------------------------------------------------------------------


def level_word(value: float) -> Literal["low", "moderate", "high"]:
    """The level of a value on 1..10."""
    if value < LOW_BELOW:
        return "low"
    return "high" if value > HIGH_ABOVE else "moderate"


def sentence(title: str, user: UserExplanation) -> str:
    """The explanation for one user: outcome, rank, fit, strongest terms, levels to recommend, and the base part."""
    act = "has not seen" if user.part is None else "chose" if user.rating is None else "rated"
    rating = "" if user.rating is None else f" {user.rating:g}"
    return (
        f"{user.user_id} {act} “{title}”{rating}, and the model ranks it {user.rank:g} of {user.ranked} for this user: "
        f"{fit_words(user.terms)}; {lift_words(user)}; {looking_words(user)}{level_words(user.terms)}. "
        f"{base_words(user)}."
    )


def base_words(user: UserExplanation) -> str:
    if user.base_moved == 0:  # item rows without a guided part
        return "The base part depends on no aspect"
    return (
        "The base part depends on aspects too, because the encoder reads those of the history: with all of them at the "
        f"catalogue's mean it would be {user.base_part_at_mean:.2f} instead of {user.base_part:.2f} for this item, and "
        f"over all items it would change by {user.base_moved:.0%} of its spread"
    )


def looking_words(user: UserExplanation) -> str:
    """What the guided user state looks for most and avoids most; nothing for a model without one."""
    most, least = (pick(user.terms, key=lambda term: term.looks_for) for pick in (max, min))
    found = []
    if most.looks_for > 0 and user.speaks(most.looks_for):
        found.append(f"looks for {most.aspect} most ({most.looks_for:+.2f} a deviation)")
    if least.looks_for < 0 and user.speaks(least.looks_for):
        found.append(f"avoids {least.aspect} most ({least.looks_for:+.2f})")
    return f"just before, the user {' and '.join(found)}; " if found else ""


def fit_words(terms: tuple[AspectTerm, ...]) -> str:
    near = sum(abs(term.gap) <= NEAR for term in terms)
    far = max(terms, key=lambda term: abs(term.gap))
    text = f"it is within one level of the user's value in {near or 'none'} of {len(terms)} aspects"
    if abs(far.gap) <= NEAR:
        return text
    return f"{text} and furthest from it in {far.aspect} ({far.item_value:.1f} against {far.user_value:.1f})"


def lift_words(user: UserExplanation) -> str:
    """The aspects that lift and lower the score most, of those that are large enough to speak."""
    best, worst = max(user.terms, key=AspectTerm.lift), min(user.terms, key=AspectTerm.lift)
    found = []
    if best.lift() > 0 and user.speaks(best.lift()):
        found.append(f"{best.aspect} lifts the score most ({best.lift():+.2f})")
    if worst.lift() < 0 and user.speaks(worst.lift()):
        found.append(f"{worst.aspect} lowers it most ({worst.lift():+.2f})")
    if found:
        return f"against the average item, {' and '.join(found)}"
    return (
        "aspects do not speak here: none moves the score from the average item's by "
        f"{SPEAKS:.0%} of the spread of this user's scores"
    )


def level_words(terms: tuple[AspectTerm, ...]) -> str:
    marked = [f"{term.level} {term.aspect} ({term.user_value:.1f})" for term in terms if term.level != "moderate"]
    if not marked:
        return "recommend items of moderate levels"
    rest = "" if len(marked) == len(terms) else ", moderate in the rest"
    return f"recommend items of {' and '.join([', '.join(marked[:-1]), marked[-1]] if marked[:-1] else marked)}{rest}"
