"""The tuning loop on plain arguments: no Ray, and torch.distributed only where there are several workers.

Before (evaluated) -> warm start on a teacher's answers, where asked for (evaluated) -> reinforcement (evaluated every
so many steps; the best adapter by a held-out metric is kept). All randomness comes from (seed, step, user), so two
workers do as one, a checkpoint needs no generator state, and an interrupted run that resumes equals the straight one.
Shape suffixes as in sampling.py and losses.py.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import Inputs, Problem
from raygr.finetune.metrics import (
    STEP_SUMS,
    Judge,
    evaluation_record,
    judge_ratings,
    keep_best_by,
    lasting_statistics,
    moments,
    step_figures,
    step_sums,
    user_metrics,
)
from raygr.finetune.policy import (
    Policy,
    adapter_weights,
    build_policy,
    copied_adapter,
    fresh_rollout,
    likeliest_ratings,
    load_adapter,
    prefill_once,
    rollouts_loss,
    sample,
    taught_loss,
)
from raygr.finetune.rewards import Normalisation, Reward
from raygr.models.workers import Share

logger = logging.getLogger(__name__)

NORMALISATION_USERS = 64  # training users on one sampled answer of whom the user statistics are fitted
USERS_AT_ONCE = 8  # at least, where nothing is learned; a batch that is learned from takes more memory
WATCH_KL_EVERY = 10
RL_ORDER, WARM_ORDER, SAMPLES, FIRST_SAMPLES, DROPOUT = range(5)  # streams of random numbers


@dataclass
class Progress:
    """Where tuning stands; part of every checkpoint."""

    warm_step: int = 0
    step: int = 0
    best_step: int = 0
    """0: right after the warm start, before any reinforcement."""
    best_value: float = -math.inf
    """Of the held-out metric that `keep_best_by` names."""
    normalisation: Normalisation | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    """One per step, for steps.jsonl."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """`stage` (before, warm_start, reinforcement), `step`, `metrics`, and `users`: a list per metric."""


@dataclass
class Tuning:
    """All that one worker tunes with. A checkpoint holds what changes: see `checkpoint_state`."""

    config: FinetuneConfig
    inputs: Inputs
    share: Share
    device: torch.device
    policy: Policy
    judge: Judge
    optimizer: torch.optim.Adam
    scaler: torch.amp.GradScaler
    best_adapter: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)

    @property
    def model(self) -> PeftModel:
        """For saving, after `load_adapter(model, best_adapter)`."""
        return self.policy.model


def start_tuning(
    config: FinetuneConfig, inputs: Inputs, device: torch.device, share: Share, reward: Reward | None = None
) -> Tuning:
    """`reward`: one's own task instead of the configured one, called as rewards.py says."""
    policy = build_policy(config, inputs, device)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    scaler.scale(torch.zeros((), device=device))  # makes its state: a worker's first step may be one without users
    return Tuning(
        config=config,
        inputs=inputs,
        share=share,
        device=device,
        policy=policy,
        judge=Judge.of(config, inputs.items_IA, reward),
        optimizer=new_optimizer(policy.model),
        scaler=scaler,
        best_adapter=copied_adapter(policy.model),
    )


def new_optimizer(model: PeftModel) -> torch.optim.Adam:
    return torch.optim.Adam(list(adapter_weights(model).values()), lr=0.0, fused=True)


def checkpoint_state(tuning: Tuning) -> dict[str, Any]:
    return {
        "adapter": copied_adapter(tuning.model),
        "optimizer": tuning.optimizer.state_dict(),
        "scaler": tuning.scaler.state_dict(),
        "best_adapter": tuning.best_adapter,
        "reference": tuning.policy.reference,
        "progress": plain(tuning.progress),
    }


def plain(progress: Progress) -> dict[str, Any]:
    """Without a class of ours, so that a checkpoint is read with torch's safe reader."""
    normalisation = progress.normalisation and dict(progress.normalisation._asdict())
    return asdict(progress) | {"normalisation": normalisation}


def restore(tuning: Tuning, state: dict[str, Any]) -> None:
    load_adapter(tuning.model, state["adapter"])
    tuning.optimizer.load_state_dict(state["optimizer"])
    tuning.scaler.load_state_dict(state["scaler"])
    tuning.best_adapter = state["best_adapter"]
    tuning.policy.reference.update(on_device(state["reference"], tuning.device))
    tuning.progress = Progress(**state["progress"])
    if tuning.progress.normalisation:
        tuning.progress.normalisation = Normalisation(**state["progress"]["normalisation"])


def on_device(weights: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: weight.to(device) for name, weight in weights.items()}


