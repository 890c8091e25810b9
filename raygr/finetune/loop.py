"""The fine-tuning loop on plain arguments: no Ray, and torch.distributed only with several workers.

`tune` is the whole loop; the functions below it are its parts, and losses.py holds the paper's equations.
All random numbers come from (seed, step, user). So two workers do the same as one, a checkpoint needs no state of a
random generator, and a resumed run equals an uninterrupted one.
Shape letters: `B` users of a batch, `U` users, `G` completions, `A` aspects, `T` tokens, `V` vocabulary.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from raygr.config import ConfigError
from raygr.execution.console import log_progress
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import TuningData, TuningExample
from raygr.finetune.losses import TargetAnswers, free_loss, rounded, slots_loss, target_losses
from raygr.finetune.metrics import (
    STEP_SUMS,
    TuningTask,
    advantages_of,
    evaluation_record,
    keep_best_by,
    lasting_normalisation,
    moments,
    mrr_and_auc,
    rewards_of,
    standardised_users,
    step_figures,
    step_sums,
    tuning_task,
    user_metrics,
)
from raygr.finetune.policy import (
    Policy,
    adapter_state,
    adapter_weights,
    answer_logits,
    build_policy,
    likeliest_ratings,
    load_adapter_state,
    loss_weights,
    reference_logits,
    rollout_logits,
    sample_rollouts,
    teacher_ratings,
)
from raygr.finetune.rewards import Normalisation, Reward
from raygr.finetune.sampling import slots_rows
from raygr.models.workers import Share

logger = logging.getLogger(__name__)

NORMALISATION_USERS = 64  # training users whose sampled answers the user statistics are fitted on
USERS_AT_ONCE = 8  # users of one pass without gradients, at least; a batch with gradients takes more memory
WATCH_KL_EVERY = 10  # steps
RL_ORDER, SFT_ORDER, SAMPLES, FIRST_SAMPLES, DROPOUT = range(5)  # streams of random numbers


@dataclass
class TuningProgress:
    """Where tuning stands; part of every checkpoint."""

    sft_step: int = 0
    step: int = 0
    """Steps of reinforcement learning."""
    best_step: int = 0
    """0: after the SFT warm-up, before any step of reinforcement learning."""
    best_value: float = -math.inf
    """Value of the held-out metric that `keep_best_by` names."""
    normalisation: Normalisation = field(default_factory=Normalisation)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """One per step, for steps.jsonl."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """`stage` (before, warm_start, reinforcement; teaching), `step`, `metrics`, and `users`: a list per metric. For
    items `aspects` (the metrics of each), and `expected`: a rating per held-out item and aspect."""


@dataclass
class Tuning:
    """Everything that one worker tunes with; `checkpoint_state` holds the parts that change."""

    config: FinetuneConfig
    data: TuningData
    share: Share
    device: torch.device
    policy: Policy
    task: TuningTask
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler
    best_adapter: dict[str, Tensor]
    progress: TuningProgress = field(default_factory=TuningProgress)

    @property
    def model(self) -> PeftModel:
        return self.policy.model


def start_tuning(
    config: FinetuneConfig, data: TuningData, device: torch.device, share: Share, reward: Reward | None = None
) -> Tuning:
    """Builds the policy and the optimizer; `reward` replaces the configured task."""
    policy = build_policy(config, data, device)
    scaler = torch.amp.GradScaler(device.type, enabled=policy.dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))  # creates its state: a worker may have no users in its first step
    return Tuning(
        config=config,
        data=data,
        share=share,
        device=device,
        policy=policy,
        task=tuning_task(config, data.items_IA, reward),
        optimizer=new_optimizer(policy.model),
        scaler=scaler,
        best_adapter=adapter_state(policy.model),
    )


def tune(tuning: Tuning) -> Iterator[bool]:
    """Tunes the adapter to the end; yields after every step, True where a checkpoint may be written.

    Checkpoints follow each evaluation and each epoch of the SFT warm-up.
    """
    config, data, policy, task, progress = tuning.config, tuning.data, tuning.policy, tuning.task, tuning.progress
    template, weights = policy.template, loss_weights(config)
    if not progress.evaluations:
        evaluate_and_keep_best(tuning, "before", may_be_best=config.warm_start_epochs == 0)
        yield True

    # SFT warm-up: cross-entropy to the teacher's answers
    taught = [example for example in data.train if example.teacher_A is not None]
    epoch_steps = steps_per_epoch(config, taught)
    steps = config.warm_start_epochs * epoch_steps
    rate = config.warm_start_learning_rate
    while progress.sft_step < steps:
        sft_step(tuning, taught, answer_loss, "warm_start", progress.sft_step, steps, rate)
        progress.sft_step += 1
        if progress.sft_step == steps:
            evaluate_and_keep_best(tuning, "warm_start", may_be_best=True)
        yield progress.sft_step % epoch_steps == 0

    # Reinforcement learning
    if progress.step == 0:
        tuning.optimizer = new_optimizer(tuning.model)  # the moments of the SFT warm-up are those of another loss
        if config.warm_start_epochs or config.adapter:
            policy.reference.update(on_device(adapter_state(tuning.model), tuning.device))
    epoch_steps = steps_per_epoch(config, data.train)
    steps = config.epochs * epoch_steps
    assert config.learning_rate is not None
    while progress.step < steps:
        started, sums = time.perf_counter(), torch.zeros(len(STEP_SUMS), dtype=torch.float64, device=tuning.device)
        examples = step_examples(config, data.train, progress.step, RL_ORDER)
        seed_dropout(tuning, progress.step)
        key = (config.seed, SAMPLES, progress.step)
        for batch in own_batches(tuning, examples):
            # rollouts, rewards, advantages
            rollouts = sample_rollouts(policy, batch, key, completions=config.completions, learn=True)
            users_BGA = standardised_users(progress.normalisation, rollouts.ratings_BGA)
            reward_BG = rewards_of(task, batch, users_BGA)
            advantage_BGA = advantages_of(task, batch, users_BGA, reward_BG, examples).to(tuning.device)
            # loss (7) = (5) + lambda * (6), and its gradient
            with_kl = weights.kl or progress.step % WATCH_KL_EVERY == 0
            reference_BGTV = reference_logits(policy, batch, rollouts.rows) if with_kl else None
            logits_BRTV, targets = rollout_logits(policy, batch, rollouts)
            if config.rollouts == "slots":
                losses = slots_loss(logits_BRTV, rollouts, advantage_BGA, template, weights, reference_BGTV)
            else:
                losses = free_loss(logits_BRTV, rollouts, advantage_BGA, template, weights, reference_BGTV, targets)
            check_finite(tuning, losses.total, "reinforcement", progress.step)
            tuning.scaler.scale(losses.total.sum() / len(examples)).backward()
            sums += step_sums(batch, rollouts, reward_BG, mrr_and_auc(task, batch, users_BGA), losses).to(tuning.device)
            del rollouts, logits_BRTV, reference_BGTV, losses  # frees memory for the next pass
        rate = config.learning_rate * learning_rate_at(progress.step, steps, config.warmup_ratio)
        norm = optimizer_step(tuning, rate)
        progress.step += 1
        figures = step_figures(tuning.share.total(sums).tolist(), time.perf_counter() - started)
        line = {"stage": "reinforcement", "step": progress.step, "learning_rate": rate, "gradient_norm": norm}
        log_step(tuning, line | figures, steps)
        evaluate_now = progress.step % (config.evaluate_every_steps or epoch_steps) == 0 or progress.step == steps
        if evaluate_now:
            evaluate_and_keep_best(tuning, "reinforcement", may_be_best=True)
        yield evaluate_now


def sft_step(
    tuning: Tuning,
    taught: list[TuningExample],
    loss_of: Callable[[Policy, list[TuningExample]], Tensor],
    stage: str,
    step: int,
    steps: int,
    highest_rate: float,
) -> None:
    """Takes and logs one optimizer step of SFT, the one after `step` of `steps`; `loss_of` gives a loss per example."""
    started, loss_sum = time.perf_counter(), torch.zeros(1, dtype=torch.float64, device=tuning.device)
    examples = step_examples(tuning.config, taught, step, SFT_ORDER)
    seed_dropout(tuning, step)
    for batch in own_batches(tuning, examples):
        losses = loss_of(tuning.policy, batch)
        check_finite(tuning, losses, stage, step)
        tuning.scaler.scale(losses.sum() / len(examples)).backward()
        loss_sum += losses.detach().sum()
        del losses  # frees memory for the next pass
    rate = highest_rate * learning_rate_at(step, steps, tuning.config.warmup_ratio)
    norm = optimizer_step(tuning, rate)
    loss = float(tuning.share.total(loss_sum)) / len(examples)
    line = {"stage": stage, "step": step + 1, "learning_rate": rate, "gradient_norm": norm}
    log_step(tuning, line | {"loss": loss, "seconds": time.perf_counter() - started}, steps)


def answer_loss(policy: Policy, batch: list[TuningExample]) -> Tensor:
    """Cross-entropy of whole answers to the teacher's, (B, 1)."""
    teacher_BA = teacher_ratings(policy, batch)
    ratings_B1A = rounded(teacher_BA).long()[:, None]
    row_B1 = torch.zeros(ratings_B1A.shape[:2], dtype=torch.long, device=policy.device)
    answers = TargetAnswers(ratings_B1A, slots_rows(policy.template, ratings_B1A), row_B1, teacher_BA)
    return target_losses(answer_logits(policy, batch, answers.rows), answers, policy.template)[1]


