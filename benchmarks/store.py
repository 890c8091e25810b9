"""The score store at several sizes: seconds and peak memory of looking answers up.

    python benchmarks/store.py --answers 625000 2500000 10000000 --folder /tmp/store

For each size it makes a store of as many answers of twelve aspects, in files of batches, and prompts of two runs: one
tenth of those of `asked` have no answer, those of `known` all have one. Each step of `raygr score` runs in a process of
its own, whose peak is the operating system's (ru_maxrss): `import` loads the libraries alone, `compact` merges the
files, `missing` finds the prompts of `asked` that have no answer, `write` looks the answers of `known` up and writes
scores/.
"""

import argparse
import hashlib
import json
import math
import resource
import shutil
import subprocess
import sys
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
BATCH = 20_000  # answers in a file before it is compacted
UNANSWERED = 10  # of as many prompts one has no answer
ASPECTS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, nargs="+", default=[625_000, 2_500_000, 10_000_000])
    parser.add_argument("--folder", type=Path, required=True, help="for the stores; each is deleted after its turn")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/store.json"))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(measured(given.step, given.folder)))
        return
    sizes = []
    for answers in given.answers:
        folder = given.folder / str(answers)
        make_store(folder, answers)
        found = {"answers": answers}
        for step in STEPS:
            command = [sys.executable, __file__, "--folder", str(folder), "--step", step]
            found[step] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        found["store_bytes"] = sum(path.stat().st_size for path in (folder / "store").iterdir())
        assert found["missing"]["rows"] == answers // UNANSWERED and found["write"]["rows"] == answers
        print(json.dumps(found), flush=True)
        sizes.append(found)
        shutil.rmtree(folder)
    slopes = {step: slope(sizes[0], sizes[-1], step) for step in STEPS[1:]} if len(sizes) > 1 else {}
    command = ["python", "benchmarks/store.py", "--answers", *map(str, given.answers)]
    files.write_json({"command": " ".join(command), "sizes": sizes, "slope_of_seconds": slopes}, str(given.output))


def slope(first: dict[str, Any], last: dict[str, Any], step: str) -> float:
    """The power of the number of answers with which the step's seconds grow."""
    return round(math.log(last[step]["seconds"] / first[step]["seconds"], last["answers"] / first["answers"]), 2)


def measured(step: str, folder: Path) -> dict[str, float]:
    """Run one step and return its seconds, the process's peak in MiB and the rows that it found."""
    store = ScoreStore(str(folder / "store"))
    asked, known = (runs.Run(str(folder / name), "score", {}, started=0.0) for name in ("asked", "known"))
    began, rows = time.perf_counter(), 0
    match step:
        case "compact":
            store.compact()
        case "missing":
            rows = len(missing_subjects(asked, store, retry_failed=False))
        case "write":
            config = ScoreConfig(output=known.path, data="data", subjects="items", aspects="aspects.yaml")
            aspects = SimpleNamespace(names=tuple(f"aspect {number}" for number in range(ASPECTS)))
            settings = cast(PromptSettings, SimpleNamespace(aspects=aspects))
            write_scores(Scoring(known, config, settings, None, store, on_gpu=False, prompt_counts={}))
            rows = stored_table(known.path, SCORES).count_rows()
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rows": rows,
    }


def make_store(folder: Path, answers: int) -> None:
    """Answers to prompts 0 to `answers`, which `known` asks; the last tenth of what `asked` asks lies behind these."""
    generator = np.random.default_rng(0)
    for first in range(0, answers, BATCH):
        count = min(BATCH, answers - first)
        ratings = generator.integers(1, 11, count * ASPECTS)
        offsets = pa.array(np.arange(count + 1) * ASPECTS, pa.int32())
        columns = {
            "prompt_sha256": hashes_of(first, count),
            "ratings": pa.ListArray.from_arrays(offsets, pa.array(ratings, pa.int8())),
            "expected": pa.ListArray.from_arrays(
                offsets, pa.array(ratings + generator.normal(0, 0.2, len(ratings)), pa.float32())
            ),
            "reason": ["ok"] * count,
            "completion": [""] * count,
            "written": np.full(count, first, np.int64),
        }
        name = f"{first:09d}.parquet"
        files.write_table(pa.table(columns, schema=STORE_SCHEMA), str(folder / "store" / name))
        for run, shift in (("known", 0), ("asked", answers // UNANSWERED)):
            prompts = {
                "subject_id": [f"B{subject:09d}" for subject in range(first, first + count)],
                "prompt_sha256": hashes_of(first + shift, count),
                "prompt_tokens": np.full(count, 500, np.int32),
                "cutoff": pa.nulls(count, pa.int64()),
                "cutoff_position": pa.nulls(count, pa.int32()),
            }
            files.write_table(pa.table(prompts), str(folder / run / PROMPTS / name))


def hashes_of(first: int, count: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(first, first + count)]


if __name__ == "__main__":
    main()
