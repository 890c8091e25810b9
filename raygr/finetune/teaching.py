"""Teaches the LLM the scores of some items: SFT on the ratings that the scoring mode `probe` reads.

`item_scores` is the teacher. The items that it has are taught, except a seeded, fixed part: Spearman's correlation of
their expected ratings with the teacher's chooses the adapter.
Shape letters: `B` prompts of a batch, `I` items, `A` aspects, `Q` levels 1..10.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raygr.config import ConfigError
from raygr.data.interactions import read_ids
from raygr.data.row_counts import log_rows
from raygr.data.vector_tables import check_ratings, read_vectors, rows_by_id
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import TuningData, TuningExample
from raygr.finetune.loop import USERS_AT_ONCE, Tuning, keep_if_best, own_batches, sft_step, steps_per_epoch
from raygr.finetune.losses import probe_loss
from raygr.finetune.policy import Policy, probed_log_probs, teacher_ratings
from raygr.finetune.sampling import AnswerTemplate
from raygr.metrics.agreement import agreement, mean_agreement
from raygr.schema import ITEMS
from raygr.score.answer_format import aspect_tails, rating_tokens
from raygr.score.subjects import chosen_prompts, encoder_of, prompt_settings

logger = logging.getLogger(__name__)

FEWEST_HELD_OUT = 3  # two items are in the right order by chance every other time


# --- inputs --------------------------------------------------------------------------------------


def load_taught_items(config: FinetuneConfig) -> TuningData:
    """Reads and checks the teacher's scores and the prompts of the items that have all of them."""
    settings = prompt_settings(config, "items")
    names, tokenizer = settings.aspects.names, encoder_of(settings).tokenizer
    vectors = read_vectors(config.item_scores, subjects="items", column=config.score_column, aspects=names, gaps=True)
    check_ratings(vectors, config.item_scores)
    ids_I = read_ids(config.data, ITEMS, "item")
    scores_IA, unknown = rows_by_id(vectors, ids_I)
    is_scored_I, is_taught_I = np.isin(ids_I, vectors.ids_S), ~np.isnan(scores_IA).any(axis=1)
    train, held_out = split_items(config, np.flatnonzero(is_taught_I))
    dropped = {
        "without_scores": int((~is_scored_I).sum()),
        "without_all_scores": int((is_scored_I & ~is_taught_I).sum()),
    }
    log_rows(f"items of {config.data}", read=len(ids_I), kept=len(train) + len(held_out), dropped=dropped)
    rows = chosen_prompts(config.data, settings, 1 + np.concatenate([train, held_out])).to_pylist()
    prompts = {row["subject_id"]: tuple(row["prompt_ids"]) for row in rows}
    counts = {"items": len(ids_I), "train": len(train), "held_out": len(held_out), **dropped}
    counts |= {"scored_but_not_in_the_data": unknown, "prompts_cut": sum(row["cut_tokens"] > 0 for row in rows)}
    none_N = np.empty(0, np.int64)
    train_examples, held_out_examples = (
        [TuningExample(i + 1, ids_I[i], prompts[ids_I[i]], none_N, none_N, none_N > 0, scores_IA[i]) for i in part]
        for part in (train.tolist(), held_out.tolist())
    )
    return TuningData(
        items_IA=scores_IA,
        train=train_examples,
        held_out=held_out_examples,
        names=names,
        model=settings.model,
        template=AnswerTemplate(
            aspect_tails(tokenizer, settings.aspects), (), rating_tokens(tokenizer, settings.aspects)
        ),
        counts=counts,
    )


def split_items(config: FinetuneConfig, taught: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the items to train on and of the held-out ones, drawn with `seed`; ConfigError for too few."""
    order = np.random.default_rng(config.seed).permutation(taught)
    held_out = round(config.held_out_fraction * len(order))
    if held_out < FEWEST_HELD_OUT or held_out == len(order):
        raise ConfigError(
            f"item_scores: {config.item_scores} has all scores of {len(taught)} items of {config.data}; with "
            f"held_out_fraction: {config.held_out_fraction:g} {held_out} of them are held out, and at least "
            f"{FEWEST_HELD_OUT} must be, and one be taught"
        )
    return order[held_out:], order[:held_out]


# --- the loop ------------------------------------------------------------------------------------


def teach(tuning: Tuning) -> Iterator[bool]:
    """Teaches the adapter to the end; yields after every step, True where a checkpoint may be written."""
    config, taught, progress = tuning.config, tuning.data.train, tuning.progress
    assert config.learning_rate is not None
    if not progress.evaluations:
        keep_if_best(tuning, "before", evaluate_items(tuning), may_be_best=True)
        yield True
    epoch_steps = steps_per_epoch(config, taught)
    steps = config.epochs * epoch_steps
    while progress.step < steps:
        sft_step(tuning, taught, teaching_loss, "teaching", progress.step, steps, config.learning_rate)
        progress.step += 1
        evaluate_now = progress.step % (config.evaluate_every_steps or epoch_steps) == 0 or progress.step == steps
        if evaluate_now:
            keep_if_best(tuning, "teaching", evaluate_items(tuning), may_be_best=True)
        yield evaluate_now


def teaching_loss(policy: Policy, batch: list[TuningExample]) -> Tensor:
    return probe_loss(probed_log_probs(policy, batch), teacher_ratings(policy, batch))


@torch.no_grad()
def evaluate_items(tuning: Tuning) -> dict[str, Any]:
    """Agreement of the held-out items' expected ratings with the teacher's: `metrics` are means over the `aspects`."""
    data = tuning.data
    expected_IA = torch.zeros(len(data.held_out), len(data.names), dtype=torch.float64, device=tuning.device)
    level_Q = torch.arange(1.0, 11, dtype=torch.float64, device=tuning.device)
    batches = own_batches(tuning, data.held_out, max(USERS_AT_ONCE, tuning.config.batch_size))
    own = [probed_log_probs(tuning.policy, batch).double().exp() @ level_Q for batch in batches]
    if own:
        expected_IA[tuning.share.rank :: tuning.share.workers] = torch.cat(own)
    expected_IA = tuning.share.total(expected_IA)  # gathers: every worker leaves the others' items at 0
    teacher_IA, taught_IA = (np.array([one.teacher_A for one in part]) for part in (data.held_out, data.train))
    found = agreement(expected_IA.cpu().numpy(), teacher_IA, taught_IA.mean(axis=0))
    return {
        "metrics": mean_agreement(found),
        "aspects": {name: one._asdict() for name, one in zip(data.names, found, strict=True)},
        "expected": expected_IA.tolist(),
    }
