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
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray
import ray.data
from ray.data.expressions import col

from raygr import files, runs, schema
from raygr.config import ConfigError
from raygr.ray_setup import Node, cluster_nodes, connect
from raygr.score.answer_format import aspect_tails, format_regex, rating_tokens
from raygr.score.asking import PROMPTS, PROMPTS_DONE, store_of, way_of_asking
from raygr.score.aspects import AspectSet
from raygr.score.config import ScoreConfig
from raygr.score.engine import EngineSettings, ScoringEngine, engine_environment, require_vllm
from raygr.score.external_llm import Request, check_free, import_answers, numbered, write_requests
from raygr.score.prompt_checks import CHECKED_COLUMNS, check_prompts
from raygr.score.quality import log_quality, score_quality
from raygr.score.store import REFUSED_BY_ENGINE, ScoreStore
from raygr.score.subjects import PROMPT_SCHEMA, PromptSettings, encoder_of, item_prompts, subjects_left_out, user_prompt

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
    """One score run under way; from `aspects` to `store` as in asking.py."""

    run: runs.Run
    config: ScoreConfig
    aspects: AspectSet
    settings: PromptSettings
    mode: str
    adapter: str | None
    store: ScoreStore
    prompt_counts: dict[str, Any]


def score(config: ScoreConfig, *, answers: Sequence[str] = ()) -> runs.Run:
    """Scores of all items or users of a prepare run, resumed where an earlier attempt stopped.

    `answers` are files of a batch service's answers to `export_prompts`: they are filed before anything is asked.
    """
    answers = [files.absolute(path) for path in answers]
    scoring = start_scoring(config, exchanges=bool(answers))
    run, names = scoring.run, scoring.aspects.names
    filed = import_answers(answers, scoring.store, asked=asked_hashes(run), names=names) if answers else None
    totals = score_missing(scoring)
    scoring.store.compact()
    scores = joined_scores(scoring)
    check_any_answer(scores)
    files.write_table(scores, files.join(run.file(schema.SCORES), "part-0.parquet"))
    quality = score_quality(scores, names)
    files.write_json(quality | speed(totals), run.file(schema.QUALITY))
    log_quality(quality)
    counts = {"subjects": len(scores), "by_reason": quality["by_reason"], "engine": dataclasses.asdict(totals)}
    counts |= {"left_out": subjects_left_out(config, asked=len(scores)), "prompts": scoring.prompt_counts}
    counts |= {"answers": filed} if filed else {}
    inputs = [config.data, config.aspects, config.adapter, config.llm, *answers]
    runs.finish_run(run, inputs=[path for path in inputs if path], counts=counts)
    return run


def export_prompts(config: ScoreConfig, path: str) -> list[str]:
    """Writes the prompts of which the store has no rating as chat requests, in one file or more; their paths.

    `score(config, answers=...)` goes on from there. RunError where a file is there already: it may be all that is left
    of a batch that was paid for.
    """
    path = files.absolute(path)
    for file in (path, numbered(path, 2)):  # known before any work; write_requests looks at each
        check_free(file)
    scoring = start_scoring(config, exchanges=True)
    prompts = files.read_table(scoring.run.file(PROMPTS))
    known = scoring.store.known(retry_failed=config.retry_failed, unread=False)
    missing = prompts.filter(
        pc.is_in(prompts["subject_id"], value_set=pa.array(missing_subjects(scoring, known), pa.string()))
    )
    tokens = completion_tokens(aspect_tails(encoder_of(scoring.settings).tokenizer, scoring.aspects))
    layout = config.requests
    request = Request(
        model=layout.service_model or config.answered_by,
        max_tokens=layout.max_tokens or tokens,
        temperature=config.temperature if layout.send_temperature else None,
        layout=layout,
    )
    paths = write_requests(missing, path, settings=scoring.settings, request=request)
    logger.info("score: %d of %d prompts written to %s", len(missing), len(prompts), ", ".join(paths))
    return paths


