"""The `prepare` stage: raw reviews and metadata -> items/, reviews/, interactions, users and statistics.

    raw files --tasks--> ids and numbers of every row --selection.py--> kept rows --+
    raw files --tasks--> texts of every row, stored in the run folder ----tasks-----+--> items/, reviews/

No text is ever held whole. Each raw file is read once: the caller collects its ids and numbers, and its texts wait in
the run folder until the caller knows which rows stay. Tasks run one after the other in the calling process, each with
all its CPUs, or side by side on Ray, each with one CPU.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.execution.console import log_progress
from raygr.execution.in_process import cpus_here, runs_here
from raygr.files import join, write_json, write_table, write_tables
from raygr.prepare import metadata, output_tables, reviews, run_counts, text_store
from raygr.prepare.bad_rows import InputError, Tally, usable
from raygr.prepare.coded_rows import HELD, CodedRows
from raygr.prepare.column_files import check_columns
from raygr.prepare.config import PrepareConfig
from raygr.prepare.output_tables import Part
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.raw_files import error_text, expand_files
from raygr.prepare.scanned_rows import Scanned
from raygr.prepare.selection import Kept
from raygr.runs import Run, finish_run, remove_parts, start_run
from raygr.schema import INTERACTIONS, ITEMS, NEW_INTERACTIONS, REVIEWS, STATISTICS, USERS

PART_BYTES = 32 << 20
PART_ROWS = 500_000
SHOWN_IDS = 5
REVIEW_STORE, ITEM_STORE = "review_texts", "item_texts"  # folders that are gone at the end
AHEAD = 8  # tables that a task on Ray makes before the first one is taken

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What differs between reviews and metadata."""

    name: str
    read: Callable[[str, PrepareConfig, Cpus], Iterator[Scanned]]
    make_part: Callable[[pa.Table, pa.Table, int], Part]
    store: str
    output: str


REVIEW = Kind("reviews", reviews.read_reviews, output_tables.review_part, REVIEW_STORE, REVIEWS)
ITEM = Kind("metadata", metadata.read_items, output_tables.item_part, ITEM_STORE, ITEMS)


def prepare(config: PrepareConfig) -> Run:
    """Writes the run folder `config.output`; InputError explains what is wrong with the raw data or the filter."""
    check_columns(config)
    review_files = expand_files(config.reviews, what="reviews")
    metadata_files = expand_files(config.metadata, what="metadata")
    run = start_run(config.output, job="prepare", config=config)
    # An interrupted attempt may have written another number of parts.
    for name in (ITEMS, REVIEWS, REVIEW_STORE, ITEM_STORE):
        remove_parts(run, name)
    if not is_here(config):
        from raygr.ray_setup import connect

        connect()
    kept, counts = keep_interactions(review_files, run, config)
    described, counts["items"] = match_metadata(kept, metadata_files, run, config)
    write_tables(output_tables.interactions(kept, PART_ROWS), run.file(INTERACTIONS))
    if config.new_items:
        write_table(output_tables.new_interactions(kept), run.file(NEW_INTERACTIONS))
    write_table(output_tables.users(kept), run.file(USERS))
    counts["reviews"] |= write_reviews(kept, run, config)
    counts["items"] |= write_items(kept, described, len(metadata_files), run, config)
    for name in (REVIEW_STORE, ITEM_STORE):
        remove_parts(run, name)
    statistics = output_tables.statistics(kept)
    write_json(statistics, run.file(STATISTICS))
    finish_run(run, inputs=[*review_files, *metadata_files], counts=counts)
    run_counts.log_counts(counts, config)
    shown = ("users", "items", "reviews", "mean_history")
    numbers = ", ".join(f"{name.replace('_', ' ')} {statistics[name]:,.6g}" for name in shown)
    logger.info("prepared %s: %s", run.path, numbers)
    return run


# --- from raw files to kept rows ------------------------------------------------------------------


def keep_interactions(files: list[str], run: Run, config: PrepareConfig) -> tuple[Kept, dict[str, Any]]:
    """The kept interactions, and the counts of reviews, users, reviewed items and parts."""
    rows = CodedRows(("user_id", "item_id"), HELD)
    tally = scan_files(files, REVIEW, rows, run, config)
    logger.log(logging.WARNING if len(tally.time_forms) > 1 else logging.INFO, "reviews: %s", tally.times())
    return run_counts.kept_and_counts(rows, tally, config)


