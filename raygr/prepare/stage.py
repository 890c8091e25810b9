"""The `prepare` stage: raw reviews and metadata -> items/, reviews/, interactions, users and statistics.

    raw files --first pass (Ray Data)--> ids of every row --selection.py--> kept rows --+
    raw files --second pass (Ray Data)------------------ texts of the kept rows <----------+

No text is ever held whole. Each raw file is streamed twice: first for ids and numbers, which the driver collects, then
for the texts of the kept rows, which the tasks write as Parquet parts. A task takes one CPU and one file, so a run
cannot deadlock, however few CPUs there are.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.exceptions import RayTaskError

from raygr.execution.console import log_progress
from raygr.files import join, write_json, write_table
from raygr.prepare import metadata, output_tables, reviews, run_counts, selection
from raygr.prepare.bad_rows import InputError, Tally
from raygr.prepare.column_files import check_columns
from raygr.prepare.config import PrepareConfig
from raygr.prepare.output_tables import Part
from raygr.prepare.raw_files import error_text, expand_files
from raygr.prepare.selection import Kept
from raygr.ray_setup import connect
from raygr.runs import Run, finish_run, remove_parts, start_run
from raygr.schema import INTERACTIONS, ITEMS, NEW_INTERACTIONS, REVIEWS, STATISTICS, USERS

PART_BYTES = 64 << 20
PART_ROWS = 500_000
SHOWN_IDS = 5

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> Run:
    """Writes the run folder `config.output`; InputError explains what is wrong with the raw data or the filter."""
    check_columns(config)
    review_files = expand_files(config.reviews, what="reviews")
    metadata_files = expand_files(config.metadata, what="metadata")
    run = start_run(config.output, job="prepare", config=config)
    # An interrupted attempt may have written another number of parts.
    for name in (ITEMS, REVIEWS):
        remove_parts(run, name)
    connect()
    # First pass: ids and numbers.
    kept, counts = keep_interactions(review_files, config)
    described, counts["items"] = match_metadata(kept, metadata_files, config)
    write_table(output_tables.interactions(kept), run.file(INTERACTIONS))
    if config.new_items:
        write_table(output_tables.new_interactions(kept), run.file(NEW_INTERACTIONS))
    write_table(output_tables.users(kept), run.file(USERS))
    # Second pass: texts.
    counts["reviews"] |= write_reviews(kept, review_files, run, config)
    counts["items"] |= write_items(kept, described, metadata_files, run, config)
    statistics = output_tables.statistics(kept)
    write_json(statistics, run.file(STATISTICS))
    finish_run(run, inputs=[*review_files, *metadata_files], counts=counts)
    run_counts.log_counts(counts, config)
    shown = ("users", "items", "reviews", "mean_history")
    numbers = ", ".join(f"{name.replace('_', ' ')} {statistics[name]:,.6g}" for name in shown)
    logger.info("prepared %s: %s", run.path, numbers)
    return run


# --- first pass: ids ------------------------------------------------------------------------------


def keep_interactions(files: list[str], config: PrepareConfig) -> tuple[Kept, dict[str, Any]]:
    """The kept interactions, and the counts of reviews, users, reviewed items and parts."""
    scan, tally = scan_files(files, reviews.read_ids, config, what="reviews", encode=("user_id", "item_id"))
    logger.log(logging.WARNING if len(tally.time_forms) > 1 else logging.INFO, "reviews: %s", tally.times())
    everything = selection.from_scan(scan)
    reduced, dropped = selection.reduce(everything, config)
    kept, dropped["only_new_items"] = selection.assign(reduced, config)
    return kept, run_counts.kept_counts(everything, kept, dropped, tally, config)


def match_metadata(kept: Kept, files: list[str], config: PrepareConfig) -> tuple[pa.Table, dict[str, Any]]:
    """The first metadata row of each kept item as (item_index, file, row), sorted by file and row, and the counts.

    InputError if no kept item has metadata.
    """
    items = len(kept.item_ids)
    if not files:
        nothing = pa.schema([("item_index", pa.int32()), ("file", pa.int32()), ("row", pa.int64())]).empty_table()
        return nothing, {"kept": items, "without_metadata": items, "read": 0, "by_reason": {}, "examples": {}}
    scan, tally = scan_files(files, metadata.read_item_ids, config, what="metadata")
    index = pc.index_in(scan["item_id"], value_set=kept.item_ids).fill_null(-1).to_numpy() + 1
    file, row = scan["file"].to_numpy(), scan["row"].to_numpy()
    order = np.lexsort((row, file))
    order = order[index[order] > 0]
    _, first = np.unique(index[order], return_index=True)
    chosen = order[np.sort(first)]
    check_matched(kept, scan["item_id"], matched=len(chosen))
    record = {"kept": items, "without_metadata": items - len(chosen), **tally.record()}
    dropped = {"item_not_kept": int((index == 0).sum()), "duplicate": len(order) - len(chosen)}
    record["by_reason"] |= {reason: count for reason, count in dropped.items() if count}
    return pa.table({"item_index": index[chosen], "file": file[chosen], "row": row[chosen]}), record


def check_matched(kept: Kept, metadata_ids: pa.ChunkedArray, *, matched: int) -> None:
    """InputError if no item has metadata, a warning if most have none: both sides may write ids differently."""
    items = len(kept.item_ids)
    if 2 * matched >= items:
        return
    has_none = pc.invert(pc.is_in(kept.item_ids, value_set=metadata_ids))
    ours, theirs = (
        ", ".join(map(repr, ids.slice(0, SHOWN_IDS).to_pylist()))
        for ids in (kept.item_ids.filter(has_none), metadata_ids.unique())
    )
    text = (
        f"metadata: {items - matched} of {items} items have none, such as {ours}; the metadata has ids such as {theirs}"
    )
    if not matched:
        raise InputError(f"{text}: name the column that holds the same ids, written in the same way")
    logger.warning("%s", text)


def scan_files(
    files: list[str],
    read: Callable[[str, PrepareConfig], Iterator[pa.Table]],
    config: PrepareConfig,
    *,
    what: str,
    encode: tuple[str, ...] = (),
) -> tuple[pa.Table, Tally]:
    """The usable rows of all files: SCAN_SCHEMA plus `file`, the columns of `encode` as dictionaries.

    InputError if too many rows are refused.
    """
    tally, usable = Tally(files), []
    for rows in stream_files(files, scan_file, {"read": read, "config": config}, config):
        tally.add(rows)
        log_progress(logger, f"read {what}", tally.read, None, "rows")
        good = rows.filter(pc.is_null(rows["reason"])) if rows["reason"].null_count < rows.num_rows else rows
        good = good.drop_columns(["reason", "snippet", "time_form"]).combine_chunks()
        for name in encode:
            place = good.column_names.index(name)
            good = good.set_column(place, name, good[name].dictionary_encode())
        usable.append(good)
    log_progress(logger, f"read {what}", tally.read, tally.read, "rows")
    if not tally.read:
        raise InputError(f"no rows in {', '.join(files)}: the files are empty")
    tally.check(config.max_bad_fraction, what=what, allow_broken_files=config.allow_broken_files)
    return pa.concat_tables(usable), tally


def scan_file(
    batch: pa.Table, *, read: Callable[[str, PrepareConfig], Iterator[pa.Table]], config: PrepareConfig
) -> Iterator[pa.Table]:
    """The Ray Data task of the first pass, for one file."""
    file, path = batch["file"][0].as_py(), batch["path"][0].as_py()
    with naming(path):
        for rows in read(path, config):
            yield rows.append_column("file", pa.array(np.full(rows.num_rows, file, np.int32)))


# --- second pass: texts ---------------------------------------------------------------------------


def write_reviews(kept: Kept, files: list[str], run: Run, config: PrepareConfig) -> dict[str, int]:
    """Writes reviews/; counts the texts that were cut, and those with repaired bytes."""
    rows, folder = output_tables.kept_rows(kept), run.file(REVIEWS)
    if not reviews.has_text(config):
        for number, start in enumerate(range(0, rows.num_rows, PART_ROWS)):
            some = rows.slice(start, PART_ROWS)
            texts = output_tables.empty_texts(reviews.TEXT_SCHEMA, some.num_rows)
            part = output_tables.review_part(some, texts, config.max_text_chars)
            write_table(part.table, part_path(folder, 0, number))
        return {"text_cut": 0, "text_repaired": 0}
    in_files = rows.take(pa.array(np.lexsort((kept.row, kept.file))))
    totals = write_texts(in_files, files, reviews.read_texts, output_tables.review_part, folder, config, what="reviews")
    return {name: totals[name] for name in ("text_cut", "text_repaired")}


def write_items(kept: Kept, described: pa.Table, files: list[str], run: Run, config: PrepareConfig) -> dict[str, int]:
    """Writes items/; counts the texts that were cut, those with repaired bytes, and the items without text.

    `described` holds the metadata rows of `match_metadata`; the other items get empty texts.
    """
    rows, folder, index = output_tables.item_rows(kept), run.file(ITEMS), described["item_index"].to_numpy()
    in_files = rows.take(pa.array(index - 1))
    for name in ("file", "row"):
        in_files = in_files.append_column(name, described[name])
    read, make_part = metadata.read_item_texts, output_tables.item_part
    totals = write_texts(in_files, files, read, make_part, folder, config, what="metadata")
    bare = np.setdiff1d(rows["item_index"].to_numpy(), index)
    if len(bare):
        texts = output_tables.empty_texts(metadata.ITEM_TEXT_SCHEMA, len(bare))
        part = make_part(rows.take(pa.array(bare - 1)), texts, config.max_text_chars)
        write_table(part.table, part_path(folder, len(files), 0))
        totals.update(part.counts)
    return {name: totals[name] for name in ("text_cut", "text_repaired", "without_text")}


def write_texts(
    rows: pa.Table,
    files: list[str],
    read: Callable[[str, PrepareConfig, np.ndarray], Iterator[pa.Table]],
    make_part: Callable[[pa.Table, pa.Table, int], Part],
    folder: str,
    config: PrepareConfig,
    *,
    what: str,
) -> Counter[str]:
    """Writes the parts of `rows`, which are sorted by file and row, with their texts; returns the summed counts.

    InputError if a file has lost rows since the first pass.
    """
    arguments = {"rows": ray.put(rows), "read": read, "make_part": make_part, "folder": folder, "config": config}
    totals: Counter[str] = Counter()
    for counts in stream_files(files, write_file, arguments, config):
        totals.update({name: pc.sum(counts[name]).as_py() for name in counts.column_names})
        log_progress(logger, f"write {what}", totals["written"], rows.num_rows, "rows")
    check_written(totals["written"], rows.num_rows, what=what)
    return totals


def check_written(written: int, expected: int, *, what: str) -> None:
    """InputError if the second pass did not find all rows of the first."""
    if written != expected:
        raise InputError(f"{what}: {expected} rows to write, {written} found again: did a file change meanwhile?")


def write_file(
    batch: pa.Table,
    *,
    rows: ray.ObjectRef,
    read: Callable[[str, PrepareConfig, np.ndarray], Iterator[pa.Table]],
    make_part: Callable[[pa.Table, pa.Table, int], Part],
    folder: str,
    config: PrepareConfig,
) -> Iterator[pa.Table]:
    """The Ray Data task of the second pass: writes the parts of one raw file and yields one row of counts."""
    file, path = batch["file"][0].as_py(), batch["path"][0].as_py()
    table = ray.get(rows)
    start, end = np.searchsorted(table["file"].to_numpy(), [file, file + 1])
    chosen, totals = table.slice(start, end - start), Counter[str]()
    if chosen.num_rows:
        numbers = chosen["row"].to_numpy()
        with naming(path):
            parts = (
                make_part(
                    chosen.take(pa.array(np.searchsorted(numbers, texts["row"].to_numpy()))),
                    texts,
                    config.max_text_chars,
                )
                for texts in read(path, config, numbers)
            )
            totals.update(write_parts(parts, folder, file))
    # The same columns for every file, so that all blocks have one schema.
    yield pa.table({name: [totals[name]] for name in output_tables.COUNTS})


def write_parts(parts: Iterator[Part], folder: str, file: int) -> Counter[str]:
    """Writes Parquet parts of about PART_BYTES and sums the counts.

    The names hold the number of the raw file, so a task that runs again replaces its own parts.
    """
    waiting: list[pa.Table] = []
    totals: Counter[str] = Counter()
    number = 0
    for part in parts:
        totals.update(part.counts)
        waiting.append(part.table)
        if sum(table.nbytes for table in waiting) >= PART_BYTES:
            write_table(pa.concat_tables(waiting), part_path(folder, file, number))
            waiting, number = [], number + 1
    if sum(table.num_rows for table in waiting):
        write_table(pa.concat_tables(waiting), part_path(folder, file, number))
    return totals


def part_path(folder: str, file: int, number: int) -> str:
    return join(folder, f"part-{file:05d}-{number:05d}.parquet")


# --- both passes ----------------------------------------------------------------------------------


def stream_files(
    files: list[str],
    task: Callable[..., Iterator[pa.Table]],
    arguments: Mapping[str, Any],
    config: PrepareConfig,
) -> Iterator[pa.Table]:
    """The tables that `task` yields, one task per file, in any order.

    A task gets one row: `file`, the index into `files`, and `path`.
    """
    if not files:
        return
    rows = [{"file": i, "path": path} for i, path in enumerate(files)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        task,
        fn_kwargs=dict(arguments),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=config.parallelism),
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            if len(batch):
                yield batch
    except RayTaskError as error:
        raise InputError(error_text(error.cause)) from error


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turns an error inside into an InputError that begins with the path of the file."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{path}: {error_text(error)}") from error
