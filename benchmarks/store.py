"""The score store at several sizes: seconds and peak memory of looking answers up.

    python benchmarks/store.py --answers 600000 2400000 10000000 --folder /tmp/store

For each size it makes a store of as many answers of twelve aspects, in files of batches, and prompts of two runs: one
tenth of those of `asked` have no answer, those of `known` all have one. Each step of `raygr score` runs in a process of
its own, forked from one that has only loaded the libraries; the peak is the operating system's (ru_maxrss). `import`
does nothing more, `compact` merges the files, `missing` finds the prompts of `asked` that have no answer, `write` looks
the answers of `known` up and writes scores/.
"""

import argparse
import binascii
import json
import math
import multiprocessing
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa

from raygr import files, runs
from raygr.schema import SCORES
from raygr.score.config import ScoreConfig
from raygr.score.stage import Scoring, missing_subjects, write_scores
from raygr.score.store import STORE_SCHEMA, ScoreStore
from raygr.score.subjects import PROMPTS, PromptSettings, stored_table

STEPS = ("import", "compact", "missing", "write")
BATCH = 20_000  # answers in a file before it is compacted; all sizes are multiples of ten times as many
MAKERS = 4  # processes that make a store
UNANSWERED = 10  # of as many prompts one has no answer
ASPECTS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[600_000, 2_400_000, 10_000_000])
    parser.add_argument("--folder", type=Path, required=True, help="for the stores; each is deleted after its turn")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/store.json"))
    given = parser.parse_args()
    sizes = []
    pool = multiprocessing.get_context("fork").Pool(MAKERS, maxtasksperchild=1)
    for answers in given.answers:
        folder = given.folder / str(answers)
        number_of_files = (answers + answers // UNANSWERED) // BATCH
        pool.starmap(make_files, [(folder, answers, number) for number in range(number_of_files)], chunksize=10)
        found = {"answers": answers} | {step: pool.apply(measured, (step, folder)) for step in STEPS}
        found["store_bytes"] = sum(path.stat().st_size for path in (folder / "store").iterdir())
        assert found["missing"]["rows"] == answers // UNANSWERED and found["write"]["rows"] == answers
        print(json.dumps(found), flush=True)
        sizes.append(found)
        shutil.rmtree(folder)
    slopes = {step: slope(sizes[0], sizes[-1], step) for step in STEPS[1:]} if len(sizes) > 1 else {}
    command = ["python", "benchmarks/store.py", "--answers", *map(str, given.answers)]
    files.write_json({"command": " ".join(command), "sizes": sizes, "slope_of_cpu_seconds": slopes}, str(given.output))


def slope(first: dict[str, Any], last: dict[str, Any], step: str) -> float:
    """The power of the number of answers with which the step's CPU seconds grow."""
    seconds = last[step]["cpu_seconds"] / first[step]["cpu_seconds"]
    return round(math.log(seconds, last["answers"] / first["answers"]), 2)


def measured(step: str, folder: Path) -> dict[str, float]:
    """Run one step and return its seconds, the process's peak in MiB and the rows that it found."""
    store = ScoreStore(str(folder / "store"))
    asked, known = (runs.Run(str(folder / name), "score", {}, started=0.0) for name in ("asked", "known"))
    began, began_cpu, rows = time.perf_counter(), time.process_time(), 0
    match step:
        case "compact":
            store.compact()
        case "missing":
            rows = len(missing_subjects(asked, store, retry_failed=False))
        case "write":
            config = ScoreConfig(output=known.path, data="data", subjects="items", aspects="aspects.yaml")
            aspects = SimpleNamespace(names=tuple(f"aspect {number}" for number in range(ASPECTS)))
            settings = cast(PromptSettings, SimpleNamespace(aspects=aspects))
            write_scores(Scoring(known, config, settings, None, store, is_here=True, on_gpu=False, prompt_counts={}))
            rows = stored_table(known.path, SCORES).count_rows()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - began_cpu, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rows": rows,
    }


def make_files(folder: Path, answers: int, number: int) -> None:
    """Prompts of batch `number` and their answers. `known` asks the first batches, `asked` as many, a tenth further."""
    generator = np.random.default_rng(number)
    digits, offsets = binascii.hexlify(generator.bytes(32 * BATCH)), np.arange(BATCH + 1, dtype=np.int32)
    hashes = pa.StringArray.from_buffers(BATCH, pa.py_buffer(64 * offsets), pa.py_buffer(digits))
    prompts = pa.table(
        {
            "subject_id": [f"B{number * BATCH + row:09d}" for row in range(BATCH)],
            "prompt_sha256": hashes,
            "prompt_tokens": np.full(BATCH, 500, np.int32),
            "cutoff": pa.nulls(BATCH, pa.int64()),
            "cutoff_position": pa.nulls(BATCH, pa.int32()),
        }
    )
    name = f"{number:06d}.parquet"
    if number * BATCH >= answers // UNANSWERED:
        files.write_table(prompts, str(folder / "asked" / PROMPTS / name))
    if number * BATCH >= answers:
        return
    files.write_table(prompts, str(folder / "known" / PROMPTS / name))
    ratings = generator.integers(1, 11, BATCH * ASPECTS, np.int8)
    expected = ratings + generator.random(len(ratings), np.float32)
    columns = {
        "prompt_sha256": hashes,
        "ratings": pa.ListArray.from_arrays(pa.array(offsets * ASPECTS), pa.array(ratings)),
        "expected": pa.ListArray.from_arrays(pa.array(offsets * ASPECTS), pa.array(expected)),
        "reason": ["ok"] * BATCH,
        "completion": [""] * BATCH,
        "written": np.full(BATCH, number, np.int64),
    }
    files.write_table(pa.table(columns, schema=STORE_SCHEMA), str(folder / "store" / name))


if __name__ == "__main__":
    main()
