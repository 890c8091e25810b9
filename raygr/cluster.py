"""The one way into Ray for the stages that need it: the cluster that was named, or a Ray of their own."""

import logging
import os

import ray
import ray.data

from raygr.config import ConfigError

logger = logging.getLogger(__name__)

ADDRESS = "RAY_ADDRESS"
# Without a dashboard of its own Ray asks the one on the usual port, another cluster's, after its actors, and Ray
# Train takes its controller for dead: nobody listens here.
NO_DASHBOARD = ("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")


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
            os.environ.setdefault(
                *NO_DASHBOARD
            )  # Ray's processes inherit it: a runtime_env would start all workers anew
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        hint = "a cluster with token authentication needs RAY_AUTH_MODE=token here"
        raise ConfigError(f"{ADDRESS}={address}: {error} ({hint})") from error
    place = f"cluster at {address}" if address else "on this machine"
    resources = ray.cluster_resources()
    logger.info("Ray %s: %.0f CPUs, %.0f GPUs", place, resources.get("CPU", 0), resources.get("GPU", 0))
    quiet_logs()


def quiet_logs() -> None:
    """Leaves raygr's own lines and Ray's warnings in the driver's log; all of Ray Data's go to its session's files."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there are no progress bars
