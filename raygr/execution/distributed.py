"""Ray Train for the stages `train` and `finetune`: placement and set-up of workers, restarts.

The training loops themselves do not use Ray; each stage passes its own as `loop`.
"""

import ctypes
import logging
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raygr import files, runs
from raygr.config import ConfigError
from raygr.execution.console import log_to_driver
from raygr.execution.in_process import Worker
from raygr.ray_setup import Node, cluster_nodes, connect

logger = logging.getLogger(__name__)

RESTARTS = 2  # of a run whose worker was killed
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def wants_gpu(workers: int, use_gpu: bool | None, gpu_share: float = 1.0, *, threads: int | None = None) -> bool:
    """Decides whether workers run on GPUs, each on its share of one. ConfigError where the workers do not fit.

    Each worker reserves `threads` CPUs of one node; None reserves one.
    """
    nodes = cluster_nodes()
    if slots(nodes, threads or 1) < workers:
        each = f"{workers * (threads or 1)} CPUs" if (threads or 1) > 1 else "as many CPUs"
        name = f"{workers} of {threads} threads each" if (threads or 1) > 1 else f"{workers}"
        raise ConfigError(f"workers: {name} need {each}, Ray has {in_words(node.cpus for node in nodes)}")
    enough = slots(nodes, threads or 1, gpu_share) >= workers
    if use_gpu and not enough:
        each = "as many GPUs" if gpu_share == 1 else f"{gpu_share:g} of a GPU each"
        raise ConfigError(
            f"use_gpu: {workers} workers need {each}, Ray has {in_words(node.gpus for node in nodes if node.gpus)}"
        )
    if not (enough if use_gpu is None else use_gpu):
        gpus = in_words(node.gpus for node in nodes if node.gpus)
        if use_gpu is None and any(node.gpus for node in nodes):
            raise ConfigError(
                f"workers: {workers} do not fit the GPUs that Ray has, {gpus}: "
                "set fewer workers, or use_gpu: false to run on CPUs"
            )
        return False
    if workers > 1 and int(1 / gpu_share) > 1:
        raise ConfigError(
            f"gpu_share: {gpu_share:g} may put two of a run's {workers} workers on one GPU, where NCCL refuses to let "
            "them talk: set workers: 1 or gpu_share: 1"
        )
    return True


def slots(nodes: Sequence[Node], cpus: int, gpu_share: float | None = None) -> int:
    """The number of workers that fit on the nodes, each with `cpus` CPUs and a share of one GPU."""
    return sum(
        int(node.cpus) // cpus
        if gpu_share is None
        else min(int(node.cpus) // cpus, int(node.gpus) * int(1 / gpu_share))
        for node in nodes
    )


def in_words(amounts: Iterable[float]) -> str:
    """The total of the nodes as text, such as "4", or "6 (2 + 4)" for two nodes."""
    found = [int(amount) for amount in amounts if amount]
    return f"{sum(found)}" + (f" ({' + '.join(map(str, found))})" if len(found) > 1 else "")


def check_at_once(workers: int, at_once: int, threads: int | None) -> None:
    """ConfigError where `at_once` runs do not fit side by side: the surplus runs would wait silently."""
    nodes = cluster_nodes()
    if slots(nodes, threads or 1) < workers * at_once:
        needed = workers * at_once * (threads or 1)
        raise ConfigError(
            f"at_once: {at_once} train runs need {needed} CPUs, Ray has {in_words(node.cpus for node in nodes)}"
        )


def worker_cpus(workers: int, threads: int | None, *, gpu_share: float | None = None, at_once: int = 1) -> int:
    """The CPUs that each worker reserves and computes on: `threads`, or an equal share of the nodes where it is None.

    `at_once` runs share the nodes. `gpu_share` is None for workers on CPUs.
    """
    if threads:
        return threads
    nodes = cluster_nodes()
    most = int(max(node.cpus for node in nodes))
    return max((cpus for cpus in range(1, most + 1) if slots(nodes, cpus, gpu_share) >= workers * at_once), default=1)


def placement(workers: int, *, use_gpu: bool, gpu_share: float = 1.0, cpus: int = 1) -> ray.train.ScalingConfig:
    """The resources of the workers: CPUs for each, and a share of a GPU."""
    resources = {"CPU": cpus, "GPU": gpu_share} if use_gpu else {"CPU": cpus}
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def reserve_workers(
    workers: int, use_gpu: bool | None, threads: int | None, *, gpu_share: float = 1.0, at_once: int = 1
) -> ray.train.ScalingConfig:
    """Connects to Ray and returns the resources of one of `at_once` runs. ConfigError where its workers do not fit."""
    connect()
    on_gpu = wants_gpu(workers, use_gpu, gpu_share, threads=threads)
    cpus = worker_cpus(workers, threads, gpu_share=gpu_share if on_gpu else None, at_once=at_once)
    return placement(workers, use_gpu=on_gpu, gpu_share=gpu_share, cpus=cpus)


def run_workers(
    loop: Callable[[dict[str, Any], Worker], None],
    settings: dict[str, Any],
    run: runs.Run,
    *,
    placed: ray.train.ScalingConfig,
    watched_every: float,
) -> None:
    """Runs `loop(settings, worker)` in every worker, again where a worker was killed: the loop keeps its checkpoints.

    Ray's controller polls the workers every `watched_every` seconds, and `report` waits for the poll. ValueError where
    a worker raises one.
    """
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(watched_every)
    filesystem, folder = files.arrow_filesystem(run.file("ray"))
    trainer = ray.train.torch.TorchTrainer(
        lambda given: loop(given, begin_worker()),
        train_loop_config=settings,
        scaling_config=placed,
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name="train",  # Ray resumes this name; start_run has refused folders of another configuration
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        fit(trainer)
    except ray.train.WorkerGroupError as error:
        refused = [one for one in error.worker_failures.values() if isinstance(one, ValueError)]
        if not refused:
            raise
        # a user can correct it, such as a learning rate at which training diverges: raise it as it would be without Ray
        raise ValueError(str(refused[0])) from error


def fit(trainer: ray.train.torch.TorchTrainer) -> None:
    """Runs the trainer outside the main thread, where Ray Train would exit silently on Ctrl-C."""
    with ThreadPoolExecutor(1) as pool:
        fitting = pool.submit(trainer.fit)
        try:
            fitting.result()
        except KeyboardInterrupt:
            ray.shutdown()  # nothing else ends the run that the thread waits for
            raise


def begin_worker() -> Worker:
    """Sets up this process as a worker of Ray Train."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train sets INFO, and logs every report
    torch.set_num_threads(begin_process(logging.INFO if rank == 0 else logging.WARNING))
    return Worker(rank, workers, ray.train.torch.get_device(), ray.train.report)


def begin_process(level: int = logging.INFO) -> int:
    """Sets up logs and memory of this process, which trains; returns the CPUs that it reserved, to compute on."""
    log_to_driver(level)
    keep_freed_memory()
    return int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))


def keep_freed_memory() -> None:
    """Keeps freed large blocks in this process, where its C library is glibc.

    glibc would return them at once, and the kernel would have to clear them again for the tensors of the next step.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)
