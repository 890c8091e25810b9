"""The `prepare` job: raw reviews and metadata -> a run of items/, reviews/, interactions, users, statistics.

    raw files --scan (Ray Data)--> ids of every row --selection.py--> kept rows --+
    raw files --write (Ray Data)--------------------- texts of the kept rows <-------+

Text is never held whole: each raw file is streamed twice, first for ids and numbers, which the driver
collects, then for the texts of the kept rows, which the tasks write as Parquet parts themselves. A task
takes one CPU and one file, so that a run cannot wait for itself however few CPUs there are.
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

from raygr.files import join, write_json, write_table
from raygr.prepare import metadata, output_tables, reviews, selection, splits
from raygr.prepare.bad_rows import InputError, Tally
from raygr.prepare.config import PrepareConfig
from raygr.prepare.named_columns import check_columns
from raygr.prepare.raw_files import error_text, expand_files
from raygr.prepare.row_report import log_prepared
from raygr.prepare.selection import Kept
from raygr.ray_setup import connect
from raygr.runs import Run, finish_run, remove_parts, start_run
from raygr.schema import INTERACTION_SCHEMA, INTERACTIONS, ITEMS, REVIEWS, STATISTICS, USER_SCHEMA, USERS

PART_BYTES = 64 << 20
PART_ROWS = 500_000
SHOWN_IDS = 5

logger = logging.getLogger(__name__)


def prepare(config: PrepareConfig) -> Run:
    """Writes the run folder `config.output`; InputError says what is wrong with the raw data or the filter."""
    check_columns(config)
    review_files = expand_files(config.reviews, what="reviews")
    metadata_files = expand_files(config.metadata, what="metadata")
    run = start_run(config.output, job="prepare", config=config)
    # another number of parts could be written than by an attempt that was interrupted
    for name in (ITEMS, REVIEWS):
        remove_parts(run, name)
    connect()
    kept, counts = keep_interactions(review_files, config)
    matched, counts["items"] = match_metadata(kept, metadata_files, config)
    write_interactions(kept, run)
    write_users(kept, run)
    counts["reviews"] |= write_reviews(kept, review_files, run, config)
    counts["items"] |= write_items(kept, matched, metadata_files, run, config)
    write_json(output_tables.statistics(kept), run.file(STATISTICS))
    finish_run(run, inputs=[*review_files, *metadata_files], counts=counts)
    log_prepared(counts, config)
    logger.info("prepared %s: %s", run.path, output_tables.statistics(kept))
    return run


# --- first pass: ids -------------------------------------------------------------------------


def keep_interactions(files: list[str], config: PrepareConfig) -> tuple[Kept, dict[str, Any]]:
    """The kept interactions, with the counts of reviews, users, reviewed items and parts."""
    scan, tally = scan_files(files, reviews.read_ids, config, encode=("user_id", "item_id"))
    tally.check(config.max_bad_fraction, what="reviews", allow_broken_files=config.allow_broken_files)
    logger.log(logging.WARNING if len(tally.time_forms) > 1 else logging.INFO, "reviews: %s", tally.times())
    everything = selection.from_scan(scan)
    reduced, dropped = selection.reduce(everything, config)
    kept = selection.assign(reduced, config)
    record = tally.record()
    record["by_reason"] |= {reason: one.interactions for reason, one in dropped.items() if one.interactions}
    without = {f"no_{splits.PARTS[part]}": users_without(kept, part) for part in (splits.TRAIN_PART, splits.TEST_PART)}
    return kept, {
        "reviews": {"kept": len(kept.row), **record},
        "users": {
            "read": len(everything.user_ids),
            "kept": len(kept.user_ids),
            "by_reason": {reason: one.users for reason, one in dropped.items() if one.users},
            **without,
        },
        "reviewed_items": {
            "read": len(everything.item_ids),
            "kept": len(kept.item_ids),
            "by_reason": {reason: one.items for reason, one in dropped.items() if one.items},
        },
        "interactions": part_sizes(kept),
    }


def users_without(kept: Kept, part: int) -> int:
    return len(kept.user_ids) - len(np.unique(kept.user_index[kept.part == part]))


def scan_files(
    files: list[str],
    read: Callable[[str, PrepareConfig], Iterator[pa.Table]],
    config: PrepareConfig,
    *,
    encode: tuple[str, ...],
) -> tuple[pa.Table, Tally]:
    """Usable rows of all files as SCAN_SCHEMA plus `file`, the `encode`d columns as dictionaries."""
    tally, usable = Tally(files), []
    for rows in stream_files(files, scan_file, {"read": read, "config": config}, config):
        tally.add(rows)
        good = rows.filter(pc.is_null(rows["reason"])) if rows["reason"].null_count < rows.num_rows else rows
        good = good.drop_columns(["reason", "snippet", "time_form"]).combine_chunks()
        for name in encode:
            place = good.column_names.index(name)
            good = good.set_column(place, name, good[name].dictionary_encode())
        usable.append(good)
    if not tally.read:
        raise InputError(f"no rows in {', '.join(files)}: the files are empty")
    return pa.concat_tables(usable), tally


@contextmanager
def naming(path: str) -> Iterator[None]:
    """What goes wrong inside is an InputError that begins with the file."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{path}: {error_text(error)}") from error


