"""The sweep stage: a search space over train settings -> a train run per trial, and the files of results.py.

The train runs are in trials/. Those of a small sweep run one after the other in the calling process, all others on Ray
Tune: a trial is a Tune function that trains in its own process and reports every evaluation, and Tune's own files are
in tune/. A killed sweep is resumed by running it again: the trials that had not ended resume from the checkpoints of
their train runs.
"""

import dataclasses
import logging
import os
import re
import signal
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from raygr import files, locks, runs
from raygr.config import ConfigError, input_paths
from raygr.execution.console import log_progress
from raygr.execution.distributed import begin_process, slots, wants_gpu, worker_cpus
from raygr.execution.in_process import runs_here
from raygr.execution.loggers import check_loggers
from raygr.ray_setup import cluster_nodes, connect
from raygr.sweep.config import SweepConfig, ValueRange, needs_ray
from raygr.sweep.results import Ended, epoch_lines, write_results
from raygr.sweep.space import TRIALS, Point, listed_values, search_points, train_config, with_absolute_paths
from raygr.train.config import TrainConfig
from raygr.train.loop import CHOSEN_BY
from raygr.train.stage import BEST, SMALL, evaluated, train, training_size

logger = logging.getLogger(__name__)

TUNE = "tune"
AT_ONCE = "at_once.json"
PARAMETERS = "params.json"  # in Tune's folder of a trial
LONGEST_NAME = 120
# Switches off Tune's own tables and tracebacks; Tune reads these variables when it starts.
QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"}


def sweep(config: SweepConfig) -> runs.Run:
    """Trains one run per point and chooses the best by validation; only the best one's test metrics are read."""
    runs.check_unfinished(config.output)
    config = with_absolute_paths(config)
    points = search_points(config)
    trained = [train_config(config, point, name="") for point in points]  # refuses wrong points before any work
    check_loggers(trained[0].loggers)
    is_small = not needs_ray(config) and sum(map(training_size, trained)) <= SMALL
    if runs_here(config.ray, is_small=is_small):
        run = runs.start_run(config.output, job="sweep", config=config)
        ended = []
        for number, point in enumerate(points):
            log_progress(logger, "sweep", number, len(points), "trials")
            ended.append(trial_here(config, number, point))
        log_progress(logger, "sweep", len(points), len(points), "trials")
    else:
        run, ended = trials_on_tune(config, points, trained[0])
    counts = write_results(config, run, ended)
    used = {given.path for one in trained for given in input_paths(one)}
    runs.finish_run(run, inputs=sorted(used), counts=counts)
    return run


def trial_here(config: SweepConfig, number: int, point: Point) -> Ended:
    """Trains one trial in the calling process, again where it fails, unless an earlier attempt has finished it."""
    trial = dataclasses.replace(train_config(config, point, name=trial_name(number, point)), ray="never")
    failure = None
    for _ in range(0 if runs.is_finished(trial.output) else config.max_failures + 1):
        try:
            train(trial)
            return Ended(trial.output, point, None)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        finally:
            locks.unlock(trial.output)
    return Ended(trial.output, point, failure)


def trials_on_tune(config: SweepConfig, points: list[Point], shared: TrainConfig) -> tuple[runs.Run, list[Ended]]:
    """Starts the sweep's run and its trials, whose threads are those of `shared`."""
    if config.search == "tpe":
        check_optuna()
    connect()
    trials = config.trials or len(points)
    room = trial_room(config, shared)
    run = runs.start_run(config.output, job="sweep", config=config)
    logger.info("sweep: %d trials, %d at a time", trials, room.at_once)
    settings = tune.TuneConfig(
        metric=BEST,
        mode="max",
        search_alg=search_algorithm(config, points, room.at_once),
        scheduler=scheduler(config),
        num_samples=trials,
        trial_name_creator=tune_trial_name,
        trial_dirname_creator=tune_trial_name,
    )
    tuner = started_tuner(config, settings, room, callbacks=[LogsTrials(trials)])
    on_interrupt = signal.getsignal(signal.SIGINT)
    ended = ended_trials(config, tuner.fit(), expected=trials)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, on_interrupt)  # Tune's own handler would hide Ctrl-C from a later stage
    return run, ended


def check_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise ConfigError("search: tpe needs Optuna: pip install 'raygr[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def search_algorithm(config: SweepConfig, points: list[Point], at_once: int) -> SearchAlgorithm | Searcher:
    """Proposes the trials' points and limits how many run at a time, because TuneConfig limits only a Searcher."""
    if config.search == "tpe":
        return ConcurrencyLimiter(OptunaSearch(metric=BEST, mode="max", seed=config.seed), max_concurrent=at_once)
    return BasicVariantGenerator(points_to_evaluate=[dict(point) for point in points], max_concurrent=at_once)


def tune_space(config: SweepConfig) -> dict[str, Any]:
    """The domains that TPE draws from; only names for grid and random, whose points are given."""
    if config.search != "tpe":
        return dict.fromkeys(config.space)
    return {name: tune_domain(config, name) for name in config.space}


def tune_domain(config: SweepConfig, name: str) -> tune.search.sample.Domain:
    match config.space[name]:
        case ValueRange(low=int(low), high=int(high), log=log):
            return tune.lograndint(low, high + 1) if log else tune.randint(low, high + 1)
        case ValueRange(low=low, high=high, log=log):
            return tune.loguniform(low, high) if log else tune.uniform(low, high)
        case _:
            return tune.choice(listed_values(config, name))


def scheduler(config: SweepConfig) -> TrialScheduler:
    if not config.stop_early:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        grace_period=config.grace_epochs,
        reduction_factor=config.reduction_factor,
        max_t=10**6,  # not the trials' epochs, because a trial evaluates its test part after the last epoch
    )


