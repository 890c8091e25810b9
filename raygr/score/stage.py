"""The score stage: a prepare run's items or users in, one LLM score per aspect and subject out (equations 3 and 4).

1. `write_prompts` makes each subject's prompt (token ids, hash, cut-off) and writes prompts/.
2. `missing_subjects` drops the prompts that the score store has answers to.
3. `ask_engine` sends the others through actors (actors.py) that run vLLM (engine.py) or, under `engine: transformers`,
   one pass of the model per subject (transformers_engine.py), which write their answers to the store; under
   `engine: http`, `ask_server` sends them to a server (http_engine.py).
4. `write_scores` joins prompts and answers into SCORE rows in scores/; a summary of quality is written beside them.

Ray makes the prompts and runs the actors, or for few subjects the calling process, but vLLM always runs on Ray. A run
that was killed continues with the first of these steps that it did not finish.
"""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raygr import files, runs, schema
from raygr.config import ConfigError
from raygr.execution.in_process import runs_here
from raygr.score.actors import EngineTotals, ask_engine, check_room
from raygr.score.adapters import answer_mode, fitting_adapter
from raygr.score.answer_format import aspect_tails, completion_tokens, format_regex, rating_tokens
from raygr.score.config import ScoreConfig
from raygr.score.engine import EngineSettings, require_vllm
from raygr.score.external_llm import check_free, import_answers, numbered, request_fields, write_requests
from raygr.score.http_engine import SPENT, api_key, ask_server
from raygr.score.prompt_checks import CHECKED_COLUMNS, check_prompts
from raygr.score.quality import log_quality, score_quality
from raygr.score.store import REFUSED_BY_ENGINE, ScoreStore, binary_hashes, hash_ranges, open_store
from raygr.score.subjects import (
    PROMPT_SCHEMA,
    PROMPTS,
    PROMPTS_DONE,
    PromptSettings,
    chosen_prompts,
    chosen_subjects,
    encoder_of,
    item_prompts,
    prompt_settings,
    stored_table,
    subjects_left_out,
    user_prompt,
)

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

PROMPT_BATCH = 256  # subjects tokenised per task call
SMALL = 5000  # subjects whose prompts the calling process makes within a minute
PART_ROWS = 1_000_000  # of scores/: prompts and answers of one part are joined in memory


class Scoring(NamedTuple):
    """A score run in progress, after its configuration was checked."""

    run: runs.Run
    config: ScoreConfig
    settings: PromptSettings
    adapter: str | None
    """Folder in PEFT's format."""
    store: ScoreStore
    is_here: bool
    """Whether the calling process makes the prompts and runs the engine, instead of Ray."""
    on_gpu: bool
    """Whether there are GPUs, on which the engine then runs."""
    prompt_counts: dict[str, Any]


def score(config: ScoreConfig, *, answers: Sequence[str] = ()) -> runs.Run:
    """Score all items or users of a prepare run; an unfinished run is resumed.

    `answers` are files with a batch service's answers to `export_prompts`; they are read into the store first.
    """
    answers = [files.absolute(path) for path in answers]
    scoring = start_scoring(config, by_service=bool(answers))
    run, store, names = scoring.run, scoring.store, scoring.settings.aspects.names
    filed = {}
    if answers:
        filed = {"answers": import_answers(answers, store, asked_N=prompt_hashes(run), names=names)}
    by_batches = config.answered_by is not None and config.engine != "http"
    store.compact()  # an earlier attempt may have left a file per batch
    missing = missing_subjects(run, store, retry_failed=config.retry_failed and not by_batches)
    logger.info("score: %d %s to score; the store has answers to the others", len(missing), config.subjects)
    totals = EngineTotals()
    if len(missing) and config.engine == "http":
        began = time.monotonic()
        done = ask_server(run, config, scoring.settings, store, missing)
        totals = EngineTotals(subjects=done, seconds=time.monotonic() - began)
    elif len(missing):
        if config.answered_by:
            raise runs.RunError(
                f"{run.path}: {len(missing)} prompts have no answer of {config.answered_by} yet; --export-prompts FILE "
                "writes them, --import-answers FILE reads the answers, engine=http asks a server"
            )
        totals = ask_engine(
            run.file(PROMPTS),
            missing,
            config=config,
            settings=engine_settings(scoring),
            store=store,
            is_here=scoring.is_here,
        )
    store.compact()
    write_scores(scoring)
    scores = stored_table(run.path, schema.SCORES)
    quality = score_quality(scores.to_batches(columns=["ratings", "expected", "reason"]), names)
    if [*quality["by_reason"]] == [REFUSED_BY_ENGINE]:  # not the fault of single prompts
        said = scores.head(1, columns=["completion"])["completion"][0]
        raise runs.RunError(f"the engine refused every prompt: {said}")
    speed = {
        "seconds": totals.seconds,
        "subjects_per_second": totals.subjects / totals.seconds if totals.seconds else None,
        "tokens_computed": totals.tokens_computed,
    }
    files.write_json(quality | speed, run.file(schema.QUALITY))
    log_quality(quality)
    counts = {
        "subjects": quality["subjects"],
        "by_reason": quality["by_reason"],
        "engine": totals._asdict(),
        "left_out": subjects_left_out(config, asked=quality["subjects"]),
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
    subjects = missing_subjects(scoring.run, scoring.store, retry_failed=config.retry_failed, unread=False)
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
        config.answered_by or open_store(config, on_gpu=torch.cuda.is_available()).has_answers()
    ):
        require_vllm()
    run = runs.start_run(config.output, job="score", config=config, inputs=input_paths(config))
    is_here = runs_here(config.ray, is_small=is_small(config))
    on_gpu = torch.cuda.is_available() if is_here else room_on_ray(config)
    store = open_store(config, on_gpu=on_gpu)
    return Scoring(
        run, config, settings, adapter, store, is_here, on_gpu, write_prompts(run, config, settings, is_here)
    )


