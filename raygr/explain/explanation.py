"""What an explanation holds, and its words: the case study of the paper's Figure 5, made without an LLM call."""

from dataclasses import dataclass
from typing import Literal

NEAR = 1.0  # an item within this many levels of a user's value suits the user in that aspect
LOW_BELOW, HIGH_ABOVE = 4.0, 7.0  # thirds of 1..10


@dataclass(frozen=True)
class AspectTerm:
    """One aspect of an item for one user. Terms are parts of the score and have its unit."""

    aspect: str
    item_value: float
    """1..10, as the model was given it."""
    user_value: float
    """1..10; see Explanation.user_values."""
    gap: float
    """`item_value - user_value`."""
    level: Literal["low", "moderate", "high"]
    """To recommend to the user: the user's own value in words."""
    encoder_term: float
    """Encoder's state times the item's part of the aspect."""
    user_term: float
    """The user's part of the aspect times the item; 0 where the model has no user side."""
    average_term: float
    """`encoder_term + user_term`, averaged over all items of the catalogue: what no ranking depends on."""

    def lift(self) -> float:
        """By how much the aspect raises the score above what it adds to the average item's."""
        return self.encoder_term + self.user_term - self.average_term


@dataclass(frozen=True)
class UserExplanation:
    """`base_part`, all encoder and user terms, and `other_encoder_terms + other_user_terms` add up to `score`.

    That splits the score's last product, not its causes: the encoder made its state from the history's aspects.
    """

    user_id: str
    part: Literal["train", "validation", "test"] | None
    """Of the user's interaction with the item; None: unseen."""
    rating: float | None
    """What the user rated the item; None where unseen, or where the data has no rating."""
    history: int
    """Interactions of the user that the score knows: those before the one with the item, or all where unseen."""
    score: float
    """<state, item>, before any final activation; comparable between the items of one user only."""
    rank: float
    """Among the items that are not in that history, 1 is best; ties share the mean rank."""
    ranked: int
    """Items of that ranking."""
    base_part: float
    """Encoder's state times learned row, and biases."""
    base_part_at_mean: float
    """The same where the encoder reads the history with every aspect at the catalogue's mean."""
    base_moved: float
    """By how much of their own spread the base parts of all items move then: 0 is not at all, it may exceed 1."""
    terms: tuple[AspectTerm, ...]
    other_aspects: int
    """Those that are not in `terms`."""
    other_encoder_terms: float
    """Sum over them, as the next two."""
    other_user_terms: float
    other_average_terms: float

    def aspect_part(self) -> float:
        """The score without its base part."""
        return sum(t.encoder_term + t.user_term for t in self.terms) + self.other_encoder_terms + self.other_user_terms

    def outcome(self) -> str:
        """What became of the user and the item, such as `rated 5 (test)`."""
        if self.part is None:
            return "not seen yet"
        return (
            f"chosen, without a rating ({self.part})" if self.rating is None else f"rated {self.rating:g} ({self.part})"
        )


@dataclass(frozen=True)
class Explanation:
    """Made by raygr.explain.stage.explain."""

    item_id: str
    title: str
    """The item's id where the data has no title."""
    chosen: str
    """How item and users were chosen."""
    user_values: str
    """What the users' values are."""
    user_side: bool
    """False: the model does not see the users' values, and all user terms are 0."""
    users: tuple[UserExplanation, ...]

    def sentences(self) -> list[str]:
        """One for each user."""
        return [sentence(self.title, user) for user in self.users]


def level_word(value: float) -> Literal["low", "moderate", "high"]:
    """Of a value on 1..10."""
    if value < LOW_BELOW:
        return "low"
    return "high" if value > HIGH_ABOVE else "moderate"


def sentence(title: str, user: UserExplanation) -> str:
    """The item for one user in plain words: outcome, rank, fit, what lifts and lowers the score, what to recommend.

    And what the base part hangs on.
    """
    acts = {None: "has not seen"} if user.part is None else {user.part: "chose" if user.rating is None else "rated"}
    opening = f"{user.user_id} {acts[user.part]} \u201c{title}\u201d" + (
        "" if user.rating is None else f" {user.rating:g}"
    )
    ranking = f"the model ranks it {user.rank:g} of {user.ranked} for this user"
    words = f"{fit_words(user.terms)}; {lift_words(user.terms)}; {level_words(user.terms)}"
    return f"{opening}, and {ranking}: {words}. {base_words(user)}"


def base_words(user: UserExplanation) -> str:
    return (
        "The base part depends on aspects too, because the encoder reads those of the history: with all of them at the "
        f"catalogue's mean it would be {user.base_part_at_mean:.2f} instead of {user.base_part:.2f} for this item, and "
        f"over all items it would change by {user.base_moved:.0%} of its spread."
    )


def fit_words(terms: tuple[AspectTerm, ...]) -> str:
    near = sum(abs(term.gap) <= NEAR for term in terms)
    far = max(terms, key=lambda term: abs(term.gap))
    text = f"it is within one level of the user's value in {near or 'none'} of {len(terms)} aspects"
    if abs(far.gap) <= NEAR:
        return text
    return f"{text} and furthest from it in {far.aspect} ({far.item_value:.1f} against {far.user_value:.1f})"


def lift_words(terms: tuple[AspectTerm, ...]) -> str:
    best, worst = max(terms, key=AspectTerm.lift), min(terms, key=AspectTerm.lift)
    found = []
    if best.lift() > 0:
        found.append(f"{best.aspect} lifts the score most ({best.lift():+z.2f})")
    if worst.lift() < 0:
        found.append(f"{worst.aspect} lowers it most ({worst.lift():+z.2f})")
    return (
        f"against the average item, {' and '.join(found)}" if found else "no aspect sets it off from the average item"
    )


def level_words(terms: tuple[AspectTerm, ...]) -> str:
    marked = [f"{term.level} {term.aspect} ({term.user_value:.1f})" for term in terms if term.level != "moderate"]
    if not marked:
        return "recommend items of moderate levels"
    rest = "" if len(marked) == len(terms) else ", moderate in the rest"
    return f"recommend items of {' and '.join([', '.join(marked[:-1]), marked[-1]] if marked[:-1] else marked)}{rest}"
