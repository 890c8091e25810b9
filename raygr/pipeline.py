"""Run one stage, or the stages of a pipeline file in their order.

Before the first stage starts, every configuration is checked and a plan made: a stage is finished, to be resumed, to
run, or refused. A stage is finished where its folder holds a run of exactly this configuration on unchanged inputs,
which are not going to be made anew; it is skipped then. A finished or started run that differs is never repeated or
overwritten automatically: the pipeline is refused, with the reason, and nothing starts.
"""

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic_core import to_jsonable_python

from raygr import files, records, runs
from raygr.config import ConfigError, InputPath, PipelineConfig, check_config, input_paths, load_config
from raygr.finetune.config import FinetuneConfig
from raygr.score.config import ScoreConfig
from raygr.stages import STAGES, StageConfig, run_stage
from raygr.train.config import TrainConfig
from raygr.vectors.config import VectorsConfig

logger = logging.getLogger(__name__)

State = Literal["finished, skipped", "unfinished, resumed", "to run", "refused"]
FINISHED: State = "finished, skipped"
RESUMED: State = "unfinished, resumed"
TO_RUN: State = "to run"
REFUSED: State = "refused"
SAMPLED = 128  # subjects whose prompts are made to estimate the tokens of all


class StagePlan(NamedTuple):
    """What will be done with one stage of a pipeline; stages are numbered from 1."""

    number: int
    job: str
    config: Any
    state: State
    note: str
    """Why the stage is refused, or the prompts that it asks an LLM; "" where there is nothing to say."""


# --- run -----------------------------------------------------------------------------------------


def run_alone(job: str, config: Any, run: Callable[[Any], runs.Run] = run_stage, *, force: bool = False) -> str:
    """Return the path of the run that `run` makes of `config`; a finished one is returned as it is.

    RunError where the output holds another run. `force` renames whatever run is there and runs anew.
    """
    if force:
        make_room(job, config)
    elif runs.is_finished(config.output):
        reason = difference(files.RUN_FILE, job, config)
        if reason:
            raise runs.RunError(f"{config.output} is finished {reason}; {way_out(config)}")
        logger.info("already finished: %s", config.output)
        return config.output
    return run(config).path


def make_room(job: str, config: Any) -> None:
    """Rename the output's folder if it holds a finished run, or one that was started with other settings or inputs.

    RunError while another process works in it.
    """
    started = files.exists(files.join(config.output, files.STARTED_FILE)) and runs.has_work(config.output)
    if runs.is_finished(config.output) or (started and difference(files.STARTED_FILE, job, config)):
        runs.check_inputs(config.output, to_jsonable_python(config))
        logger.info("set aside: %s is now %s", config.output, runs.set_aside(config.output, job))


def pipeline(config: PipelineConfig, *, dry_run: bool = False) -> str:
    """Run the stages that are not finished yet, in order; return `outcome`.

    `dry_run` prints the plan and stops there.
    """
    started = time.time()
    stages = [checked_stage(number, entry) for number, entry in enumerate(config.stages, start=1)]
    if dry_run:
        plans = plan_stages(stages)
        print("\n".join(plan_lines(plans)))
        check_plan(plans)
        return ""
    run_stages(stages)
    logger.info("pipeline done in %.0f s, last output: %s", time.time() - started, stages[-1][1].output)
    return outcome(stages)


def outcome(stages: Sequence[tuple[str, StageConfig]]) -> str:
    """Return the table of each comparison that was made, and the address of each report."""
    from raygr.compare.comparison import read_comparison  # numpy, which plans do without
    from raygr.compare.tables import terminal_table

    found = ""
    for job, config in stages:
        if job == "compare":
            found += f"\n{terminal_table(read_comparison(config.output))}\n"
        if job == "report":
            page = files.join(config.output, "report.html")
            found += f"\nreport: {page if '://' in page else Path(page).as_uri()}\n"
    return found


def run_stages(stages: Sequence[tuple[str, StageConfig]], *, at_once: int = 1, gpu_share: float = 1.0) -> None:
    """Run each (stage name, configuration) that is not finished yet, in order.

    `at_once` train runs in a row run at the same time, with `gpu_share` of a GPU for each worker. RunError before
    anything starts where a stage is refused.
    """
    plans = plan_stages(stages)
    for line in plan_lines(plans):
        logger.info("plan: %s", line)
    check_plan(plans)
    unfinished = [plan for plan in plans if plan.state != FINISHED]
    for job, group in itertools.groupby(unfinished, key=lambda plan: plan.job):
        configs = [plan.config for plan in group]
        if job == "train":
            train_side_by_side(configs, at_once=at_once, gpu_share=gpu_share)
            continue
        for config in configs:
            run_logged(job, config, run_stage)


def train_side_by_side(configs: Sequence[TrainConfig], *, at_once: int, gpu_share: float) -> None:
    from raygr.train.stage import train, train_all  # torch and Ray, which plans do without

    placed = partial(train, at_once=at_once, gpu_share=gpu_share)
    train_all(lambda config: run_logged("train", config, placed), configs, at_once)


