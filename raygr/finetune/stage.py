"""The finetune stage: prepare run + item scores -> adapter/, steps.jsonl, evaluations.json and .parquet.

With `subjects: items` also metrics.json, the held-out items' agreement with the teacher before and after.

The driver reads and checks all inputs once. Then the loop of loop.py runs in the calling process, or in one or more
workers of Ray Train. After a worker is killed, or when an unfinished run is started again, tuning continues from the
last checkpoint.
"""

import copy
import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from raygr import files, runs
from raygr.config import ConfigError
from raygr.execution.in_process import (
    Worker,
    last_checkpoint,
    remove_checkpoint,
    runs_here,
    save_checkpoint,
    torch_of_a_worker,
    worker_here,
)
from raygr.execution.loggers import Loggers, Point, check_loggers
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import PROFILE, TuningData, load_tuning_data
from raygr.finetune.loop import Tuning, checkpoint_state, restore, start_tuning, tune
from raygr.finetune.lora import check_start, save_adapter
from raygr.finetune.metrics import keep_best_by
from raygr.finetune.policy import load_adapter_state
from raygr.finetune.rewards import Reward
from raygr.finetune.teaching import load_taught_items, teach
from raygr.models.workers import Share
from raygr.schema import EVALUATIONS, HELD_OUT_EVALUATIONS, METRICS, STEPS
from raygr.score.adapters import ADAPTER, AdapterNote, adapter_folder, model_sha256
from raygr.score.default_model import model_folder
from raygr.score.prompts import prompt_sha256
from raygr.score.subjects import encoder_of, prompt_settings

logger = logging.getLogger(__name__)

WATCHED_EVERY = 2.0  # seconds; steps are long here, and watching takes time on the cores that the workers use
SMALL = 2000  # prompts times epochs, minutes for a small LLM: above it Ray's restart of a killed worker pays


def finetune(config: FinetuneConfig, *, reward: Reward | None = None) -> runs.Run:
    """Tunes one LoRA adapter and keeps the best one by the held-out metric of `keep_best_by`.

    `reward` replaces the task's reward by your own function. It is called for one user at a time as
    `reward(user_GA, items_CA, relevant_C)` with tensors on the CPU and returns a float tensor of shape (G,): one reward
    in [-1, 1] for each of the user's G completions.

    user_GA     float64, (G, A): each completion's ratings of the A aspects, standardised by the mean and standard
                deviation of sampled ratings of training users. A rating that was not read is 0, so a row may be all
                zeros, and its reward must be finite too.
    items_CA    float64, (C, A): the scores of C items, standardised per aspect over all items; a missing score is 0.
    relevant_C  bool, (C,). task: base has `candidate_items` + 1 items, and item 0, the next item of the user, is the
                relevant one. task: classification has the `keep_out` items kept out of the prompt, and the liked ones
                are relevant.

    G is not always `completions`: it is 1 in evaluations, and larger with `per_aspect_credit`, where rows are changed
    copies of completions. Any other result is refused with a ValueError that names the user. The workers must be able
    to import the function's module.

    Returns the finished run; ConfigError where inputs or settings do not fit together.
    """
    if reward and config.subjects == "items":
        raise ConfigError("reward: a function has no effect on subjects: items, which learn item_scores by SFT alone")
    runs.check_unfinished(config.output)
    check_loggers(config.loggers)
    note = adapter_note(config)
    on_workers = with_absolute_paths(config)
    if on_workers.adapter:
        check_start(config, on_workers.adapter, note)
    own = {"reward": f"{reward.__module__}.{reward.__qualname__}"} if reward else {}
    data = load_taught_items(config) if config.subjects == "items" else load_tuning_data(config)
    logger.info("finetune: %s %s", config.subjects, json.dumps(data.counts))
    is_small = config.workers == 1 and len(data.train) * (config.epochs + config.warm_start_epochs) <= SMALL
    prepare_loop = loop_here if runs_here(config.ray, is_small=is_small) else loop_on_ray
    run_loop = prepare_loop(on_workers, data, reward, note)
    teacher = None if config.teacher == PROFILE else config.teacher
    read = [config.data, config.item_scores, config.aspects, config.adapter, teacher, config.llm]
    used = [path for path in read if path]
    run = runs.start_run(config.output, job="finetune", config=config, inputs=used)
    run_loop(run)
    steps = files.read_json(run.file(EVALUATIONS))
    warn_if_untouched(config, steps["best_step"])
    counts = {config.subjects: data.counts, "steps": steps["steps"], "best_step": steps["best_step"]} | own
    runs.finish_run(run, inputs=used, counts=counts)
    remove_checkpoint(run.path)
    return run


