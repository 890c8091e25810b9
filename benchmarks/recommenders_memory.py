"""Peak memory of raygr's training loop (SASRec, batch 128) by users, history and items, on made-up interactions.

    PYTHONPATH=tests python benchmarks/recommenders_memory.py

Each size has a process of its own, without Ray: two batches, then the evaluation of 256 users. `imports` is what the
libraries take, each further figure the peak up to there, in MiB.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from recommenders_orders import peak_bytes

# users, history, items: from the first, each of the three is raised alone
SIZES = ((300, 80, 1500), (300, 200, 1500), (300, 80, 15_000), (2000, 80, 1500))
EVALUATED = 256


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
        return
    print("users  history   items  imports  inputs  training  evaluation")
    for users, history, items in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), users, history, items)
            command = [sys.executable, __file__, json.dumps([folder, history])]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        peaks = "  ".join(f"{peak / 2**20:8.0f}" for peak in json.loads(output))
        print(f"{users:5}  {history:7}  {items:6}  {peaks}", flush=True)


def write(folder: Path, users: int, history: int, items: int) -> None:
    from toy_data import walks, write_prepared

    # history and the target after it, validation, test
    write_prepared(folder / "prepare", walks(users, items, history + 3, seed=0), items=items)


def measure(folder: str, history: int) -> list[int]:
    import torch

    from raygr.execution.distributed import keep_freed_memory
    from raygr.models.workers import Share
    from raygr.schema import VALIDATION
    from raygr.train.batches import Targets
    from raygr.train.config import TrainConfig
    from raygr.train.evaluate import target_ranks
    from raygr.train.inputs import load_inputs
    from raygr.train.loop import accumulate_gradients, take_step
    from raygr.train.state import start_training
    from raygr.train.step import epoch_contents, epoch_draws, whole_batch

    keep_freed_memory()
    config = TrainConfig(output="none", data=f"{folder}/prepare", base_width=64, max_history=history)
    peaks = [peak_bytes()]
    inputs = load_inputs(config)
    peaks.append(peak_bytes())
    training = start_training(config, inputs, torch.device("cpu"), Share())
    training.model.train()
    draws = epoch_draws(config.seed, 1, 0)
    for content in epoch_contents(config, inputs, 1)[:2]:
        accumulate_gradients(training, whole_batch(config, inputs, content, training.popularity_I, draws))
        take_step(training, config.learning_rate)
    peaks.append(peak_bytes())
    inputs.targets[VALIDATION] = Targets(*(column[:EVALUATED] for column in inputs.targets[VALIDATION]))
    target_ranks(training, VALIDATION, ["full"])
    return [*peaks, peak_bytes()]


if __name__ == "__main__":
    main()