def run_logged(job: str, config: StageConfig, run: Callable[[Any], runs.Run]) -> None:
    begun = time.time()
    logger.info("%-9s %s", job, config.output)
    run(config)
    logger.info("%-9s %s done in %.0f s", job, config.output, time.time() - begun)


def checked_stage(number: int, entry: Mapping[str, Any]) -> tuple[str, StageConfig]:
    """Return name and configuration of one entry such as `- prepare: {output: ...}`; ConfigError names the entry."""
    if len(entry) != 1 or next(iter(entry)) not in STAGES:
        found = ", ".join(map(str, entry))
        raise ConfigError(
            f"stage {number}: expected one of {', '.join(STAGES)}, found {found}; "
            'a stage is "- train: {output: ...}", its settings indented below the name'
        )
    [(job, settings)] = entry.items()
    if isinstance(settings, str):
        return job, load_config(STAGES[job], settings, [])
    return job, check_config(STAGES[job], settings, source=f"stage {number} ({job})")


# --- plan ----------------------------------------------------------------------------------------


def plan_stages(stages: Sequence[tuple[str, Any]]) -> list[StagePlan]:
    """Return the plan of each (stage name, configuration), in order. Reads what is there and writes nothing."""
    plans: list[StagePlan] = []
    for number, (job, config) in enumerate(stages, start=1):
        made = [plan for plan in plans if plan.state != FINISHED]
        state, note = stage_state(job, config, made)
        twin = next((plan for plan in plans if plan.config.output == config.output), None)
        if twin:
            state, note = REFUSED, f"stage {twin.number} ({twin.job}) has the same output"
        if state in (RESUMED, TO_RUN):
            state, note = with_prompts(config, state, made)
        plans.append(StagePlan(number, job, config, state, note))
    return plans


def stage_state(job: str, config: Any, made: Sequence[StagePlan]) -> tuple[State, str]:
    """Return the state of a stage that follows those in `made`, and the reason of a refusal."""
    settings = to_jsonable_python(config)
    try:
        runs.check_output(config.output)
        runs.check_inputs(config.output, settings)
        if runs.is_finished(config.output):
            reason = difference(files.RUN_FILE, job, config, made)
            return (REFUSED, f"finished {reason}; {way_out(config)}") if reason else (FINISHED, "")
        wrong = [problem for given in input_paths(config) if (problem := input_problem(given, made))]
        if wrong:
            return REFUSED, "; ".join(wrong)
        if not files.exists(files.join(config.output, files.STARTED_FILE)) or not runs.has_work(config.output):
            runs.check_folder(config.output, job, settings, runs.speed_fields(config))
            return TO_RUN, ""
    except runs.RunError as error:
        return REFUSED, str(error)
    reason = difference(files.STARTED_FILE, job, config, made)
    return (REFUSED, f"started {reason}; {way_out(config)}") if reason else (RESUMED, "")


def input_problem(given: InputPath, made: Sequence[StagePlan]) -> str:
    """Say what is wrong with an input: missing, unfinished, or of another kind; "" where nothing is."""
    field, path, kind = given
    subjects = kind.subjects and f"scores of {kind.subjects}"
    one = maker(path, made)
    if one:
        is_run = one.config.output.rstrip("/") == path.rstrip("/")
        readout = one.config.readout if isinstance(one.config, VectorsConfig) else None
        if is_run and kind.job and kind.job not in (one.job, records.output_of(one.job, readout)):
            return f"{field}: {path} is the output of stage {one.number} ({one.job}): name one of `{kind.job}` here"
        if is_run and subjects and one.config.subjects != kind.subjects:
            return f"{field}: stage {one.number} makes scores of {one.config.subjects}: name {subjects} here"
        return ""
    filesystem, inner = files.filesystem_of(path)
    if not filesystem.exists(inner) and not (kind.pattern and filesystem.glob(inner)):
        return f"{field}: {path} is not there, and no earlier stage makes it"
    is_run = runs.is_finished(path) or files.exists(files.join(path, files.STARTED_FILE))
    if not kind.job or (kind.or_other and not is_run):
        return ""
    try:
        record = runs.read_run(path, job=kind.job)
    except runs.RunError as error:
        return f"{field}: {error}"
    is_other = subjects and record.config["subjects"] != kind.subjects
    return f"{field}: {path} has scores of {record.config['subjects']}: name {subjects} here" if is_other else ""


def maker(path: str, made: Sequence[StagePlan]) -> StagePlan | None:
    """Return the stage that is going to write `path`, or the folder that `path` lies in."""
    return next((one for one in made if f"{path.rstrip('/')}/".startswith(files.join(one.config.output, ""))), None)


