"""Seconds of a training step by the number of items and the optimizer: SASRec with 256 shared negatives.

    python benchmarks/recommenders_step.py --items 10000 1000000 --optimizers adam sparse_adam

Width 64, batches of 128 histories of 50 steps on made-up interactions; the median of the steps behind the first three,
which fill the allocator. `peak` is the process's memory in MiB, each line in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from recommenders_orders import peak_bytes

HISTORY, BATCH, WARM = 50, 128, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--optimizers", nargs="+", default=["adam", "sparse_adam"])
    parser.add_argument("--loss", default="sampled_cross_entropy")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one", action="store_true", help="in this process")
    parsed = parser.parse_args()
    if parsed.one:
        print(json.dumps(measure(parsed.items[0], parsed.optimizers[0], parsed)))
        return
    print("     items  optimizer    s a step  peak")
    for items in parsed.items:
        for optimizer in parsed.optimizers:
            chosen = ["--items", str(items), "--optimizers", optimizer, "--loss", parsed.loss]
            chosen += ["--steps", str(parsed.steps), "--threads", str(parsed.threads)]
            command = [sys.executable, __file__, "--one", *chosen]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            seconds, peak = json.loads(output)
            print(f"{items:10}  {optimizer:11}  {seconds:8.3f}  {peak / 2**20:5.0f}", flush=True)


def measure(items: int, optimizer: str, parsed: argparse.Namespace) -> tuple[float, int]:
    import torch

    from raygr.execution.distributed import keep_freed_memory
    from raygr.models.workers import Share
    from raygr.train.config import TrainConfig
    from raygr.train.loop import accumulate_gradients, take_step
    from raygr.train.state import start_training
    from raygr.train.step import epoch_contents, epoch_draws, whole_batch

    torch.set_num_threads(parsed.threads)
    keep_freed_memory()
    drawn = {"negatives": 256} if parsed.loss == "sampled_cross_entropy" else {}
    settings = {"base_width": 64, "batch_size": BATCH, "max_history": HISTORY, "loss": parsed.loss, **drawn}
    config = TrainConfig(output="none", data="none", optimizer=optimizer, **settings)
    inputs = made_up_inputs(items, histories=BATCH * (WARM + parsed.steps))
    training = start_training(config, inputs, torch.device("cpu"), Share())
    training.model.train()
    draws, seconds = epoch_draws(config.seed, 1, 0), []
    for content in epoch_contents(config, inputs, 1):
        started = time.perf_counter()
        accumulate_gradients(training, whole_batch(config, inputs, content, training.popularity_I, draws))
        take_step(training, config.learning_rate)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM:]), peak_bytes()


def made_up_inputs(items: int, *, histories: int):
    """Histories of items drawn at random, all of them to train on."""
    import numpy as np
    import torch

    from raygr.models.negatives import owned_items
    from raygr.train.batches import training_windows
    from raygr.train.inputs import Inputs

    user_N = np.repeat(np.arange(histories), HISTORY + 1)
    item_N = np.random.default_rng(0).integers(1, items + 1, len(user_N))
    prompt_U, is_train_N = np.zeros(histories, np.int64), np.full(len(user_N), True)
    return Inputs(
        items=items,
        new=None,
        new_items=0,
        items_N=torch.from_numpy(item_N),
        rating_N=torch.full((len(item_N),), torch.nan),
        rating_deviation=1.0,
        first_U=np.arange(histories + 1) * (HISTORY + 1),
        windows=training_windows(user_N, is_train_N, max_history=HISTORY, prompt_U=prompt_U),
        targets={},
        repeats=False,
        owned=owned_items(user_N, item_N, users=histories, items=items),
        candidates={},
        train_count_I=np.bincount(item_N - 1, minlength=items),
        scores=None,
        list_scores_IA=None,
        user_vectors=None,
        protocol={},
        warnings=[],
    )


if __name__ == "__main__":
    main()
