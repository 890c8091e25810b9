"""What a score run asks the LLM, and where its answers are kept: all that is known before anything starts.

Needs no Ray, so that a plan can say what a run would cost.
"""

from typing import NamedTuple

from raygr import runs
from raygr.aspects.adapters import adapter_folder, adapter_rank, check_adapter, check_learned
from raygr.aspects.aspects import AspectSet, load_aspects
from raygr.aspects.prompts import prompt_sha256
from raygr.aspects.small_model import model_folder
from raygr.aspects.store import ScoreStore, store_key
from raygr.aspects.subjects import PromptSettings, encoder_of
from raygr.config import ConfigError, ScoreConfig

PROMPTS, PROMPTS_DONE = "prompts", "prompts.json"


class Asking(NamedTuple):
    """One way of asking, checked."""

    aspects: AspectSet
    settings: PromptSettings
    mode: str
    """probe, generate or generate-free."""
    adapter: str | None
    """Folder in PEFT's format."""
    store: ScoreStore


def way_of_asking(config: ScoreConfig, *, exchanges: bool) -> Asking:
    """Reads and checks aspects, model and adapter. `exchanges`: prompts and answers go through a batch service."""
    settings = prompt_settings(config)
    mode = mode_of(config)
    check_settings(config, mode, exchanges=exchanges)
    adapter = checked_adapter(config, settings, mode)
    folder = config.store or runs.join(config.output, "store")
    store = ScoreStore(runs.join(folder, key_of(config, settings.model, adapter, mode)))
    return Asking(settings.aspects, settings, mode, adapter, store)


def prompt_settings(config: ScoreConfig) -> PromptSettings:
    prepared = runs.read_run(config.data, job="prepare")
    return PromptSettings(
        model=model_folder(config.model),
        aspects=load_aspects(config.aspects),
        subjects=config.subjects,
        max_prompt_tokens=config.max_prompt_tokens,
        item_rating=config.item_rating,
        best_rating=prepared["config"]["rating_range"][1],
    )


def mode_of(config: ScoreConfig) -> str:
    return "generate-free" if config.mode == "generate" and not config.structured else config.mode


def check_settings(config: ScoreConfig, mode: str, *, exchanges: bool) -> None:
    if (config.answered_by or exchanges) and mode != "generate-free":
        raise ConfigError("another LLM answers in free text: set mode=generate and structured=false")
    if exchanges and not config.answered_by:
        raise ConfigError(
            f"answered_by: not set, so that another LLM's answers would be filed as those of {config.model}: "
            "set it to the name of the LLM that answers"
        )
    if config.answered_by and config.adapter:
        raise ConfigError(f"answered_by: {config.answered_by} and adapter are two ways to score: set one of them")


def checked_adapter(config: ScoreConfig, settings: PromptSettings, mode: str) -> str | None:
    if config.adapter is None:
        return None
    folder = adapter_folder(config.adapter)
    check_learned(folder)
    adapter_rank(folder)  # refused here, not in an actor
    shared = prompt_sha256(encoder_of(settings).shared)
    check_adapter(folder, shared_prompt_sha256=shared, model=config.model, mode=mode, force=config.force_adapter)
    return folder


def key_of(config: ScoreConfig, model: str, adapter: str | None, mode: str) -> str:
    """A model folder or adapter that changes under the same name is another model."""
    content = "" if config.answered_by or not runs.exists(model) else runs.fingerprint(model)
    return store_key(
        model=f"{config.answered_by or config.model} {content}",
        adapter=f"{config.adapter} {runs.fingerprint(adapter)}" if adapter else "",
        mode=mode,
        temperature=config.temperature,
        seed=config.seed,
    )
