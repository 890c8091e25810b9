"""jobs/*.py through `ray job submit` to a head with token authentication: logs, exit codes, what a stop leaves behind.

The head has ports, a folder and a HOME of its own beside whatever other Rays run here.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from raygr import runs
from raygr.score.default_model import cache_folder

CHECKOUT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")
BOUND = 240  # seconds for one command
OF_THE_CLUSTER = {"_AutoscalingCoordinatorActor"}  # Ray Data and Ray Train start it once; it stays for later jobs
pytestmark = pytest.mark.slow


class Head(NamedTuple):
    folder: Path
    url: str
    environment: dict[str, str]

    def ray(self, *arguments: str) -> subprocess.CompletedProcess:
        """Runs one command of the `ray` command line from the checkout, as docs/cluster.md says."""
        command = [RAY, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=BOUND, env=self.environment, cwd=CHECKOUT
        )

    def submit(self, *arguments: str) -> subprocess.CompletedProcess:
        return self.ray("job", "submit", "--runtime-env", "configs/runtime_env.yaml", *arguments)

    def living_actors(self) -> list[str]:
        """Class names of the actors that are not dead."""
        token = (self.folder / ".ray" / "auth_token").read_text()
        request = urllib.request.Request(
            f"{self.url}/api/v0/actors?limit=1000", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            actors = json.load(answer)["data"]["result"]["result"]
        return sorted(actor["class_name"] for actor in actors if actor["state"] != "DEAD")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, because Ray's sockets live in it
    dashboard = free_port()
    hidden = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAYGR_CACHE": str(cache_folder()),
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_enable_worker_prestart": "0",
    }
    found = Head(folder, environment["RAY_API_SERVER_ADDRESS"], environment)
    assert found.ray("get-auth-token", "--generate").returncode == 0
    # the agent takes a job only where its port is free, and another Ray here may hold the usual one
    named = ("--port", "--ray-client-server-port", "--dashboard-agent-listen-port")
    ports = ["--dashboard-port", dashboard, *(part for name in named for part in (name, free_port()))]
    start = [RAY, "start", "--head", "--block", "--num-cpus", "2", "--temp-dir", f"{folder}/ray", *ports]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(start, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        wait_for(lambda: answers(found), seconds=BOUND, what=f"no dashboard: {(folder / 'head.log').read_text()}")
        yield found
    finally:
        process.terminate()  # `--block` ends what it has started
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def answers(head: Head) -> bool:
    try:
        return isinstance(head.living_actors(), list)
    except (OSError, KeyError):
        return False


def wait_for(is_so, *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.fixture(scope="module")
def prepared(head: Head) -> str:
    """A prepare run, made by two jobs whose logs are looked at."""
    raw, data = f"{head.folder}/raw", f"{head.folder}/prepare"
    simulated = head.submit("--", "python", "jobs/simulate.py", "--set", f"output={raw}", "--set", "shoppers=400")
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    made = head.submit(
        "--", "python", "jobs/prepare.py", "--set", f"output={data}", "--set", f"reviews=[{raw}/reviews.jsonl.gz]"
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert f"prepared {data}: " in made.stdout
    assert "Traceback" not in made.stdout
    return data


def test_a_job_without_the_token_is_turned_away(head: Head):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.url}/api/jobs/", timeout=60)
    assert refused.value.code == 401


def test_two_jobs_leave_finished_runs_and_readable_logs(prepared: str):
    assert runs.read_run(prepared, job="prepare").counts["users"]["kept"] > 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [("shoppers=0", "shoppers: Input should be greater"), ("output=outputs/raw", "output: outputs/raw would lie")],
)
def test_a_bad_configuration_fails_the_job_in_words(head: Head, setting: str, words: str):
    result = head.submit("--", "python", "jobs/simulate.py", "--set", f"output={head.folder}/bad", "--set", setting)
    assert result.returncode == 1
    assert words in result.stdout and "Traceback" not in result.stdout
    assert not (head.folder / "bad").exists()


def test_a_stopped_job_leaves_no_actor_behind(head: Head, prepared: str):
    output = head.folder / "train"
    settings = [
        f"output={output}",
        f"data={prepared}",
        "epochs=100000",
        "patience=100000",
        "max_history=8",
        "threads=1",
    ]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    options = ["--no-wait", "--submission-id", "stopped"]
    assert head.submit(*options, "--", "python", "jobs/train.py", *flags).returncode == 0
    wait_for(lambda: (output / "epochs.jsonl").exists(), seconds=BOUND, what="the training did not begin")
    assert "RayTrainWorker" in " ".join(head.living_actors())
    stopped = head.ray("job", "stop", "stopped")
    assert "was stopped" in stopped.stdout + stopped.stderr
    wait_for(lambda: set(head.living_actors()) <= OF_THE_CLUSTER, seconds=120, what="actors of the stopped job live on")
    assert not runs.is_finished(str(output))
    assert "epoch" in head.ray("job", "logs", "stopped").stdout