def steps_per_epoch(config: FinetuneConfig, examples: list[TuningExample]) -> int:
    return math.ceil(len(examples) / step_size(config))


def step_size(config: FinetuneConfig) -> int:
    """Users of one optimizer step, over all workers."""
    return config.batch_size * config.accumulation


def step_examples(config: FinetuneConfig, examples: list[TuningExample], step: int, stream: int) -> list[TuningExample]:
    """The users of a step, in the order of its epoch."""
    size = step_size(config)
    epoch, place = divmod(step, steps_per_epoch(config, examples))
    order = np.random.default_rng([config.seed, stream, epoch]).permutation(len(examples))
    return [examples[row] for row in order[place * size : (place + 1) * size]]


def own_batches(
    tuning: Tuning, examples: list[TuningExample], at_once: int | None = None
) -> Iterator[list[TuningExample]]:
    """This worker's users in batches of `at_once`; null: its share of `batch_size`."""
    own = examples[tuning.share.rank :: tuning.share.workers]
    at_once = at_once or math.ceil(tuning.config.batch_size / tuning.share.workers)
    return (own[start : start + at_once] for start in range(0, len(own), at_once))


def seed_dropout(tuning: Tuning, step: int) -> None:
    seeds = np.random.SeedSequence([tuning.config.seed, DROPOUT, step, tuning.share.rank])
    torch.manual_seed(int(seeds.generate_state(1)[0]))


