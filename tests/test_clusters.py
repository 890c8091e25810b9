"""One of two nodes on this machine is lost: scoring and training finish with the rows of a run without loss.

Each cluster lives in a process, a folder and a HOME of its own beside whatever other Rays run here.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from toy_data import cycles, write_prepared

from raygr import files, runs
from raygr.score.config import ScoreConfig
from raygr.score.default_model import cache_folder
from raygr.score.subjects import item_prompts, prompt_settings
from raygr.train.config import TrainConfig

ASPECTS = str(Path(__file__).parent.parent / "configs" / "aspects" / "movies.yaml")
CHECKOUT = Path(__file__).parent.parent
ITEMS, BATCH, EPOCHS = 96, 4, 20
BOUND = 540  # seconds for one cluster, start and end included
pytestmark = pytest.mark.slow

# The head steers and works; the other node is killed as a machine that loses its power.
START = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import ray
from ray.cluster_utils import Cluster
from raygr import files

output = sys.argv[1]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS, "include_dashboard": False})
other = cluster.add_node(num_cpus=OTHER_CPUS)
ray.init(address=cluster.address)

def finish_without_the_other_node(stage, is_under_way, *, replace):
    '''Runs the stage beside this thread, which alone may start and end nodes.'''
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(stage)
        while not is_under_way() and not finished.done():
            time.sleep(0.05)
        if not finished.done():
            cluster.remove_node(other, allow_graceful=False)
            print("node lost", flush=True)
            if replace:
                cluster.add_node(num_cpus=OTHER_CPUS)
        finished.result()
    ray.shutdown()
    cluster.shutdown()
"""

SCORE = """
from raygr.score import actors
from raygr.score.config import ScoreConfig
from raygr.score.stage import score
from raygr.score.store import StoredScore

class StandIn:
    '''Answers by the prompt's hash, slowly, and notes on which node.'''
    def __init__(self, settings, store):
        self.store = store
        self.node = ray.get_runtime_context().get_node_id()
        threads, cores = os.environ["OMP_NUM_THREADS"], os.environ["VLLM_CPU_OMP_THREADS_BIND"]
        files.write_text(f"{threads} {cores}", f"{output}/threads/{self.node}")

    def __call__(self, batch):
        time.sleep(0.5)
        hashes = list(batch["prompt_sha256"])
        ratings = [1 + int(digest[:8], 16) % 10 for digest in hashes]
        self.store.write(hashes, [StoredScore((r,) * 12, (float(r),) * 12, "ok", "") for r in ratings])
        files.write_text("", f"{output}/nodes/{self.node}/{hashes[0]}")
        names = ("subjects", "tokens_given", "tokens_computed", "engine_seconds")
        return {name: np.array([len(hashes)]) for name in names}

def is_under_way():
    return len({path.parent.name for path in Path(output, "nodes").glob("*/*")}) == 2

actors.ScoringEngine = StandIn
finish_without_the_other_node(lambda: score(ScoreConfig(**CONFIG)), is_under_way, replace=False)
"""

