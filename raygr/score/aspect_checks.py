"""`raygr aspects check`: weak aspects by their words, by a prompt, and by the scores that they got."""

import difflib
import itertools
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from raygr import runs
from raygr.data.vector_tables import read_score_table, score_values
from raygr.metrics.agreement import spearman
from raygr.score.aspects import Aspect, AspectSet, load_aspects
from raygr.score.config import ScoreConfig
from raygr.score.prompt_checks import prompt_counts
from raygr.score.quality import score_quality
from raygr.score.subjects import chosen_prompts, encoder_of, prompt_settings, show_prompts, subjects_of

LIKE_WORDS = 0.7  # share of the words that two names and descriptions have in common
LIKE_NAMES = 0.85  # difflib's ratio of two names
FEWEST_WORDS, MOST_WORDS = 4, 40  # of a description
ALIKE = 0.9  # magnitude of the rank correlation of two aspects of which one is enough
FEW_SCORED = 50
PREVIEWED = 128  # subjects whose prompts are counted
LITTLE_WORDS = {"a", "an", "and", "e", "for", "g", "in", "of", "or", "the", "to", "very", "vs", "with", "1", "10"}


def check_aspects(path: str, *, data: str | None, scores: str | None, llm: str) -> str:
    """Return what is weak about the aspects of a file, as lines of text.

    With a prepare run also the prompt of one item with its tokens, with a score run also what the scores say.
    """
    aspects = load_aspects(path)
    weak = word_problems(aspects.aspects)
    lines = [f"{path}: {len(aspects.aspects)} aspects of {aspects.category}", *weak]
    lines += [] if weak else ["words: nothing to complain of"]
    lines += score_lines(aspects, scores) if scores else []
    lines += prompt_lines(path, data, llm) if data else []
    return "\n".join(lines) + "\n"


# --- words ---------------------------------------------------------------------------------------


def word_problems(aspects: Sequence[Aspect]) -> list[str]:
    """Descriptions that are short, long or without both ends of the scale, and aspects that say much the same."""
    found = []
    for one in aspects:
        count = len(one.description.split())
        if not FEWEST_WORDS <= count <= MOST_WORDS:
            length = "short" if count < FEWEST_WORDS else "long: each word is in every prompt"
            found.append(f"{one.name}: a description of {count} words is {length}")
        missing = [end for end in ("1", "10") if not re.search(rf"\b{end}\b", one.description)]
        if missing:
            ends = " and what ".join(missing)
            found.append(f"{one.name}: does not say what {ends} means, as in (e.g., 1 for slow, 10 for fast)")
    return found + [
        f"{one.name} and {other.name}: much the same {what}"
        for one, other in itertools.combinations(aspects, 2)
        if (what := same_words(one, other))
    ]


def same_words(one: Aspect, other: Aspect) -> str:
    if difflib.SequenceMatcher(None, one.name.casefold(), other.name.casefold()).ratio() >= LIKE_NAMES:
        return "name"
    texts = (f"{each.name} {each.description}" for each in (one, other))
    left, right = (set(re.findall(r"\w+", text.casefold())) - LITTLE_WORDS for text in texts)
    return "description" if len(left & right) >= LIKE_WORDS * max(1, min(len(left), len(right))) else ""


# --- scores --------------------------------------------------------------------------------------


def score_lines(aspects: AspectSet, run: str) -> list[str]:
    """Dead aspects, pairs that order the subjects alike, and the aspects that are worth keeping."""
    runs.read_run(run, job="score")
    table, names = read_score_table(run, ["ratings", "expected", "reason"])
    if names != aspects.names:
        return [f"{run} has scores of other aspects: {', '.join(names)}; score again with this file"]
    quality = score_quality(table.to_batches(), names)
    expected_SA = score_values(table["expected"], len(names), run)
    spread = {name: quality["aspects"][name]["spread"] or 0.0 for name in names}
    dead = [name for name in names if quality["aspects"][name]["dead"]]
    rank = quality["effective_rank"]
    unlike = f"; they say as much as {rank:.1f} unrelated aspects of {len(names)}" if rank else ""
    lines = [f"{run}: {len(table):,} scored, {quality['valid_share']:.0%} valid{unlike}"]
    lines += [
        f"{name}: dead, the same for nearly all (standard deviation {spread[name]:.2f} of 1..10)" for name in dead
    ]
    dropped = set(dead)
    for (a, one), (b, other) in itertools.combinations(enumerate(names), 2):
        both = np.isfinite(expected_SA[:, [a, b]]).all(axis=1)
        like = None if {one, other} & set(dead) else spearman(expected_SA[both, a], expected_SA[both, b])
        if like is not None and abs(like) >= ALIKE:
            lines.append(f"{one} and {other}: rank correlation {like:+.2f}, one of them is enough")
            if not {one, other} & dropped:
                dropped.add(min(one, other, key=lambda name: spread[name]))
    kept = [name for name in names if name not in dropped]
    if dropped and len(table) < FEW_SCORED:
        lines.append(f"only {len(table)} are scored: score more before you drop any")
    if dropped:
        lines.append(f"drop: {', '.join(name for name in names if name in dropped)}")
        lines.append(f"train without them, with no new LLM call: aspect_names: [{', '.join(map(repr, kept))}]")
    return lines


# --- prompts -------------------------------------------------------------------------------------


def prompt_lines(path: str, data: str, llm: str) -> list[str]:
    """The tokens of the prompts of a few items, and the first prompt whole."""
    subjects: Literal["items"] = "items"
    config = ScoreConfig(output="preview", data=data, subjects=subjects, aspects=path, llm=llm)
    settings = prompt_settings(config, subjects)
    rows = chosen_prompts(config.data, settings, subjects_of(config.data, subjects, PREVIEWED))
    counts, shared = prompt_counts(rows), len(encoder_of(settings).shared)
    about = (
        f"prompts of {counts['count']:,} items: {counts['mean_tokens']:.0f} tokens on average, "
        f"{counts['max_tokens']:,} at most, of which the aspects and the task take {shared:,}"
    )
    cut = f"cut at max_prompt_tokens={config.max_prompt_tokens}: {counts['cut_subjects']:,}"
    return [about, cut, "", show_prompts(config, 1)]
