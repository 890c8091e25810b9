"""The bare model's answers serve as teacher for a user without one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_policy import SMALL_VOCABULARY, SPLIT, naive_rating_log_probs, save_tiny_llama, toy_config, toy_inputs

from raygr.finetune.examples import TuningExample
from raygr.finetune.policy import Policy, adapter_weights, build_policy, likeliest_ratings, pass_dtype, teacher_ratings

CPU = torch.device("cpu")


def tuned_policy(folder: Path) -> tuple[Policy, list[TuningExample]]:
    """A policy whose adapter changes the answers, and three users, of whom only the last has a teacher."""
    inputs = toy_inputs(save_tiny_llama(folder, vocabulary=SMALL_VOCABULARY), users=3)
    policy = build_policy(toy_config(), inputs, CPU)
    torch.manual_seed(1)
    for name, weight in adapter_weights(policy.model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return policy, [example._replace(teacher_A=None) for example in inputs.train[:2]] + inputs.train[2:]


def greedy_answer(policy: Policy, prompt: tuple[int, ...]) -> list[int]:
    """The likeliest ratings of the model without its adapter, by whole forward passes."""
    answer: list[int] = []
    with policy.model.disable_adapter():
        for _ in policy.names:
            log_probs = naive_rating_log_probs(policy.model, prompt, SPLIT, tuple(answer))
            answer.append(int(np.argmax(log_probs)) + 1)
    return answer


def test_without_a_teacher_the_bare_models_structured_answer_teaches(tmp_path):
    policy, examples = tuned_policy(tmp_path)
    own = [greedy_answer(policy, example.prompt_ids) for example in examples[:2]]
    assert teacher_ratings(policy, examples).tolist() == [*own, [7.5, 2.0]]
    assert policy.base_answers == {example.user_index: answer for example, answer in zip(examples, own, strict=False)}
    tuned = likeliest_ratings(policy, examples)[:2].round()
    assert (tuned != torch.tensor(own)).any()  # the adapter changes the answers


@pytest.mark.parametrize(
    ("device", "has_bf16", "precision", "expected"),
    [
        ("cpu", True, "auto", torch.float32),
        ("cuda", True, "auto", torch.bfloat16),
        ("cuda", False, "auto", torch.float16),
        ("cuda", True, "fp32", torch.float32),
    ],
)
def test_passes_are_in_bf16_where_the_card_has_it(monkeypatch, device, has_bf16, precision, expected):
    """A card that only emulates bf16 does not have it."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *, including_emulation: has_bf16 or including_emulation)
    assert pass_dtype(toy_config(precision=precision), torch.device(device)) == expected


def test_the_bare_model_is_asked_once_per_user(tmp_path):
    policy, examples = tuned_policy(tmp_path)
    policy.base_answers[examples[0].user_index] = [1.0, 10.0]  # not this model's answer: a second pass would replace it
    assert teacher_ratings(policy, examples[:1]).tolist() == [[1.0, 10.0]]
    assert greedy_answer(policy, examples[0].prompt_ids) != [1, 10]
