"""The score stage: a prepare run's items or users in, one LLM score per aspect and subject out (equations 3 and 4).

1. `write_prompts` makes each subject's prompt (token ids, hash, cut-off) and writes prompts/.
2. `missing_subjects` drops the prompts that the score store has answers to.
3. `ask_engine` sends the others through actors that run vLLM (engine.py) or, under `engine: transformers`, one pass of
   the model per subject (transformers_engine.py), which write their answers to the store; under `engine: http`,
   `ask_server` sends them to a server (http_engine.py).
4. `joined_scores` joins prompts and answers into SCORE rows, which are written to scores/ with a summary of quality.

A run that was killed continues with the first of these steps that it did not finish.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from ray.data.expressions import col

from raygr import files, runs, schema
from raygr.config import ConfigError
from raygr.execution.console import log_progress
from raygr.ray_setup import Node, cluster_nodes, connect
from raygr.score.adapters import answer_mode, fitting_adapter
from raygr.score.answer_format import aspect_tails, completion_tokens, format_regex, rating_tokens
from raygr.score.config import ScoreConfig
from raygr.score.engine import EngineSettings, ScoringActor, ScoringEngine, actor_resources, require_vllm
from raygr.score.external_llm import check_free, import_answers, numbered, request_fields, write_requests
from raygr.score.http_engine import SPENT, api_key, ask_server
from raygr.score.prompt_checks import CHECKED_COLUMNS, check_prompts
from raygr.score.quality import log_quality, score_quality
from raygr.score.store import REFUSED_BY_ENGINE, ScoreStore, open_store
from raygr.score.subjects import (
    PROMPT_SCHEMA,
    PROMPTS,
    PROMPTS_DONE,
    PromptSettings,
    chosen_subjects,
    encoder_of,
    item_prompts,
    prompt_settings,
    subjects_left_out,
    user_prompt,
)

logger = logging.getLogger(__name__)

PROMPT_BATCH = 256  # subjects tokenised per task call


class Scoring(NamedTuple):
    """A score run in progress, after its configuration was checked."""

    run: runs.Run
    config: ScoreConfig
    settings: PromptSettings
    adapter: str | None
    """Folder in PEFT's format."""
    store: ScoreStore
    on_gpu: bool
    """Whether the cluster has GPUs, on which the engine then runs."""
    prompt_counts: dict[str, Any]


class EngineTotals(NamedTuple):
    """Work of the engine actors in this run; zeros where the store had all answers."""

    subjects: int = 0
    tokens_given: int = 0
    tokens_computed: int = 0
    seconds: float = 0.0


def score(config: ScoreConfig, *, answers: Sequence[str] = ()) -> runs.Run:
    """Score all items or users of a prepare run; an unfinished run is resumed.

    `answers` are files with a batch service's answers to `export_prompts`; they are read into the store first.
    """
    answers = [files.absolute(path) for path in answers]
    scoring = start_scoring(config, by_service=bool(answers))
    run, store, names = scoring.run, scoring.store, scoring.settings.aspects.names
    filed = {}
    if answers:
        asked = set(files.read_table(run.file(PROMPTS), columns=["prompt_sha256"])["prompt_sha256"].to_pylist())
        filed = {"answers": import_answers(answers, store, asked=asked, names=names)}
    by_batches = config.answered_by is not None and config.engine != "http"
    missing = missing_subjects(run, store.known(retry_failed=config.retry_failed and not by_batches))
    logger.info("score: %d %s to score; the store has answers to the others", len(missing), config.subjects)
    totals = EngineTotals()
    if missing and config.engine == "http":
        began = time.monotonic()
        done = ask_server(run, config, scoring.settings, store, missing)
        totals = EngineTotals(subjects=done, seconds=time.monotonic() - began)
    elif missing:
        totals = ask_engine(scoring, missing)
    store.compact()
    scores = joined_scores(scoring)
    if len(scores) and set(scores["reason"].to_pylist()) == {REFUSED_BY_ENGINE}:  # not the fault of single prompts
        raise runs.RunError(f"the engine refused every prompt: {scores['completion'][0]}")
    files.write_table(scores, files.join(run.file(schema.SCORES), "part-0.parquet"))
    quality = score_quality(scores, names)
    speed = {
        "seconds": totals.seconds,
        "subjects_per_second": totals.subjects / totals.seconds if totals.seconds else None,
        "tokens_computed": totals.tokens_computed,
    }
    files.write_json(quality | speed, run.file(schema.QUALITY))
    log_quality(quality)
    counts = {
        "subjects": len(scores),
        "by_reason": quality["by_reason"],
        "engine": totals._asdict(),
        "left_out": subjects_left_out(config, asked=len(scores)),
        "prompts": scoring.prompt_counts,
    }
    if config.engine == "http" and files.exists(run.file(SPENT)):
        counts |= {"server": files.read_json(run.file(SPENT))}
    runs.finish_run(run, inputs=[*input_paths(config), *answers], counts=counts | filed)
    return run


