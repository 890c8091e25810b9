"""Paths, JSON, text and tables on local disks and any fsspec file system."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from pydantic_core import to_jsonable_python

RUN_FILE, STARTED_FILE = "run.json", "started.json"
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets in the processes that `ray job submit` starts
CHECKOUT = Path(__file__).parent.parent
NAMED = 3  # files of a message


# --- paths ---------------------------------------------------------------------------------------


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def filesystem_of(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a local path or URI, and the path inside it."""
    return fsspec.core.url_to_fs(path)


def arrow_filesystem(path: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """The same for Ray, which by itself knows few URIs and none of fsspec's settings; None with a local path."""
    if "://" not in path:
        return None, absolute(path)
    filesystem, inner = filesystem_of(path)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), inner


def absolute(path: str) -> str:
    """The same place for processes in other folders; `~` is the home folder, a URI stays as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def is_relative(path: str) -> bool:
    return "://" not in path and not os.path.isabs(os.path.expanduser(path))


def placed(path: str) -> str:
    """The rule for every path of a configuration: absolute.

    In a job of a cluster a relative path stays one: it lies in Ray's copy of the code, another folder each time.
    """
    return path if IN_JOB in os.environ and is_relative(path) else absolute(path)


def shipped(path: str) -> str:
    """`placed`; but where only the checkout has it, the checkout's file: `configs/...` is found from any folder."""
    own = CHECKOUT / path
    return str(own) if is_relative(path) and not os.path.exists(path) and own.exists() else placed(path)


def model_place(name: str) -> str:
    """`placed` where it is a folder, or looks like one; the name of a model of the hub, or raygr's own, is kept."""
    is_folder = name.startswith(("/", "~", "./", "../")) or (name != "smollm2" and os.path.isdir(name))
    return placed(name) if is_folder else name


def exists(path: str) -> bool:
    filesystem, inner = filesystem_of(path)
    return filesystem.exists(inner)


def some(paths: Sequence[str]) -> str:
    """The names of a few of them, for a message."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(path.rpartition("/")[2] for path in paths[:NAMED]) + more


# --- contents ------------------------------------------------------------------------------------


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


def fingerprint(path: str) -> str:
    """sha256 of a run's run.json, or of the size and the first and last megabyte of a file or of each of a folder.

    Of a model of the Hugging Face hub its commit; "" where nothing is there.
    """
    filesystem, inner = filesystem_of(path)
    if not filesystem.exists(inner):
        return hub_commit(path)
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


def hub_commit(name: str) -> str:
    """The commit that this machine's cache has of a model of the hub; "" where it has none."""
    if name.startswith("/") or name.count("/") > 1:
        return ""
    from huggingface_hub import constants  # slow to load, and few need it

    reference = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