def learning_rate_at(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the highest learning rate: a linear rise, then a linear fall that would end at 0 after the last step."""
    warmup = math.ceil(warmup_ratio * steps)
    return (step + 1) / warmup if step < warmup else (steps - step) / max(steps - warmup, 1)


def new_optimizer(model: PeftModel) -> torch.optim.Adam:
    return torch.optim.Adam(list(adapter_weights(model).values()), lr=0.0, fused=True)


def optimizer_step(tuning: Tuning, learning_rate: float) -> float:
    """One optimizer step on the gradient of all workers; returns the gradient's norm before clipping."""
    sum_gradients(tuning)
    tuning.scaler.unscale_(tuning.optimizer)
    weights = list(adapter_weights(tuning.model).values())
    norm = torch.nn.utils.clip_grad_norm_(weights, tuning.config.max_grad_norm)
    for group in tuning.optimizer.param_groups:
        group["lr"] = learning_rate
    tuning.scaler.step(tuning.optimizer)
    tuning.scaler.update()
    tuning.optimizer.zero_grad(set_to_none=True)
    return float(norm)


def sum_gradients(tuning: Tuning) -> None:
    """Sums the gradients of all workers; a worker without users in this step adds zeros."""
    weights = list(adapter_weights(tuning.model).values())
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    tuning.share.add_up(gradients)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


def check_finite(tuning: Tuning, loss: Tensor, stage: str, step: int) -> None:
    """ConfigError where a loss is NaN or infinite: its gradient would destroy the adapter."""
    if loss.isfinite().all():
        return
    config, dtype = tuning.config, str(tuning.policy.dtype).removeprefix("torch.")
    name = "warm_start_learning_rate" if stage == "warm_start" else "learning_rate"
    rate = config.warm_start_learning_rate if stage == "warm_start" else config.learning_rate
    fp32 = "" if tuning.policy.dtype == torch.float32 else ", or precision: fp32"
    raise ConfigError(
        f"{name}: the model's logits are NaN or infinite in step {step + 1} of {stage}, in {dtype}, so the tuning "
        f"stops before it loses the adapter: set {name} below {rate:g}{fp32}"
    )


def log_step(tuning: Tuning, line: dict[str, Any], steps: int) -> None:
    """Keeps the figures of a step, and logs it as one of `steps`."""
    tuning.progress.lines.append(line)
    shown = ("reward", "loss", "entropy", "gradient_norm", "tokens_per_second")
    text = ", ".join(f"{name.replace('_', ' ')} {line[name]:.4g}" for name in shown if name in line)
    log_progress(logger, line["stage"].replace("_", " "), line["step"], steps, "steps", text)


def evaluate_and_keep_best(tuning: Tuning, stage: str, *, may_be_best: bool) -> None:
    """Records held-out metrics, and copies the adapter if it is the best; before RL fits the normalisation first."""
    progress = tuning.progress
    if stage != "reinforcement":
        progress.normalisation = sampled_normalisation(tuning, warn=may_be_best and tuning.share.rank == 0)
    keep_if_best(tuning, stage, evaluate(tuning, tuning.data.held_out), may_be_best=may_be_best)


def keep_if_best(tuning: Tuning, stage: str, evaluation: dict[str, Any], *, may_be_best: bool) -> None:
    """Records an evaluation, and copies the adapter if no earlier one is as good."""
    progress, metrics = tuning.progress, evaluation["metrics"]
    progress.evaluations.append({"stage": stage, "step": progress.step, **evaluation})
    logger.info("held out, %s: %s", stage, "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    value = metrics[keep_best_by(tuning.config)]
    if may_be_best and value > progress.best_value:
        progress.best_value, progress.best_step = value, progress.step
        tuning.best_adapter = adapter_state(tuning.model)


def sampled_normalisation(tuning: Tuning, *, warn: bool) -> Normalisation:
    """User statistics from one sampled answer of each of the first training users."""
    users = np.random.default_rng([tuning.config.seed, FIRST_SAMPLES]).permutation(len(tuning.data.train))
    examples = [tuning.data.train[row] for row in users[:NORMALISATION_USERS]]
    total_3A = torch.zeros(3, len(tuning.data.names), dtype=torch.float64, device=tuning.device)
    for batch in own_batches(tuning, examples, max(USERS_AT_ONCE, tuning.config.batch_size)):
        key = (tuning.config.seed, FIRST_SAMPLES)
        rollouts = sample_rollouts(tuning.policy, batch, key, completions=1, learn=False)
        total_3A += moments(rollouts.ratings_BGA[:, 0])
    normalisation, unsure = lasting_normalisation(tuning.task, tuning.share.total(total_3A))
    if warn and unsure:
        means, spreads, names = normalisation.user_mean, normalisation.user_std, tuning.data.names
        taken = "; ".join(f"{names[a]}: mean {means[a]:.3g}, spread {spreads[a]:.3g}" for a in unsure)
        logger.warning("too few or too similar ratings in %d sampled answers; rewards take %s", len(examples), taken)
    return normalisation


def evaluate(tuning: Tuning, examples: list[TuningExample]) -> dict[str, Any]:
    """`metrics` of the likeliest ratings, and `users`: each metric's list, in the order of the examples."""
    ratings_UA = torch.zeros(len(examples), len(tuning.data.names), dtype=torch.float64, device=tuning.device)
    batches = own_batches(tuning, examples, max(USERS_AT_ONCE, tuning.config.batch_size))
    own = [likeliest_ratings(tuning.policy, batch) for batch in batches]
    if own:
        ratings_UA[tuning.share.rank :: tuning.share.workers] = torch.cat(own)
    ratings_UA = tuning.share.total(ratings_UA)  # gathers: every worker leaves the others' users at 0
    return evaluation_record(user_metrics(tuning.task, tuning.progress.normalisation, examples, ratings_UA))


def checkpoint_state(tuning: Tuning) -> dict[str, Any]:
    """Plain values and tensors alone, which torch's safe reader loads."""
    return {
        "adapter": adapter_state(tuning.model),
        "optimizer": tuning.optimizer.state_dict(),
        "scaler": tuning.scaler.state_dict(),
        "best_adapter": tuning.best_adapter,
        "reference": tuning.policy.reference,
        "progress": asdict(tuning.progress),
    }


def restore(tuning: Tuning, state: dict[str, Any]) -> None:
    """Continues from a `checkpoint_state`."""
    load_adapter_state(tuning.model, state["adapter"])
    tuning.optimizer.load_state_dict(state["optimizer"])
    tuning.scaler.load_state_dict(state["scaler"])
    tuning.best_adapter = state["best_adapter"]
    tuning.policy.reference.update(on_device(state["reference"], tuning.device))
    normalisation = Normalisation(**state["progress"]["normalisation"])
    tuning.progress = TuningProgress(**(state["progress"] | {"normalisation": normalisation}))


def on_device(weights: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: weight.to(device) for name, weight in weights.items()}
