"""Send prompts through engine actors: on Ray, or through one in the calling process."""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr import files
from raygr.config import ConfigError
from raygr.execution.console import log_progress
from raygr.execution.in_process import torch_of_a_worker, worker_here
from raygr.score.config import ScoreConfig
from raygr.score.engine import EngineSettings, ScoringActor, ScoringEngine, actor_resources, require_vllm
from raygr.score.store import ScoreStore

if TYPE_CHECKING:
    import ray

    from raygr.ray_setup import Node

logger = logging.getLogger(__name__)

ASKED = ["prompt_ids", "prompt_sha256"]  # the columns of PROMPT rows that an actor reads


class EngineTotals(NamedTuple):
    """Work of the engine actors in this run; zeros where the store had all answers."""

    subjects: int = 0
    tokens_given: int = 0
    tokens_computed: int = 0
    seconds: float = 0.0


def check_room(config: ScoreConfig, nodes: "Sequence[Node]", *, on_gpu: bool) -> None:
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


def ask_engine(
    prompts: str, missing: pa.Array, *, config: ScoreConfig, settings: EngineSettings, store: ScoreStore, is_here: bool
) -> EngineTotals:
    """Has the subjects `missing` of the PROMPT rows in `prompts` answered; the answers go to the store.

    `is_here`: by one actor in the calling process, instead of `actors` on Ray.
    """
    engine: type[ScoringActor] = ScoringEngine
    if config.engine == "vllm":
        require_vllm()
    else:
        from raygr.score.transformers_engine import TransformersEngine as engine  # loads torch's models, for seconds
    each = f" in each of {config.actors} actors" if config.actors > 1 else ""
    device = "GPU" if settings.on_gpu else "CPU"
    how_long = "half a minute or more" if config.engine == "vllm" else "some seconds"
    logger.info("starting %s%s with %s, on the %s: this takes %s", config.engine, each, config.llm, device, how_long)
    answered = answered_here if is_here else answered_on_ray
    totals = EngineTotals()
    for batch in answered(prompts, missing, engine, config, settings, store):
        totals = EngineTotals(
            subjects=totals.subjects + int(batch["subjects"].sum()),
            tokens_given=totals.tokens_given + int(batch["tokens_given"].sum()),
            tokens_computed=totals.tokens_computed + int(batch["tokens_computed"].sum()),
            seconds=totals.seconds + float(batch["engine_seconds"].sum()),
        )
        how_far = (f"score {config.subjects}", totals.subjects, len(missing), config.subjects)
        log_progress(logger, *how_far, seconds=totals.seconds / config.actors)  # without the engines' start
    return totals


def answered_here(
    prompts: str,
    missing: pa.Array,
    engine: type[ScoringActor],
    config: ScoreConfig,
    settings: EngineSettings,
    store: ScoreStore,
) -> Iterator[dict[str, np.ndarray]]:
    """The counters of each batch, answered in the calling process."""
    rows = files.read_table(prompts, columns=["subject_id", *ASKED])
    rows = rows.filter(pc.is_in(rows["subject_id"], value_set=missing)).select(ASKED)
    with torch_of_a_worker(worker_here(use_gpu=settings.on_gpu, threads=None), threads=None):
        actor = engine(settings, store)
        for first in range(0, len(rows), config.batch_size):
            batch = rows.slice(first, config.batch_size)
            yield actor({name: batch[name].to_numpy() for name in ASKED})


def answered_on_ray(
    prompts: str,
    missing: pa.Array,
    engine: type[ScoringActor],
    config: ScoreConfig,
    settings: EngineSettings,
    store: ScoreStore,
) -> Iterator[dict[str, np.ndarray]]:
    """The counters of each batch, answered by actors of Ray Data."""
    import ray.data

    from raygr.ray_setup import cluster_nodes

    # an engine's memory is known and bounded: no warning about it every half minute
    ray.data.DataContext.get_current().issue_detectors_config.detectors = []
    filesystem, folder = files.arrow_filesystem(prompts)
    dataset = (
        ray.data.read_parquet(folder, filesystem=filesystem)
        .select_columns(["subject_id", *ASKED])
        .map_batches(
            keep_subjects,  # type: ignore[arg-type]  # Ray's types know no function that gets keywords by fn_kwargs
            fn_kwargs={"wanted": ray.put(missing)},
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        .repartition(target_num_rows_per_block=config.batch_size)
        .map_batches(
            engine,
            fn_constructor_args=(settings, store),
            batch_size=config.batch_size,
            compute=ray.data.ActorPoolStrategy(size=config.actors),
            **actor_resources(config, [node.cpus for node in cluster_nodes()], on_gpu=settings.on_gpu),
        )
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="numpy")


def keep_subjects(prompts: pa.Table, *, wanted: "ray.ObjectRef") -> pa.Table:
    import ray

    return prompts.filter(pc.is_in(prompts["subject_id"], value_set=ray.get(wanted))).select(ASKED)