def loop_here(
    config: FinetuneConfig, data: TuningData, reward: Reward | None, note: AdapterNote
) -> Callable[[runs.Run], None]:
    """Checks the room; returns what tunes in the calling process."""
    worker = worker_here(config.use_gpu, config.threads)

    def run_loop(run: runs.Run) -> None:
        with torch_of_a_worker(worker, config.threads):
            tune_and_write(config, data, reward, note, worker)

    return run_loop


def loop_on_ray(
    config: FinetuneConfig, data: TuningData, reward: Reward | None, note: AdapterNote
) -> Callable[[runs.Run], None]:
    """Checks the room; returns what tunes in workers of Ray Train."""
    import ray

    from raygr.execution.distributed import reserve_workers, run_workers

    placed = reserve_workers(config.workers, config.use_gpu, config.threads)
    settings = {"config": config, "data": ray.put(data), "reward": reward, "note": note}
    return lambda run: run_workers(tune_per_worker, settings, run, placed=placed, watched_every=WATCHED_EVERY)


def warn_if_untouched(config: FinetuneConfig, best_step: int) -> None:
    """Warns where a fresh adapter was best before its first step: it changes no score, and scoring refuses it."""
    if best_step == 0 and not config.warm_start_epochs and not config.adapter:
        logger.warning(
            "finetune: no evaluation's held-out %s was above the bare model's, so %s/%s is the untouched adapter, "
            "which changes no score: score without it, or tune again with %smore epochs or another learning_rate",
            keep_best_by(config),
            config.output,
            ADAPTER,
            "" if config.subjects == "items" else "an SFT warm-up (teacher, warm_start_epochs), ",
        )


