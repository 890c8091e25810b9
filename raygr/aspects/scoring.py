"""Items or users -> scores: Ray Data shards the prompts over actors running vLLM (3, 4).

1. prompts/ is written once from the prepare run (token ids, hash, cut-off);
2. hashes that the score store lacks go through the engine actors, which write the store batch by batch;
3. scores/ (SCORE rows) is joined from both, with a summary of their quality.

A run that was killed starts again at the first of these that is not there.
"""

import dataclasses
import logging
import math
import os
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray
import ray.data
from ray.data.expressions import col

from raygr import runs, schema
from raygr.aspects.answers import aspect_tails, format_regex, rating_tokens
from raygr.aspects.asking import PROMPTS, PROMPTS_DONE, way_of_asking
from raygr.aspects.aspects import AspectSet
from raygr.aspects.batch_files import Request, import_answers, write_requests
from raygr.aspects.engine import EngineSettings, ScoringEngine, engine_environment
from raygr.aspects.quality import log_quality, score_quality
from raygr.aspects.store import ScoreStore
from raygr.aspects.subjects import PromptSettings, encoder_of, item_prompts, subjects_left_out, user_prompt
from raygr.cluster import connect
from raygr.config import ScoreConfig

logger = logging.getLogger(__name__)

PROMPT_BATCH = 256  # subjects tokenised per task call
COMPLETION_SLACK = 2  # completions may be this many times the tokens of the bare answer lines


@dataclasses.dataclass(frozen=True)
class ScoringTotals:
    """What the engine actors did in this run; zeros where the store knew everything."""

    subjects: int = 0
    tokens_given: int = 0
    tokens_computed: int = 0
    seconds: float = 0.0


class Scoring(NamedTuple):
    """One score run under way; from `aspects` on as in asking.py."""

    run: runs.Run
    config: ScoreConfig
    aspects: AspectSet
    settings: PromptSettings
    mode: str
    adapter: str | None
    store: ScoreStore


def score(config: ScoreConfig, *, answers: str | None = None) -> runs.Run:
    """Scores of all items or users of a prepare run, resumed where an earlier attempt stopped.

    `answers` is a file of a batch service's answers to `export_prompts`: they are filed before anything is asked.
    """
    answers = answers and runs.absolute(answers)
    scoring = start_scoring(config, exchanges=answers is not None)
    run, names = scoring.run, scoring.aspects.names
    filed = import_answers(answers, scoring.store, asked=asked_hashes(run), names=names) if answers else None
    totals = score_missing(scoring)
    scores = joined_scores(scoring)
    runs.write_table(scores, runs.join(run.file(schema.SCORES), "part-0.parquet"))
    quality = score_quality(scores, names)
    runs.write_json(quality | speed(totals), run.file(schema.QUALITY))
    log_quality(quality)
    counts = {"subjects": len(scores), "by_reason": quality["by_reason"], "engine": dataclasses.asdict(totals)}
    counts |= {"left_out": subjects_left_out(config, asked=len(scores)), "prompts": prompt_counts(run)}
    counts |= {"answers": filed} if filed else {}
    inputs = [config.data, config.aspects, config.adapter, config.model, answers]
    runs.finish_run(run, inputs=[path for path in inputs if path], counts=counts)
    return run


def export_prompts(config: ScoreConfig, path: str) -> str:
    """Writes the prompts that the store lacks as chat requests; `score(config, answers=...)` goes on from there.

    RunError where `path` is there already: it may be all that is left of a batch that was paid for.
    """
    path = runs.absolute(path)
    if runs.exists(path):
        raise runs.RunError(f"{path} is there already: export to another file, or move that one away")
    scoring = start_scoring(config, exchanges=True)
    prompts = runs.read_table(scoring.run.file(PROMPTS))
    missing = prompts.filter(
        pc.is_in(prompts["subject_id"], value_set=pa.array(missing_subjects(scoring), pa.string()))
    )
    tokens = completion_tokens(aspect_tails(encoder_of(scoring.settings).tokenizer, scoring.aspects))
    request = Request(config.answered_by, tokens, config.temperature)
    write_requests(missing, path, settings=scoring.settings, request=request)
    logger.info("score: %d of %d prompts written to %s", len(missing), len(prompts), path)
    return path


def start_scoring(config: ScoreConfig, *, exchanges: bool) -> Scoring:
    """Checks the configuration and fills prompts/, unless an earlier attempt did. `exchanges`: with a batch service."""
    asking = way_of_asking(config, exchanges=exchanges)
    encoder_of(asking.settings)  # a model that is not at hand is refused here, and not inside Ray
    # of another model's tokens prompts/ would be wrong
    read = [path for path in (config.data, config.aspects, config.adapter, config.model) if path]
    run = runs.start_run(config.output, job="score", config=config, inputs=read)
    connect()
    write_prompts(run, config, asking.settings)
    return Scoring(run, config, *asking)


