"""What the fine-tune on simulated shoppers reached, beside what their hidden tastes reach.

    python benchmarks/shoppers_truth.py   # after configs/shoppers/pipeline.yaml; a minute on one core

A Markdown table of the held-out shoppers: the model at every evaluation, the profile of the films before the cut, and
tastes.csv of the simulation in place of ratings, which no reader of a few reviews can know: they bound the metrics from
above. Same users, items and metrics for all. Then the paired change from the bare model.
"""

import argparse

import numpy as np
import torch

from raygr import runs
from raygr.compare_tables import markdown_rows
from raygr.config import FinetuneConfig, check_config
from raygr.data.vectors import read_vectors, rows_by_id
from raygr.finetuning.inputs import Problem, load_inputs
from raygr.finetuning.judging import METRICS, Judge, fitted, moments, user_metrics
from raygr.report_tuning import bootstrap, read_evaluations

SHOWN = {"personal_auc": "personal AUC", "personal_mrr": "personal MRR", "common_auc": "AUC of one answer for all"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", default="outputs/shoppers/tuned", help="the finetune run")
    parser.add_argument("--tastes", default="outputs/shoppers/raw/tastes.csv")
    arguments = parser.parse_args()
    settings = runs.read_run(arguments.tuned, job="finetune")["config"]
    config = check_config(FinetuneConfig, settings, source=arguments.tuned)
    evaluations = {
        "bare model" if one.stage == "before" else f"{one.stage}, step {one.step}": one.users
        for one in read_evaluations(arguments.tuned)
    }
    rows = [["", *SHOWN.values()]]
    known = known_metrics(config, arguments.tastes)
    rows += [[name, *(cell(users[metric]) for metric in SHOWN)] for name, users in (evaluations | known).items()]
    first, *_, last = evaluations.values()
    rows.append(["last less bare model, paired", *(cell(last[metric] - first[metric]) for metric in SHOWN)])
    print(markdown_rows(rows))


def known_metrics(config: FinetuneConfig, tastes: str) -> dict[str, dict[str, np.ndarray]]:
    """Of ratings that are known without a model: each metric by held-out user."""
    inputs = load_inputs(config)
    judge = Judge.of(config, inputs.items_IA, None)
    ids = np.array([problem.user_id for problem in inputs.held_out])
    tastes_UA, _ = rows_by_id(read_vectors(tastes, column=config.score_column, aspects=inputs.names), ids)
    if np.isnan(tastes_UA).any():
        raise SystemExit(f"{tastes} is not of the simulation that {config.data} was prepared from")
    known = {
        "profile of the films before the cut": np.stack([problem.teacher_A for problem in inputs.held_out]),
        "hidden tastes": tastes_UA,
    }
    return {name: metrics_of(judge, inputs.held_out, torch.as_tensor(values)) for name, values in known.items()}


def metrics_of(judge: Judge, problems: list[Problem], ratings_UA: torch.Tensor) -> dict[str, np.ndarray]:
    values_MU = user_metrics(judge, fitted(judge, moments(ratings_UA)), problems, ratings_UA.double())
    return dict(zip(METRICS, values_MU.numpy(), strict=True))


def cell(values_U: np.ndarray) -> str:
    gain = bootstrap(values_U)
    return f"{gain.difference:.3f} [{gain.low:.3f}, {gain.high:.3f}]"


if __name__ == "__main__":
    main()
