"""Memory per row of what one process holds whole: the driver of scoring, and every worker of training.

    python benchmarks/driver_memory.py --out benchmarks/results/driver_memory.json

Each part runs in a process of its own at two sizes; bytes per row are the difference of the two peaks of resident
memory over the difference of rows, so that what does not grow with the data falls out.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from raygr import runs, schema
from raygr.aspects.aspects import load_aspects
from raygr.aspects.scoring import Scoring, joined_scores, missing_subjects
from raygr.aspects.store import STORE_SCHEMA, ScoreStore
from raygr.config import ScoreConfig, TrainConfig
from raygr.recommenders.inputs import load_inputs

ASPECTS = str(Path(__file__).parent.parent / "configs" / "aspects" / "movies.yaml")
SIZES = {"score": (100_000, 400_000), "train": (100_000, 300_000)}  # users
LENGTH = 20  # interactions of a user
ITEMS = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--part", choices=SIZES, help=argparse.SUPPRESS)  # how a part is run
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        {"score": score_driver, "train": training_worker}[arguments.part](arguments.folder)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    peaks = {part: {users: peak_bytes(part, users) for users in sizes} for part, sizes in SIZES.items()}
    result = {
        "peak_bytes": {part: {str(users): peak for users, peak in found.items()} for part, found in peaks.items()},
        "score_driver_bytes_per_subject": slope(peaks["score"]),
        "training_worker_bytes_per_interaction": slope(peaks["train"]) / LENGTH,
        "interactions_per_user": LENGTH,
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def slope(peaks: dict[int, int]) -> float:
    small, big = peaks
    return (peaks[big] - peaks[small]) / (big - small)


def peak_bytes(part: str, users: int) -> int:
    """Of a process that finds its data written."""
    with tempfile.TemporaryDirectory() as folder:
        {"score": write_answers, "train": write_prepared}[part](folder, users)
        command = [sys.executable, __file__, "--part", part, "--folder", folder]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def score_config(folder: str) -> ScoreConfig:
    return ScoreConfig(output=f"{folder}/scores", data="d", subjects="users", aspects=ASPECTS)


def score_driver(folder: str) -> None:
    """Which prompts are missing, and the joined scores of all."""
    config, store = score_config(folder), ScoreStore(f"{folder}/store")
    run = runs.start_run(config.output, job="score", config=config)
    scoring = Scoring(run, config, load_aspects(ASPECTS), None, "probe", None, store)
    assert not missing_subjects(scoring)
    assert len(joined_scores(scoring))


def training_worker(folder: str) -> None:
    """The inputs of a training without scores."""
    load_inputs(TrainConfig(output=f"{folder}/train", data=folder))


def write_answers(folder: str, users: int) -> None:
    """prompts/ and a score store for users of ids as Amazon's (28 characters)."""
    run = runs.start_run(score_config(folder).output, job="score", config=score_config(folder))
    hashes = [f"{user:064x}" for user in range(users)]
    prompts = {"subject_id": [f"AE{user:026d}" for user in range(users)], "prompt_sha256": hashes}
    numbers = {name: pa.array(np.zeros(users), pa.int32()) for name in ("prompt_tokens", "cutoff_position")}
    table = pa.table(prompts | numbers | {"cutoff": np.zeros(users, np.int64)})
    runs.write_table(table, run.file("prompts/part-0.parquet"))
    answers = {"ratings": [[5] * 12] * users, "expected": [[5.0] * 12] * users}
    words = {"reason": ["ok"] * users, "completion": [""] * users}
    answered = pa.table({"prompt_sha256": hashes} | answers | words, schema=STORE_SCHEMA)
    runs.write_table(answered, f"{folder}/store/all.parquet")


def write_prepared(folder: str, users: int) -> None:
    run = runs.start_run(folder, job="prepare", config={"split": "leave_one_out", "rating_range": [1, 5]})
    position = np.tile(np.arange(LENGTH, dtype=np.int32), users)
    split = np.array([0] * (LENGTH - 2) + [1, 2], np.int8)
    columns = {
        "user_index": np.repeat(np.arange(users, dtype=np.int32), LENGTH),
        "item_index": np.random.default_rng(0).integers(1, ITEMS + 1, users * LENGTH).astype(np.int32),
        "position": position,
        "rating": np.ones(users * LENGTH, np.float32),
        "timestamp": position.astype(np.int64),
        "split": pa.DictionaryArray.from_arrays(np.tile(split, users), [schema.TRAIN, schema.VALIDATION, schema.TEST]),
    }
    runs.write_table(pa.table(columns).cast(schema.INTERACTION_SCHEMA), run.file(schema.INTERACTIONS))
    runs.write_table(pa.table({"item_index": np.arange(1, ITEMS + 1)}), run.file(f"{schema.ITEMS}/part-0.parquet"))
    runs.write_table(pa.table({"user_index": np.arange(users)}), run.file(schema.USERS))
    runs.finish_run(run, inputs=[], counts={})


if __name__ == "__main__":
    main()