def tuning_rounds(tuning: Tuning) -> Iterator[None]:
    """Tunes to the end; yields after each evaluation and each epoch of the warm start, where a checkpoint may be."""
    config, progress = tuning.config, tuning.progress
    if not progress.evaluations:
        evaluate_stage(tuning, "before", counts=config.warm_start_epochs == 0)
        yield
    taught = [problem for problem in tuning.inputs.train if problem.teacher_A is not None]
    warm_epoch = math.ceil(len(taught) / step_size(config))
    while progress.warm_step < config.warm_start_epochs * warm_epoch:
        log_step(tuning, warm_step(tuning, taught))
        if progress.warm_step % warm_epoch == 0:
            if progress.warm_step == config.warm_start_epochs * warm_epoch:
                evaluate_stage(tuning, "warm_start", counts=True)
            yield
    if progress.step == 0:
        tuning.optimizer = new_optimizer(tuning.model)  # the warm start's moments are of another loss
        if config.warm_start_epochs or config.adapter:
            tuning.policy.reference.update(on_device(copied_adapter(tuning.model), tuning.device))
    epoch = math.ceil(len(tuning.inputs.train) / step_size(config))
    while progress.step < config.epochs * epoch:
        log_step(tuning, reinforcement_step(tuning))
        if progress.step % (config.evaluate_every_steps or epoch) == 0 or progress.step == config.epochs * epoch:
            evaluate_stage(tuning, "reinforcement", counts=True)
            yield


def step_size(config: FinetuneConfig) -> int:
    """Users of one optimizer step, over all workers."""
    return config.batch_size * config.accumulation


def step_problems(config: FinetuneConfig, problems: list[Problem], step: int, stream: int) -> list[Problem]:
    """The users of a step, in the order of its epoch."""
    size = step_size(config)
    epoch, place = divmod(step, math.ceil(len(problems) / size))
    order = np.random.default_rng([config.seed, stream, epoch]).permutation(len(problems))
    return [problems[row] for row in order[place * size : (place + 1) * size]]


def own_batches(tuning: Tuning, problems: list[Problem]) -> Iterator[list[Problem]]:
    """This worker's part of the step's users, as many at once as its share of a batch."""
    own = problems[tuning.share.rank :: tuning.share.workers]
    at_once = math.ceil(tuning.config.batch_size / tuning.share.workers)
    return (own[start : start + at_once] for start in range(0, len(own), at_once))