def with_absolute_paths(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration for Ray Train's workers, which run in another folder; a hub name stays as it is."""
    model = files.absolute(config.llm) if files.exists(config.llm) else config.llm
    adapter = config.adapter and adapter_folder(config.adapter)
    return dataclasses.replace(config, output=files.absolute(config.output), llm=model, adapter=adapter)


def adapter_note(config: FinetuneConfig) -> AdapterNote:
    """The adapter's note without the normalisation, which is fitted later."""
    settings = prompt_settings(config, config.subjects)
    assert config.rollouts is not None
    return AdapterNote(
        subjects=config.subjects,
        shared_prompt_sha256=prompt_sha256(encoder_of(settings).shared),
        rollouts=config.rollouts,
        model=config.llm,
        model_sha256=model_sha256(config.llm),
        aspects=settings.aspects.names,
        normalisation={},
    )


def tune_per_worker(settings: dict[str, Any], worker: Worker) -> None:
    """The function that every Ray Train worker runs."""
    import ray

    data = copy.deepcopy(ray.get(settings["data"]))  # because Ray's arrays are read-only
    tune_and_write(settings["config"], data, settings["reward"], settings["note"], worker)


def tune_and_write(
    config: FinetuneConfig, data: TuningData, reward: Reward | None, note: AdapterNote, worker: Worker
) -> None:
    """Tunes from the last checkpoint on. Rank 0 writes the run's files."""
    share = Share(worker.rank, worker.workers)
    data = data._replace(model=model_folder(config.llm))  # the model's folder may be another one on this machine
    tuning = start_tuning(config, data, worker.device, share, reward)
    state = last_checkpoint(config.output, tuning.device)
    if state is not None:
        restore(tuning, state)
        steps = (tuning.progress.sft_step, tuning.progress.step)
        logger.info("resumed after %d steps of SFT warm-up and %d of reinforcement learning", *steps)
    loggers, logged = None, {"steps": len(tuning.progress.lines), "held_out": len(tuning.progress.evaluations)}
    if share.rank == 0:
        loggers = Loggers(config.loggers, config.output, vars(config), logged=logged)
    for is_checkpoint in (teach if config.subjects == "items" else tune)(tuning):
        if not is_checkpoint:
            continue
        if loggers:
            write_progress(tuning)
            log_curves(loggers, tuning)
            save_checkpoint(checkpoint_state(tuning), config.output)
        worker.report({"step": tuning.progress.step, **tuning.progress.evaluations[-1]["metrics"]})
    if loggers:
        write_progress(tuning)
        log_curves(loggers, tuning)
        loggers.close()
        load_adapter_state(tuning.model, tuning.best_adapter)
        log_agreement(tuning)
        note = dataclasses.replace(note, normalisation=dataclasses.asdict(tuning.progress.normalisation))
        save_adapter(tuning.model, note, files.join(config.output, ADAPTER))


def log_curves(loggers: Loggers, tuning: Tuning) -> None:
    """Logs the figures of each step by its stage, and the metrics of the held-out users or items."""
    now = time.time()
    steps = []
    for line in tuning.progress.lines:
        flat = line | {f"loss_{name}": value for name, value in line.get("losses", {}).items()}
        steps.append(Point(line["step"], numbers(flat, line["stage"]), now))
    evaluations = tuning.progress.evaluations
    loggers.write("steps", steps)
    loggers.write("held_out", [Point(one["step"], numbers(one["metrics"], "held_out"), now) for one in evaluations])


def numbers(figures: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The figures that are numbers, but the step."""
    return {
        f"{prefix}/{name}": value
        for name, value in figures.items()
        if isinstance(value, int | float) and name != "step"
    }


def write_progress(tuning: Tuning) -> None:
    """Writes steps.jsonl, and the evaluations as means over the held-out users or items, and of each."""
    output, progress = tuning.config.output, tuning.progress
    lines = "".join(json.dumps(finite(line)) + "\n" for line in progress.lines)
    files.write_text(lines, files.join(output, STEPS))
    record = {
        "steps": progress.step,
        "warm_steps": progress.sft_step,
        "best_step": progress.best_step,
        "held_out": len(tuning.data.held_out),
        "evaluations": [
            {"stage": one["stage"], "step": one["step"], "metrics": finite(one["metrics"])}
            for one in progress.evaluations
        ],
    }
    files.write_json(record, files.join(output, EVALUATIONS))
    files.write_table(evaluation_table(tuning), files.join(output, HELD_OUT_EVALUATIONS))
    if tuning.config.subjects == "items":
        before, after = before_and_after(tuning)
        agreed = {"before": before["aspects"], "after": after["aspects"]}
        means = {"mean_before": before["metrics"], "mean_after": after["metrics"]}
        sizes = {"taught": len(tuning.data.train), "held_out": len(tuning.data.held_out)}
        files.write_json(sizes | means | agreed, files.join(output, METRICS))


def before_and_after(tuning: Tuning) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first evaluation, and that of the best step."""
    evaluations, best = tuning.progress.evaluations, tuning.progress.best_step
    return evaluations[0], next(one for one in reversed(evaluations) if one["step"] == best)


def log_agreement(tuning: Tuning) -> None:
    """Prints how well the held-out items' scores agree with the teacher's, per aspect, before and after."""
    if tuning.config.subjects != "items":
        return
    before, after = before_and_after(tuning)
    size = len(tuning.data.held_out)
    logger.info("%d held-out items, before -> after step %d:", size, tuning.progress.best_step)
    pairs = [(name, before["aspects"][name], after["aspects"][name]) for name in tuning.data.names]
    for name, old, new in [*pairs, ("mean", before["metrics"], after["metrics"])]:
        logger.info(
            "  %s: Spearman %s -> %s, error %s -> %s (mean guess %s), bias %s -> %s, slope %s -> %s",
            name,
            *(f"{value:.2f}" if value is not None else "none" for value in (
                old["spearman"], new["spearman"], old["mean_absolute_error"], new["mean_absolute_error"],
                new["mean_guess_error"], old["bias"], new["bias"], old["slope"], new["slope"],
            )),
        )  # fmt: skip


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinities, which JSON does not have, by None."""
    return {n: None if isinstance(value, float) and not math.isfinite(value) else value for n, value in values.items()}


def evaluation_table(tuning: Tuning) -> pa.Table:
    """One row per evaluation and held-out user or item.

    Of a user the metrics, null where one has no value; of an item the expected and the teacher's score of each aspect.
    """
    held_out, kind = tuning.data.held_out, tuning.config.subjects.removesuffix("s")
    tables = []
    for one in tuning.progress.evaluations:
        columns = {
            "stage": [one["stage"]] * len(held_out),
            "step": pa.array([one["step"]] * len(held_out), pa.int32()),
            f"{kind}_index": pa.array([example.user_index for example in held_out], pa.int32()),
            f"{kind}_id": [example.user_id for example in held_out],
        }
        if kind == "user":
            metrics = {name: pa.array(values, pa.float32()) for name, values in one["users"].items()}
        else:
            scores = {"expected": one["expected"], "teacher": [example.teacher_A for example in held_out]}
            metrics = {name: pa.array(list(rows), pa.list_(pa.float32())) for name, rows in scores.items()}
        tables.append(pa.table(columns | metrics))
    return pa.concat_tables(tables)
