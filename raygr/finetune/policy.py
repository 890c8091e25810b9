"""The policy, an LLM with a LoRA adapter: its rollouts of a few users, and their loss.

The prompts are prefilled once, with their gradient. Slots are sampled behind that prefill with the gradient too, so
that their loss needs no pass of its own; free completions are sampled without it, and their loss's pass goes on from
the prefill. Dropout and gradient checkpointing forbid this: they prefill once more, and pass over all completions.
Shape suffixes as in sampling.py and losses.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from raygr.config import ConfigError
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import Inputs, Problem
from raygr.finetune.lora import load_start, with_adapter
from raygr.finetune.losses import (
    LossParts,
    LossWeights,
    answer_log_probs,
    free_loss,
    is_canonical,
    joined,
    slots_loss,
    target_answers,
    teacher_loss,
    with_divergence,
)
from raygr.finetune.prefix_cache import (
    FULL,
    WINDOW,
    Prefilled,
    Rows,
    completion_logits,
    layer_kinds,
    packed_logits,
    prefill,
    register_attention,
)
from raygr.finetune.rewards import token_advantages
from raygr.finetune.sampling import (
    AnswerTemplate,
    Rollouts,
    free_places,
    free_rollouts,
    sample_free,
    sample_slots,
    slots_rollouts,
    slots_rows,
)

FARTHEST_FP32, FARTHEST_FP16 = 0.01, 0.3  # two ways of computing a log-probability; wrong ones are off by several


class Policy(NamedTuple):
    config: FinetuneConfig
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: AnswerTemplate
    names: tuple[str, ...]
    device: torch.device
    structured: dict[int, list[float]]
    """By user: the base model's own structured answer, the teacher of a user without one. Filled as needed."""
    reference: dict[str, Tensor]
    """The adapter at the start of reinforcement, which the KL divergence is to; empty stands for the bare model."""


def build_policy(config: FinetuneConfig, inputs: Inputs, device: torch.device) -> Policy:
    """The frozen model (fp16 on CUDA) with an adapter in fp32, fresh or the one to go on from."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=dtype, attn_implementation=register_attention())
    base = base.to(device)
    # cuDNN plans every new shape anew, milliseconds a layer, and here each step's shapes are new
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(config.seed)
    model = with_adapter(base, config)
    if config.adapter:
        load_start(model, config.adapter)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    check_passes(config, model, inputs.train[0].prompt_ids)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    return Policy(config, model, tokenizer, inputs.template, inputs.names, device, {}, {})


@torch.no_grad()
def check_passes(config: FinetuneConfig, model: PeftModel, prompt: tuple[int, ...]) -> None:
    """ConfigError where passes that share a prompt do not give the log-probabilities of plain ones.

    Only attention that depends on nothing but who sees whom can be shared: no recurrent layers, no learned sinks.
    """
    base, kinds = model.get_base_model(), layer_kinds(model)
    if unknown := kinds - {FULL, WINDOW}:
        raise ConfigError(f"llm: {config.llm} has layers of {', '.join(sorted(unknown))}, which cannot be tuned here")
    prompts, device = [prompt[:-2], prompt[:-4]], model.device
    ids_BRT = torch.tensor([prompt[-2:], prompt[-4:-2]], device=device)[:, None]
    is_fp16 = device.type == "cuda"
    with torch.autocast(device.type, dtype=torch.float16, enabled=is_fp16), model.disable_adapter():
        shared = completion_logits(model, prefill(model, prompts), Rows(ids_BRT, torch.ones_like(ids_BRT) > 0))
        base.set_attn_implementation("eager")
        plain = base(torch.tensor([prompt], device=device), logits_to_keep=5, use_cache=False).logits[0, :-1].float()
        base.set_attn_implementation(register_attention())
    expected = torch.stack([plain[2:], plain[:2]]).log_softmax(-1)
    likeliest = expected.argmax(-1, keepdim=True)
    off = (shared[:, 0].log_softmax(-1).gather(-1, likeliest) - expected.gather(-1, likeliest)).abs().max().item()
    if not off < (FARTHEST_FP16 if is_fp16 else FARTHEST_FP32):
        raise ConfigError(
            f"llm: {config.llm} cannot be tuned: its attention is of a kind that shared prompts do not keep "
            f"(log-probabilities are off by {off:.2g}); choose another model"
        )


def adapter_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def copied_adapter(model: PeftModel) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in adapter_weights(model).items()}


@torch.no_grad()
def load_adapter(model: PeftModel, weights: dict[str, Tensor]) -> None:
    """Puts `copied_adapter`'s weights back, such as `tuning.best_adapter` before it is saved."""
    for name, weight in adapter_weights(model).items():
        weight.copy_(weights[name])


