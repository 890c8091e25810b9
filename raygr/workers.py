"""What the training stages ask of Ray Train: workers that survive a kill, their set-up, checkpoints out and in.

The loops themselves know no Ray; `train` and `finetune` hand theirs over as `loop`.
"""

import ctypes
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raygr import runs
from raygr.config import ConfigError

CHECKPOINT = "training.pt"
RESTARTS = 2
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def wants_gpu(workers: int, use_gpu: bool | None, gpu_share: float = 1.0) -> bool:
    """Whether training workers run on GPUs, each on its share of one; ConfigError where they do not fit."""
    resources = ray.cluster_resources()
    if workers > resources.get("CPU", 0):
        raise ConfigError(f"workers: {workers} need as many CPUs, Ray has {resources.get('CPU', 0):.0f}")
    enough = workers_on_gpus(resources.get("GPU", 0), gpu_share) >= workers
    if use_gpu and not enough:
        each = "as many GPUs" if gpu_share == 1 else f"{gpu_share:g} of a GPU each"
        raise ConfigError(f"use_gpu: {workers} workers need {each}, Ray has {resources.get('GPU', 0):.0f}")
    return enough if use_gpu is None else use_gpu


def workers_on_gpus(gpus: float, gpu_share: float) -> int:
    """Workers that so many GPUs have room for; no worker's share is taken from two of them."""
    return int(gpus) * int(1 / gpu_share)


def placement(workers: int, *, use_gpu: bool, gpu_share: float = 1.0) -> ray.train.ScalingConfig:
    """A CPU for each worker, and its share of a GPU."""
    resources = {"CPU": 1, "GPU": gpu_share} if use_gpu else {"CPU": 1}
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def run_workers(
    loop: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    run: runs.Run,
    *,
    placed: ray.train.ScalingConfig,
    watched_every: float,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> None:
    """Runs `loop(settings)` in every worker, from the last checkpoint where an earlier attempt stopped.

    Ray's controller looks at the workers every so many seconds, which they wait for in `report`; the callbacks run
    in the controller.
    """
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(watched_every)
    filesystem, folder = runs.arrow_filesystem(run.file("ray"))
    trainer = ray.train.torch.TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=placed,
        run_config=ray.train.RunConfig(
            name="train",  # start_run has refused a folder of another configuration: going on here is right
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        refused = [one for one in error.worker_failures.values() if isinstance(one, ValueError)]
        if not refused:
            raise
        # what a user can mend, such as a learning rate under which training diverges: as it would be without Ray
        raise ValueError(str(refused[0])) from error


def begin_worker(threads: int | None, *, at_once: int = 1) -> tuple[int, int]:
    """Logs and threads of this worker; its rank and how many there are.

    `threads`: null shares the machine's cores among the workers on it, of all runs that train at once.
    """
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train sets INFO, and tells of every report
    logging.getLogger("raygr").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    sharing = context.get_local_world_size() * at_once
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // sharing))
    keep_freed_memory()
    return rank, workers


def keep_freed_memory() -> None:
    """Large blocks that are freed stay with this process, where its C library is glibc.

    glibc returns them at once, and the kernel has to clear them anew for the same tensors of the next step.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def last_checkpoint(device: torch.device) -> dict[str, Any] | None:
    """The state that was reported last; None at the start."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder, CHECKPOINT), map_location=device, weights_only=True)


def report(metrics: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
    """A collective of all workers; rank 0 brings the state, the others None."""
    if state is None:
        ray.train.report(dict(metrics))
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder, CHECKPOINT))
        ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder))
