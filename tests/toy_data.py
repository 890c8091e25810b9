"""Small prepare runs and score runs that follow schema.py, with two aspects."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raygr import files, runs
from raygr.data.interactions import Interactions
from raygr.schema import (
    INTERACTION_SCHEMA,
    INTERACTIONS,
    ITEM_SCHEMA,
    ITEMS,
    NEW_INTERACTION_SCHEMA,
    NEW_INTERACTIONS,
    REVIEW_SCHEMA,
    REVIEWS,
    SCORES,
    TEST,
    TRAIN,
    USER_SCHEMA,
    USERS,
    VALIDATION,
    score_schema,
)
from raygr.score.aspects import Aspect, AspectSet

TWO = AspectSet(
    category="movies",
    subject="movie",
    a_subject="a movie",
    a_critic="a movie critic",
    a_recommender="a movie recommender",
    reviews="movie reviews",
    aspects=(
        Aspect(name="pace", description="Slow to fast."),
        Aspect(name="movie length (duration)", description="Short to long."),
    ),
)

# The entry `lists` in the metrics.json of a train run.
LISTS = {
    "length": 10,
    "mmr_weight": 0.5,
    "scores": None,
    "ranked": {"recall": 0.2, "ndcg": 0.1, "mmr": 0.3, "intra_list_diversity": 0.4},
    "reranked": {"recall": 0.1, "ndcg": 0.05, "mmr": 0.35, "intra_list_diversity": 0.6},
}
RUN_METRICS: dict[str, Any] = {  # metrics.json of a base model
    "protocol": {},
    "shares": None,
    "best_epoch": 1,
    "epochs": 2,
    "parameters": 1,
    "seconds_per_epoch": 2.0,
    "warnings": [],
    "validation": {},
    "test": {},
    "cold": {"below": 5},
    "lists": LISTS,
}


def cycles(users: int, items: int, length: int) -> list[list[int]]:
    """Histories that go through the items in a cycle; user u starts at item u + 1."""
    return [[(user + step) % items + 1 for step in range(length)] for user in range(users)]


def walks(users: int, items: int, length: int, *, seed: int) -> list[list[int]]:
    """Random histories without repeats."""
    generator = np.random.default_rng(seed)
    return [(generator.permutation(items)[:length] + 1).tolist() for _ in range(users)]


def write_prepared(
    folder: Path,
    histories: list[list[int]],
    *,
    items: int,
    ratings: list[list[float]] | None = None,
    tests: int = 1,
    keep_duplicate: str = "first",
    user_ids: list[str] | None = None,
    new: list[tuple[int, int, int]] | None = None,
    **settings: Any,
) -> str:
    """Writes a prepare run; the last `tests` interactions of each user are test, the one before them validation.

    `new` holds (user_index, item_index, position) of the interactions with new items, the last ones of the catalogue.

    item_id is "i" + item_index; user_id is "u" + user_index unless `user_ids` are given.
    """
    config = {"split": "leave_one_out", "rating_range": [1, 5], "keep_duplicate": keep_duplicate} | settings
    run = runs.start_run(str(folder), job="prepare", config=config)
    rows = [
        row
        for user, history in enumerate(histories)
        for row in user_rows(user, history, (ratings or {0: None})[user if ratings else 0], tests)
    ]
    if new:
        new_rows = [(user, item, position, None, position) for user, item, position in new]
        new_table = typed(list(zip(*new_rows, strict=True)), NEW_INTERACTION_SCHEMA)
        files.write_table(new_table, run.file(NEW_INTERACTIONS))
    columns = list(zip(*rows, strict=True))
    files.write_table(typed(columns, INTERACTION_SCHEMA), run.file(INTERACTIONS))
    texts = [(*row, "", f"words of u{row[0]} at {row[2]}") for row in rows]
    files.write_table(typed(list(zip(*texts, strict=True)), REVIEW_SCHEMA), run.file(f"{REVIEWS}/part-0.parquet"))
    item_rows = [(i, f"i{i}", f"title {i}", "", "", "", None, 0, None, 0) for i in range(1, items + 1)]
    files.write_table(typed(list(zip(*item_rows, strict=True)), ITEM_SCHEMA), run.file(f"{ITEMS}/part-0.parquet"))
    cutoffs = [max(len(history) - tests - 2, -1) for history in histories]
    ids = user_ids or [f"u{u}" for u in range(len(histories))]
    user_table = [(u, ids[u], len(h), cutoffs[u], cutoffs[u]) for u, h in enumerate(histories)]
    files.write_table(typed(list(zip(*user_table, strict=True)), USER_SCHEMA), run.file(USERS))
    runs.finish_run(run, inputs=[], counts={})
    return str(folder)


def user_rows(user: int, history: list[int], ratings: list[float] | None, tests: int) -> list[tuple]:
    splits = [TRAIN] * (len(history) - 1 - tests) + [VALIDATION] + [TEST] * tests
    stars = ratings or [None] * len(history)
    return [(user, item, at, stars[at], at, splits[at]) for at, item in enumerate(history)]


def interaction_arrays(rows: list[tuple[int, int, float | None, str]]) -> Interactions:
    """Interactions as they are read from a prepare run; `rows` are (user_index, item_index, rating, split)."""
    users, items, ratings, splits = zip(*rows, strict=True)
    rating_N = np.array([np.nan if rating is None else rating for rating in ratings], float)
    columns = (np.array(users), np.array(items), rating_N, np.array(splits))
    return Interactions(*columns, users=max(users) + 1, items=max(items))


def sha256(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def hashes(*prompts: str) -> np.ndarray:
    """The hashes of prompts as 32 bytes each, for the score store."""
    return np.array([hashlib.sha256(prompt.encode()).digest() for prompt in prompts], "S32")


def typed(columns: list[tuple], schema: pa.Schema) -> pa.Table:
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def write_score_run(
    folder: Path,
    scores: dict[str, list[float | None]],
    *,
    aspects: list[str],
    cutoffs: dict[str, int] | None = None,
    times: dict[str, int] | None = None,
    data: str | None = None,
) -> str:
    """Writes a score run: of users of the prepare run `data` if `cutoffs` are given, else of items."""
    config = {"subjects": "items" if cutoffs is None else "users", "data": data}
    run = runs.start_run(str(folder), job="score", config=config)
    rows = [
        (
            subject,
            [None if s is None else round(s) for s in values],
            values,
            "ok",
            "",
            "",
            1,
            (times or {}).get(subject),
            (cutoffs or {}).get(subject),
            "m",
            "",
            "probe",
        )
        for subject, values in scores.items()
    ]
    files.write_table(typed(list(zip(*rows, strict=True)), score_schema(aspects)), run.file(f"{SCORES}/part-0.parquet"))
    runs.finish_run(run, inputs=[data] if data else [], counts={})
    return str(folder)


def write_csv(path: Path, vectors: dict[str, list[float]], names: list[str]) -> str:
    lines = [",".join(["id", *names]), *(",".join([key, *map(str, values)]) for key, values in vectors.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def random_scores(items: int, aspects: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 11, size=(items, aspects)).astype(float)
