"""`raygr prepare` against a polars streaming reader on the same generated Amazon 2023 files.

    python benchmarks/prepare.py --rows 1000000 5000000 --rounds 3 --folder /tmp/prepare --out prepare.json
    python benchmarks/prepare.py --rows 1000000 4000000 16000000 --no-text --sides raygr --folder /tmp/prepare

Both read the same .jsonl.gz files (texts of about 200 characters, or none), drop duplicates of (user, item), drop items
and users with fewer than five reviews, sort by user and time, and write Parquet with the texts. raygr also completes
the k-core, numbers ids, splits, and writes the ratings; polars filters once. Each runs in its own process, in turns.
`raygr-ray` reads the files with two tasks on Ray. Memory is the sampled sum over the process tree of what the operating
system counts as each process's share (PSS): a page that several processes use counts once.
"""

import argparse
import gzip
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil

SIDES = ("raygr", "polars", "raygr-ray")
SAMPLE_SECONDS = 0.2
# fmt: off
WORDS = [
    "good", "great", "works", "fine", "broke", "after", "week", "bought", "for", "my", "daughter", "she", "loves",
    "it", "color", "size", "true", "fit", "soft", "quality", "price", "would", "buy", "again", "not", "recommend",
    "shipping", "fast", "box", "damaged", "battery", "lasts", "long",
]
# fmt: on


def generate_file(path: Path, rows: int, seed: int, files: int, has_text: bool) -> None:
    """Writes reviews of rows / 8 users and rows / 20 items with skewed popularity and about 200 characters of text."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, max(1, rows * files // 8), rows)
    item = (rng.random(rows) ** 3 * max(1, rows * files // 20)).astype(np.int64)
    stamp = rng.integers(1_300_000_000_000, 1_690_000_000_000, rows)
    rating = rng.integers(1, 6, rows)
    sentences = [" ".join(rng.choice(WORDS, 38)) for _ in range(5000)] if has_text else [""]
    pick = rng.integers(0, len(sentences), rows)
    with gzip.open(path, "wt", compresslevel=4, encoding="utf-8") as file:
        for start in range(0, rows, 100_000):
            some = (column[start : start + 100_000].tolist() for column in (user, item, stamp, rating, pick))
            file.write("".join(itertools.starmap(partial(line, sentences), zip(*some, strict=True))))


def line(sentences: Sequence[str], user: int, item: int, timestamp: int, rating: int, pick: int) -> str:
    text = sentences[pick]
    return (
        f'{{"rating": {rating:.1f}, "title": "{text[:24]}", "text": "{text}", "images": [], "asin": "B{item:09d}", '
        f'"parent_asin": "B{item:09d}", "user_id": "AE{user:026d}", "timestamp": {timestamp}, "helpful_vote": 0, '
        '"verified_purchase": true}\n'
    )


def generate(folder: Path, rows: int, files: int, has_text: bool) -> None:
    """Writes files of rows / files reviews each, unless an earlier run of the same size left them."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(2) as pool:
        jobs = [(folder / f"reviews-{n}.jsonl.gz", rows // files, n, files, has_text) for n in range(files)]
        pool.starmap(generate_file, jobs)
    (folder / "done").touch()


def run_raygr(folder: Path, output: Path, parallelism: int) -> None:
    from raygr.prepare.config import PrepareConfig
    from raygr.prepare.stage import prepare

    os.environ["RAY_AUTH_MODE"] = "disabled"
    prepare(PrepareConfig(output=str(output), reviews=(f"{folder}/*.jsonl.gz",), parallelism=parallelism))


def run_polars(folder: Path, output: Path) -> None:
    import polars as pl

    output.mkdir(parents=True)
    schema = {
        "user_id": pl.String,
        "parent_asin": pl.String,
        "rating": pl.Float32,
        "timestamp": pl.Int64,
        "title": pl.String,
        "text": pl.String,
    }
    reviews = (
        pl.scan_ndjson(f"{folder}/*.jsonl.gz", schema=schema)
        .sort("timestamp")
        .unique(["user_id", "parent_asin"], keep="first", maintain_order=True)
        .filter(pl.len().over("parent_asin") >= 5)
        .filter(pl.len().over("user_id") >= 5)
        .sort("user_id", "timestamp")
    )
    reviews.sink_parquet(output / "reviews.parquet", engine="streaming")


def measure(arguments: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak bytes of a process and its descendants; Ray's processes are in the memory only."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, __file__, *arguments])
    while process.poll() is None:
        peak = max(peak, tree_bytes(psutil.Process(process.pid)))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{arguments} failed with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}


def tree_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        pass  # a process ended between the listing and the reading; the next sample sees the others
    return total


def compare(rows: int, options: argparse.Namespace) -> list[dict[str, float | str | int]]:
    """One result per side and round at this number of rows, the sides in turns."""
    data = options.folder / f"rows-{rows}-{options.files}{'-no-text' * options.no_text}"
    generate(data, rows, options.files, not options.no_text)
    lines = []
    for _ in range(options.rounds):
        for side in options.sides:
            output = options.folder / f"output-{side}-{rows}"
            shutil.rmtree(output, ignore_errors=True)
            result = measure(["--run", side, "--folder", str(data), "--out", str(output)])
            shutil.rmtree(output)
            given = {"side": side, "rows": rows, "files": options.files, "text": not options.no_text}
            lines.append({**given, "rows_per_second": rows / result["seconds"], **result})
            print(
                f"{side:9} {rows:>10,} rows {result['seconds']:7.1f} s {result['cpu_seconds']:7.1f} s of CPUs "
                f"{rows / result['seconds']:>9,.0f} rows/s {result['peak_bytes'] / 2**20:>7,.0f} MiB",
                flush=True,
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--no-text", action="store_true", help="reviews of empty title and text")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, which keeps the generated files")
    parser.add_argument("--out", type=Path, default=Path("prepare.json"))
    parser.add_argument("--run", choices=SIDES, help="what a measured process runs")
    options = parser.parse_args()
    match options.run:
        case "polars":
            run_polars(options.folder, options.out)
        case "raygr" | "raygr-ray":
            run_raygr(options.folder, options.out, 2 if options.run == "raygr-ray" else 1)
        case _:
            lines = [line for rows in options.rows for line in compare(rows, options)]
            options.out.write_text(json.dumps({"cpus": os.cpu_count(), "results": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