def write_prompts(run: runs.Run, config: ScoreConfig, settings: PromptSettings) -> None:
    """Fills prompts/, unless an earlier attempt did."""
    if runs.exists(run.file(PROMPTS_DONE)):
        return
    runs.remove_parts(run, PROMPTS)
    if config.subjects == "items":
        dataset = read_parquet(runs.join(config.data, schema.ITEMS))
        if config.max_subjects:
            dataset = dataset.filter(expr=col("item_index") <= config.max_subjects)
        prompts = dataset.map_batches(
            item_prompts, fn_kwargs={"settings": settings}, batch_format="pyarrow", batch_size=PROMPT_BATCH
        )
    else:
        prompts = user_prompts(config, settings)
    filesystem, folder = runs.arrow_filesystem(run.file(PROMPTS))
    prompts.write_parquet(folder, filesystem=filesystem)
    asked = runs.read_table(run.file(PROMPTS), columns=["subject_id"]) if runs.exists(run.file(PROMPTS)) else ()
    runs.write_json({"prompts": len(asked)}, run.file(PROMPTS_DONE))


def read_parquet(path: str) -> ray.data.Dataset:
    filesystem, inner = runs.arrow_filesystem(path)
    return ray.data.read_parquet(inner, filesystem=filesystem)


def user_prompts(config: ScoreConfig, settings: PromptSettings) -> ray.data.Dataset:
    """Prompts from each user's train reviews; later reviews are never read."""
    # a shuffle by tasks: the default one holds every CPU of a two-core machine by actors and waits for ever
    ray.data.DataContext.get_current().shuffle_strategy = "sort_shuffle_pull_based"
    items = runs.read_table(runs.join(config.data, schema.ITEMS)).sort_by("item_index")
    user_ids = runs.read_table(runs.join(config.data, schema.USERS)).sort_by("user_index")["user_id"].combine_chunks()
    reviews = read_parquet(runs.join(config.data, schema.REVIEWS)).filter(expr=col("split") == schema.TRAIN)
    if config.max_subjects:
        reviews = reviews.filter(expr=col("user_index") < config.max_subjects)
    shared = {"settings": settings, "items": ray.put(items), "user_ids": ray.put(user_ids)}
    return reviews.groupby("user_index").map_groups(prompt_of_group, fn_kwargs=shared, batch_format="pyarrow")


def prompt_of_group(
    reviews: pa.Table, *, settings: PromptSettings, items: ray.ObjectRef, user_ids: ray.ObjectRef
) -> pa.Table:
    """`user_prompt` with the tables that every worker reads from the object store."""
    return user_prompt(reviews, settings=settings, items=ray.get(items), user_ids=ray.get(user_ids))


def engine_settings(scoring: Scoring) -> EngineSettings:
    config, aspects = scoring.config, scoring.aspects
    tokenizer = encoder_of(scoring.settings).tokenizer
    tails = aspect_tails(tokenizer, aspects)
    completion = completion_tokens(tails)
    longest_answer = completion if scoring.mode != "probe" else max(map(len, tails)) + 2
    return EngineSettings(
        model=scoring.settings.model,
        adapter=scoring.adapter,
        mode=scoring.mode,
        temperature=config.temperature,
        names=aspects.names,
        tails=tails,
        rating_tokens=rating_tokens(tokenizer, aspects),
        answer_regex=format_regex(aspects),
        max_completion_tokens=completion,
        shared_ids=shared_prefix(scoring.run),
        max_model_len=config.max_prompt_tokens + longest_answer + 1,
        tensor_parallel_size=config.tensor_parallel_size,
        on_gpu=gpus_of_cluster() > 0,
        engine_kwargs=dict(config.engine_kwargs),
        seed=config.seed,
    )


def completion_tokens(tails: tuple[tuple[int, ...], ...]) -> int:
    return COMPLETION_SLACK * sum(len(tail) + 3 for tail in tails)


def shared_prefix(run: runs.Run) -> tuple[int, ...]:
    """The token ids that all prompts start with."""
    filesystem, inner = runs.filesystem_of(run.file(PROMPTS))
    # the first row alone: the column of all token ids is as large as the prompts themselves
    prompts = pyarrow.dataset.dataset(inner, filesystem=filesystem)
    first = prompts.head(1, columns=["prompt_ids", "shared_tokens"]).to_pylist()
    return tuple(first[0]["prompt_ids"][: first[0]["shared_tokens"]]) if first else ()


def gpus_of_cluster() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def score_missing(scoring: Scoring) -> ScoringTotals:
    """Sends the prompts that the store lacks through the actors."""
    run, config = scoring.run, scoring.config
    missing = missing_subjects(scoring)
    logger.info("score: %d %s to score, the store knows the rest", len(missing), config.subjects)
    if not missing:
        return ScoringTotals()
    if config.answered_by:
        raise runs.RunError(
            f"{run.path}: {len(missing)} prompts have no answer of {config.answered_by} yet; "
            "--export-prompts FILE writes them, --import-answers FILE reads the answers"
        )
    settings = engine_settings(scoring)
    wanted = ray.put(pa.array(missing))
    # an engine's memory is the model's, known and bounded: no warning every half minute
    ray.data.DataContext.get_current().issue_detectors_config.detectors = []
    dataset = (
        read_parquet(run.file(PROMPTS))
        .select_columns(["subject_id", "prompt_ids", "prompt_sha256"])
        .map_batches(keep_subjects, fn_kwargs={"wanted": wanted}, batch_format="pyarrow", zero_copy_batch=True)
        .repartition(target_num_rows_per_block=config.batch_size)
        .map_batches(
            ScoringEngine,
            fn_constructor_args=(settings, scoring.store),
            batch_size=config.batch_size,
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            **actor_resources(config, on_gpu=settings.on_gpu),
        )
    )
    return follow(dataset, len(missing))


