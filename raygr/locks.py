"""Let one process at a time write into an output folder.

On a local file system the kernel holds the lock while the process lives, so a killed process leaves no lock behind.
On other file systems the lock is a file that its holder renews while it works; two processes that start in the same
second may miss each other's file.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

LOCK_FILE = ".lock"
RENEWED_EVERY, STALE_AFTER = 20.0, 120.0  # seconds

logger = logging.getLogger(__name__)

# URI of a lock file -> the function that releases it. A second `lock` of a folder by this process changes nothing.
held: dict[str, Callable[[], None]] = {}


def lock(folder: str, job: str) -> str | None:
    """Lock the folder for this process; return None, or a text that says which process holds it."""
    filesystem, inner = fsspec.core.url_to_fs(f"{folder.rstrip('/')}/{LOCK_FILE}")
    if filesystem.unstrip_protocol(inner) in held:
        return None
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    mine = {"job": job, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    if isinstance(filesystem, LocalFileSystem):
        return lock_file(filesystem, inner, mine)
    return renew_file(filesystem, inner, mine)


def unlock(folder: str, *, finished: bool = False) -> None:
    """Release the folder; the lock file of a `finished` run is deleted."""
    filesystem, inner = fsspec.core.url_to_fs(f"{folder.rstrip('/')}/{LOCK_FILE}")
    release = held.pop(filesystem.unstrip_protocol(inner), None)
    if release is None:
        return
    release()
    if finished and filesystem.exists(inner):
        filesystem.rm_file(inner)


def lock_file(filesystem: LocalFileSystem, path: str, mine: dict[str, Any]) -> str | None:
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open for as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            return who(file)
    except OSError as error:
        logger.warning("%s: %s; two runs in this folder at once would not be told apart", path, error)
    file.truncate(0)
    json.dump(mine, file)
    file.flush()
    held[filesystem.unstrip_protocol(path)] = file.close
    return None


def renew_file(filesystem: fsspec.AbstractFileSystem, path: str, mine: dict[str, Any]) -> str | None:
    if filesystem.exists(path):
        with filesystem.open(path, "r", encoding="utf-8") as file:
            holder = json.load(file)
        gone = time.time() - holder["renewed"] > STALE_AFTER
        if not gone and not (holder["host"] == mine["host"] and is_dead(holder["pid"])):
            return described(holder)
    stopped = threading.Event()

    def renew() -> None:
        with filesystem.open(path, "w", encoding="utf-8") as file:
            json.dump(mine | {"renewed": time.time()}, file)

    def keep_renewing() -> None:
        while not stopped.wait(RENEWED_EVERY):
            try:
                renew()
            except OSError as error:
                logger.warning("%s was not renewed: %s", path, error)

    renew()
    threading.Thread(target=keep_renewing, daemon=True).start()
    held[filesystem.unstrip_protocol(path)] = stopped.set
    return None


def is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return False


def who(file: IO[str]) -> str:
    try:
        return described(json.load(file))
    except ValueError:  # it is just writing its name
        return "another raygr"


def described(holder: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"another raygr {holder['job']} (pid {holder['pid']} on {holder['host']}, since {since})"