TRAIN = """
from raygr.train.config import TrainConfig
from raygr.train.stage import train

def is_under_way():
    history = Path(output, "epochs.jsonl")
    return history.exists() and len(history.read_text().splitlines()) >= 3

finish_without_the_other_node(lambda: train(TrainConfig(**CONFIG)), is_under_way, replace=True)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, because Ray's sockets live in it; what is left of processes in it is ended at the end."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    yield path
    for process in psutil.process_iter():
        try:
            if str(path) in " ".join(process.cmdline()):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    shutil.rmtree(path, ignore_errors=True)


def run_on_two_nodes(folder: Path, script: str, *, config: dict, head_cpus: int, other_cpus: int) -> str:
    """Runs the script in its own process, which starts and ends the cluster; returns all that it printed."""
    constants = f"HEAD_CPUS, OTHER_CPUS = {head_cpus}, {other_cpus}\nCONFIG = {config!r}\n"
    file = folder / "on_two_nodes.py"
    file.write_text(constants + textwrap.dedent(START) + textwrap.dedent(script))
    hidden = ("RAY_ADDRESS",)
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "RAY_TMPDIR": str(folder),
        "HOME": str(folder),
        "RAYGR_CACHE": str(cache_folder()),
        "RAY_AUTH_MODE": "disabled",
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",  # no other Ray's dashboard
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy machine may take longer than the usual minute
        "RAY_enable_worker_prestart": "0",  # idle workers only take time to start
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
    }
    command = [sys.executable, str(file), config["output"]]
    with (folder / "log").open("w") as log:
        result = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, timeout=BOUND, env=environment, cwd=folder
        )
    text = (folder / "log").read_text()
    assert result.returncode == 0, text[-4000:]
    return text


@pytest.mark.timeout(BOUND + 60)
def test_scoring_goes_on_when_a_node_is_lost(folder: Path, tokenizer):
    data = write_prepared(folder / "prepare", cycles(8, ITEMS, 12), items=ITEMS)
    settings = {"output": str(folder / "scores"), "data": data, "subjects": "items", "aspects": ASPECTS}
    settings |= {"store": str(folder / "store"), "mode": "generate", "actors": 2, "batch_size": BATCH}
    config = ScoreConfig(**settings)
    prompts = item_prompts(files.read_table(f"{data}/items"), settings=prompt_settings(config, "items"))

    log = run_on_two_nodes(folder, SCORE, config=settings, head_cpus=4, other_cpus=2)

    assert "node lost" in log
    assert runs.is_finished(config.output)
    rows = files.read_table(f"{config.output}/scores")
    ratings = [[1 + int(digest[:8], 16) % 10] * 12 for digest in prompts["prompt_sha256"].to_pylist()]
    expected = pa.table({"subject_id": prompts["subject_id"], "ratings": pa.array(ratings, pa.list_(pa.int8()))})
    assert rows.select(["subject_id", "ratings"]).sort_by("subject_id").equals(expected.sort_by("subject_id"))
    by_node = sorted(len(list(node.iterdir())) for node in (folder / "scores" / "nodes").iterdir())
    assert len(by_node) == 2 and by_node[0] >= 1
    assert by_node[1] > ITEMS // BATCH // 2  # the remaining node did the rest
    # an actor on each: two threads is what the smaller node has, and no core of the driver's by number
    assert {file.read_text() for file in (folder / "scores" / "threads").iterdir()} == {"2 nobind"}


@pytest.mark.timeout(BOUND + 60)
def test_training_goes_on_when_a_node_is_lost_and_another_comes(folder: Path):
    data = write_prepared(folder / "prepare", cycles(20, 20, 12), items=20)
    settings = {"output": str(folder / "train"), "data": data, "base_width": 16, "batch_size": 8, "max_history": 10}
    settings |= {"epochs": EPOCHS, "patience": EPOCHS, "dropout": 0.0, "threads": 1, "workers": 2}

    log = run_on_two_nodes(folder, TRAIN, config=settings, head_cpus=1, other_cpus=1)

    assert "node lost" in log and "resumed after epoch" in log
    lines = [json.loads(line) for line in (folder / "train" / "epochs.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    straight = straight_losses(TrainConfig(**settings | {"workers": 1}))
    # two workers sum the gradient of one in another order
    assert [line["loss"] for line in lines] == pytest.approx(straight, rel=1e-3)
    ranks = files.read_table(f"{folder}/train/ranks.parquet")
    assert ranks.filter(pa.compute.equal(ranks["part"], "test")).num_rows == 20


def straight_losses(config: TrainConfig) -> list[float]:
    """Losses of the same training without Ray, in this process."""
    import torch

    from raygr.models.workers import Share
    from raygr.train.inputs import load_inputs
    from raygr.train.loop import training_rounds
    from raygr.train.state import start_training

    training = start_training(config, load_inputs(config), torch.device("cpu"), Share())
    for _ in training_rounds(training):
        pass
    return [line["loss"] for line in training.progress.lines]