def match_metadata(kept: Kept, files: list[str], run: Run, config: PrepareConfig) -> tuple[pa.Table, dict[str, Any]]:
    """The first metadata row of each kept item as (item_index, file, row), sorted by file and row, and the counts.

    InputError if no kept item has metadata.
    """
    items = len(kept.item_ids)
    if not files:
        nothing = pa.schema([("item_index", pa.int32()), ("file", pa.int32()), ("row", pa.int64())]).empty_table()
        return nothing, {"kept": items, "without_metadata": items, "read": 0, "by_reason": {}, "examples": {}}
    rows = CodedRows(("item_id",), {"row": np.uint32})
    tally = scan_files(files, ITEM, rows, run, config)
    code, ids = rows.pop_ids("item_id")
    index = (pc.index_in(ids, value_set=kept.item_ids).fill_null(-1).to_numpy() + 1)[code]
    known = np.flatnonzero(index)
    _, first = np.unique(index[known], return_index=True)
    chosen = known[np.sort(first)]
    check_matched(kept, ids, matched=len(chosen))
    record = {"kept": items, "without_metadata": items - len(chosen), **tally.record()}
    dropped = {"item_not_kept": len(index) - len(known), "duplicate": len(known) - len(chosen)}
    record["by_reason"] |= {reason: count for reason, count in dropped.items() if count}
    places = {name: rows.pop(name)[chosen] for name in ("file", "row")}
    return pa.table({"item_index": index[chosen], **places}), record


def check_matched(kept: Kept, metadata_ids: pa.Array, *, matched: int) -> None:
    """InputError if no item has metadata, a warning if most have none: both sides may write ids differently."""
    items = len(kept.item_ids)
    if 2 * matched >= items:
        return
    has_none = pc.invert(pc.is_in(kept.item_ids, value_set=metadata_ids))
    ours, theirs = (
        ", ".join(map(repr, ids.slice(0, SHOWN_IDS).to_pylist()))
        for ids in (kept.item_ids.filter(has_none), metadata_ids)
    )
    text = (
        f"metadata: {items - matched} of {items} items have none, such as {ours}; the metadata has ids such as {theirs}"
    )
    if not matched:
        raise InputError(f"{text}: name the column that holds the same ids, written in the same way")
    logger.warning("%s", text)


def scan_files(files: list[str], kind: Kind, rows: CodedRows, run: Run, config: PrepareConfig) -> Tally:
    """Adds the usable rows of all files to `rows` and stores their texts. InputError if too many rows are refused."""
    tally = Tally(files)
    jobs = [(path, file, run.file(kind.store), kind, config) for file, path in enumerate(files)]
    for file, scanned in outputs(scan_file, jobs, config):
        tally.add(scanned, file)
        rows.add(usable(scanned), file)
        log_progress(logger, f"read {kind.name}", tally.read, None, "rows")
    log_progress(logger, f"read {kind.name}", tally.read, tally.read, "rows")
    if not tally.read:
        raise InputError(f"no rows in {', '.join(files)}: the files are empty")
    tally.check(config.max_bad_fraction, what=kind.name, allow_broken_files=config.allow_broken_files)
    return tally


def scan_file(path: str, file: int, store: str, kind: Kind, config: PrepareConfig, *, cpus: Cpus) -> Iterator[pa.Table]:
    """The task that reads a raw file: stores its texts and yields SCAN_SCHEMA."""
    with naming(path):
        yield from text_store.store_texts(kind.read(path, config, cpus), store, file)


# --- from kept rows to tables with texts ----------------------------------------------------------


def write_reviews(kept: Kept, run: Run, config: PrepareConfig) -> dict[str, int]:
    """Writes reviews/; counts the texts that were cut, and those with repaired bytes."""
    order = np.lexsort((kept.row, kept.file))
    totals = write_groups(
        kept.file[order], kept.row[order], lambda some: output_tables.kept_rows(kept, order[some]), REVIEW, run, config
    )
    return {name: totals[name] for name in ("text_cut", "text_repaired")}


