"""What the fine-tune on simulated shoppers reached, beside what can be known of them.

    python benchmarks/shoppers_truth.py   # after configs/shoppers/pipeline.yaml; a minute on one core

A Markdown table of the held-out shoppers: the model at every evaluation of the runs, the profile of the films before
the cut, linear readers of the prompts' reviews (which phrase stands in a good, middling or bad one -> ratings; fitted
on the training shoppers, to the profiles that teach the model or to the hidden tastes, which it never sees), and
tastes.csv of the simulation in place of ratings. Same users, items and metrics for all. Then paired changes of a run.
"""

import argparse
import re

import numpy as np
import torch
from transformers import AutoTokenizer

from raygr import runs
from raygr.aspects.small_model import model_folder
from raygr.compare_tables import markdown_rows
from raygr.config import FinetuneConfig, check_config
from raygr.data.shopper_words import ASPECT_PHRASES, DISLIKED, LIKED
from raygr.data.vectors import read_vectors, rows_by_id
from raygr.finetuning.inputs import Inputs, Problem, load_inputs
from raygr.finetuning.judging import METRICS, Judge, fitted, moments, user_metrics
from raygr.report_tuning import bootstrap, read_evaluations

SHOWN = {
    "auc": "AUC",
    "mrr": "MRR",
    "personal_auc": "personal AUC",
    "personal_mrr": "personal MRR",
    "common_auc": "AUC of one answer for all",
}
RUNS = ["outputs/shoppers/warm", "outputs/shoppers/tuned"]
RIDGE = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=RUNS, help="finetune runs of the same users, each from the last")
    parser.add_argument("--tastes", default="outputs/shoppers/raw/tastes.csv")
    arguments = parser.parse_args()
    config = config_of(arguments.runs[0])
    rows = [["", *SHOWN.values()]]
    changes = []
    for path in arguments.runs:
        evaluations = read_evaluations(path)
        begun = path == arguments.runs[0]  # the others begin where the one before ended
        rows += [row(name_of(one.stage, one.step), one.users) for one in evaluations[0 if begun else 1 :]]
        first, last = evaluations[0].users, evaluations[-1].users
        change = {metric: last[metric] - first[metric] for metric in SHOWN}
        changes.append(row(f"{name_of(evaluations[-1].stage, evaluations[-1].step)}, what it adds", change, sign="+"))
    rows += [row(name, users) for name, users in known_metrics(config, arguments.tastes).items()]
    print(markdown_rows(rows + changes))


def config_of(path: str) -> FinetuneConfig:
    return check_config(FinetuneConfig, runs.read_run(path, job="finetune")["config"], source=path)


def name_of(stage: str, step: int) -> str:
    return {"before": "bare model", "warm_start": "warm start"}.get(stage, f"{stage}, step {step}")


def known_metrics(config: FinetuneConfig, tastes: str) -> dict[str, dict[str, np.ndarray]]:
    """Of ratings that are known without the model: each metric by held-out user."""
    inputs = load_inputs(config)
    judge = Judge.of(config, inputs.items_IA, None)
    train_TA, held_out_UA = (tastes_of(config, tastes, inputs, users) for users in (inputs.train, inputs.held_out))
    read_TF, read_UF = (phrases_read(config, inputs, users) for users in (inputs.train, inputs.held_out))
    profiles_TA, profiles_UA = (np.stack([one.teacher_A for one in users]) for users in (inputs.train, inputs.held_out))
    known = {
        "profile of the films before the cut": profiles_UA,
        "linear reader, taught by profiles": ridge(read_TF, profiles_TA, read_UF),
        "linear reader, taught by the tastes": ridge(read_TF, train_TA, read_UF),
        "hidden tastes": held_out_UA,
    }
    return {name: metrics_of(judge, inputs.held_out, torch.as_tensor(values)) for name, values in known.items()}


def tastes_of(config: FinetuneConfig, tastes: str, inputs: Inputs, users: list[Problem]) -> np.ndarray:
    ids = np.array([user.user_id for user in users])
    tastes_UA, _ = rows_by_id(read_vectors(tastes, column=config.score_column, aspects=inputs.names), ids)
    if np.isnan(tastes_UA).any():
        raise SystemExit(f"{tastes} is not of the simulation that {config.data} was prepared from")
    return tastes_UA


def phrases_read(config: FinetuneConfig, inputs: Inputs, users: list[Problem]) -> np.ndarray:
    """How many bad, middling and good reviews of a prompt hold each phrase, (U, phrases * 3)."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(config.model))
    phrases = [phrase for name in inputs.names for phrase in ASPECT_PHRASES[name]]
    counts_UPK = np.zeros((len(users), len(phrases), 3))
    for user, problem in enumerate(users):
        text = tokenizer.decode(problem.prompt_ids)
        for rating, review in re.findall(r"review \d+: rating: ([\d.]+)(.*?)(?=review \d+: |$)", text, re.DOTALL):
            kind = int(float(rating) > DISLIKED) + int(float(rating) >= LIKED)
            counts_UPK[user, :, kind] += [phrase in review for phrase in phrases]
    return counts_UPK.reshape(len(users), -1)


def ridge(known_TF: np.ndarray, targets_TA: np.ndarray, new_UF: np.ndarray) -> np.ndarray:
    centre_F, centred_TF = known_TF.mean(0), known_TF - known_TF.mean(0)
    gram_FF = centred_TF.T @ centred_TF + RIDGE * np.eye(known_TF.shape[1])
    weights_FA = np.linalg.solve(gram_FF, centred_TF.T @ (targets_TA - targets_TA.mean(0)))
    return targets_TA.mean(0) + (new_UF - centre_F) @ weights_FA


def metrics_of(judge: Judge, problems: list[Problem], ratings_UA: torch.Tensor) -> dict[str, np.ndarray]:
    values_MU = user_metrics(judge, fitted(judge, moments(ratings_UA)), problems, ratings_UA.double())
    return dict(zip(METRICS, values_MU.numpy(), strict=True))


def row(name: str, users: dict[str, np.ndarray], sign: str = "") -> list[str]:
    return [name, *(cell(users[metric], sign) for metric in SHOWN)]


def cell(values_U: np.ndarray, sign: str) -> str:
    gain = bootstrap(values_U)
    return f"{gain.difference:{sign}.3f} [{gain.low:{sign}.3f}, {gain.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
