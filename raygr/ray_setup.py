"""Connect a stage to Ray: to the cluster in RAY_ADDRESS, or to a Ray that it starts itself."""

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
    """Resources of one machine of the cluster."""

    cpus: float
    gpus: float


def cluster_nodes() -> list[Node]:
    """Return the living nodes that have at least one CPU."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has["CPU"], has.get("GPU", 0)) for has in found if has.get("CPU")]


def connect() -> None:
    """Join the cluster in RAY_ADDRESS (`ray job submit` sets it), else start Ray on this machine for this process.

    A Ray that someone else started here is never joined automatically, since its work may hold every CPU.
    Does nothing in a process that has called `ray.init`, whose settings are kept.
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
    """Limit the driver's log to raygr's lines and Ray's warnings; Ray Data's lines go to its session's files.

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
    """Return the error that a worker's code raised, without the errors that Ray wraps around it."""
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
    """Return the error at the end of a traceback's text, which is all that Ray passes on of some errors.

    One of raygr's own errors, a ValueError or an OSError becomes a ConfigError, which a user can fix.
    """
    ends = [FRAME_OR_PLACE.split(part)[-1].strip() for part in text.split(CAUSED)]
    said = [end for end in ends if not end.startswith("ray.exceptions.UserCodeException")]
    name, _, message = (said or ends)[-1].partition(": ")
    known = vars(builtins).get(name, Exception)
    if name.startswith("raygr.") or issubclass(known, ValueError | OSError):
        return ConfigError(message)
    return type(name.rpartition(".")[2], (Exception,), {})(message)


def is_no_error(record: logging.LogRecord) -> bool:
    """Filter out errors: Ray Data logs what it raises too, with the whole traceback."""
    return record.levelno < logging.ERROR