def is_small(config: ScoreConfig) -> bool:
    """Whether the calling process may do the work: few subjects, and at most one engine, which is not vLLM."""
    is_vllm = config.engine == "vllm" and not config.answered_by
    return not is_vllm and config.actors == 1 and len(chosen_subjects(config)) <= SMALL


def room_on_ray(config: ScoreConfig) -> bool:
    """Connects to Ray; returns whether it has GPUs. ConfigError where the actors would not fit."""
    from raygr.ray_setup import cluster_nodes, connect

    connect()
    nodes = cluster_nodes()
    on_gpu = any(node.gpus >= 1 for node in nodes)
    if not config.answered_by:
        check_room(config, nodes, on_gpu=on_gpu)
    return on_gpu


def input_paths(config: ScoreConfig) -> list[str]:
    """What the run reads; the LLM is part of it, because prompts/ holds tokens of its tokenizer."""
    return [path for path in (config.data, config.aspects, config.adapter, config.llm) if path]


# --- prompts -----------------------------------------------------------------------------------


def write_prompts(run: runs.Run, config: ScoreConfig, settings: PromptSettings, is_here: bool) -> dict[str, Any]:
    """Write and check prompts/, unless an earlier attempt did; return the counts of `check_prompts`."""
    done = files.read_json(run.file(PROMPTS_DONE)) if files.exists(run.file(PROMPTS_DONE)) else {}
    if "cut_tokens_share" in done:  # earlier versions cut prompts without counting it: these are made again
        return done
    runs.remove_parts(run, PROMPTS)
    logger.info("making the prompts of the %s", config.subjects)
    if is_here:
        prompts = chosen_prompts(config.data, settings, chosen_subjects(config))
        files.write_table(prompts, files.join(run.file(PROMPTS), "part-0.parquet"))
    else:
        filesystem, folder = files.arrow_filesystem(run.file(PROMPTS))
        prompts_on_ray(config, settings).write_parquet(folder, filesystem=filesystem)
    has_subjects = files.exists(run.file(PROMPTS))  # without subjects Ray writes no folder
    rows = files.read_table(run.file(PROMPTS), CHECKED_COLUMNS) if has_subjects else PROMPT_SCHEMA.empty_table()
    try:
        counts = check_prompts(rows, data=config.data, settings=settings)
    except ConfigError:
        runs.remove_parts(run, PROMPTS)
        raise
    files.write_json(counts, run.file(PROMPTS_DONE))
    return counts


def prompts_on_ray(config: ScoreConfig, settings: PromptSettings) -> "ray.data.Dataset":
    """PROMPT rows of the chosen items or users, made by Ray's tasks."""
    if config.subjects == "users":
        return user_prompts(config, settings)
    return chosen_rows(read_parquet(files.join(config.data, schema.ITEMS)), "item_index", config).map_batches(
        item_prompts,  # type: ignore[arg-type]  # Ray's types know no function that gets keywords by fn_kwargs
        fn_kwargs={"settings": settings},
        batch_format="pyarrow",
        batch_size=PROMPT_BATCH,
    )


