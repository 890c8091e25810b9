"""What does the guided user state add to an epoch? Both models train in turns, epoch by epoch, on one prepare run.

    python benchmarks/guided_state_cost.py outputs/quickstart/prepare outputs/quickstart/raw/item_scores.csv

Prints the median seconds of an epoch without and with the state, and their ratio, for each recommender.
"""

import argparse
import statistics

import torch

from raygr.models.workers import Share
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.loop import training_rounds
from raygr.train.state import start_training

MODELS = {
    "sasrec": {},
    "gru4rec": {"model": "gru4rec"},
    "gru4rec-plus": {"model": "gru4rec", "loss": "bpr_max", "negatives": 256, "final_activation": "elu-0.5"},
    "bert4rec": {"model": "bert4rec"},
}
WARM = 1  # epochs before those that count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("item_scores")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--max-history", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    for model in parsed.models:
        given = {"output": "unused", "data": parsed.data, "max_history": parsed.max_history, **MODELS[model]}
        given |= {"epochs": parsed.epochs + WARM, "evaluate_every": 1, "patience": parsed.epochs + WARM}
        trainings = []
        for scores in ({}, {"item_scores": parsed.item_scores}):
            config = TrainConfig(**given, **scores)
            trainings.append(start_training(config, load_inputs(config), torch.device("cpu"), Share()))
        for _ in zip(*[training_rounds(training) for training in trainings], strict=True):
            pass
        base, state = (
            statistics.median(line["seconds"] for line in training.progress.lines[WARM:]) for training in trainings
        )
        print(f"{model}: {base:.3f} s an epoch, {state:.3f} s with the guided state, ratio {state / base:.2f}")


if __name__ == "__main__":
    main()
