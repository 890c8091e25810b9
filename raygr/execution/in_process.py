"""Run a stage in the calling process instead of on Ray, and keep the checkpoints of both ways."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raygr import files
from raygr.config import ConfigError, RayUse

if TYPE_CHECKING:
    import torch

CHECKPOINT = "training.pt"
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container, in microseconds of each period, or "max"


class Worker(NamedTuple):
    """Where a training loop runs, and who follows its evaluations."""

    rank: int
    workers: int
    device: "torch.device"
    report: Callable[[dict[str, Any]], None]
    """Takes the metrics of an evaluation. All workers call it together."""


def runs_here(ray: RayUse, *, is_small: bool) -> bool:
    """Decides whether the calling process does the work. `auto` does so with small work outside a cluster.

    `auto` leaves threads to Ray, because trainings in one process would share torch's random numbers.
    """
    if ray == "auto":
        return is_small and threading.current_thread() is threading.main_thread() and not is_in_cluster()
    return ray == "never"


def is_in_cluster() -> bool:
    """True where RAY_ADDRESS names a cluster, or where this process has joined one of several nodes."""
    if os.environ.get("RAY_ADDRESS"):
        return True
    ray = sys.modules.get("ray")  # a process that has not imported it has joined nothing
    return ray is not None and ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1


def worker_here(use_gpu: bool | None, threads: int | None) -> Worker:
    """The only worker, in the calling process. ConfigError where the machine lacks the GPU or the CPUs."""
    import torch

    if threads and threads > cpus_here():
        raise ConfigError(f"threads: {threads} need as many CPUs, this machine has {cpus_here()}")
    has_gpu = torch.cuda.is_available()
    if use_gpu and not has_gpu:
        raise ConfigError("use_gpu: this machine has no GPU that torch can use")
    device = torch.device("cuda" if has_gpu and use_gpu is not False else "cpu")
    return Worker(0, 1, device, lambda metrics: None)


def cpus_here() -> int:
    """The CPUs that this process may use, by its affinity and its container's limit."""
    # macOS has no affinity
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, _, period = CPU_LIMIT.read_text().partition(" ") if CPU_LIMIT.exists() else ("max", "", "")
    return allowed if limit == "max" else max(1, min(allowed, int(limit) // int(period)))


@contextmanager
def torch_of_a_worker(worker: Worker, threads: int | None) -> Iterator[None]:
    """Sets torch's threads for the work inside; puts them and torch's random numbers back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or cpus_here())
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if worker.device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)


# --- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(state: Mapping[str, Any], output: str) -> None:
    """Replaces the run's checkpoint; a reader never sees half of one."""
    import torch

    filesystem, inner = files.filesystem_of(files.join(output, CHECKPOINT))
    with filesystem.open(f"{inner}.part", "wb") as file:
        torch.save(state, file)
    filesystem.mv(f"{inner}.part", inner)


def last_checkpoint(output: str, device: "torch.device") -> dict[str, Any] | None:
    """The saved state; None at the start of a run."""
    import torch

    filesystem, inner = files.filesystem_of(files.join(output, CHECKPOINT))
    if not filesystem.exists(inner):
        return None
    with filesystem.open(inner, "rb") as file:
        return torch.load(file, map_location=device, weights_only=True)


def remove_checkpoint(output: str) -> None:
    """Deletes the checkpoint of a finished run."""
    filesystem, inner = files.filesystem_of(files.join(output, CHECKPOINT))
    if filesystem.exists(inner):
        filesystem.rm(inner)
