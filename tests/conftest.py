"""Fixtures: real data and the packaged model where they are available, and one small local Ray per session."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"

# CI draws the same examples every time; `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Quick tests run beside those on Ray, and OpenMP's waiting threads would spin on cores that others need.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that use the session's Ray, so that `make test-fast` can leave them out."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker("ray")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets; tests that need it skip if it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is missing: it holds real data sets that are not part of the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def local_ray():
    """A local Ray with two logical CPUs and no dashboard, stopped at the end of the session."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=True, configure_logging=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the packaged model; tests that need it skip if it is missing."""
    from transformers import AutoTokenizer

    from raygr.score.default_model import ModelError, small_model_folder

    try:
        return AutoTokenizer.from_pretrained(small_model_folder())
    except ModelError as error:
        pytest.skip(str(error))