class Room(NamedTuple):
    """How many trials run side by side, and the resources that each reserves."""

    at_once: int
    each: dict[str, float]


def trial_room(config: SweepConfig, shared: TrainConfig) -> Room:
    """The room that the cluster has for trials; ConfigError if not even one fits."""
    on_gpu = wants_gpu(1, shared.use_gpu, config.gpu_share, threads=shared.threads)
    share = config.gpu_share if on_gpu else None
    fitting = slots(cluster_nodes(), shared.threads or 1, share)
    at_once = min(fitting, config.max_concurrent_trials or fitting)
    cpus = worker_cpus(1, shared.threads, gpu_share=share, at_once=at_once)
    return Room(at_once, {"CPU": cpus} | ({"GPU": share} if share else {}))


def started_tuner(
    config: SweepConfig, settings: tune.TuneConfig, room: Room, *, callbacks: list[tune.Callback]
) -> tune.Tuner:
    """A new experiment, or the restored one of an earlier attempt in this folder."""
    os.environ.update(QUIET)
    trainable = tune.with_resources(tune.with_parameters(run_trial, sweep_config=config), room.each)
    folder = files.join(config.output, TUNE)
    filesystem, storage = files.arrow_filesystem(config.output)
    experiment = files.join(storage, TUNE)
    if tune.Tuner.can_restore(experiment, storage_filesystem=filesystem):
        check_room(config, room.at_once)
        logger.info("sweep: goes on with the trials of %s that had not ended", folder)
        return tune.Tuner.restore(experiment, trainable, resume_unfinished=True, storage_filesystem=filesystem)
    files.write_json(room.at_once, files.join(folder, AT_ONCE))
    return tune.Tuner(
        trainable,
        param_space=tune_space(config),
        tune_config=settings,
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=storage,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            callbacks=callbacks,
            verbose=0,
        ),
    )


def check_room(config: SweepConfig, at_once: int) -> None:
    """ConfigError if the cluster has shrunk: a restored Tune runs as many trials at a time as before."""
    folder = files.join(config.output, TUNE)
    before = files.read_json(files.join(folder, AT_ONCE))
    if at_once < before:
        raise ConfigError(
            f"{config.output} was started with {before} trials at a time, and Ray has room for {at_once} now: provide "
            f"as many CPUs as then, or delete {folder} (finished train runs are kept)"
        )


def trial_name(number: int, point: Point) -> str:
    """Folder name of a trial: its number and its point, without characters that a shell or YAML would interpret."""
    text = "_".join(f"{name}={value}" for name, value in point.items())
    return f"{number:04}_{re.sub(r'[^a-zA-Z0-9_.=+-]+', '-', text)[:LONGEST_NAME]}"


def tune_trial_name(trial: Trial) -> str:
    return trial_name(int(trial.experiment_tag.partition("_")[0]), trial.config)


def run_trial(point: Point, *, sweep_config: SweepConfig) -> None:
    """The Tune function: one train run, which an earlier attempt may have finished without telling Tune."""
    config = train_config(sweep_config, point, name=tune.get_context().get_trial_name())
    if runs.is_finished(config.output):
        lines = [line for line in epoch_lines(config.output) if "validation" in line]
        tune.report(evaluated(lines, best=max(line["validation"][CHOSEN_BY] for line in lines)))
        return
    try:
        train(dataclasses.replace(config, ray="never", threads=begin_process()), report=tune.report)
    finally:
        locks.unlock(config.output)  # the next attempt may start while this process is ending


class LogsTrials(tune.Callback):
    """Logs how many of all trials have ended."""

    def __init__(self, trials: int) -> None:
        self.trials, self.ended = trials, 0

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.ended += 1
        log_progress(logger, "sweep", self.ended, self.trials, "trials")

    on_trial_error = on_trial_complete


def ended_trials(config: SweepConfig, results: tune.ResultGrid, *, expected: int) -> list[Ended]:
    """All trials by folder name; RunError if some have not ended because the sweep was interrupted."""
    if results.num_terminated + results.num_errors < expected:
        raise runs.RunError(f"{config.output}: interrupted; run the sweep again to go on with the remaining trials")
    ended = []
    for result in (results[place] for place in range(len(results))):
        name = os.path.basename(result.path)
        point: Mapping[str, Any] = files.read_json(files.join(config.output, f"{TUNE}/{name}/{PARAMETERS}"))
        run = files.join(files.join(config.output, TRIALS), name)
        ended.append(Ended(run, point, str(result.error).strip() if result.error else None))
    return sorted(ended)
