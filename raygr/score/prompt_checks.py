"""Checks of a score run's prompts before the engine is asked: cut text, missing text, prompts that subjects share."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.config import ConfigError
from raygr.score.subjects import PromptSettings, whole_texts

logger = logging.getLogger(__name__)

CHECKED_COLUMNS = [
    "subject_id",
    "prompt_sha256",
    "prompt_tokens",
    "shared_tokens",
    "told_sha256",
    "has_text",
    "cut_tokens",
    "reviews_used",
    "reviews_left_out",
]
FEW_SHARE = 0.01  # share of subjects that may share a prompt with a different one, if the budget cut both
LISTED, VALUE_SHOWN = 3, 60  # pairs of a message, and characters of each text


def check_prompts(prompts: pa.Table, *, data: str, settings: PromptSettings) -> dict[str, Any]:
    """Count what these PROMPT rows show, for `run.json`; warn of text that is missing or was cut by the budget.

    Raises ConfigError where no subject has any text, and where subjects with different texts share a prompt: always if
    one of them was not cut, otherwise if they are more than `FEW_SHARE` of all subjects.
    """
    counts = prompt_counts(prompts)
    what, total = settings.subjects, counts["count"]
    if total and counts["without_text"] == total:
        raise ConfigError(f"{data}: none of the {total:,} {what} has any text; check the metadata of the prepare run")
    if counts["without_text"]:
        logger.warning(
            "score: %s of %s %s have no text (no title, description, categories, details or review): their scores "
            "mean nothing",
            f"{counts['without_text']:,}",
            f"{total:,}",
            what,
        )
    warn_of_cuts(counts, settings)
    check_shared(prompts, counts, data=data, settings=settings)
    return counts


def prompt_counts(prompts: pa.Table) -> dict[str, Any]:
    """Count subjects, tokens and reviews, and how many of them the budget cut."""
    tokens, lost, left_out = (
        prompts[name].fill_null(0).to_numpy() for name in ("prompt_tokens", "cut_tokens", "reviews_left_out")
    )
    own = tokens - prompts["shared_tokens"].to_numpy()
    total = max(1, len(prompts))
    return {
        "count": len(prompts),
        "mean_tokens": float(tokens.mean()) if len(prompts) else 0.0,
        "max_tokens": int(tokens.max(initial=0)),
        "without_text": pc.sum(pc.invert(prompts["has_text"])).as_py() or 0,
        "cut_subjects": int((lost > 0).sum()),
        "cut_subjects_share": float((lost > 0).sum() / total),
        "cut_tokens_share": float(lost.sum() / max(1, lost.sum() + own.sum())),
        "subjects_with_reviews_left_out": int((left_out > 0).sum()),
        "reviews_left_out": int(left_out.sum()),
        "reviews_used": pc.sum(prompts["reviews_used"]).as_py() or 0,
        "share_a_prompt_unlike": len(sharing_rows(prompts)),
    }


def warn_of_cuts(counts: dict[str, Any], settings: PromptSettings) -> None:
    if counts["cut_subjects"]:
        logger.warning(
            "score: max_prompt_tokens=%d cut the text of %s of %s %s (%.1f%%); %.1f%% of all subjects' tokens were cut",
            settings.max_prompt_tokens,
            f"{counts['cut_subjects']:,}",
            f"{counts['count']:,}",
            settings.subjects,
            100 * counts["cut_subjects_share"],
            100 * counts["cut_tokens_share"],
        )
    if counts["reviews_left_out"]:
        reviews = counts["reviews_left_out"] + counts["reviews_used"]
        logger.warning(
            "score: max_prompt_tokens=%d left out the oldest reviews of %s of %s users: %s of %s reviews (%.1f%%)",
            settings.max_prompt_tokens,
            f"{counts['subjects_with_reviews_left_out']:,}",
            f"{counts['count']:,}",
            f"{counts['reviews_left_out']:,}",
            f"{reviews:,}",
            100 * counts["reviews_left_out"] / reviews,
        )


def check_shared(prompts: pa.Table, counts: dict[str, Any], *, data: str, settings: PromptSettings) -> None:
    sharing = sharing_rows(prompts)
    if not len(sharing):
        return
    examples = "; ".join(shared_examples(sharing, data=data, settings=settings))
    message = (
        f"{len(sharing):,} of {len(prompts):,} {settings.subjects} share a prompt with another whose text differs, and "
        f"would get the same scores: {examples}"
    )
    all_cut = pc.all(pc.greater(sharing["cut_tokens"], 0)).as_py()
    if all_cut and len(sharing) <= FEW_SHARE * len(prompts):
        logger.warning("score: %s", message)
        return
    mend = "raise max_prompt_tokens, which cut them" if all_cut else "the model's tokenizer does not tell them apart"
    raise ConfigError(f"{message} ({mend})")


def sharing_rows(prompts: pa.Table) -> pa.Table:
    """The PROMPT rows that share a prompt with a subject of different text, sorted by prompt."""
    texts = prompts.group_by("prompt_sha256").aggregate([("told_sha256", "count_distinct")])
    several = texts.filter(pc.greater(texts["told_sha256_count_distinct"], 1))["prompt_sha256"]
    return prompts.filter(pc.is_in(prompts["prompt_sha256"], value_set=several.combine_chunks())).sort_by(
        "prompt_sha256"
    )


def shared_examples(sharing: pa.Table, *, data: str, settings: PromptSettings) -> list[str]:
    """Pairs of subjects that share a prompt, each with the first line in which their texts differ."""
    pairs = []
    for prompt in sharing["prompt_sha256"].unique().to_pylist()[:LISTED]:
        rows = sharing.filter(pc.equal(sharing["prompt_sha256"], prompt))
        told = np.array(rows["told_sha256"].to_pylist())
        other = int(np.flatnonzero(told != told[0])[0])
        pairs.append((rows["subject_id"][0].as_py(), rows["subject_id"][other].as_py()))
    texts = iter(whole_texts(data, settings, [subject for pair in pairs for subject in pair]))
    return [f"{first} and {second} ({first_difference(next(texts), next(texts))})" for first, second in pairs]


def first_difference(one: str, other: str) -> str:
    """The label of the line where two texts first differ, and a few characters of each from there."""
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = one.rfind("\n", 0, place) + 1
    label = one[start:place].partition(":")[0]
    shown = (" ".join(text[place : place + VALUE_SHOWN].split()) or "nothing more" for text in (one, other))
    return f"{label}: {' / '.join(shown)}"
