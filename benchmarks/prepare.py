"""`raygr prepare` against a polars streaming reader on the same generated Amazon 2023 files.

    python benchmarks/prepare.py --rows 1000000 5000000 --folder /tmp/prepare --out prepare.json

Both read the same .jsonl.gz files (texts of about 200 characters), drop duplicates of (user, item), drop items and
users with fewer than five reviews, sort by user and time, and write Parquet with the texts. raygr also completes the
k-core, numbers ids, splits, and writes the ratings; polars filters once. Each runs in its own process. Memory is the
sampled sum of resident pages over the process tree; pages that processes share (Ray's object store) count once per
process, so the sum is an upper bound.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

FILES = 4
SAMPLE_SECONDS = 0.1
# fmt: off
WORDS = [
    "good", "great", "works", "fine", "broke", "after", "week", "bought", "for", "my", "daughter", "she", "loves",
    "it", "color", "size", "true", "fit", "soft", "quality", "price", "would", "buy", "again", "not", "recommend",
    "shipping", "fast", "box", "damaged", "battery", "lasts", "long",
]
# fmt: on


def generate_file(path: Path, rows: int, seed: int) -> None:
    """Writes reviews of rows / 8 users and rows / 20 items with skewed popularity and about 200 characters of text."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, max(1, rows * FILES // 8), rows)
    item = (rng.random(rows) ** 3 * max(1, rows * FILES // 20)).astype(np.int64)
    stamp = rng.integers(1_300_000_000_000, 1_690_000_000_000, rows)
    rating = rng.integers(1, 6, rows)
    sentences = [" ".join(rng.choice(WORDS, 38)) for _ in range(5000)]
    pick = rng.integers(0, len(sentences), rows)
    with gzip.open(path, "wt", compresslevel=4, encoding="utf-8") as file:
        for u, i, t, r, p in zip(*(a.tolist() for a in (user, item, stamp, rating, pick)), strict=True):
            asin = f"B{i:09d}"
            record = {
                "rating": float(r),
                "title": sentences[p][:24],
                "text": sentences[p],
                "images": [],
                "asin": asin,
                "parent_asin": asin,
                "user_id": f"AE{u:026d}",
                "timestamp": t,
                "helpful_vote": 0,
                "verified_purchase": True,
            }
            file.write(json.dumps(record) + "\n")


def generate(folder: Path, rows: int) -> None:
    """Writes FILES files of rows / FILES reviews each, unless an earlier run of the same size left them."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(2) as pool:
        jobs = [(folder / f"reviews-{n}.jsonl.gz", rows // FILES, n) for n in range(FILES)]
        pool.starmap(generate_file, jobs)
    (folder / "done").touch()


def run_raygr(folder: Path, output: Path, parallelism: int) -> None:
    import ray

    from raygr.prepare.config import PrepareConfig
    from raygr.prepare.stage import prepare

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", object_store_memory=1 << 30)
    prepare(PrepareConfig(output=str(output), reviews=(f"{folder}/*.jsonl.gz",), parallelism=parallelism))
    ray.shutdown()


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
    """Wall seconds and peak resident bytes of a process and its descendants."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, __file__, *arguments])
    while process.poll() is None:
        peak = max(peak, tree_bytes(psutil.Process(process.pid)))
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{arguments} failed with {process.returncode}")
    return {"seconds": seconds, "peak_bytes": peak}


def tree_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass  # a process ended between the listing and the reading; the next sample sees the others
    return total


def compare(folder: Path, rows: int, parallelism: int) -> list[dict[str, float | str | int]]:
    """One result per reader at this number of rows, raygr first."""
    data = folder / f"rows-{rows}"
    generate(data, rows)
    lines = []
    for reader in ("raygr", "polars"):
        output = folder / f"output-{reader}-{rows}"
        shutil.rmtree(output, ignore_errors=True)
        result = measure(
            ["--reader", reader, "--folder", str(data), "--out", str(output), "--parallelism", str(parallelism)]
        )
        shutil.rmtree(output)
        lines.append({"reader": reader, "rows": rows, "rows_per_second": rows / result["seconds"], **result})
        print(
            f"{reader:7} {rows:>9,} rows {result['seconds']:7.1f} s {rows / result['seconds']:>9,.0f} rows/s "
            f"{result['peak_bytes'] / 2**20:>7,.0f} MiB",
            flush=True,
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000])
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, which keeps the generated files")
    parser.add_argument("--out", type=Path, default=Path("prepare.json"))
    parser.add_argument("--parallelism", type=int, default=2)
    parser.add_argument("--reader", choices=["raygr", "polars"], help="what a measured process runs")
    options = parser.parse_args()
    if options.reader == "raygr":
        run_raygr(options.folder, options.out, options.parallelism)
    elif options.reader == "polars":
        run_polars(options.folder, options.out)
    else:
        lines = [line for rows in options.rows for line in compare(options.folder, rows, options.parallelism)]
        options.out.write_text(json.dumps({"cpus": os.cpu_count(), "results": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
