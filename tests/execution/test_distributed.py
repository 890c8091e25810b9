"""Effects of a training worker on its process, and the resources that workers get."""

import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray.train.torch

from raygr.config import ConfigError
from raygr.execution import distributed
from raygr.execution.distributed import begin_worker, check_at_once, placement, wants_gpu, worker_cpus
from raygr.ray_setup import Node

FAULTS = """
import resource, sys, torch
from raygr.execution.distributed import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(24):
    torch.ones(1 << 24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(way: str) -> int:
    """Page faults of 24 tensors of 64 MiB, each freed before the next."""
    done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_used_again_without_the_kernel():
    plain = page_faults("plain")
    assert plain > 24 * 10_000
    # a few tensors, until one fits where another lay
    assert page_faults("kept") < plain / 2


def test_ctrl_c_ends_a_training_as_an_interrupt(monkeypatch):
    """Ray Train's own handler would end the process with code 1 and without a message."""
    ended = threading.Event()
    monkeypatch.setattr(distributed.ray, "shutdown", ended.set)

    class Trainer:
        def fit(self):
            assert threading.current_thread() is not threading.main_thread()
            os.kill(os.getpid(), signal.SIGINT)
            assert ended.wait(20)

    left_by_others = signal.signal(signal.SIGINT, signal.default_int_handler)  # a trainer in another test's process
    try:
        with pytest.raises(KeyboardInterrupt):
            distributed.fit(Trainer())
    finally:
        signal.signal(signal.SIGINT, left_by_others)


# --- room --------------------------------------------------------------------------------------


def nodes_with(monkeypatch, *nodes: tuple[float, float]) -> None:
    monkeypatch.setattr(distributed, "cluster_nodes", lambda: [Node(*node) for node in nodes])


@pytest.mark.parametrize(
    ("nodes", "asked", "words"),
    [
        ([(2, 0)], {"workers": 3, "use_gpu": None}, "workers: 3 need as many CPUs, Ray has 2"),
        (
            [(2, 0)],
            {"workers": 1, "use_gpu": None, "threads": 4},
            "workers: 1 of 4 threads each need 4 CPUs, Ray has 2",
        ),
        ([(2, 0), (3, 0)], {"workers": 1, "use_gpu": None, "threads": 4}, r"need 4 CPUs, Ray has 5 \(2 \+ 3\)"),
        ([(8, 1)], {"workers": 2, "use_gpu": True}, "use_gpu: 2 workers need as many GPUs, Ray has 1"),
        ([(8, 0)], {"workers": 1, "use_gpu": True}, "use_gpu: 1 workers need as many GPUs, Ray has 0"),
        ([(8, 2)], {"workers": 2, "use_gpu": None, "gpu_share": 0.5}, "gpu_share: 0.5 may put two .* NCCL"),
    ],
)
def test_workers_that_can_never_start_are_refused_with_the_numbers(monkeypatch, nodes, asked, words):
    nodes_with(monkeypatch, *nodes)
    with pytest.raises(ConfigError, match=words):
        wants_gpu(**asked)


def test_workers_take_gpus_where_all_fit(monkeypatch):
    nodes_with(monkeypatch, (8, 1), (8, 1))
    assert wants_gpu(2, None) and wants_gpu(2, None, 0.6) and wants_gpu(1, None, 0.25)
    assert not wants_gpu(2, False)
    with pytest.raises(
        ConfigError, match=r"workers: 3 do not fit the GPUs that Ray has, 2 \(1 \+ 1\): .*use_gpu: false"
    ):
        wants_gpu(3, None)
    assert not wants_gpu(3, False)


@pytest.mark.parametrize(
    ("nodes", "asked", "cpus"),
    [
        ([(8, 0)], {"workers": 1, "threads": None}, 8),
        ([(8, 0)], {"workers": 1, "threads": 3}, 3),
        ([(8, 0)], {"workers": 2, "threads": None}, 4),
        ([(8, 0)], {"workers": 2, "threads": None, "at_once": 2}, 2),
        ([(8, 0), (8, 0)], {"workers": 2, "threads": None}, 8),  # a node's cores by its workers, not the cluster's
        ([(8, 0), (4, 0)], {"workers": 3, "threads": None}, 4),
        ([(64, 0), (8, 1)], {"workers": 1, "threads": None, "gpu_share": 1.0}, 8),  # of the node that has the GPU
        ([(2, 0)], {"workers": 3, "threads": None}, 1),
    ],
)
def test_a_worker_reserves_the_cores_that_it_computes_on(monkeypatch, nodes, asked, cpus):
    nodes_with(monkeypatch, *nodes)
    assert worker_cpus(**asked) == cpus
    placed = placement(asked["workers"], use_gpu=False, cpus=cpus)
    assert placed.resources_per_worker == {"CPU": cpus}


def test_runs_at_once_that_do_not_fit_are_refused(monkeypatch):
    nodes_with(monkeypatch, (4, 0))
    check_at_once(workers=1, at_once=4, threads=None)
    check_at_once(workers=2, at_once=2, threads=1)
    with pytest.raises(ConfigError, match="at_once: 3 train runs need 6 CPUs, Ray has 4"):
        check_at_once(workers=2, at_once=3, threads=None)


@pytest.mark.slow
def test_a_worker_computes_on_what_it_reserved(local_ray, tmp_path):
    """The worker does not use all of the node's cores, because other processes may have reserved them."""

    def loop(settings: dict) -> None:
        import torch

        begin_worker()
        Path(settings["file"]).write_text(str(torch.get_num_threads()))

    trainer = ray.train.torch.TorchTrainer(
        loop,
        train_loop_config={"file": str(tmp_path / "threads")},
        scaling_config=placement(1, use_gpu=False, cpus=1),
        run_config=ray.train.RunConfig(name="t", storage_path=str(tmp_path)),
    )
    trainer.fit()
    assert (tmp_path / "threads").read_text() == "1"
