"""Items that are taught: what probe mode reads is computed exactly, a rule is learned, and inputs are checked."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import JOINED, NAMES, PROMPTS, SMALL_VOCABULARY, SPLIT, save_tiny_llama, tiny_policy

from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import TuningData, TuningExample
from raygr.finetune.loop import Tuning, start_tuning
from raygr.finetune.losses import probe_loss
from raygr.finetune.policy import Policy, adapter_weights, probed_log_probs
from raygr.finetune.sampling import AnswerTemplate
from raygr.finetune.teaching import teach
from raygr.models.workers import Share
from raygr.score.engine import rating_probabilities

CPU = torch.device("cpu")
NONE = np.empty(0, np.int64)
SETTINGS = {"output": "", "data": "", "item_scores": "", "aspects": "", "subjects": "items"}


def example_of(n: int, prompt: tuple[int, ...], scores: list[float]) -> TuningExample:
    return TuningExample(n, f"i{n}", prompt, NONE, NONE, NONE > 0, np.array(scores))


def policy_of(template: AnswerTemplate, **changes: Any) -> Policy:
    config = FinetuneConfig(**SETTINGS, **changes)
    model = tiny_policy()
    if config.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(config, model, None, template, NAMES, CPU, {}, {})


def engine_reading(model: torch.nn.Module, prompt: tuple[int, ...], template: AnswerTemplate) -> np.ndarray:
    """P(1..10) as ScoringEngine.probe reads it: one request per aspect, and a forced `1` where `10` is two tokens."""
    ratings = template.ratings

    def log_probs(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits_V = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
        return logits_V[[*ratings.digits, ratings.ten[-1]]].numpy()

    rows, zeros = [], []
    for tail in template.pieces:
        rows.append(log_probs([*prompt, *tail]))
        zeros.append(log_probs([*prompt, *tail, ratings.digits[0]])[9])
    return rating_probabilities(np.array(rows), np.array(zeros) if ratings.ten_is_split else None)


@pytest.mark.parametrize("template", [SPLIT, JOINED], ids=["ten is two tokens", "one token"])
def test_the_taught_ratings_are_those_that_probe_mode_reads(template: AnswerTemplate):
    policy = policy_of(template)
    examples = [example_of(n, prompt, [1.0, 1.0]) for n, prompt in enumerate(PROMPTS)]
    read_BAQ = probed_log_probs(policy, examples).exp().detach().numpy()
    expected_BAQ = np.stack([engine_reading(policy.model, prompt, template) for prompt in PROMPTS])
    np.testing.assert_allclose(read_BAQ, expected_BAQ, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_cross_entropy_of_the_two_levels_around_the_teachers_score():
    log_probs_BAQ = torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    loss_B = probe_loss(log_probs_BAQ, torch.tensor([[7.25, 10.0]]))
    seven_eight = 0.75 * log_probs_BAQ[0, 0, 6] + 0.25 * log_probs_BAQ[0, 0, 7]
    torch.testing.assert_close(loss_B, -(seven_eight + log_probs_BAQ[0, 1, 9])[None] / 2)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for is_on in (False, True):
        policy = policy_of(SPLIT, gradient_checkpointing=is_on)
        examples = [example_of(n, prompt, [3.5, 10.0]) for n, prompt in enumerate(PROMPTS)]
        teacher_BA = torch.tensor(np.array([one.teacher_A for one in examples]))
        probe_loss(probed_log_probs(policy, examples), teacher_BA).sum().backward()
        gradients.append({name: weight.grad for name, weight in adapter_weights(policy.model).items()})
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


# --- the loop ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), vocabulary=SMALL_VOCABULARY)


def toy_items(folder: str, *, train: int = 32, held_out: int = 12) -> TuningData:
    """Items whose texts say their scores: token 80 + n is n on the first aspect, 100 + n is 11 - n on the second."""
    generator = np.random.default_rng(0)
    examples = []
    for n in range(train + held_out):
        first, second = generator.integers(1, 11, 2).tolist()
        prompt = (20, 21, 22, 23, *[70] * (n % 2), 80 + first, 100 + second, 24, 25)
        examples.append(example_of(n, prompt, [first, 11.0 - second]))
    scores_IA = np.array([one.teacher_A for one in examples])
    return TuningData(scores_IA, examples[:train], examples[train:], NAMES, folder, SPLIT, {})


def tuning_of(folder: str, *, share: Share | None = None, **changes: Any) -> Tuning:
    settings = {"lora_rank": 4, "learning_rate": 3e-2, "epochs": 2, "batch_size": 8}
    config = FinetuneConfig(**SETTINGS, **(settings | changes))
    return start_tuning(config, toy_items(folder), CPU, share or Share())


def run(tuning: Tuning) -> Tuning:
    for _ in teach(tuning):
        pass
    return tuning


def test_a_rule_from_texts_to_scores_is_learned(folder):
    evaluations = run(tuning_of(folder, epochs=40)).progress.evaluations
    first, last = evaluations[0], max(evaluations, key=lambda one: one["metrics"]["spearman"])
    assert first["metrics"]["spearman"] < 0.5
    assert last["metrics"]["spearman"] > 0.8