def chosen_rows(rows: "ray.data.Dataset", column: str, config: ScoreConfig) -> "ray.data.Dataset":
    """The rows of the items or users that `max_subjects` or `sample_subjects` chooses; all rows without either."""
    from ray.data.expressions import col

    if not (config.max_subjects or config.sample_subjects):
        return rows
    return rows.filter(expr=col(column).is_in(chosen_subjects(config).tolist()))


def read_parquet(path: str) -> "ray.data.Dataset":
    import ray.data

    filesystem, inner = files.arrow_filesystem(path)
    return ray.data.read_parquet(inner, filesystem=filesystem)


def user_prompts(config: ScoreConfig, settings: PromptSettings) -> "ray.data.Dataset":
    """Prompts from each user's train reviews; later reviews are never read."""
    import ray.data
    from ray.data.expressions import col

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
    reviews: pa.Table, *, settings: PromptSettings, items: "ray.ObjectRef", user_ids: "ray.ObjectRef"
) -> pa.Table:
    """`user_prompt` with the tables that every worker reads from Ray's object store."""
    import ray

    return user_prompt(reviews, settings=settings, items=ray.get(items), user_ids=ray.get(user_ids))


def missing_subjects(run: runs.Run, store: ScoreStore, *, retry_failed: bool, unread: bool = True) -> pa.Array:
    """The first subject of each distinct prompt that the store has no answer to; arguments as of `answered`."""
    digests_N = prompt_hashes(run)
    missing_M = np.flatnonzero(~store.answered(digests_N, retry_failed=retry_failed, unread=unread))
    first = np.unique(digests_N[missing_M], return_index=True)[1]
    # read only now, so that memory never holds the ids beside all that the lookup needs
    subjects = stored_table(run.path, PROMPTS).to_table(columns=["subject_id"])["subject_id"]
    return subjects.take(pa.array(missing_M[np.sort(first)])).combine_chunks()


def prompt_hashes(run: runs.Run) -> np.ndarray:
    """The hashes of the prompts as 32 bytes each, in the order of prompts/."""
    prompts, first = stored_table(run.path, PROMPTS), 0
    digests_N = np.empty(prompts.count_rows(), "S32")
    for rows in prompts.to_batches(columns=["prompt_sha256"]):  # as text they take twice the memory
        digests_N[first : first + len(rows)] = binary_hashes(rows["prompt_sha256"], run.file(PROMPTS))
        first += len(rows)
    return digests_N


# --- answers -----------------------------------------------------------------------------------


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


def write_scores(scoring: Scoring) -> None:
    """Write SCORE rows as parts of at most about PART_ROWS prompts, each of a range of hashes, so that one fits into
    memory; a single part has the order of prompts/. RunError where an answer is missing."""
    run = scoring.run
    runs.remove_parts(run, schema.SCORES)  # of an earlier attempt
    parts = 1 + stored_table(run.path, PROMPTS).count_rows() // PART_ROWS
    for number, (low, high) in enumerate(hash_ranges(parts)):
        files.write_table(
            joined_scores(scoring, low, high), files.join(run.file(schema.SCORES), f"part-{number}.parquet")
        )


def joined_scores(scoring: Scoring, low: str, high: str) -> pa.Table:
    """SCORE rows of the prompts whose hash lies in low <= hash < high, each with the store's answer."""
    run, config = scoring.run, scoring.config
    columns = ["subject_id", "prompt_sha256", "prompt_tokens", "cutoff", "cutoff_position"]
    in_range = (pc.field("prompt_sha256") >= low) & (pc.field("prompt_sha256") < high)
    table = stored_table(run.path, PROMPTS).to_table(columns=columns, filter=in_range)
    answers = scoring.store.read(low, high)
    places = pc.index_in(table["prompt_sha256"], value_set=answers["prompt_sha256"].combine_chunks())
    if places.null_count:
        raise runs.RunError(
            f"{run.path}: {places.null_count} prompts were not scored; run `raygr score` again to resume"
        )
    found = answers.take(places)
    model, mode = config.answered_by or config.llm, answer_mode(config)
    constants = {"model": model, "adapter": config.adapter or "", "mode": mode}
    for name in ("ratings", "expected", "reason", "completion"):
        table = table.append_column(name, found[name])
    for name, value in constants.items():
        once = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(table), np.int32)), pa.array([value]))
        table = table.append_column(name, once)
    return table.select(schema.SCORE_SCHEMA.names).cast(schema.score_schema(scoring.settings.aspects.names))
