"""Compares the fine-tune on simulated shoppers with what can be known about these shoppers without an LLM.

    python benchmarks/shoppers_truth.py   # after configs/shoppers/pipeline.yaml; a minute on one core

Prints a Markdown table of the held-out shoppers. Its rows are the model at every evaluation of the runs; the profile
of the films before the cut; linear readers of the prompts' reviews, which map the phrases in good, middling and bad
reviews to ratings (fitted on the training shoppers, either to the profiles that teach the model or to the hidden
tastes, which the model never sees); and the simulation's tastes.csv in place of ratings. Users, items and metrics are
the same for all rows. The last rows are paired changes within each run.
"""

import argparse
import re
from typing import NamedTuple

import numpy as np
import torch

from raygr import runs
from raygr.compare.tables import markdown_rows
from raygr.config import check_config
from raygr.data.vector_tables import read_vectors, rows_by_id
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import TuningExample, load_tuning_data
from raygr.finetune.metrics import METRICS, TuningTask, moments, normalisation_from, tuning_task, user_metrics
from raygr.report.finetune_section import METRICS as HEADINGS
from raygr.report.finetune_section import read_evaluations, user_mean
from raygr.score.subjects import load_tokenizer
from raygr.simulate.review_texts import ASPECT_PHRASES, DISLIKED, LIKED

SHOWN = ("auc", "mrr", "personal_auc", "personal_mrr", "common_auc")
RUNS = ["outputs/shoppers/warm", "outputs/shoppers/tuned"]
REVIEW = re.compile(r"review \d+: rating: ([\d.]+)(.*?)(?=review \d+: |$)", re.DOTALL)
RIDGE = 3.0


class Known(NamedTuple):
    """What is known about some shoppers without the model."""

    tastes_UA: np.ndarray
    profiles_UA: np.ndarray
    read_UF: np.ndarray
    """Numbers of bad, middling and good reviews in the prompt that contain each phrase."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", default=RUNS, help="finetune runs of the same users, each from the one before"
    )
    parser.add_argument("--tastes", default="outputs/shoppers/raw/tastes.csv")
    arguments = parser.parse_args()
    first_run = arguments.runs[0]
    config = check_config(FinetuneConfig, runs.read_run(first_run, job="finetune").config, source=first_run)
    stages, changes = [], []
    for path in arguments.runs:
        before, *others = read_evaluations(path)
        if not stages:  # the other runs start where the previous one ended
            stages.append(row("bare model", before.users))
        stages += [row(name_of(one.stage, one.step), one.users) for one in others]
        last = others[-1]
        change = {metric: last.users[metric] - before.users[metric] for metric in SHOWN}
        changes.append(row(f"{name_of(last.stage, last.step)}, what it adds", change, sign="+"))
    known = [row(name, users) for name, users in known_metrics(config, arguments.tastes).items()]
    print(markdown_rows([["", *(HEADINGS[metric] for metric in SHOWN)], *stages, *known, *changes]))


def name_of(stage: str, step: int) -> str:
    return "SFT warm-up" if stage == "warm_start" else f"{stage}, step {step}"


def known_metrics(config: FinetuneConfig, tastes: str) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of each held-out user, of ratings that are known without the model."""
    inputs = load_tuning_data(config)
    task = tuning_task(config, inputs.items_IA, None)
    phrases = [phrase for name in inputs.names for phrase in ASPECT_PHRASES[name]]
    vectors = read_vectors(tastes, subjects="users", column=config.score_column, aspects=inputs.names)
    tokenizer = load_tokenizer(inputs.model)

    def known_of(users: list[TuningExample]) -> Known:
        tastes_UA, _ = rows_by_id(vectors, np.array([user.user_id for user in users]))
        if np.isnan(tastes_UA).any():
            raise SystemExit(f"{tastes} does not belong to the simulation that {config.data} was prepared from")
        texts = [tokenizer.decode(user.prompt_ids) for user in users]
        return Known(tastes_UA, np.stack([user.teacher_A for user in users]), phrases_read(texts, phrases))

    train, held_out = known_of(inputs.train), known_of(inputs.held_out)
    ratings = {
        "profile of the films before the cut": held_out.profiles_UA,
        "linear reader, taught by profiles": ridge(train.read_UF, train.profiles_UA, held_out.read_UF),
        "linear reader, taught by the tastes": ridge(train.read_UF, train.tastes_UA, held_out.read_UF),
        "hidden tastes": held_out.tastes_UA,
    }
    return {name: metrics_of(task, inputs.held_out, torch.as_tensor(values)) for name, values in ratings.items()}


def phrases_read(texts: list[str], phrases: list[str]) -> np.ndarray:
    counts_UPK = np.zeros((len(texts), len(phrases), 3))
    for user, text in enumerate(texts):
        for rating, review in REVIEW.findall(text):
            kind = int(float(rating) > DISLIKED) + int(float(rating) >= LIKED)
            counts_UPK[user, :, kind] += [phrase in review for phrase in phrases]
    return counts_UPK.reshape(len(texts), -1)


def ridge(known_TF: np.ndarray, targets_TA: np.ndarray, new_UF: np.ndarray) -> np.ndarray:
    centre_F, centred_TF = known_TF.mean(0), known_TF - known_TF.mean(0)
    gram_FF = centred_TF.T @ centred_TF + RIDGE * np.eye(known_TF.shape[1])
    weights_FA = np.linalg.solve(gram_FF, centred_TF.T @ (targets_TA - targets_TA.mean(0)))
    return targets_TA.mean(0) + (new_UF - centre_F) @ weights_FA


def metrics_of(task: TuningTask, examples: list[TuningExample], ratings_UA: torch.Tensor) -> dict[str, np.ndarray]:
    values_MU = user_metrics(task, normalisation_from(task, moments(ratings_UA)), examples, ratings_UA.double())
    return dict(zip(METRICS, values_MU.numpy(), strict=True))


def row(name: str, users: dict[str, np.ndarray], sign: str = "") -> list[str]:
    return [name, *(cell(users[metric], sign) for metric in SHOWN)]


def cell(values_U: np.ndarray, sign: str) -> str:
    mean = user_mean(values_U)
    return f"{mean.value:{sign}.3f} [{mean.low:{sign}.3f}, {mean.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