def start_scoring(config: ScoreConfig, *, exchanges: bool) -> Scoring:
    """Checks the configuration and fills prompts/, unless an earlier attempt did. `exchanges`: with a batch service."""
    asking = way_of_asking(config, exchanges=exchanges)
    encoder_of(asking.settings)  # a model that is not at hand is refused here, and not inside Ray
    if not (config.answered_by or asking.store.known()):
        require_vllm()
    # of another model's tokens prompts/ would be wrong
    read = [path for path in (config.data, config.aspects, config.adapter, config.llm) if path]
    run = runs.start_run(config.output, job="score", config=config, inputs=read)
    connect()
    on_gpu = gpus_of_cluster() > 0
    if not config.answered_by:
        check_room(config, cluster_nodes(), on_gpu=on_gpu)
    asking = asking._replace(store=store_of(config, asking.settings.model, asking.adapter, asking.mode, on_gpu=on_gpu))
    return Scoring(run, config, *asking, write_prompts(run, config, asking.settings))


def write_prompts(run: runs.Run, config: ScoreConfig, settings: PromptSettings) -> dict[str, Any]:
    """Fills and checks prompts/, unless an earlier attempt did; the counts of `check_prompts`."""
    done = files.read_json(run.file(PROMPTS_DONE)) if files.exists(run.file(PROMPTS_DONE)) else {}
    if "cut_tokens_share" in done:  # those of earlier versions were cut without a word: they are made anew
        return done
    runs.remove_parts(run, PROMPTS)
    if config.subjects == "items":
        dataset = read_parquet(files.join(config.data, schema.ITEMS))
        if config.max_subjects:
            dataset = dataset.filter(expr=col("item_index") <= config.max_subjects)
        prompts = dataset.map_batches(
            item_prompts, fn_kwargs={"settings": settings}, batch_format="pyarrow", batch_size=PROMPT_BATCH
        )
    else:
        prompts = user_prompts(config, settings)
    filesystem, folder = files.arrow_filesystem(run.file(PROMPTS))
    prompts.write_parquet(folder, filesystem=filesystem)
    try:
        counts = check_prompts(checked_columns(run), data=config.data, settings=settings)
    except ConfigError:
        runs.remove_parts(run, PROMPTS)
        raise
    files.write_json(counts, run.file(PROMPTS_DONE))
    return counts


def checked_columns(run: runs.Run) -> pa.Table:
    if not files.exists(run.file(PROMPTS)):  # Ray writes no folder where there is no subject
        return PROMPT_SCHEMA.empty_table()
    return files.read_table(run.file(PROMPTS), CHECKED_COLUMNS)


def read_parquet(path: str) -> ray.data.Dataset:
    filesystem, inner = files.arrow_filesystem(path)
    return ray.data.read_parquet(inner, filesystem=filesystem)


def user_prompts(config: ScoreConfig, settings: PromptSettings) -> ray.data.Dataset:
    """Prompts from each user's train reviews; later reviews are never read."""
    # a shuffle by tasks: the default one holds every CPU of a two-core machine by actors and waits for ever
    ray.data.DataContext.get_current().shuffle_strategy = "sort_shuffle_pull_based"
    items = files.read_table(files.join(config.data, schema.ITEMS)).sort_by("item_index")
    user_ids = files.read_table(files.join(config.data, schema.USERS)).sort_by("user_index")["user_id"].combine_chunks()
    reviews = read_parquet(files.join(config.data, schema.REVIEWS)).filter(expr=col("split") == schema.TRAIN)
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
    filesystem, inner = files.filesystem_of(run.file(PROMPTS))
    # the first row alone: the column of all token ids is as large as the prompts themselves
    prompts = pyarrow.dataset.dataset(inner, filesystem=filesystem)
    first = prompts.head(1, columns=["prompt_ids", "shared_tokens"]).to_pylist()
    return tuple(first[0]["prompt_ids"][: first[0]["shared_tokens"]]) if first else ()


