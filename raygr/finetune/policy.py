"""The policy, an LLM with a LoRA adapter: its rollouts, its logits, and the answers of its teachers.

The prompts are prefilled once, with gradients. Ratings in slots are sampled after that prefill with gradients too, so
their loss needs no further pass. Free completions are sampled without gradients, and the pass of their loss continues
from the prefill. Dropout and gradient checkpointing exclude this reuse: the loss then prefills again, and its pass
covers all completions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import TuningData, TuningExample
from raygr.finetune.lora import load_start, with_adapter
from raygr.finetune.losses import LossWeights, TargetAnswers, is_canonical, loss_rows, target_answers
from raygr.finetune.prefix_cache import PromptCache, TokenRows, completion_logits, packed_logits, prefill
from raygr.finetune.sampling import (
    AnswerTemplate,
    Rollouts,
    free_places,
    free_rollouts,
    sample_free,
    sample_slots,
    slots_rollouts,
)
from raygr.score.shared_prefix import (
    beginning,
    check_passes,
    common_beginning,
    probe_log_probs,
    register_attention,
)


class Policy(NamedTuple):
    config: FinetuneConfig
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: AnswerTemplate
    names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    """Of the passes; the adapter's weights are fp32."""
    base_answers: dict[int, list[float]]
    """By user_index: ratings of the bare model in slots, the teacher of a user without one; filled as needed."""
    reference: dict[str, Tensor]
    """The adapter at the start of reinforcement learning, for the KL divergence; empty for the bare model."""

    @property
    def reuses_prefill(self) -> bool:
        """Whether the loss continues from the prefill, and from the logits of slots, of its rollouts."""
        return not self.config.gradient_checkpointing and self.config.lora_dropout == 0


def build_policy(config: FinetuneConfig, data: TuningData, device: torch.device) -> Policy:
    """The frozen model in `pass_dtype` with a LoRA adapter in fp32, fresh or loaded from `config.adapter`."""
    dtype = pass_dtype(config, device)
    base: Any = AutoModelForCausalLM.from_pretrained(data.model, dtype=dtype, attn_implementation=register_attention())
    base = base.to(device)
    # cuDNN plans every new shape, for milliseconds per layer, and the shapes change with every step
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(config.seed)
    model = with_adapter(base, config)
    if config.adapter:
        load_start(model, config.adapter)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    with autocast(device, dtype), model.disable_adapter():
        check_passes(base, data.train[0].prompt_ids, name=config.llm)
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    return Policy(config, model, tokenizer, data.template, data.names, device, dtype, {}, {})


def pass_dtype(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    """The type of the frozen model and of its passes: bf16 has the range of fp32, so fp16 is for older GPUs."""
    if device.type != "cuda" or config.precision == "fp32":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def adapter_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in adapter_weights(model).items()}


