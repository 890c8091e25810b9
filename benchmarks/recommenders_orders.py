"""The part of recommenders.py in the measured processes. It needs torch only, so every environment imports it."""

import json
import sys
from pathlib import Path

import torch


class Orders:
    """Reads orders line by line; each runs one epoch or one evaluation and answers with one line of JSON."""

    def __init__(self, evaluate) -> None:
        """`evaluate()` gives each user's rank of its validation target; beyond 10 it may be anything."""
        self.evaluate = evaluate
        self.answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too

    def wait_for_epoch(self) -> None:
        while (order := sys.stdin.readline().strip()) == "evaluate":
            self.answer(ranks=[float(rank) for rank in self.evaluate()])
        if order != "epoch":
            raise SystemExit(0)  # the benchmark has ended

    def answer(self, **figures: object) -> None:
        figures |= {"peak_bytes": peak_bytes(), "threads": torch.get_num_threads()}
        print(json.dumps(figures), file=self.answers, flush=True)


def read_job() -> dict:
    """In a measured process: its job, with threads and seed set."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    return job


def peak_bytes() -> int:
    """Of this process; not getrusage, which begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