def export_prompts(config: ScoreConfig, path: str) -> list[str]:
    """Write the prompts without a rating in the store as chat requests; return the paths of the files.

    `score(config, answers=...)` continues from there. RunError where a file exists already, since it may be all that is
    left of a batch that was paid for.
    """
    path = files.absolute(path)
    for file in (path, numbered(path, 2)):  # checked before any work; write_requests checks each of its files
        check_free(file)
    scoring = start_scoring(config, by_service=True)
    prompts = files.read_table(scoring.run.file(PROMPTS))
    known = scoring.store.known(retry_failed=config.retry_failed, unread=False)
    subjects = pa.array(missing_subjects(scoring.run, known), pa.string())
    missing = prompts.filter(pc.is_in(prompts["subject_id"], value_set=subjects))
    settings = scoring.settings
    paths = write_requests(missing, path, settings=settings, request=request_fields(config, settings))
    logger.info("score: %d of %d prompts written to %s", len(missing), len(prompts), ", ".join(paths))
    return paths


# --- start -------------------------------------------------------------------------------------


def start_scoring(config: ScoreConfig, *, by_service: bool) -> Scoring:
    """Check the configuration, open the run and fill prompts/.

    `by_service`: a batch service answers the prompts. Whatever cannot work is refused before Ray starts where possible.
    """
    if by_service and not config.answered_by:
        raise ConfigError(
            f"answered_by: not set, so that another LLM's answers would be stored as those of {config.llm}: "
            "set it to the name of the LLM that answers"
        )
    settings = prompt_settings(config, config.subjects, cutoff_fraction=config.cutoff_fraction)
    encoder_of(settings)  # a missing tokenizer is reported here and not inside Ray
    adapter = fitting_adapter(config, settings) if config.adapter else None
    if config.engine == "http":
        api_key(config.http)
    # before Ray has started, this machine stands for the cluster's
    elif config.engine == "vllm" and not (
        config.answered_by or open_store(config, on_gpu=torch.cuda.is_available()).known()
    ):
        require_vllm()
    run = runs.start_run(config.output, job="score", config=config, inputs=input_paths(config))
    connect()
    nodes = cluster_nodes()
    on_gpu = int(ray.cluster_resources().get("GPU", 0)) > 0
    if not config.answered_by:
        check_room(config, nodes, on_gpu=on_gpu)
    store = open_store(config, on_gpu=on_gpu)
    return Scoring(run, config, settings, adapter, store, on_gpu, write_prompts(run, config, settings))


def input_paths(config: ScoreConfig) -> list[str]:
    """What the run reads; the LLM is part of it, because prompts/ holds tokens of its tokenizer."""
    return [path for path in (config.data, config.aspects, config.adapter, config.llm) if path]


def check_room(config: ScoreConfig, nodes: Sequence[Node], *, on_gpu: bool) -> None:
    """ConfigError where the actors would wait forever for CPUs or GPUs."""
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


# --- prompts -----------------------------------------------------------------------------------


