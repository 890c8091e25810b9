"""Read and write paths, JSON, text and tables on local disks and any fsspec file system."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs

RUN_FILE, STARTED_FILE = "run.json", "started.json"
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets in the processes that `ray job submit` starts
PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parent
NAMED = 3  # files that a message names


# --- paths ---------------------------------------------------------------------------------------


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def filesystem_of(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a local path or URI, and the path inside it."""
    return fsspec.core.url_to_fs(path)


def arrow_filesystem(path: str) -> "tuple[pyarrow.fs.FileSystem | None, str]":
    """Return the same for Ray, which knows few URIs and no fsspec settings itself; None for a local path."""
    if "://" not in path:
        return None, absolute(path)
    import pyarrow.fs  # here and below: `raygr --help` does without it

    filesystem, inner = filesystem_of(path)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), inner


def absolute(path: str) -> str:
    """Return the absolute path, with `~` as the home folder; a URI stays as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def is_relative(path: str) -> bool:
    return "://" not in path and not os.path.isabs(os.path.expanduser(path))


def placed(path: str) -> str:
    """Return a configuration's path as an absolute one.

    In a cluster job a relative path stays relative: it lies in Ray's copy of the code, a new folder for each job.
    """
    return path if IN_JOB in os.environ and is_relative(path) else absolute(path)


def shipped(path: str) -> str:
    """Return raygr's own file where only raygr has `path`, such as `configs/aspects/movies.yaml`, else `placed(path)`.

    A checkout has all of configs/, an installed package its aspects and the paper's settings.
    """
    own = next((one for one in (CHECKOUT / path, PACKAGE / path) if one.exists()), None)
    return str(own) if own and is_relative(path) and not os.path.exists(path) else placed(path)


def model_place(name: str) -> str:
    """Return the absolute path of a model's folder; the name of a hub model, or `smollm2`, stays as it is."""
    is_folder = name.startswith(("/", "~", "./", "../")) or (name != "smollm2" and os.path.isdir(name))
    return placed(name) if is_folder else name


def exists(path: str) -> bool:
    filesystem, inner = filesystem_of(path)
    return filesystem.exists(inner)


def some(paths: Sequence[str]) -> str:
    """Return the names of a few paths, for a message."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(path.rpartition("/")[2] for path in paths[:NAMED]) + more


# --- contents ------------------------------------------------------------------------------------


def read_json(path: str) -> Any:
    with fsspec.open(path, "r", encoding="utf-8") as file:
        return json.load(file)


def write_json(value: object, path: str) -> None:
    write_text(json.dumps(to_jsonable_python(value), indent=1, allow_nan=False) + "\n", path)


def write_text(text: str, path: str) -> None:
    """Write a file beside the target and rename it, so that no reader sees half a file."""
    filesystem, inner = filesystem_of(path)
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    with filesystem.open(inner + ".part", "w", encoding="utf-8") as file:
        file.write(text)
    filesystem.mv(inner + ".part", inner)


def read_table(path: str, columns: list[str] | None = None) -> "pa.Table":
    """Read one Parquet file, or every part of a Parquet folder."""
    import pyarrow.parquet as pq

    filesystem, inner = filesystem_of(path)
    return pq.read_table(inner, columns=columns, filesystem=filesystem)


def write_table(table: "pa.Table", path: str) -> None:
    write_tables([table], path)


def write_tables(tables: "Iterable[pa.Table]", path: str, *, compression: str = "snappy") -> None:
    """Write tables of one schema, at least one, as one Parquet file; each starts a new row group."""
    import pyarrow.parquet as pq

    filesystem, inner = filesystem_of(path)
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    rest = iter(tables)
    first = next(rest)
    with pq.ParquetWriter(inner + ".part", first.schema, filesystem=filesystem, compression=compression) as writer:
        for table in itertools.chain([first], rest):
            writer.write_table(table)
    filesystem.mv(inner + ".part", inner)


def fingerprint(path: str) -> str:
    """Return a sha256 of what a path holds; "" where nothing is there.

    Of a run it covers run.json, of a file size, first and last megabyte, of a folder those of each file. For a model of
    the Hugging Face hub it is the commit.
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
    """Return the commit of a hub model in this machine's cache; "" where the cache has none."""
    if name.startswith("/") or name.count("/") > 1:
        return ""
    from huggingface_hub import constants  # slow to load, and few need it

    reference = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
