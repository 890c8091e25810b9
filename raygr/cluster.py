"""The one way into Ray for the stages that need it: the cluster that was named, or a Ray of their own."""

import logging
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import ray
import ray.data
from ray.exceptions import RayActorError, RayTaskError, UserCodeException

from raygr.config import ConfigError

logger = logging.getLogger(__name__)

ADDRESS, TOKEN = "RAY_ADDRESS", "RAY_AUTH_TOKEN"
# Without a dashboard of its own Ray asks the one on the usual port, another cluster's, after its actors, and Ray
# Train takes its controller for dead: nobody listens here.
NO_DASHBOARD = ("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")


class Node(NamedTuple):
    """What one machine of the cluster has for Ray."""

    cpus: float
    gpus: float


def cluster_nodes() -> list[Node]:
    """The living nodes that have a CPU for work."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has["CPU"], has.get("GPU", 0)) for has in found if has.get("CPU")]


def connect() -> None:
    """Joins the cluster in RAY_ADDRESS (`ray job submit` sets it), else starts Ray on this machine for this process.

    A Ray that others started here is never joined unasked: their work may hold every CPU for ever.
    Does nothing in a process that has called `ray.init`, whose settings stay as they are.
    """
    if ray.is_initialized():
        return
    address = os.environ.get(ADDRESS)
    try:
        if address:
            ray.init(logging_level=logging.ERROR)
        else:
            # Ray's processes inherit both: a runtime_env would start all workers anew
            os.environ.setdefault(*NO_DASHBOARD)
            bring_token()
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        hint = "a cluster with token authentication needs RAY_AUTH_MODE=token here"
        raise ConfigError(f"{ADDRESS}={address}: {error} ({hint})") from error
    place = f"cluster at {address}" if address else "on this machine"
    resources = ray.cluster_resources()
    logger.info("Ray %s: %.0f CPUs, %.0f GPUs", place, resources.get("CPU", 0), resources.get("GPU", 0))
    quiet_logs()


def bring_token() -> None:
    """A token of its own for a Ray of one's own, which would write one into HOME, and HOME may be read-only."""
    is_there = any(name in os.environ for name in (TOKEN, f"{TOKEN}_PATH"))
    if not is_there and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ[TOKEN] = secrets.token_hex(32)


def quiet_logs() -> None:
    """Leaves raygr's own lines and Ray's warnings in the driver's log; all of Ray Data's go to its session's files."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there are no progress bars


def cause_of(error: Exception) -> Exception:
    """The error that a worker's code raised, without what Ray wraps around it: texts of tracebacks, mostly.

    An actor that failed to start leaves but a text, whose last line names the error.
    """
    from ray.train import ControllerError, WorkerGroupError  # not loaded for the stages that train nothing

    match error:
        case RayTaskError(cause=Exception() as cause):
            return cause_of(cause)
        case WorkerGroupError(worker_failures=failures) if failures:
            return cause_of(next(iter(failures.values())))
        case ControllerError(controller_failure=Exception() as cause):
            return cause_of(cause)
        case UserCodeException(__cause__=Exception() as cause):
            return cause_of(cause)
        case RayActorError(actor_init_failed=True):
            return RuntimeError(str(error).strip().splitlines()[-1])
    return error