def learning_rate_at(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the highest rate: rises linearly, then falls linearly to nothing behind the last step."""
    warmup = math.ceil(warmup_ratio * steps)
    return (step + 1) / warmup if step < warmup else (steps - step) / max(steps - warmup, 1)


def update(tuning: Tuning, learning_rate: float) -> float:
    """One optimizer step on the gradient of all workers; its norm before clipping."""
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
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    tuning.share.add_up([weight.grad for weight in weights])


def log_step(tuning: Tuning, line: dict[str, Any]) -> None:
    tuning.progress.lines.append(line)
    shown = ("reward", "loss", "entropy", "gradient_norm", "tokens_per_second")
    figures = "  ".join(f"{name} {line[name]:.4g}" for name in shown if name in line)
    logger.info("%s step %d  %s", line["stage"], line["step"], figures)


def evaluate_stage(tuning: Tuning, stage: str, *, counts: bool) -> None:
    """Held-out metrics into the progress; `counts`: the adapter may become the best. Refits statistics before RL."""
    progress = tuning.progress
    if stage != "reinforcement":
        progress.normalisation = fit_normalisation(tuning, logged=counts and tuning.share.rank == 0)
    evaluation = evaluate(tuning, tuning.inputs.held_out)
    metrics = evaluation["metrics"]
    progress.evaluations.append({"stage": stage, "step": progress.step, **evaluation})
    logger.info("held out, %s: %s", stage, "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    value = metrics[keep_best_by(tuning.config)]
    if counts and value > progress.best_value:
        progress.best_value, progress.best_step = value, progress.step
        tuning.best_adapter = copied_adapter(tuning.model)


def fit_normalisation(tuning: Tuning, *, logged: bool) -> Normalisation:
    """User statistics from the policy's own sampled ratings of the first training users."""
    users = np.random.default_rng([tuning.config.seed, FIRST_SAMPLES]).permutation(len(tuning.inputs.train))
    problems = [tuning.inputs.train[row] for row in users[:NORMALISATION_USERS]]
    total_3A = torch.zeros(3, len(tuning.inputs.names), dtype=torch.float64, device=tuning.device)
    for batch in own_groups(tuning, problems):
        ratings_BGA = fresh_rollout(tuning.policy, batch, (tuning.config.seed, FIRST_SAMPLES)).ratings_BGA
        total_3A += moments(ratings_BGA.flatten(0, 1))
    normalisation, unsure = lasting_statistics(tuning.judge, tuning.share.total(total_3A))
    if logged and unsure:
        means, spreads, names = normalisation.user_mean, normalisation.user_std, tuning.inputs.names
        taken = "; ".join(f"{names[a]}: mean {means[a]:.3g}, spread {spreads[a]:.3g}" for a in unsure)
        logger.warning("too few or too like ratings in %d sampled answers; rewards take %s", len(problems), taken)
    return normalisation


def own_groups(tuning: Tuning, problems: list[Problem]) -> Iterator[list[Problem]]:
    own = problems[tuning.share.rank :: tuning.share.workers]
    at_once = max(USERS_AT_ONCE, tuning.config.batch_size)
    return (own[start : start + at_once] for start in range(0, len(own), at_once))


def evaluate(tuning: Tuning, problems: list[Problem]) -> dict[str, Any]:
    """`metrics` of the likeliest ratings, and `users`, each metric's list in the order of the problems."""
    ratings_UA = torch.zeros(len(problems), len(tuning.inputs.names), dtype=torch.float64, device=tuning.device)
    row_of = {problem.user_index: row for row, problem in enumerate(problems)}
    for batch in own_groups(tuning, problems):
        rows = [row_of[problem.user_index] for problem in batch]
        ratings_UA[rows] = likeliest_ratings(tuning.policy, batch)[:, 0]
    # gathering is adding: every worker left the others' users at 0
    ratings_UA = tuning.share.total(ratings_UA)
    return evaluation_record(user_metrics(tuning.judge, tuning.progress.normalisation, problems, ratings_UA))


def warm_step(tuning: Tuning, taught: list[Problem]) -> dict[str, Any]:
    """One optimizer step of cross-entropy on the teacher's answers."""
    config, progress, started = tuning.config, tuning.progress, time.perf_counter()
    problems = step_problems(config, taught, progress.warm_step, WARM_ORDER)
    seed_dropout(tuning, progress.warm_step)
    total = torch.zeros(1, dtype=torch.float64, device=tuning.device)
    for batch in own_batches(tuning, problems):
        loss_B = taught_loss(tuning.policy, batch)
        tuning.scaler.scale(loss_B.sum() / len(problems)).backward()
        total += loss_B.detach().sum()
    steps = config.warm_start_epochs * math.ceil(len(taught) / step_size(config))
    rate = config.warm_start_learning_rate * learning_rate_at(progress.warm_step, steps, config.warmup_ratio)
    norm = update(tuning, rate)
    progress.warm_step += 1
    line = {"stage": "warm_start", "step": progress.warm_step, "learning_rate": rate, "gradient_norm": norm}
    return line | {"loss": float(tuning.share.total(total)) / len(problems), "seconds": time.perf_counter() - started}


def seed_dropout(tuning: Tuning, step: int) -> None:
    seeds = np.random.SeedSequence([tuning.config.seed, DROPOUT, step, tuning.share.rank])
    torch.manual_seed(int(seeds.generate_state(1)[0]))


def reinforcement_step(tuning: Tuning) -> dict[str, Any]:
    """One optimizer step on fresh rollouts."""
    config, progress, started = tuning.config, tuning.progress, time.perf_counter()
    problems = step_problems(config, tuning.inputs.train, progress.step, RL_ORDER)
    seed_dropout(tuning, progress.step)
    sums = torch.zeros(len(STEP_SUMS), dtype=torch.float64, device=tuning.device)
    for batch in own_batches(tuning, problems):
        sums += reinforce(tuning, batch, users=len(problems))
    steps = config.epochs * math.ceil(len(tuning.inputs.train) / step_size(config))
    rate = config.learning_rate * learning_rate_at(progress.step, steps, config.warmup_ratio)
    norm = update(tuning, rate)
    progress.step += 1
    line = {"stage": "reinforcement", "step": progress.step, "learning_rate": rate, "gradient_norm": norm}
    return line | step_figures(tuning.share.total(sums).tolist(), time.perf_counter() - started)


def reinforce(tuning: Tuning, problems: list[Problem], *, users: int) -> Tensor:
    """Adds the gradient of these users' part of the step's mean loss; their STEP_SUMS."""
    policy, progress = tuning.policy, tuning.progress
    sampled_from, reused = prefill_once(policy, problems)
    key = (tuning.config.seed, SAMPLES, progress.step)
    with torch.set_grad_enabled(reused is not None):
        rollouts = sample(policy, sampled_from, problems, key, completions=tuning.config.completions)
    outcome = judge_ratings(tuning.judge, progress.normalisation, problems, rollouts.ratings_BGA)
    watch_kl = progress.step % WATCH_KL_EVERY == 0
    parts = rollouts_loss(policy, problems, reused, rollouts, outcome.advantage_BGA, watch_kl)
    tuning.scaler.scale(parts.total.sum() / users).backward()
    return step_sums(problems, rollouts, outcome, parts).to(tuning.device)