def write_prompts(run: runs.Run, config: ScoreConfig, settings: PromptSettings) -> dict[str, Any]:
    """Write and check prompts/, unless an earlier attempt did; return the counts of `check_prompts`."""
    done = files.read_json(run.file(PROMPTS_DONE)) if files.exists(run.file(PROMPTS_DONE)) else {}
    if "cut_tokens_share" in done:  # earlier versions cut prompts without counting it: these are made again
        return done
    runs.remove_parts(run, PROMPTS)
    if config.subjects == "items":
        items = chosen_rows(read_parquet(files.join(config.data, schema.ITEMS)), "item_index", config)
        arguments = {"settings": settings}
        prompts = items.map_batches(
            item_prompts,  # type: ignore[arg-type]  # Ray's types know no function that gets keywords by fn_kwargs
            fn_kwargs=arguments,
            batch_format="pyarrow",
            batch_size=PROMPT_BATCH,
        )
    else:
        prompts = user_prompts(config, settings)
    logger.info("making the prompts of the %s", config.subjects)
    filesystem, folder = files.arrow_filesystem(run.file(PROMPTS))
    prompts.write_parquet(folder, filesystem=filesystem)
    has_subjects = files.exists(run.file(PROMPTS))  # without subjects Ray writes no folder
    rows = files.read_table(run.file(PROMPTS), CHECKED_COLUMNS) if has_subjects else PROMPT_SCHEMA.empty_table()
    try:
        counts = check_prompts(rows, data=config.data, settings=settings)
    except ConfigError:
        runs.remove_parts(run, PROMPTS)
        raise
    files.write_json(counts, run.file(PROMPTS_DONE))
    return counts


def chosen_rows(rows: ray.data.Dataset, column: str, config: ScoreConfig) -> ray.data.Dataset:
    """The rows of the items or users that `max_subjects` or `sample_subjects` chooses; all rows without either."""
    if not (config.max_subjects or config.sample_subjects):
        return rows
    return rows.filter(expr=col(column).is_in(chosen_subjects(config).tolist()))


def read_parquet(path: str) -> ray.data.Dataset:
    filesystem, inner = files.arrow_filesystem(path)
    return ray.data.read_parquet(inner, filesystem=filesystem)


def user_prompts(config: ScoreConfig, settings: PromptSettings) -> ray.data.Dataset:
    """Prompts from each user's train reviews; later reviews are never read."""
    # shuffled by tasks: the default shuffle takes every CPU of a two-core machine for its actors and waits forever
    ray.data.DataContext.get_current().shuffle_strategy = "sort_shuffle_pull_based"
    items = files.read_table(files.join(config.data, schema.ITEMS)).sort_by("item_index")
    user_ids = files.read_table(files.join(config.data, schema.USERS)).sort_by("user_index")["user_id"].combine_chunks()
    reviews = read_parquet(files.join(config.data, schema.REVIEWS)).filter(expr=col("split") == schema.TRAIN)
    reviews = chosen_rows(reviews, "user_index", config)
    shared = {"settings": settings, "items": ray.put(items), "user_ids": ray.put(user_ids)}
    return reviews.groupby("user_index").map_groups(
        prompt_of_group,  # type: ignore[arg-type]  # as above
        fn_kwargs=shared,
        batch_format="pyarrow",
    )


def prompt_of_group(
    reviews: pa.Table, *, settings: PromptSettings, items: ray.ObjectRef, user_ids: ray.ObjectRef
) -> pa.Table:
    """`user_prompt` with the tables that every worker reads from Ray's object store."""
    return user_prompt(reviews, settings=settings, items=ray.get(items), user_ids=ray.get(user_ids))


def missing_subjects(run: runs.Run, known: set[str]) -> list[str]:
    """The first subject of each distinct prompt whose hash is not in `known`."""
    prompts = files.read_table(run.file(PROMPTS), columns=["subject_id", "prompt_sha256"])
    first: dict[str, str] = {}
    for subject, digest in zip(prompts["subject_id"].to_pylist(), prompts["prompt_sha256"].to_pylist(), strict=True):
        first.setdefault(digest, subject)
    return [subject for digest, subject in first.items() if digest not in known]


# --- answers -----------------------------------------------------------------------------------


