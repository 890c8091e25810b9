"""What the LLM stages of a pipeline would ask: prompts and tokens, net of what the score store holds.

Counted from the prompts where an earlier attempt wrote them, else estimated: some subjects are drawn, their real
prompts made and tokenised, and their mean is taken for all. Their texts are looked for in all parts of the prepare run.
"""

import math
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from raygr import files, runs
from raygr.finetune.config import FinetuneConfig
from raygr.score.answer_format import aspect_tails, rating_tokens
from raygr.score.asking import PROMPTS, PROMPTS_DONE, way_of_asking
from raygr.score.aspects import AspectSet
from raygr.score.chat_template import encode_plain
from raygr.score.chosen_subjects import chosen_prompts, subjects_of
from raygr.score.config import ScoreConfig
from raygr.score.subjects import encoder_of, prompt_settings
from raygr.vectors.config import VectorsConfig

SAMPLED = 128  # subjects whose prompts are made for an estimate


class Estimate(NamedTuple):
    """What one stage would ask, in all."""

    what: str
    """The subjects, in words."""
    prompts: int
    prompt_tokens: int
    shared_tokens: int
    """Of the prompt tokens those that all prompts start with, which an engine with a prefix cache computes once."""
    answer_tokens: int
    """Of answers in the format that is asked for."""
    sampled: int | None
    """Prompts that it was estimated from; None where every prompt was counted."""


def score_estimate(config: ScoreConfig, *, adapter_is_known: bool) -> Estimate:
    """Prompts that the store lacks. The store knows none of an adapter that is yet to be tuned."""
    settings = prompt_settings(config, config.subjects, cutoff_fraction=config.cutoff_fraction)
    store = way_of_asking(config, exchanges=False).store if adapter_is_known else None
    known = store.known(retry_failed=config.retry_failed) if store else set()
    encoder = encoder_of(settings)
    subjects = subjects_of(config.data, config.subjects, config.max_subjects)
    if files.exists(files.join(config.output, PROMPTS_DONE)):
        columns = ["prompt_sha256", "prompt_tokens"]
        prompts, sampled = files.read_table(files.join(config.output, PROMPTS), columns), None
    else:
        drawn = draw(subjects)
        prompts = chosen_prompts(config.data, settings, drawn)
        sampled = len(drawn) if len(drawn) < len(subjects) else None
    # equal prompts are asked once
    tokens_of = dict(zip(prompts["prompt_sha256"].to_pylist(), prompts["prompt_tokens"].to_pylist(), strict=True))
    missing = [tokens for digest, tokens in tokens_of.items() if digest not in known]
    share = len(subjects) / max(1, len(prompts)) if sampled else 1
    asked = round(len(missing) * share)
    return Estimate(
        what=f"{len(subjects):,} {config.subjects}",
        prompts=asked,
        prompt_tokens=round(sum(missing) * share),
        shared_tokens=asked * len(encoder.shared),
        answer_tokens=asked * answer_tokens(encoder.tokenizer, settings.aspects, config.mode),
        sampled=sampled,
    )


def vectors_estimate(config: VectorsConfig) -> Estimate:
    """One prompt per item, read and never answered."""
    settings = prompt_settings(config, "items")
    items = subjects_of(config.data, "items", None)
    drawn = draw(items)
    tokens = chosen_prompts(config.data, settings, drawn)["prompt_tokens"].to_pylist()
    return Estimate(
        what=f"{len(items):,} items",
        prompts=len(items),
        prompt_tokens=round(np.mean(tokens) * len(items)),
        shared_tokens=len(items) * len(encoder_of(settings).shared),
        answer_tokens=0,
        sampled=len(drawn) if len(drawn) < len(items) else None,
    )


def finetune_estimate(config: FinetuneConfig) -> Estimate:
    """Prompts and answers of all passes over the users and of the evaluations of those held out."""
    from raygr.data.interactions import read_interactions
    from raygr.finetune.examples import check_settings, choose_users, cut_histories, user_prompts

    check_settings(config)
    prepared = runs.read_run(config.data, job="prepare")
    settings = prompt_settings(config, "users")
    histories = cut_histories(config, read_interactions(config.data), prepared["config"]["rating_range"])
    chosen = choose_users(config, histories)
    users = np.concatenate([chosen.train, chosen.held_out])
    drawn = draw(users)
    mean = np.mean([len(ids) for ids in user_prompts(config, settings, histories, drawn).values()])
    answer = answer_tokens(encoder_of(settings).tokenizer, settings.aspects, "generate")
    train, judged = len(chosen.train), len(chosen.held_out) * evaluations(config, len(chosen.train))
    prompts = train * (config.warm_start_epochs + config.epochs) + judged
    answers = train * (config.warm_start_epochs + config.epochs * config.completions) + judged
    return Estimate(
        what=f"{train:,} users to train on, {len(chosen.held_out):,} held out, in all passes and evaluations",
        prompts=prompts,
        prompt_tokens=round(mean * prompts),
        shared_tokens=0,
        answer_tokens=answers * answer,
        sampled=len(drawn) if len(drawn) < len(users) else None,
    )


def evaluations(config: FinetuneConfig, train: int) -> int:
    """How often the held-out users answer: before, after a warm start, and along the reinforcement."""
    epoch = math.ceil(train / (config.batch_size * config.accumulation))
    along = math.ceil(config.epochs * epoch / (config.evaluate_every_steps or epoch))
    return 1 + (config.warm_start_epochs > 0) + along


def answer_tokens(tokenizer: PreTrainedTokenizerBase, aspects: AspectSet, mode: str) -> int:
    """Tokens behind one prompt: the answer's lines and its end, or probe's tail and rating per aspect."""
    if mode == "probe":
        ratings = len(rating_tokens(tokenizer, aspects).ten)
        return sum(len(tail) + ratings for tail in aspect_tails(tokenizer, aspects))
    lines = "\n".join(f"{name}: 5" for name in aspects.names)
    return len(encode_plain(tokenizer, [lines])[0]) + 1


def draw(subjects: np.ndarray) -> np.ndarray:
    """At most SAMPLED of them, the same every time."""
    return np.random.default_rng(0).permutation(subjects)[:SAMPLED]