def write_items(kept: Kept, described: pa.Table, files: int, run: Run, config: PrepareConfig) -> dict[str, int]:
    """Writes items/; counts the texts that were cut, those with repaired bytes, and the items without text.

    `described` holds the metadata rows of `match_metadata`, from a number of `files`; other items get empty texts.
    """
    rows, index = output_tables.item_rows(kept), described["item_index"].to_numpy()
    in_files = rows.take(pa.array(index - 1)).append_column("row", described["row"])
    file, row = (described[name].to_numpy() for name in ("file", "row"))
    totals = write_groups(file, row, lambda some: in_files.slice(some.start, some.stop - some.start), ITEM, run, config)
    bare = np.setdiff1d(rows["item_index"].to_numpy(), index)
    if len(bare):
        part = ITEM.make_part(
            rows.take(pa.array(bare - 1)), output_tables.empty_texts(len(bare)), config.max_text_chars
        )
        write_table(part.table, part_path(run.file(ITEMS), files, 0, 0))
        totals.update(part.counts)
    return {name: totals[name] for name in ("text_cut", "text_repaired", "without_text")}


def write_groups(
    file: np.ndarray, row: np.ndarray, rows_of: Callable[[slice], pa.Table], kind: Kind, run: Run, config: PrepareConfig
) -> Counter[str]:
    """Writes the parts of rows in these places, which are sorted; returns the summed counts.

    `rows_of` gives the numbers of the rows at a slice of the places. A task writes the rows of one group of texts.
    """
    group = file.astype(np.int64) << 32 | row // text_store.GROUP_ROWS
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    jobs = (
        (rows_of(slice(start, end)), int(file[start]), int(row[start]) // text_store.GROUP_ROWS, kind, run, config)
        for start, end in itertools.pairwise([*starts.tolist(), len(file)])
    )
    totals: Counter[str] = Counter()
    for _, counts in outputs(write_group, jobs, config):
        totals.update(counts)
        log_progress(logger, f"write {kind.name}", totals["written"], len(file), "rows")
    return totals


def write_group(
    rows: pa.Table, file: int, group: int, kind: Kind, run: Run, config: PrepareConfig, *, cpus: Cpus
) -> Iterator[Counter[str]]:
    """The task that writes kept rows with their texts: Parquet parts of about PART_BYTES, whose counts it yields.

    The names hold the numbers of the raw file and of its group, so a task that runs again replaces its own parts.
    """
    numbers = rows["row"].to_numpy()

    def write_part(numbered: tuple[int, pa.Table]) -> Counter[str]:
        number, texts = numbered
        found = texts["row"].to_numpy()
        start, end = np.searchsorted(numbers, [found[0], found[-1] + 1]).tolist()
        some, chosen = rows.slice(start, end - start), np.isin(found, numbers[start:end])
        part = kind.make_part(some, texts.filter(chosen), config.max_text_chars)
        if len(some):
            write_table(part.table, part_path(run.file(kind.output), file, group, number))
        return Counter(part.counts)

    stored = text_store.stored_texts(run.file(kind.store), file, group, PART_BYTES)
    yield from cpus.in_threads(write_part, enumerate(stored))


def part_path(folder: str, file: int, group: int, number: int) -> str:
    return join(folder, f"part-{file:05d}-{group:05d}-{number:05d}.parquet")


# --- tasks ----------------------------------------------------------------------------------------


def is_here(config: PrepareConfig) -> bool:
    return runs_here(config.ray, is_small=config.parallelism == 1)


def outputs(
    task: Callable[..., Iterator[Any]], jobs: Iterable[tuple[Any, ...]], config: PrepareConfig
) -> Iterator[tuple[int, Any]]:
    """The number of a job and what `task` yields for it, job by job; on Ray in any order."""
    if not is_here(config):
        yield from outputs_on_ray(task, jobs, config.parallelism)
        return
    with Cpus(cpus_here()) as cpus:
        for number, job in enumerate(jobs):
            for output in task(*job, cpus=cpus):
                yield number, output


def outputs_on_ray(
    task: Callable[..., Iterator[Any]], jobs: Iterable[tuple[Any, ...]], parallelism: int
) -> Iterator[tuple[int, Any]]:
    import ray
    from ray.exceptions import RayTaskError

    remote = ray.remote(task).options(num_cpus=1, num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
    waiting = enumerate(jobs)
    running: dict[Any, int] = {}
    while True:
        for number, job in itertools.islice(waiting, parallelism - len(running)):
            running[remote.remote(*job, cpus=Cpus(1))] = number
        if not running:
            return
        [ready], _ = ray.wait([*running], num_returns=1, fetch_local=False)
        try:
            yield running[ready], ray.get(next(ready))  # type: ignore[arg-type]  # typed as an ObjectRef
        except StopIteration:
            del running[ready]
        except RayTaskError as error:
            raise InputError(error_text(error.cause)) from error


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turns an error inside into an InputError that begins with the path of the file."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{path}: {error_text(error)}") from error
