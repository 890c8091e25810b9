"""The one way into Ray for the stages that need it: the cluster that was named, or a Ray of their own."""

import builtins
import logging
import os
import re
import secrets
from typing import NamedTuple

import ray
import ray.data
from ray.exceptions import RayActorError, RayTaskError, UserCodeException

from raygr.config import ConfigError

logger = logging.getLogger(__name__)

# Of a traceback's text: what stands between an error and the one that it caused; a frame with its lines of code, or the
# place in the cluster that stands first.
CAUSED = "\n\nThe above exception was the direct cause of the following exception:\n\n"
FRAME_OR_PLACE = re.compile(r'^(?:  File "[^\n]*\n(?: {4}[^\n]*\n)*|[^\n]*ray::[^\n]*\n)', re.MULTILINE)

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
            is_there = any(name in os.environ for name in (TOKEN, f"{TOKEN}_PATH"))
            if not is_there and not os.path.exists(os.path.expanduser("~/.ray/auth_token")):
                os.environ[TOKEN] = secrets.token_hex(32)  # Ray would write one into HOME, which may be read-only
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        hint = "a cluster with token authentication needs RAY_AUTH_MODE=token here"
        raise ConfigError(f"{ADDRESS}={address}: {error} ({hint})") from error
    place = f"cluster at {address}" if address else "on this machine"
    resources = ray.cluster_resources()
    logger.info("Ray %s: %.0f CPUs, %.0f GPUs", place, resources.get("CPU", 0), resources.get("GPU", 0))
    quiet_logs()


def quiet_logs() -> None:
    """Leaves raygr's own lines and Ray's warnings in the driver's log; all of Ray Data's go to its session's files.

    Does nothing under `--debug`.
    """
    if logger.isEnabledFor(logging.DEBUG):
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
            handler.addFilter(is_no_error)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there are no progress bars


def cause_of(error: Exception) -> Exception:
    """The error that a worker's code raised, without what Ray wraps around it: texts of tracebacks, mostly."""
    from ray.train import ControllerError, WorkerGroupError  # not loaded for the stages that train nothing

    match error:
        case WorkerGroupError(worker_failures=failures) if failures:
            return cause_of(next(iter(failures.values())))
        case ControllerError(controller_failure=Exception() as cause):
            return cause_of(cause)
        case RayTaskError(cause=UserCodeException()) | RayActorError(actor_init_failed=True):
            return error_of_text(str(error))
        case RayTaskError(cause=Exception() as cause):
            return cause_of(cause)
    return error


def error_of_text(text: str) -> Exception:
    """The error that a traceback ends with, which is all that Ray brings of some.

    One of raygr's own, a ValueError or an OSError is for a user to mend, as it is where it is raised beside the user.
    """
    ends = [FRAME_OR_PLACE.split(part)[-1].strip() for part in text.split(CAUSED)]
    said = [end for end in ends if not end.startswith("ray.exceptions.UserCodeException")]
    name, _, message = (said or ends)[-1].partition(": ")
    known = vars(builtins).get(name, Exception)
    if name.startswith("raygr.") or issubclass(known, ValueError | OSError):
        return ConfigError(message)
    return type(name.rpartition(".")[2], (Exception,), {})(message)


def is_no_error(record: logging.LogRecord) -> bool:
    """Ray Data logs what it raises as well, with its whole traceback."""
    return record.levelno < logging.ERROR