@torch.no_grad()
def load_adapter_state(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Copies the weights of an `adapter_state` into the model."""
    for name, weight in adapter_weights(model).items():
        weight.copy_(state[name])


def loss_weights(config: FinetuneConfig) -> LossWeights:
    on = float(config.format_reward)
    return LossWeights(
        temperature=config.temperature,
        format_reward=on,
        format_read=on * config.lambda_format_read,
        format_unread=on * config.lambda_format_unread,
        kl=config.kl_weight,
        entropy=config.entropy_weight,
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to bf16 or fp16; fp32 passes have none. Each pass takes a new one.

    An autocast keeps cast copies of the weights, and copies made without gradients must not serve a pass that has them.
    """
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def prefill_prompts(policy: Policy, examples: Sequence[TuningExample]) -> PromptCache:
    return prefill(policy.model, [example.prompt_ids for example in examples])


def sample_rollouts(
    policy: Policy, examples: Sequence[TuningExample], key: tuple[int, ...], *, completions: int, learn: bool
) -> Rollouts:
    """Samples completions of each user's prompt with the random numbers of `key`.

    `learn`: keep the gradients of the prefill, and of the logits of slots, where the loss can reuse them.
    """
    learn, template = learn and policy.reuses_prefill, policy.template
    with autocast(policy.device, policy.dtype), torch.set_grad_enabled(learn):
        prompts = prefill_prompts(policy, examples)
    is_slots, temperature = policy.config.rollouts == "slots", policy.config.temperature
    shape = (completions, len(policy.names) if is_slots else free_places(template))
    # from `key` and the user, so the same in every batch
    drawn = [np.random.default_rng([*key, example.user_index]).random(shape) for example in examples]
    uniform = torch.as_tensor(np.stack(drawn), dtype=torch.float32, device=policy.device)
    with autocast(policy.device, policy.dtype), torch.set_grad_enabled(learn):
        if is_slots:
            sampled = sample_slots(policy.model, prompts, template, uniform, temperature)
            rollouts = slots_rollouts(template, sampled.ratings_BGA, sampled.logits_BGTV)
        else:
            texts = sample_free(policy.model, prompts, template, uniform, temperature)
            rollouts = free_rollouts(policy.tokenizer, texts, policy.names, template, policy.device)
    return rollouts._replace(prompts=prompts if learn else None)


@torch.no_grad()
def likeliest_ratings(policy: Policy, examples: Sequence[TuningExample]) -> Tensor:
    """Ratings without randomness, (B, A), NaN where none was read.

    In slots the expected rating at each slot after the most likely ratings before it; in free rollouts the ratings in
    the text of the most likely tokens.
    """
    with autocast(policy.device, policy.dtype):
        prompts = prefill_prompts(policy, examples)
        if policy.config.rollouts == "slots":
            probabilities_BAQ = sample_slots(policy.model, prompts, policy.template).probabilities_BGAQ[:, 0]
            return probabilities_BAQ.double() @ torch.arange(1.0, 11, dtype=torch.float64, device=policy.device)
        texts = sample_free(policy.model, prompts, policy.template)
    return free_rollouts(policy.tokenizer, texts, policy.names, policy.template, policy.device).ratings_BGA[:, 0]


def answer_logits(
    policy: Policy, examples: Sequence[TuningExample], rows: TokenRows, prompts: PromptCache | None = None
) -> Tensor:
    """Logits of answers with gradients, (B, R, T, V) in fp32; `prompts`: a prefill to continue from."""
    config, model = policy.config, policy.model
    model.train(config.gradient_checkpointing or config.lora_dropout > 0)
    with autocast(policy.device, policy.dtype):
        if config.gradient_checkpointing:
            logits = packed_logits(model, [example.prompt_ids for example in examples], rows)
        else:
            logits = completion_logits(model, prompts or prefill_prompts(policy, examples), rows)
    model.eval()
    return logits


def probed_log_probs(policy: Policy, examples: Sequence[TuningExample]) -> Tensor:
    """log P(1..10) of every aspect as the scoring mode `probe` reads it, (B, A, 10), with gradients where enabled."""
    base: Any = policy.model.get_base_model()
    config, learn = policy.config, torch.is_grad_enabled()
    prompts, template = [example.prompt_ids for example in examples], policy.template
    policy.model.train(learn and (config.gradient_checkpointing or config.lora_dropout > 0))
    with autocast(policy.device, policy.dtype):
        in_full = learn and config.gradient_checkpointing
        start = None if in_full else beginning(base, common_beginning([ids[:-1] for ids in prompts]))
        log_probs_BAQ = probe_log_probs(base, prompts, template.pieces, template.ratings, start)
    policy.model.eval()
    return log_probs_BAQ


@torch.no_grad()
def reference_logits(policy: Policy, examples: Sequence[TuningExample], rows: TokenRows) -> Tensor:
    """Logits of the policy at the start of reinforcement learning."""
    with reference_adapter(policy), autocast(policy.device, policy.dtype):
        return completion_logits(policy.model, prefill_prompts(policy, examples), rows)


@contextmanager
def reference_adapter(policy: Policy) -> Iterator[None]:
    """The model with its adapter as it was at the start of reinforcement learning."""
    if not policy.reference:
        with policy.model.disable_adapter():
            yield
        return
    weights = adapter_weights(policy.model)
    current = {name: weight.data for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data = policy.reference[name]  # not copied into: the loss's pass still needs the current values
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data = current[name]


def rollout_logits(
    policy: Policy, examples: Sequence[TuningExample], rollouts: Rollouts
) -> tuple[Tensor, TargetAnswers | None]:
    """Logits with gradients of the completions and of their target answers, and these; None where none is needed."""
    if rollouts.logits_BGTV is not None:
        return rollouts.logits_BGTV, None
    targets = None
    if not is_canonical(rollouts).all():
        targets = target_answers(rollouts, teacher_ratings(policy, examples), policy.template)
    return answer_logits(policy, examples, loss_rows(rollouts, targets), rollouts.prompts), targets


def teacher_ratings(policy: Policy, examples: Sequence[TuningExample]) -> Tensor:
    """Ratings of each user's teacher, (B, A); the bare model's likeliest ratings in slots where there is no teacher."""
    missing = [one for one in examples if one.teacher_A is None and one.user_index not in policy.base_answers]
    if missing:
        with torch.no_grad(), autocast(policy.device, policy.dtype), policy.model.disable_adapter():
            answers = sample_slots(policy.model, prefill_prompts(policy, missing), policy.template)
        ratings = answers.ratings_BGA[:, 0].tolist()
        policy.base_answers.update(zip([one.user_index for one in missing], ratings, strict=True))
    known = [
        policy.base_answers[one.user_index] if one.teacher_A is None else one.teacher_A.tolist() for one in examples
    ]
    return torch.tensor(known, dtype=torch.float64, device=policy.device)
