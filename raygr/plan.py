"""What a pipeline would do: the state of every stage, and the prompts and tokens of those that ask an LLM.

A stage is finished where its folder holds a run of just this configuration on the inputs as they are and stay. One that
is finished or was started otherwise is refused: nothing is ever done again, or over, unasked.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic_core import to_jsonable_python

from raygr import files, records, runs
from raygr.compare.config import CompareConfig
from raygr.config import ConfigError
from raygr.finetune.config import FinetuneConfig
from raygr.score.config import ScoreConfig
from raygr.vectors.config import VectorsConfig

State = Literal["finished, skipped", "unfinished, resumed", "to run", "refused"]
FINISHED, RESUMED, TO_RUN, REFUSED = "finished, skipped", "unfinished, resumed", "to run", "refused"

# Fields of any job that name a file or a run folder which must be there, or be made by an earlier stage.
INPUT_FIELDS = ("data", "train", "aspects", "item_scores", "user_score_run", "adapter", "comparison")
# What may be wrong with a stage's inputs, a model's folder or name among them.
INPUT_ERRORS = (ConfigError, runs.RunError, ValueError, OSError)


class StagePlan(NamedTuple):
    """One stage of a pipeline, numbered from 1."""

    number: int
    job: str
    config: Any
    state: State
    note: str
    """Why it is refused, or what it would ask an LLM; "" where there is nothing to say."""


class Made(NamedTuple):
    """What an earlier stage of the same pipeline is going to write."""

    output: str
    number: int
    job: str


def plan_stages(stages: Sequence[tuple[str, Any]]) -> list[StagePlan]:
    """`stages` are jobs with their configurations, in order. Reads what is there; starts and writes nothing."""
    plans: list[StagePlan] = []
    made: list[Made] = []
    for number, (job, config) in enumerate(stages, start=1):
        state, note = stage_state(job, config, made)
        twin = next((plan for plan in plans if plan.config.output == config.output), None)
        if twin:
            state, note = REFUSED, f"stage {twin.number} ({twin.job}) has the same output"
        if state in (RESUMED, TO_RUN):
            state, note = with_estimate(config, state, made)
        if state != FINISHED:
            made.append(Made(config.output.rstrip("/"), number, job))
        plans.append(StagePlan(number, job, config, state, note))
    return plans


def stage_state(job: str, config: Any, made: Sequence[Made]) -> tuple[State, str]:
    """State of a stage after those that are going to write `made`; for a refusal with its reason."""
    try:
        runs.check_output(config.output)
        runs.check_inputs(config.output, to_jsonable_python(config))
    except runs.RunError as error:
        return REFUSED, str(error)
    if runs.is_finished(config.output):
        reason = unlike(files.RUN_FILE, job, config, made)
        return (REFUSED, f"finished {reason}; {way_out(config)}") if reason else (FINISHED, "")
    absent = [path for path in named_inputs(config) if not maker(path, made) and not files.exists(path)]
    if absent:
        return REFUSED, f"{', '.join(absent)}: not there, and no earlier stage makes it"
    try:
        if not files.exists(files.join(config.output, files.STARTED_FILE)) or not runs.has_work(config.output):
            runs.check_folder(config.output, settings_of(job, config), runs.speed_fields(config))
            return TO_RUN, ""
    except runs.RunError as error:
        return REFUSED, str(error)
    reason = unlike(files.STARTED_FILE, job, config, made)
    return (REFUSED, f"started {reason}; {way_out(config)}") if reason else (RESUMED, "")


def settings_of(job: str, config: Any) -> dict[str, Any]:
    return {"job": job, "config": to_jsonable_python(config)}


def unlike(file: str, job: str, config: Any, made: Sequence[Made] = ()) -> str:
    """How this stage differs from the one that left run.json or started.json in its folder; "" where it does not."""
    inputs = records.read_record(config.output, file)["inputs"]
    makers = {path: found for path in inputs if (found := maker(path, made))}
    if makers:
        texts = [f"{path}, which stage {one.number} ({one.job}) makes anew" for path, one in makers.items()]
        return f"from {' and '.join(texts)}"
    return records.unlike(config.output, file, settings_of(job, config), runs.speed_fields(config))


def is_done(job: str, config: Any) -> bool:
    """Whether the run is finished; RunError where one is, of another configuration or of other inputs."""
    if not runs.is_finished(config.output):
        return False
    reason = unlike(files.RUN_FILE, job, config)
    if reason:
        raise runs.RunError(f"{config.output} is finished {reason}; {way_out(config)}")
    return True


def is_in_the_way(job: str, config: Any) -> bool:
    """Whether the output holds a finished run, or one that was started otherwise and cannot be gone on with."""
    if runs.is_finished(config.output):
        return True
    started = files.exists(files.join(config.output, files.STARTED_FILE)) and runs.has_work(config.output)
    return started and bool(unlike(files.STARTED_FILE, job, config))


def way_out(config: Any) -> str:
    hint = "rename the folder to redo it, as --force of a single stage does, or name another output"
    own_store = isinstance(config, ScoreConfig) and config.store is None and files.join(config.output, "store")
    if own_store and files.exists(own_store):
        return f"{hint} (the LLM's answers are in {own_store}: move it out and set `store` to it to keep them)"
    return hint


def named_inputs(config: Any) -> list[str]:
    """Files and run folders that the configuration names one by one; globs of raw files are read by prepare alone."""
    if isinstance(config, CompareConfig):
        return [path for arm in config.arms.values() for path in arm]
    settings = to_jsonable_python(config)
    return [settings[name] for name in INPUT_FIELDS if isinstance(settings.get(name), str)]


def maker(path: str, made: Sequence[Made]) -> Made | None:
    """Which of the stages is going to write `path`, or the folder that it lies in."""
    return next((one for one in made if f"{path.rstrip('/')}/".startswith(f"{one.output}/")), None)


def with_estimate(config: Any, state: State, made: Sequence[Made]) -> tuple[State, str]:
    """The state with what the stage would ask an LLM; refused where its inputs are not what it needs."""
    if not isinstance(config, ScoreConfig | FinetuneConfig | VectorsConfig):
        return state, ""
    # what is only being made says nothing yet; scores of items and teachers do not change the prompts
    unknown = maker(config.data, made) or maker(config.aspects, made)
    if unknown:
        return state, f"prompts are known after stage {unknown.number} ({unknown.job})"
    try:
        return state, estimate_text(config, made)
    except INPUT_ERRORS as error:
        return REFUSED, str(error)


def estimate_text(config: ScoreConfig | FinetuneConfig | VectorsConfig, made: Sequence[Made]) -> str:
    # tokenizers and torch, which a plan without prompts does without
    from raygr.estimates import finetune_estimate, score_estimate, vectors_estimate

    match config:
        case ScoreConfig():
            found = score_estimate(config, adapter_is_known=not (config.adapter and maker(config.adapter, made)))
        case FinetuneConfig():
            found = finetune_estimate(config)
        case VectorsConfig():
            found = vectors_estimate(config)
    if not found.prompts:
        return f"{found.what}: nothing to ask, the store knows all"
    counted = f"estimated from {found.sampled} prompts" if found.sampled else "counted"
    shared = f" ({found.shared_tokens:,} of them the start that all share)" if found.shared_tokens else ""
    return (
        f"{found.what}: {found.prompts:,} prompts to ask, {found.prompt_tokens:,} prompt tokens{shared}, "
        f"{found.answer_tokens:,} answer tokens; {counted}"
    )


def plan_lines(plans: Sequence[StagePlan]) -> list[str]:
    """One line per stage, for people."""
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
