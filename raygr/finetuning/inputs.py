"""A prepare run, item scores and a teacher -> the users to tune on, each with its prompt and its targets.

Everything is checked here. Validation and test items enter nothing. Shape suffixes: `I` items, `A` aspects,
`C` candidates, `K` judged items.
"""

from typing import NamedTuple

import numpy as np

from raygr.finetuning.rollouts import AnswerTemplate


class Problem(NamedTuple):
    """One user: what the policy reads and what its ratings are judged by. Items are rows, item_index - 1."""

    user_index: int
    user_id: str
    prompt_ids: tuple[int, ...]
    """The chat prompt up to where the answer starts, with reviews before the cut-off only."""
    candidate_C: np.ndarray
    """The target (the last train interaction) first, then items the user has in no part, drawn uniformly."""
    judged_K: np.ndarray
    """Train interactions kept out of the prompt, the target among them."""
    liked_K: np.ndarray
    """Whether the user's rating of a judged item reaches the threshold."""
    teacher_A: np.ndarray | None
    """The teacher's ratings on 1..10; None where it has none for this user."""


class Inputs(NamedTuple):
    """All that one fine-tune needs; every worker holds it whole."""

    items_IA: np.ndarray
    """Item scores on 1..10; missing ones took the aspect's mean."""
    train: list[Problem]
    held_out: list[Problem]
    names: tuple[str, ...]
    """The aspects, in the order of the answer."""
    model: str
    """The base model's folder."""
    template: AnswerTemplate
    counts: dict[str, int]
    """Users by what became of them."""