def difference(file: str, job: str, config: Any, made: Sequence[StagePlan] = ()) -> str:
    """Say how this stage differs from the one that left run.json or started.json in its folder; "" if it does not."""
    inputs = records.read_record(config.output, file).inputs
    anew = {path: found for path in inputs if (found := maker(path, made))}
    if anew:
        texts = [f"{path}, which stage {one.number} ({one.job}) makes anew" for path, one in anew.items()]
        return f"from {' and '.join(texts)}"
    return records.unlike(config.output, file, job, to_jsonable_python(config), runs.speed_fields(config))


def way_out(config: Any) -> str:
    hint = "rename the folder to redo it, as --force of a single stage does, or name another output"
    own_store = isinstance(config, ScoreConfig) and config.store is None and files.join(config.output, "store")
    if own_store and files.exists(own_store):
        return f"{hint} (the LLM's answers are in {own_store}: move it out and set `store` to it to keep them)"
    return hint


def plan_lines(plans: Sequence[StagePlan]) -> list[str]:
    """Return one line of text per stage."""
    return [
        f"{plan.number:>2}  {plan.job:<9}  {plan.state:<19}  {plan.config.output}" + (plan.note and f": {plan.note}")
        for plan in plans
    ]


def check_plan(plans: Sequence[StagePlan]) -> None:
    """RunError with every refused stage and its reason."""
    refused = [
        f"\n  stage {plan.number} ({plan.job}), {plan.config.output}: {plan.note}"
        for plan in plans
        if plan.state == REFUSED
    ]
    if refused:
        raise runs.RunError(f"{len(refused)} of {len(plans)} stages are refused, none was started:{''.join(refused)}")


# --- prompts -------------------------------------------------------------------------------------


def with_prompts(config: Any, state: State, made: Sequence[StagePlan]) -> tuple[State, str]:
    """Return the state with the prompts that the stage asks an LLM; refused where they cannot be made."""
    if not isinstance(config, ScoreConfig | FinetuneConfig | VectorsConfig):
        return state, ""
    unknown = maker(config.data, made) or maker(config.aspects, made)
    if unknown:
        return state, f"prompts are known after stage {unknown.number} ({unknown.job})"
    try:
        return state, prompts_to_ask(config, made)
    except (ConfigError, runs.RunError, ValueError, OSError) as error:  # also a model that cannot be loaded
        return REFUSED, str(error)


def prompts_to_ask(config: ScoreConfig | FinetuneConfig | VectorsConfig, made: Sequence[StagePlan]) -> str:
    """Say how many prompts the stage asks and their tokens, without those that the score store has answers to.

    Above SAMPLED subjects both are estimated from the prompts of as many. A fine-tune's prompts are a little shorter.
    For `engine: http` the longest answers and the cost at the given prices are told, too.
    """
    # tokenizers and torch, which a plan without prompts does without
    import numpy as np
    import pyarrow as pa
    import torch

    from raygr.score.adapters import fitting_adapter
    from raygr.score.external_llm import request_fields
    from raygr.score.store import binary_hashes, open_store
    from raygr.score.subjects import chosen_prompts, chosen_subjects, prompt_settings, subjects_of

    store = None
    match config:
        case ScoreConfig():
            subjects, fraction, chosen = config.subjects, config.cutoff_fraction, chosen_subjects(config)
        case FinetuneConfig():
            subjects, fraction = config.subjects, 1.0
            chosen = subjects_of(config.data, subjects, config.max_users)
        case VectorsConfig():
            subjects, fraction, chosen = "items", 1.0, subjects_of(config.data, "items", None)
    settings = prompt_settings(config, subjects, cutoff_fraction=fraction)
    # an adapter that an earlier stage is yet to tune has no answers
    if isinstance(config, ScoreConfig) and not (config.adapter and maker(config.adapter, made)):
        if config.adapter:
            fitting_adapter(config, settings)
        store = open_store(config, on_gpu=torch.cuda.is_available())
    drawn = np.random.default_rng(0).permutation(chosen)[:SAMPLED]
    rows = chosen_prompts(config.data, settings, drawn)
    if isinstance(config, ScoreConfig) and store:
        hashes_N = binary_hashes(rows["prompt_sha256"], config.output)
        rows = rows.filter(pa.array(~store.answered(hashes_N, retry_failed=config.retry_failed)))
    # equal prompts are asked once
    asked = dict(zip(rows["prompt_sha256"].to_pylist(), rows["prompt_tokens"].to_pylist(), strict=True)).values()
    share = len(chosen) / max(1, len(drawn))
    prompts, tokens = round(len(asked) * share), round(sum(asked) * share)
    about = "about " if len(drawn) < len(chosen) else ""
    every = " in each pass" if isinstance(config, FinetuneConfig) else ""
    text = f"{len(chosen):,} {subjects}: {about}{prompts:,} prompts to ask{every}, {tokens:,} tokens"
    if not isinstance(config, ScoreConfig) or config.engine != "http":
        return text
    samples = config.http.samples
    written = prompts * samples * request_fields(config, settings).max_tokens
    cost = config.http.cost(tokens * samples, written)
    return f"{text}, at most {written:,} tokens of answers" + (
        f", at most {cost:,.2f} at the given prices" if cost else ""
    )