def ask_engine(scoring: Scoring, missing: list[str]) -> EngineTotals:
    """Send the prompts of these subjects through the engine actors; RunError where another LLM has to answer them."""
    run, config = scoring.run, scoring.config
    if config.answered_by:
        raise runs.RunError(
            f"{run.path}: {len(missing)} prompts have no answer of {config.answered_by} yet; "
            "--export-prompts FILE writes them, --import-answers FILE reads the answers, engine=http asks a server"
        )
    engine: type[ScoringActor] = ScoringEngine
    if config.engine == "vllm":
        require_vllm()
    else:
        from raygr.score.transformers_engine import TransformersEngine as engine  # loads torch's models, for seconds
    # an engine's memory is known and bounded: no warning about it every half minute
    ray.data.DataContext.get_current().issue_detectors_config.detectors = []
    keep = {"wanted": ray.put(pa.array(missing))}
    dataset = (
        read_parquet(run.file(PROMPTS))
        .select_columns(["subject_id", "prompt_ids", "prompt_sha256"])
        .map_batches(
            keep_subjects,  # type: ignore[arg-type]  # as above
            fn_kwargs=keep,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        .repartition(target_num_rows_per_block=config.batch_size)
        .map_batches(
            engine,
            fn_constructor_args=(engine_settings(scoring), scoring.store),
            batch_size=config.batch_size,
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            **actor_resources(config, [node.cpus for node in cluster_nodes()], on_gpu=scoring.on_gpu),
        )
    )
    each = f" in each of {config.actors} actors" if config.actors > 1 else ""
    device = "GPU" if scoring.on_gpu else "CPU"
    how_long = "half a minute or more" if config.engine == "vllm" else "some seconds"
    logger.info("starting %s%s with %s, on the %s: this takes %s", config.engine, each, config.llm, device, how_long)
    totals = EngineTotals()
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        totals = EngineTotals(
            subjects=totals.subjects + int(batch["subjects"].sum()),
            tokens_given=totals.tokens_given + int(batch["tokens_given"].sum()),
            tokens_computed=totals.tokens_computed + int(batch["tokens_computed"].sum()),
            seconds=totals.seconds + float(batch["engine_seconds"].sum()),
        )
        how_far = (f"score {config.subjects}", totals.subjects, len(missing), config.subjects)
        log_progress(logger, *how_far, seconds=totals.seconds / config.actors)  # without the engines' start
    return totals


def keep_subjects(prompts: pa.Table, *, wanted: ray.ObjectRef) -> pa.Table:
    return prompts.filter(pc.is_in(prompts["subject_id"], value_set=ray.get(wanted))).drop_columns("subject_id")


def engine_settings(scoring: Scoring) -> EngineSettings:
    config, aspects, encoder = scoring.config, scoring.settings.aspects, encoder_of(scoring.settings)
    mode, tails = answer_mode(config), aspect_tails(encoder.tokenizer, aspects)
    completion = completion_tokens(tails)
    longest_answer = completion if mode != "probe" else max(map(len, tails)) + 2
    return EngineSettings(
        model=scoring.settings.model,
        adapter=scoring.adapter,
        mode=mode,
        temperature=config.temperature,
        names=aspects.names,
        tails=tails,
        rating_tokens=rating_tokens(encoder.tokenizer, aspects),
        answer_regex=format_regex(aspects),
        max_completion_tokens=completion,
        shared_ids=tuple(encoder.shared),
        max_model_len=config.max_prompt_tokens + longest_answer + 1,
        tensor_parallel_size=config.tensor_parallel_size,
        on_gpu=scoring.on_gpu,
        engine_kwargs=dict(config.engine_kwargs),
        seed=config.seed,
    )


def joined_scores(scoring: Scoring) -> pa.Table:
    """SCORE rows in the order of prompts/, each with the store's answer; RunError where an answer is missing."""
    run, config = scoring.run, scoring.config
    columns = ["subject_id", "prompt_sha256", "prompt_tokens", "cutoff", "cutoff_position"]
    table = files.read_table(run.file(PROMPTS), columns=columns)
    answers = scoring.store.read()
    places = pc.index_in(table["prompt_sha256"], value_set=answers["prompt_sha256"].combine_chunks())
    if places.null_count:
        raise runs.RunError(
            f"{run.path}: {places.null_count} prompts were not scored; run `raygr score` again to resume"
        )
    found = answers.take(places).drop_columns("prompt_sha256")
    constants = {
        "aspects": list(scoring.settings.aspects.names),
        "model": config.answered_by or config.llm,
        "adapter": config.adapter or "",
        "mode": answer_mode(config),
    }
    for name in found.column_names:
        table = table.append_column(name, found[name])
    for name, value in constants.items():
        table = table.append_column(name, pa.array([value] * len(table), type=schema.SCORE_SCHEMA.field(name).type))
    return table.select(schema.SCORE_SCHEMA.names).cast(schema.SCORE_SCHEMA)