def actor_resources(config: ScoreConfig, *, on_gpu: bool) -> dict:
    """GPUs (or cores) of one actor, and the environment that its process must start with."""
    threads, bind = cores_of_an_actor(config.actors)
    environment = engine_environment(
        threads=threads, bind=bind, on_gpu=on_gpu, tensor_parallel_size=config.tensor_parallel_size
    )
    return {
        "num_cpus": 1,  # never all of them: the tasks that feed the actors need one
        "num_gpus": config.tensor_parallel_size if on_gpu else 0,
        "runtime_env": {"env_vars": environment},
    }


def cores_of_an_actor(actors: int) -> tuple[list[int], bool]:
    """The cores that an actor without a GPU computes on, and whether it may be bound to just these."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:
        cores = sorted(os.sched_getaffinity(0))
        return cores[: max(1, len(cores) // actors)], actors == 1
    # this machine's cores are not theirs: as many as the smallest node has for those that fall to it
    working = [cpus for cpus in nodes if cpus] or [1]
    on_each = math.ceil(actors / len(working))
    return list(range(max(1, int(min(working)) // on_each))), False


def missing_subjects(scoring: Scoring) -> list[str]:
    """The first subject of every prompt hash that the store lacks."""
    prompts = runs.read_table(scoring.run.file(PROMPTS), columns=["subject_id", "prompt_sha256"])
    first = dict(
        zip(reversed(prompts["prompt_sha256"].to_pylist()), reversed(prompts["subject_id"].to_pylist()), strict=True)
    )
    known = scoring.store.hashes()
    return [subject for digest, subject in reversed(first.items()) if digest not in known]


def asked_hashes(run: runs.Run) -> set[str]:
    return set(runs.read_table(run.file(PROMPTS), columns=["prompt_sha256"])["prompt_sha256"].to_pylist())


def keep_subjects(prompts: pa.Table, *, wanted: ray.ObjectRef) -> pa.Table:
    return prompts.filter(pc.is_in(prompts["subject_id"], value_set=ray.get(wanted))).drop_columns("subject_id")


def follow(dataset: ray.data.Dataset, expected: int) -> ScoringTotals:
    """Runs the dataset with a progress line per finished batch: rate and time left."""
    started = time.perf_counter()
    done = given = computed = 0
    engine_seconds = 0.0
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        done += int(batch["subjects"].sum())
        given += int(batch["tokens_given"].sum())
        computed += int(batch["tokens_computed"].sum())
        engine_seconds += float(batch["engine_seconds"].sum())
        rate = done / (time.perf_counter() - started)
        logger.info("score: %d of %d, %.2f/s, %.0f s left", done, expected, rate, (expected - done) / rate)
    return ScoringTotals(subjects=done, tokens_given=given, tokens_computed=computed, seconds=engine_seconds)


def joined_scores(scoring: Scoring) -> pa.Table:
    """SCORE rows in the order of prompts/, each with the store's answer to its prompt."""
    run, config, store = scoring.run, scoring.config, scoring.store
    columns = ["subject_id", "prompt_sha256", "prompt_tokens", "cutoff", "cutoff_position"]
    prompts = runs.read_table(run.file(PROMPTS), columns=columns)
    answers = store.read()
    places = pc.index_in(prompts["prompt_sha256"], value_set=answers["prompt_sha256"].combine_chunks())
    if places.null_count:
        raise runs.RunError(
            f"{run.path}: {places.null_count} prompts were not scored; run `raygr score` again to resume"
        )
    found = answers.take(places).drop_columns("prompt_sha256")
    constants = {
        "aspects": list(scoring.aspects.names),
        "model": config.answered_by or config.model,
        "adapter": config.adapter or "",
        "mode": scoring.mode,
    }
    table = prompts
    for name in found.column_names:
        table = table.append_column(name, found[name])
    for name, value in constants.items():
        table = table.append_column(name, pa.array([value] * len(table), type=schema.SCORE_SCHEMA.field(name).type))
    return table.select(schema.SCORE_SCHEMA.names).cast(schema.SCORE_SCHEMA)


def prompt_counts(run: runs.Run) -> dict[str, float]:
    tokens = runs.read_table(run.file(PROMPTS), columns=["prompt_tokens"])
    lengths = tokens["prompt_tokens"].to_numpy()
    return {"count": len(lengths), "mean_tokens": float(np.mean(lengths)), "max_tokens": int(lengths.max())}


def speed(totals: ScoringTotals) -> dict[str, float | None]:
    rate = totals.subjects / totals.seconds if totals.seconds else None
    return {"seconds": totals.seconds, "subjects_per_second": rate, "tokens_computed": totals.tokens_computed}