def gpus_of_cluster() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def score_missing(scoring: Scoring) -> ScoringTotals:
    """Sends the prompts that the store lacks through the actors."""
    run, config = scoring.run, scoring.config
    missing = missing_subjects(
        scoring, scoring.store.known(retry_failed=config.retry_failed and not config.answered_by)
    )
    logger.info("score: %d %s to score, the store knows the rest", len(missing), config.subjects)
    if not missing:
        return ScoringTotals()
    if config.answered_by:
        raise runs.RunError(
            f"{run.path}: {len(missing)} prompts have no answer of {config.answered_by} yet; "
            "--export-prompts FILE writes them, --import-answers FILE reads the answers"
        )
    require_vllm()
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


def check_room(config: ScoreConfig, nodes: Sequence[Node], *, on_gpu: bool) -> None:
    """ConfigError where the actors would wait for CPUs or GPUs for ever."""
    cpus, needed = int(sum(node.cpus for node in nodes)), config.actors + 1
    if cpus < needed:
        raise ConfigError(
            f"actors: {config.actors} and one CPU to feed them need {needed} CPUs, Ray has {cpus}: set actors lower"
        )
    each = config.tensor_parallel_size
    if not on_gpu and each > 1:
        raise ConfigError(f"tensor_parallel_size: {each} GPUs for each actor, Ray has none: set it to 1")
    if on_gpu and sum(int(node.gpus) // each for node in nodes) < config.actors:
        has = " + ".join(f"{node.gpus:.0f}" for node in nodes if node.gpus)
        name = "tensor_parallel_size" if each > 1 else "actors"
        raise ConfigError(
            f"{name}: {config.actors} actors of {each} GPUs, each on one node, need "
            f"{config.actors * each} GPUs, Ray has {has}: set actors or tensor_parallel_size lower"
        )


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
    nodes = [node.cpus for node in cluster_nodes()]
    if len(nodes) == 1:
        cores = sorted(os.sched_getaffinity(0))[: max(1, int(nodes[0]))]
        return cores[: max(1, len(cores) // actors)], actors == 1
    # this machine's cores are not theirs: as many as the smallest node has for those that fall to it
    on_each = math.ceil(actors / len(nodes))
    return list(range(max(1, int(min(nodes)) // on_each))), False


def missing_subjects(scoring: Scoring, known: set[str]) -> list[str]:
    """The first subject of every prompt hash that is not known."""
    prompts = files.read_table(scoring.run.file(PROMPTS), columns=["subject_id", "prompt_sha256"])
    first = dict(
        zip(reversed(prompts["prompt_sha256"].to_pylist()), reversed(prompts["subject_id"].to_pylist()), strict=True)
    )
    return [subject for digest, subject in reversed(first.items()) if digest not in known]


def asked_hashes(run: runs.Run) -> set[str]:
    return set(files.read_table(run.file(PROMPTS), columns=["prompt_sha256"])["prompt_sha256"].to_pylist())


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
    prompts = files.read_table(run.file(PROMPTS), columns=columns)
    answers = store.read()
    places = pc.index_in(prompts["prompt_sha256"], value_set=answers["prompt_sha256"].combine_chunks())
    if places.null_count:
        raise runs.RunError(
            f"{run.path}: {places.null_count} prompts were not scored; run `raygr score` again to resume"
        )
    found = answers.take(places).drop_columns("prompt_sha256")
    constants = {
        "aspects": list(scoring.aspects.names),
        "model": config.answered_by or config.llm,
        "adapter": config.adapter or "",
        "mode": scoring.mode,
    }
    table = prompts
    for name in found.column_names:
        table = table.append_column(name, found[name])
    for name, value in constants.items():
        table = table.append_column(name, pa.array([value] * len(table), type=schema.SCORE_SCHEMA.field(name).type))
    return table.select(schema.SCORE_SCHEMA.names).cast(schema.SCORE_SCHEMA)


def check_any_answer(scores: pa.Table) -> None:
    """RunError where the engine refused every prompt, which is no fault of a prompt."""
    if len(scores) and set(scores["reason"].to_pylist()) == {REFUSED_BY_ENGINE}:
        raise runs.RunError(f"the engine refused every prompt: {scores['completion'][0]}")


def speed(totals: ScoringTotals) -> dict[str, float | None]:
    rate = totals.subjects / totals.seconds if totals.seconds else None
    return {"seconds": totals.seconds, "subjects_per_second": rate, "tokens_computed": totals.tokens_computed}