def autocast(policy: Policy) -> torch.autocast:
    """One per phase: it keeps cast copies of the weights, which must not come from a pass without gradients."""
    return torch.autocast(policy.device.type, dtype=torch.float16, enabled=policy.device.type == "cuda")


def reuses_prefill(policy: Policy) -> bool:
    return not policy.config.gradient_checkpointing and policy.config.lora_dropout == 0


def prompts_of(problems: Sequence[Problem]) -> list[tuple[int, ...]]:
    return [problem.prompt_ids for problem in problems]


def uniforms(problems: Sequence[Problem], key: tuple[int, ...], shape: tuple[int, int], device: torch.device) -> Tensor:
    """Each user's own random numbers, (B, *shape): the same whoever shares the batch."""
    drawn = [np.random.default_rng([*key, problem.user_index]).random(shape) for problem in problems]
    return torch.as_tensor(np.stack(drawn), dtype=torch.float32, device=device)


def sample(
    policy: Policy, prefilled: Prefilled, problems: Sequence[Problem], key: tuple[int, ...], *, completions: int
) -> Rollouts:
    """Rollouts of each user; `key` and the user name the random numbers. Those of slots keep an enabled gradient."""
    g, temperature = completions, policy.config.temperature
    if policy.config.rollouts == "slots":
        uniform_BGA = uniforms(problems, key, (g, len(policy.names)), policy.device)
        with autocast(policy):
            slots = sample_slots(policy.model, prefilled, policy.template, uniform_BGA, temperature)
        return slots_rollouts(policy.template, slots.ratings_BGA, slots.logits_BGTV)
    with autocast(policy), torch.no_grad():
        uniform_BGT = uniforms(problems, key, (g, free_places(policy.template)), policy.device)
        texts = sample_free(policy.model, prefilled, policy.template, uniform_BGT, temperature)
    return free_rollouts(policy.tokenizer, texts, policy.names, policy.template, policy.device)


@torch.no_grad()
def fresh_rollout(policy: Policy, problems: Sequence[Problem], key: tuple[int, ...]) -> Rollouts:
    """One of each user."""
    with autocast(policy):
        prefilled = prefill(policy.model, prompts_of(problems))
    return sample(policy, prefilled, problems, key, completions=1)


@torch.no_grad()
def likeliest_ratings(policy: Policy, problems: Sequence[Problem]) -> Tensor:
    """Ratings without chance, (B, 1, A), NaN where not read: expected ones for slots, those of the text for free."""
    with autocast(policy):
        prefilled = prefill(policy.model, prompts_of(problems))
        if policy.config.rollouts == "slots":
            probabilities_BGAR = sample_slots(policy.model, prefilled, policy.template).probabilities_BGAR
            return probabilities_BGAR.double() @ torch.arange(1.0, 11, dtype=torch.float64, device=policy.device)
        completions = sample_free(policy.model, prefilled, policy.template)
    return free_rollouts(policy.tokenizer, completions, policy.names, policy.template, policy.device).ratings_BGA


def logits_of(policy: Policy, problems: Sequence[Problem], prefilled: Prefilled | None, rows: Rows) -> Tensor:
    """With the gradient; `prefilled` where it can be reused."""
    with autocast(policy):
        if policy.config.gradient_checkpointing:
            policy.model.train()
            logits = packed_logits(policy.model, prompts_of(problems), rows)
        else:
            policy.model.train(policy.config.lora_dropout > 0)
            prefilled = prefilled or prefill(policy.model, prompts_of(problems))
            logits = completion_logits(policy.model, prefilled, rows)
    policy.model.eval()
    return logits


