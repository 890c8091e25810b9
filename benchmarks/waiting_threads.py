"""What OpenMP's waiting threads cost: epochs of SASRec with short and with long spinning, alone and in company.

    python benchmarks/waiting_threads.py outputs/quickstart/prepare [--epochs 12] [--rounds 2]

Threads that wait spin before they sleep: 300,000 times by default, 1,000 times in raygr, 0 times under
OMP_WAIT_POLICY=PASSIVE. Each training is a process of its own on all cores. "In company" is a second process of one
busy thread. The settings take turns; the better round counts. Seconds per epoch go to
benchmarks/results/waiting_threads.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from raygr import files
from raygr.config import load_config, override
from raygr.train.config import TrainConfig
from raygr.train.stage import train

BUSY = "while True: pass"
SPINS = ("300000", "1000", "0")  # libgomp's default, raygr's, and none
RESULT = Path(__file__).parent / "results" / "waiting_threads.json"
SETTINGS = {"max_history": 16, "evaluate_every": 100, "patience": 1, "learning_rate": 0.003, "ray": "never"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepare run")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--train-into", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.train_into:
        given = SETTINGS | {"output": parsed.train_into, "data": parsed.data, "epochs": parsed.epochs}
        train(load_config(TrainConfig, None, [override(key, value) for key, value in given.items()]))
        return
    record: dict[str, dict[str, float]] = {}
    for busy in (0, 1):
        company = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        try:
            seconds: dict[str, list[float]] = {spins: [] for spins in SPINS}
            for _ in range(parsed.rounds):
                for spins, found in seconds.items():
                    found.append(seconds_per_epoch(spins, parsed.data, parsed.epochs))
        finally:
            for process in company:
                process.kill()
        record["in company" if busy else "alone"] = {spins: min(found) for spins, found in seconds.items()}
        print(record, flush=True)
    files.write_json(record, str(RESULT))


def seconds_per_epoch(spins: str, data: str, epochs: int) -> float:
    environment = os.environ | {"GOMP_SPINCOUNT": spins}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, data, "--epochs", str(epochs), "--train-into", f"{folder}/run"]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return files.read_json(f"{folder}/run/metrics.json")["seconds_per_epoch"]


if __name__ == "__main__":
    main()
