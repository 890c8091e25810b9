"""The report's section of a finetune run: held-out users before and after, and the curves of its steps."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
import msgspec
import numpy as np
import pyarrow.compute as pc

from raygr.compare.tables import NOTHING, Table
from raygr.files import join, read_json, read_table
from raygr.metrics.gains import gains
from raygr.report.charts import Curve, curve_chart
from raygr.report.sections import Chart, Section, show
from raygr.schema import EVALUATIONS, HELD_OUT_EVALUATIONS, STEPS
from raygr.schema import METRICS as METRICS_FILE

METRICS = {
    "reward": "reward",
    "mrr": "MRR",
    "auc": "AUC",
    "common_mrr": "MRR, one answer for all",
    "common_auc": "AUC, one answer for all",
    "personal_mrr": "MRR, personal",
    "personal_auc": "AUC, personal",
    "valid": "answers with all aspects",
}
LOSS_PARTS = {
    "value": "ratings (5)",
    "format": "format (6)",
    "format_reward": "format's reward",
    "teacher": "teacher's answer",
    "kl": "KL, weighted",
    "entropy_bonus": "entropy, weighted",
}
STEP_FIGURES = {
    "reward": "reward",
    "reward_spread": "its spread in a group",
    "flat_groups": "groups without spread",
    "valid": "answers with all aspects",
    "entropy": "entropy",
    "kl": "KL to the base model",
    "loss": "loss",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
NATS, ANSWERS = ("entropy", "kl"), ("valid", "flat_groups")
SMOOTHED = 20  # a curve's point is the mean of the steps before it, as many as a twentieth of all
PART = 10  # the table of steps compares the first and the last tenth


class Evaluation(NamedTuple):
    """The metrics of the held-out users after one step of a stage; NaN where a user has no value."""

    stage: str
    step: int
    users: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class EvaluatedStep:
    stage: str
    step: int


@dataclass(frozen=True)
class TuningRecord:
    """What the report reads of evaluations.json."""

    steps: int
    warm_steps: int
    best_step: int
    held_out: int
    """Number of held-out users."""
    evaluations: list[EvaluatedStep]


Step = Mapping[str, Any]
"""A line of steps.jsonl."""


def finetune_section(path: str, config: Mapping[str, Any], *, name: str, figure_id: str) -> Section:
    """A finetune run: its held-out users by stage, and the curves of its steps.

    `config` is the run's own; the title shows `name`; `figure_id` must be unique in the page.
    """
    if config.get("subjects") == "items":  # runs of earlier versions have no such field
        return taught_section(path, config, name=name, figure_id=figure_id)
    record, evaluations, lines = read_record(path), read_evaluations(path), read_lines(path)
    best = next(one for one in reversed(evaluations) if one.step == record.best_step)
    start = f", from the adapter of {PurePosixPath(config['adapter']).name}" if config["adapter"] else ""
    text = (
        f"Task “{config['task']}”, {config['rollouts']} rollouts, {record.steps} reinforcement learning steps after "
        f"{record.warm_steps} steps of the SFT warm-up{start}; means over {record.held_out} held-out users with 95% "
        "intervals over users, then the same users' change from before; an asterisk marks an interval without zero. "
        "No interval shows how another fine-tune would differ, because this is one run. One answer for all is the "
        "mean of these users' ratings; the personal metrics are of ratings centred on that mean, as a recommender's "
        "user vectors are. The best step was chosen by the reward of these same users, the last step was not."
    )
    tables = [stage_table(evaluations, best)]
    if record.steps:
        tables.append(step_table(lines))
    return Section(f"Fine-tune: {name}", text, tables, tuning_charts(evaluations, lines, figure_id))


def taught_section(path: str, config: Mapping[str, Any], *, name: str, figure_id: str) -> Section:
    """A finetune run of items: agreement of the held-out items with the teacher, and the loss by step."""
    found = read_json(join(path, METRICS_FILE))
    teacher = PurePosixPath(config["item_scores"]).name
    text = (
        f"{found['taught']} items were taught the scores of {teacher}, epochs: {config['epochs']}; the "
        f"figures are of {found['held_out']} held-out items, before and after. They also chose the step, so “after” is "
        "a little too high. Error is the mean absolute error; the mean guess is the taught items' mean for all items. "
        "Bias is the mean score minus the teacher's, 0 where calibrated; slope is that of the teacher's scores on "
        "these scores, 1 where calibrated."
    )
    names = ("spearman", "mean_absolute_error", "mean_guess_error", "bias", "slope")
    pairs = [(aspect, found["before"][aspect], found["after"][aspect]) for aspect in found["before"]]
    rows = []
    for aspect, *both in [*pairs, ("mean", found["mean_before"], found["mean_after"])]:
        rows.append([aspect, *(show(one[name]) for name in names for one in both[name == "mean_guess_error" :])])
    words = ("Spearman before", "after", "error before", "after", "mean guess", "bias before", "after", "slope before")
    loss = chart("Loss by step", [step_curve(read_lines(path), "loss", "taught items")], f"{figure_id}-loss")
    return Section(f"Fine-tune: {name}", text, [Table("Held-out items", ["aspect", *words, "after"], rows)], [loss])


def read_record(path: str) -> TuningRecord:
    return msgspec.convert(read_json(join(path, EVALUATIONS)), TuningRecord)


def read_evaluations(path: str) -> list[Evaluation]:
    """All evaluations of a finetune run, in the order of tuning."""
    table = read_table(join(path, HELD_OUT_EVALUATIONS))
    found = []
    for one in read_record(path).evaluations:
        rows = table.filter((pc.field("stage") == one.stage) & (pc.field("step") == one.step))
        users = {name: rows[name].fill_null(np.nan).to_numpy().astype(float) for name in METRICS}
        found.append(Evaluation(one.stage, one.step, users))
    return found


def read_lines(run: str, name: str = STEPS) -> list[Step]:
    """The JSON lines of a run's file."""
    with fsspec.open(join(run, name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def stage_table(evaluations: Sequence[Evaluation], best: Evaluation) -> Table:
    before, last = evaluations[0], evaluations[-1]
    stages = [("before", before)]
    stages += [("after the SFT warm-up", one) for one in evaluations if one.stage == "warm_start"]
    if last.stage == "reinforcement":
        stages += [(f"last step, {last.step}", last), (f"best step, {best.step}", best)]
    rows = [[name, *(stage_cell(one, before, metric) for metric in METRICS)] for name, one in stages]
    return Table("Held-out users", ["stage", *METRICS.values()], rows)


def stage_cell(one: Evaluation, before: Evaluation, metric: str) -> str:
    mean = user_mean(one.users[metric])
    if mean is None:
        return NOTHING
    text = f"{mean.value:.4f}\n({mean.low:.4f} to {mean.high:.4f})"
    change = user_mean(one.users[metric] - before.users[metric])
    if one is before or change is None:
        return text
    mark = "*" if change.low > 0 or change.high < 0 else ""
    return f"{text}\n{change.value:+.4f}{mark}\n({change.low:+.4f} to {change.high:+.4f})"


class UserMean(NamedTuple):
    """A mean over users with its 95% interval."""

    value: float
    low: float
    high: float


def user_mean(values_U: np.ndarray) -> UserMean | None:
    """The mean of the users that have a value, with its interval; None for fewer than two users."""
    known_11U = values_U[~np.isnan(values_U)][None, None]
    [gain] = gains(known_11U, np.zeros_like(known_11U), paired=True) if known_11U.size > 1 else [None]
    if gain is None or gain.low is None or gain.high is None:
        return None
    return UserMean(gain.difference, gain.low, gain.high)


def step_table(lines: Sequence[Step]) -> Table:
    steps = [line for line in lines if line["stage"] == "reinforcement"]
    part = max(1, len(steps) // PART)
    rows = []
    for name, words in STEP_FIGURES.items():
        known = [[line[name] for line in some if line.get(name) is not None] for some in (steps[:part], steps[-part:])]
        rows.append([words, *(show(sum(some) / len(some) if some else None) for some in known)])
    return Table("Reinforcement learning steps, training users", ["mean of", f"first {part}", f"last {part}"], rows)


def tuning_charts(evaluations: Sequence[Evaluation], lines: Sequence[Step], figure_id: str) -> list[Chart]:
    trained = [line for line in lines if line["stage"] == "reinforcement"]
    taught = [line for line in lines if line["stage"] != "reinforcement"]
    losses = [step_curve(taught, "loss", "SFT warm-up, own steps")] if taught else []
    if not trained:
        return [chart("Loss by step", losses, f"{figure_id}-loss")]
    rewards = [held_out_curve(evaluations, "reward", "held-out users"), step_curve(trained, "reward", "training users")]
    metrics = [held_out_curve(evaluations, metric, METRICS[metric]) for metric in ("mrr", "auc", "personal_auc")]
    parts = [line["losses"] | {"step": line["step"]} for line in trained]
    used = [name for name in LOSS_PARTS if any(line.get(name) for line in parts)]
    nats, answers = ([step_curve(trained, n, STEP_FIGURES[n]) for n in pair] for pair in (NATS, ANSWERS))
    return [
        chart("Reward by step", rewards, f"{figure_id}-reward"),
        chart("MRR and AUC of held-out users by step", metrics, f"{figure_id}-metrics"),
        chart("Loss by step", [step_curve(trained, "loss", "reinforcement learning"), *losses], f"{figure_id}-loss"),
        chart("Parts of the loss by step", [step_curve(parts, n, LOSS_PARTS[n]) for n in used], f"{figure_id}-parts"),
        chart("Entropy and KL divergence by step, in nats", nats, f"{figure_id}-entropy"),
        chart("Answers by step, shares", answers, f"{figure_id}-answers"),
    ]


def chart(caption: str, curves: Sequence[Curve], figure_id: str) -> Chart:
    return Chart(caption, curve_chart(curves, figure_id=figure_id, label=caption, axis="step"))


def held_out_curve(evaluations: Sequence[Evaluation], metric: str, name: str) -> Curve:
    """A metric's mean with its interval, from the last evaluation before reinforcement learning."""
    start = [one for one in evaluations if one.stage != "reinforcement"][-1:]
    shown = [*start, *(one for one in evaluations if one.stage == "reinforcement")]
    known = [(one.step, mean) for one in shown if (mean := user_mean(one.users[metric])) is not None]
    columns = [(step, mean.value, mean.low, mean.high) for step, mean in known]
    steps, means, lows, highs = ([row[place] for row in columns] for place in range(4))
    return Curve(name, steps, means, lows, highs)


def step_curve(lines: Sequence[Step], figure: str, name: str) -> Curve:
    """A figure's moving mean over the steps that have a value, so that single groups do not hide the trend."""
    known = [(line["step"], line[figure]) for line in lines if line[figure] is not None]
    steps, values = [step for step, _ in known], [value for _, value in known]
    window = max(1, len(values) // SMOOTHED)
    means = [sum(some) / len(some) for end in range(1, len(values) + 1) if (some := values[max(0, end - window) : end])]
    return Curve(name, steps, means, None, None)