def stream_files(
    files: list[str],
    task: Callable[..., Iterator[pa.Table]],
    arguments: Mapping[str, Any],
    config: PrepareConfig,
) -> Iterator[pa.Table]:
    """What `task` yields for {file: place in `files`, path}, one task per file, in any order."""
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
            if batch.num_rows:
                yield batch
    except RayTaskError as error:
        raise InputError(error_text(error.cause)) from error


def scan_file(
    batch: pa.Table, *, read: Callable[[str, PrepareConfig], Iterator[pa.Table]], config: PrepareConfig
) -> Iterator[pa.Table]:
    for file, path in zip(batch["file"].to_pylist(), batch["path"].to_pylist(), strict=True):
        with naming(path):
            for rows in read(path, config):
                yield rows.append_column("file", pa.array(np.full(rows.num_rows, file, np.int32)))


# --- second pass: texts ----------------------------------------------------------------------


def write_reviews(kept: Kept, files: list[str], run: Run, config: PrepareConfig) -> dict[str, int]:
    """Writes reviews/ and counts the texts that were cut, and those with repaired bytes.

    InputError where a file lost rows since it was scanned.
    """
    table = output_tables.kept_table(kept)
    if not reviews.has_text(config):
        empty = pa.array([""] * PART_ROWS, pa.string())
        for start in range(0, table.num_rows, PART_ROWS):
            rows = table.slice(start, PART_ROWS)
            texts = empty.slice(0, rows.num_rows)
            write_table(
                output_tables.review_part(rows, texts, texts), part_path(run.file(REVIEWS), 0, start // PART_ROWS)
            )
        return {"text_cut": 0, "text_repaired": 0}
    order = np.lexsort((kept.row, kept.file))
    arguments = {"kept": ray.put(table.take(pa.array(order))), "folder": run.file(REVIEWS), "config": config}
    totals = summed(stream_files(files, write_review_file, arguments, config))
    check_written(totals.pop("written"), table.num_rows, what="reviews")
    return totals


def write_review_file(
    batch: pa.Table, *, kept: ray.ObjectRef, folder: str, config: PrepareConfig
) -> Iterator[pa.Table]:
    """Writes the kept reviews of one raw file as parts; yields how many, and how many texts were cut and repaired."""
    file, path = batch["file"][0].as_py(), batch["path"][0].as_py()
    rows = output_tables.rows_of_file(ray.get(kept), file)
    cut = repaired = written = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal cut, repaired, written
        numbers = rows["row"].to_numpy()
        for texts in reviews.read_texts(path, config, numbers):
            chosen = rows.take(pa.array(np.searchsorted(numbers, texts["row"].to_numpy())))
            titles, cut_titles = output_tables.cut_texts(texts["review_title"], config.max_text_chars)
            bodies, cut_bodies = output_tables.cut_texts(texts["review_text"], config.max_text_chars)
            cut += cut_titles + cut_bodies
            repaired += pc.sum(texts["repaired"]).as_py() or 0
            written += len(chosen)
            yield output_tables.review_part(chosen, titles, bodies)

    if rows.num_rows:
        with naming(path):
            write_parts(tables(), folder, file)
    yield pa.table({"text_cut": [cut], "text_repaired": [repaired], "written": [written]})


def part_path(folder: str, file: int, number: int) -> str:
    return join(folder, f"part-{file:05d}-{number:05d}.parquet")


def write_parts(tables: Iterator[pa.Table], folder: str, file: int) -> None:
    """Parquet parts of about PART_BYTES; named by the raw file, so that a task run again replaces its own."""
    waiting: list[pa.Table] = []
    number = 0
    for table in tables:
        waiting.append(table)
        if sum(t.nbytes for t in waiting) >= PART_BYTES:
            write_table(pa.concat_tables(waiting), part_path(folder, file, number))
            waiting, number = [], number + 1
    rest = pa.concat_tables(waiting) if waiting else None
    if rest is not None and rest.num_rows:
        write_table(rest, part_path(folder, file, number))


def summed(tables: Iterator[pa.Table]) -> Counter[str]:
    """The sum of each column."""
    totals: Counter[str] = Counter()
    for table in tables:
        totals.update({name: pc.sum(table[name]).as_py() for name in table.column_names})
    return totals


def check_written(written: int, expected: int, *, what: str) -> None:
    """The second reading of the raw files must find the rows of the first."""
    if written != expected:
        raise InputError(f"{what}: {expected} rows to write, {written} found again: did a file change meanwhile?")


# --- items -----------------------------------------------------------------------------------


def write_items(kept: Kept, rows: pa.Table, files: list[str], run: Run, config: PrepareConfig) -> dict[str, int]:
    """Writes items/ from the metadata `rows` of `match_metadata`, and counts the texts that were cut or not there."""
    numbers = output_tables.item_numbers(kept)
    arguments = {"numbers": ray.put(numbers), "rows": ray.put(rows), "folder": run.file(ITEMS), "config": config}
    totals = summed(stream_files(files, write_item_file, arguments, config))
    check_written(totals.pop("written", 0), rows.num_rows, what="metadata")
    bare = np.setdiff1d(numbers["item_index"].to_numpy(), rows["item_index"].to_numpy())
    if len(bare):
        write_table(
            output_tables.bare_items(numbers.take(pa.array(bare - 1))), part_path(run.file(ITEMS), len(files), 0)
        )
    totals["without_text"] += len(bare)
    return {name: totals[name] for name in ("text_cut", "text_repaired", "without_text")}


def match_metadata(kept: Kept, files: list[str], config: PrepareConfig) -> tuple[pa.Table, dict[str, Any]]:
    """The first metadata row of each kept item as (item_index, file, row), sorted by (file, row), and counts.

    InputError where no kept item has one.
    """
    items = len(kept.item_ids)
    if not files:
        nothing = pa.schema([("item_index", pa.int32()), ("file", pa.int32()), ("row", pa.int64())]).empty_table()
        return nothing, {"kept": items, "without_metadata": items, "read": 0, "by_reason": {}, "examples": {}}
    scan, tally = scan_files(files, metadata.read_item_ids, config, encode=())
    tally.check(config.max_bad_fraction, what="metadata", allow_broken_files=config.allow_broken_files)
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
    """InputError where no item has metadata, a warning where most have none: ids may be written in two ways."""
    items = len(kept.item_ids)
    if 2 * matched >= items:
        return
    has_none = pc.invert(pc.is_in(kept.item_ids, value_set=metadata_ids))
    ours, theirs = (
        ", ".join(map(repr, ids.slice(0, SHOWN_IDS).to_pylist()))
        for ids in (kept.item_ids.filter(has_none), metadata_ids.unique())
    )
    text = f"metadata: {items - matched} of {items} items have none, such as {ours}; ids there are such as {theirs}"
    if not matched:
        raise InputError(f"{text}: name the column that holds the same ids, written in the same way")
    logger.warning("%s", text)


def write_item_file(
    batch: pa.Table, *, numbers: ray.ObjectRef, rows: ray.ObjectRef, folder: str, config: PrepareConfig
) -> Iterator[pa.Table]:
    """Writes the items of one metadata file as parts; yields how many, those without text, and the texts cut."""
    file, path = batch["file"][0].as_py(), batch["path"][0].as_py()
    chosen, known = output_tables.rows_of_file(ray.get(rows), file), ray.get(numbers)
    cut = repaired = written = without_text = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal cut, repaired, written, without_text
        places = chosen["row"].to_numpy()
        for texts in metadata.read_item_texts(path, config, places):
            found = chosen["item_index"].to_numpy()[np.searchsorted(places, texts["row"].to_numpy())]
            table, cut_here = output_tables.item_part(known.take(pa.array(found - 1)), texts, config.max_text_chars)
            cut += cut_here
            repaired += pc.sum(texts["repaired"]).as_py() or 0
            written += len(table)
            without_text += output_tables.count_without_text(table)
            yield table

    if chosen.num_rows:
        with naming(path):
            write_parts(tables(), folder, file)
    counts = {"text_cut": cut, "text_repaired": repaired, "written": written, "without_text": without_text}
    yield pa.table({name: [count] for name, count in counts.items()})


# --- ids and numbers -------------------------------------------------------------------------


def write_interactions(kept: Kept, run: Run) -> None:
    rows = output_tables.kept_table(kept).append_column("split", output_tables.part_names(kept.part))
    write_table(rows.select(INTERACTION_SCHEMA.names).cast(INTERACTION_SCHEMA), run.file(INTERACTIONS))


def write_users(kept: Kept, run: Run) -> None:
    index = np.arange(len(kept.user_ids), dtype=np.int32)
    table = pa.table({"user_index": index, "user_id": kept.user_ids, **selection.user_cutoffs(kept)})
    write_table(table.cast(USER_SCHEMA), run.file(USERS))


def part_sizes(kept: Kept) -> dict[str, int]:
    sizes = np.bincount(kept.part, minlength=len(splits.PARTS)).tolist()
    return dict(zip(splits.PARTS, sizes, strict=True))
