"""Where an epoch of training goes: the torch operations of raygr's recommenders by their own time, with torch.profiler.

    raygr prepare --config configs/ml-100k/prepare.yaml --set output=outputs/benchmark/ml-100k
    python benchmarks/recommenders_profile.py

The second of two epochs on MovieLens 100k, settings as in recommenders.py; all threads of the machine.
"""

import argparse
import os

import torch
from recommenders_raygr import one_epoch
from torch.profiler import ProfilerActivity, profile

from raygr.execution.distributed import keep_freed_memory
from raygr.models.workers import Share
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.state import start_training

SHOWN = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="outputs/benchmark/ml-100k", help="a prepare run")
    parser.add_argument("--models", nargs="+", default=["sasrec", "bert4rec", "gru4rec"])
    parsed = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    for model in parsed.models:
        print("\n".join([f"## {model}", *operation_lines(parsed.data, model)]), flush=True)


def operation_lines(data: str, model: str) -> list[str]:
    """Share of the operations' own time on the processor, the largest first."""
    config = TrainConfig(output="", data=data, model=model, base_width=64, dropout=0.2, batch_size=64)
    training = start_training(config, load_inputs(config), torch.device("cpu"), Share())
    training.progress.epoch = 1
    one_epoch(training)
    training.progress.epoch = 2
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        one_epoch(training)
    operations = sorted(profiled.key_averages(), key=lambda one: one.self_cpu_time_total, reverse=True)
    total = sum(one.self_cpu_time_total for one in operations)
    return [f"{one.self_cpu_time_total / total:6.1%} {one.count:7} x {one.key}" for one in operations[:SHOWN]]


if __name__ == "__main__":
    main()