@torch.no_grad()
def reference_logits(policy: Policy, problems: Sequence[Problem], rows: Rows) -> Tensor:
    with reference_adapter(policy), autocast(policy):
        return completion_logits(policy.model, prefill(policy.model, prompts_of(problems)), rows)


@contextmanager
def reference_adapter(policy: Policy) -> Iterator[None]:
    """The model as it was at the start of reinforcement."""
    if not policy.reference:
        with policy.model.disable_adapter():
            yield
        return
    weights = adapter_weights(policy.model)
    current = {name: weight.data for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data = policy.reference[name]  # not copied into: the pass of the loss still needs the current values
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.data = current[name]


def prefill_once(policy: Policy, problems: Sequence[Problem]) -> tuple[Prefilled, Prefilled | None]:
    """What to sample from, and what the loss may reuse."""
    with autocast(policy), torch.set_grad_enabled(reuses_prefill(policy)):
        prefilled = prefill(policy.model, prompts_of(problems))
    return prefilled, prefilled if reuses_prefill(policy) else None


def loss_weights(config: FinetuneConfig) -> LossWeights:
    on = float(config.format_reward)
    return LossWeights(
        temperature=config.temperature,
        format_reward=on,
        format_read=on * config.lambda_format_read,
        format_unread=on * config.lambda_format_unread,
        kl=config.kl_weight,
    )


def rollouts_loss(
    policy: Policy,
    problems: Sequence[Problem],
    prefilled: Prefilled | None,
    rollouts: Rollouts,
    advantage_BGA: Tensor,
    watch_kl: bool,
) -> LossParts:
    """(7) of every user, with what is watched."""
    weights, template = loss_weights(policy.config), policy.template
    advantage_BGA = advantage_BGA.to(policy.device)
    reference = reference_logits(policy, problems, rollouts.rows) if watch_kl or weights.kl else None
    if policy.config.rollouts == "slots":
        logits = rollouts.logits_BGTV
        if logits is None:
            logits = logits_of(policy, problems, prefilled, rollouts.rows)
        return slots_loss(logits, rollouts, advantage_BGA, template, weights, reference)
    targets = None
    if not is_canonical(rollouts).all():
        targets = target_answers(rollouts, teacher_ratings(policy, problems), template)
    rows = rollouts.rows if targets is None else joined(rollouts.rows, targets.rows)
    logits = logits_of(policy, problems, prefilled, rows)
    advantages = token_advantages(advantage_BGA, rollouts.aspect_BGT, rollouts.correct_BGT)
    parts = free_loss(logits, rollouts, advantages, targets, template, weights)
    if reference is None:
        return parts
    g, places = rollouts.rows.ids_BRT.shape[1:]
    return with_divergence(parts, logits[:, :g, :places], reference, rollouts.rows, weights.kl)


def teacher_ratings(policy: Policy, problems: Sequence[Problem]) -> Tensor:
    """(B, A): the teacher's, or the base model's own structured answer where there is none."""
    missing = [p for p in problems if p.teacher_A is None and p.user_index not in policy.structured]
    if missing:
        with torch.no_grad(), autocast(policy), policy.model.disable_adapter():
            prefilled = prefill(policy.model, prompts_of(missing))
            answers = sample_slots(policy.model, prefilled, policy.template).ratings_BGA[:, 0].tolist()
        policy.structured.update(zip([p.user_index for p in missing], answers, strict=True))
    known = [policy.structured[p.user_index] if p.teacher_A is None else p.teacher_A.tolist() for p in problems]
    return torch.tensor(known, dtype=torch.float64, device=policy.device)


def taught_loss(policy: Policy, problems: Sequence[Problem]) -> Tensor:
    """Cross-entropy to the teacher's answers, per user, (B,)."""
    teacher_BRA = teacher_ratings(policy, problems)[:, None]
    ratings_BRA = (teacher_BRA + 0.5).floor().clamp(1, 10).long()
    rows = slots_rows(policy.template, ratings_BRA)
    logits = logits_of(policy, problems, None, rows)
    answer = answer_log_probs(logits, rows, ratings_BRA, policy.template)
    return teacher_loss(answer, teacher_BRA, policy.template)[:, 0]
