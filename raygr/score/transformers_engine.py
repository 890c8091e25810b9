"""The transformers actor: mode `probe` without vLLM, all aspects of a subject in one pass.

vLLM's prefix cache holds whole blocks of tokens, so it computes the last, partial block of a prompt again for every
aspect. Here the tails of all aspects lie behind their prompt in one row (shared_prefix.py), and every token is computed
once. That is the fastest way to probe a small model on processors (docs/results/speed.md); vLLM serves models that need
several GPUs, and writes completions.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from raygr.score.adapters import copied_adapter, merged_model
from raygr.score.engine import EngineSettings, ScoringActor, TokenCounts
from raygr.score.shared_prefix import Beginning, beginning, check_passes, probe_log_probs, register_attention
from raygr.score.store import ScoreStore, StoredScore

CHECKED_TOKENS = 64  # of a prompt: enough to tell a kind of attention, and a whole prompt takes as long as ten films
PASS_TOKENS = 4096  # of one pass, or one subject's: more saves no time and costs memory


class TransformersEngine(ScoringActor):
    """Answers batches of prompts with a transformers model and writes the answers to the score store."""

    def __init__(self, settings: EngineSettings, store: ScoreStore) -> None:
        super().__init__(settings, store)
        if threads := os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(threads))  # torch may have been imported by an earlier task of this process
        copy = copied_adapter(settings.adapter)
        merged = merged_model(settings.model, copy.name if copy else settings.adapter) if settings.adapter else None
        model: Any = AutoModelForCausalLM.from_pretrained(
            merged.name if merged else settings.model,
            dtype="auto" if settings.on_gpu else torch.float32,
            attn_implementation=register_attention(),
        )
        self.model = model.to("cuda" if settings.on_gpu else "cpu").eval()
        self.start: Beginning | None = None  # the system prompt, computed for the first batch

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], counts: TokenCounts) -> list[StoredScore]:
        """One answer per prompt."""
        settings, shared = self.settings, self.settings.shared_ids
        if self.start is None:
            check_passes(self.model, prompts[0][:CHECKED_TOKENS], name=settings.model)
            self.start = beginning(self.model, shared)
            counts.computed += len(shared)
        answers: dict[int, StoredScore] = {}
        tail_tokens = sum(len(tail) + len(settings.rating_tokens.ten) - 1 for tail in settings.tails)
        for places in passes([len(prompt) - len(shared) + tail_tokens for prompt in prompts]):
            asked = [tuple(prompts[place]) for place in places]
            log_probs_BAQ = probe_log_probs(self.model, asked, settings.tails, settings.rating_tokens, self.start)
            probabilities_BAQ = log_probs_BAQ.double().exp().cpu().numpy()
            answers |= {
                place: StoredScore.from_probabilities(probabilities_AQ)
                for place, probabilities_AQ in zip(places, probabilities_BAQ, strict=True)
            }
            counts.given += sum(len(prompt) * len(settings.tails) + tail_tokens for prompt in asked)
            counts.computed += sum(len(prompt) - len(shared) + tail_tokens for prompt in asked)
        return [answers[place] for place in range(len(prompts))]


def passes(tokens: Sequence[int]) -> Iterator[list[int]]:
    """Places of the prompts of each pass, those of like length together; `tokens`: what each prompt adds to a pass."""
    order = np.argsort(tokens, kind="stable").tolist()
    while order:
        longest = tokens[order[-1]]  # the pass is padded to it
        count = max(1, PASS_TOKENS // longest)
        order, chosen = order[:-count], order[-count:]
        yield chosen
