"""What scoring on the first k aspects costs: tokens, counted, and a score run's seconds in proportion to them.

Nothing is scored again: the subjects' tokens are those of the run, template and answer are tokenised for each k.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raygr import files, runs, schema
from raygr.score.answer_format import aspect_tails
from raygr.score.aspects import load_aspects
from raygr.score.default_model import model_folder
from raygr.score.subjects import PromptSettings, encoder_of


class ScoringCost(NamedTuple):
    """Of one subject, on so many aspects."""

    aspects: int
    tokens: float
    """Template, subject, and answer lines with their ratings."""
    computed: float
    """Without the template, which a prefix cache computes once for all."""
    seconds: float | None
    """Of the score run's engine, in proportion to `computed`; None where its store knew all answers already."""


def scoring_costs(path: str, counts: Sequence[int]) -> list[ScoringCost]:
    """One per number of aspects; none where `path` is no score run."""
    if not runs.is_finished(path):
        return []
    record = runs.read_run(path, job="score")
    whole = prompt_settings(record["config"])
    prompt_tokens = files.read_table(files.join(path, schema.SCORES), columns=["prompt_tokens"])["prompt_tokens"]
    names = whole.aspects.names
    subject = float(np.mean(prompt_tokens.to_numpy())) - len(encoder_of(whole).shared)
    engine = record["counts"]["engine"]
    per_subject = engine["seconds"] / engine["subjects"] if engine["subjects"] else None
    computed = {count: subject + answer_tokens(whole, count) for count in (*counts, len(names))}
    return [
        ScoringCost(
            aspects=count,
            tokens=len(encoder_of(first_aspects(whole, count)).shared) + computed[count],
            computed=computed[count],
            seconds=per_subject and per_subject * computed[count] / computed[len(names)],
        )
        for count in counts
    ]


def prompt_settings(config: dict) -> PromptSettings:
    """Those of a score run's configuration; the rest of them does not change the template."""
    return PromptSettings(
        model=model_folder(config["llm"]),
        aspects=load_aspects(config["aspects"]),
        subjects=config["subjects"],
        max_prompt_tokens=config["max_prompt_tokens"],
        item_rating=config["item_rating"],
        best_rating=5.0,
    )


def first_aspects(settings: PromptSettings, count: int) -> PromptSettings:
    aspects = dataclasses.replace(settings.aspects, aspects=settings.aspects.aspects[:count])
    return dataclasses.replace(settings, aspects=aspects)


def answer_tokens(settings: PromptSettings, count: int) -> int:
    """Each line up to its rating, and the rating."""
    tails = aspect_tails(encoder_of(settings).tokenizer, settings.aspects)
    return sum(len(tail) + 1 for tail in tails[:count])
