"""The Ray that a stage runs on, and the lines of Ray in a job's log."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raygr import ray_setup
from raygr.config import ConfigError
from raygr.simulate.config import SimulateConfig
from raygr.simulate.stage import simulate

PIPELINE = """
stages:
  - prepare: {{output: {folder}/prepare, reviews: [{folder}/raw/reviews.jsonl.gz]}}
  - train: {{output: {folder}/train, data: {folder}/prepare, epochs: 2, evaluate_every: 1, max_history: 8,
           ray: always}}
"""


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """The arguments of each call of ray.init, which is replaced and has no effect."""
    calls: list[dict] = []
    monkeypatch.setattr(ray_setup.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_setup.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray_setup.ray, "init", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(ray_setup, "quiet_logs", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "set by the user")  # the fixture restores both after the test
    monkeypatch.setenv("RAY_AUTH_TOKEN", "set by the user")
    return calls


def test_without_an_address_ray_starts_here_whatever_else_runs(started):
    ray_setup.connect()
    [arguments] = started
    assert (arguments["address"], arguments["include_dashboard"]) == ("local", False)


def test_an_address_in_the_environment_is_joined(started, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray_setup.connect()
    [arguments] = started
    # ray.init reads the address itself; a running cluster refuses to be configured
    assert set(arguments) == {"logging_level"}


def test_a_driver_keeps_the_ray_that_it_has_started(started, monkeypatch):
    monkeypatch.setattr(ray_setup.ray, "is_initialized", lambda: True)
    ray_setup.connect()
    assert not started


def test_a_cluster_that_cannot_be_joined_is_named(started, monkeypatch):
    def refuse(**arguments):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray_setup.ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=10\.0\.0\.1:6379: nobody there"):
        ray_setup.connect()


def test_a_ray_of_ones_own_needs_no_file_in_home(started, monkeypatch, tmp_path):
    """Ray writes a token there, and HOME may be read-only in a container."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the user")
    ray_setup.connect()
    assert os.environ["RAY_AUTH_TOKEN"] == "of the user"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the user's file")
    ray_setup.connect()
    assert "RAY_AUTH_TOKEN" not in os.environ
    (tmp_path / ".ray" / "auth_token").unlink()
    ray_setup.connect()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.delenv("RAY_AUTH_TOKEN")


@pytest.mark.slow
def test_a_pipeline_beside_another_cluster_leaves_only_our_own_lines():
    # a short path: Ray's sockets live in it
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        simulate(SimulateConfig(output=f"{folder}/raw", shoppers=400))
        Path(folder, "pipeline.yaml").write_text(PIPELINE.format(folder=folder))
        # what `ray start` leaves for others to find; nobody listens there, so that joining it fails
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:9")
        hidden = ("RAY_ADDRESS", "RAY_AUTH_MODE")  # authentication as it comes, with no token yet
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        result = subprocess.run(
            [sys.executable, "-m", "raygr.cli", "pipeline", "--config", f"{folder}/pipeline.yaml"],
            capture_output=True,
            text=True,
            timeout=480,
            env=environment | {"RAY_TMPDIR": folder, "HOME": folder},
        )
        kept = Path(folder, "pipeline.log").read_text()
    log = result.stderr + result.stdout
    assert result.returncode == 0, log
    ours = re.compile(
        r"\d\d:\d\d:\d\d (plan:|prepare|train|pipeline|Ray on this machine: |\d+ of \d+ (items|users) |test |what Ray |"
        r"(read |write )?(reviews|users|reviewed items|rows of metadata)( of the \w+)?: )"
    )
    assert [line for line in log.splitlines() if not ours.match(line)] == []
    assert [kept.count(f" train: {epoch} of 2 epochs") for epoch in range(3)] == [1, 1, 1]
    assert log.count("Ray on this machine: ") == 1  # both stages share it
