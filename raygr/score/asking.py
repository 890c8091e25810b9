"""What a score run asks the LLM, and where its answers are kept: all that is known before anything starts.

Needs no Ray, so that a plan can say what a run would cost.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from raygr import files
from raygr.config import ConfigError
from raygr.score.adapters import adapter_folder, adapter_rank, check_adapter, check_learned
from raygr.score.aspects import AspectSet
from raygr.score.config import SAME_ANSWERS, ScoreConfig
from raygr.score.engine import CPU_DTYPE, LOGPROBS_MODE
from raygr.score.prompts import prompt_sha256
from raygr.score.store import ScoreStore, store_key
from raygr.score.subjects import PromptSettings, encoder_of, prompt_settings

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
    settings = prompt_settings(config, config.subjects, cutoff_fraction=config.cutoff_fraction)
    mode = mode_of(config)
    check_settings(config, mode, exchanges=exchanges)
    adapter = checked_adapter(config, settings, mode)
    # before Ray is there, this machine stands for those of the cluster
    store = store_of(config, settings.model, adapter, mode, on_gpu=torch.cuda.is_available())
    return Asking(settings.aspects, settings, mode, adapter, store)


def mode_of(config: ScoreConfig) -> str:
    return "generate-free" if config.mode == "generate" and not config.structured else config.mode


def check_settings(config: ScoreConfig, mode: str, *, exchanges: bool) -> None:
    if (config.answered_by or exchanges) and mode != "generate-free":
        raise ConfigError("another LLM answers in free text: set mode=generate and structured=false")
    if exchanges and not config.answered_by:
        raise ConfigError(
            f"answered_by: not set, so that another LLM's answers would be filed as those of {config.llm}: "
            "set it to the name of the LLM that answers"
        )
    if config.cutoff_fraction < 1 and config.subjects == "items":
        raise ConfigError("cutoff_fraction is for subjects: users")
    if config.answered_by and config.adapter:
        raise ConfigError(f"answered_by: {config.answered_by} and adapter are two ways to score: set one of them")


def checked_adapter(config: ScoreConfig, settings: PromptSettings, mode: str) -> str | None:
    if config.adapter is None:
        return None
    folder = adapter_folder(config.adapter)
    check_learned(folder)
    adapter_rank(folder)  # refused here, not in an actor
    shared = prompt_sha256(encoder_of(settings).shared)
    check_adapter(folder, shared_prompt_sha256=shared, model=config.llm, mode=mode, force=config.force_adapter)
    return folder


def store_of(config: ScoreConfig, model: str, adapter: str | None, mode: str, *, on_gpu: bool) -> ScoreStore:
    """The part of the store that holds answers to this way of asking. `on_gpu`: the engine computes there.

    A model, an adapter or another file goes by its content, whatever its path and however that is written.
    """
    sampled = mode != "probe" and config.temperature > 0
    asked = {"temperature": config.temperature, "seed": config.seed} if sampled else {}
    if config.answered_by:
        asked |= {"answered_by": config.answered_by}
    else:
        asked |= {"model": model_content(model, config.engine_kwargs.get("revision"))}
        asked |= {"adapter": files.fingerprint(adapter) if adapter else None}
        asked |= {"engine": answering_settings(config.engine_kwargs, on_gpu=on_gpu)}
    folder = config.store or files.join(config.output, "store")
    return ScoreStore(files.join(folder, store_key(mode, asked)))


def model_content(model: str, revision: str | None) -> str:
    """Fingerprint of a model's folder; of a hub's model the name and the commit, as far as it is known here."""
    if files.exists(model):
        return files.fingerprint(model)
    cached = try_to_load_from_cache(model, "tokenizer_config.json", revision=revision)
    commit = Path(cached).parent.name if isinstance(cached, str) else revision or ""
    return f"{model} {commit}"


def answering_settings(engine_kwargs: Mapping[str, Any], *, on_gpu: bool) -> dict[str, Any]:
    """The engine's settings that may change an answer; a hub's `revision` is in `model_content`."""
    chosen = {"dtype": "auto" if on_gpu else CPU_DTYPE, "logprobs_mode": LOGPROBS_MODE, **engine_kwargs}
    return {name: content_of(value) for name, value in chosen.items() if name not in SAME_ANSWERS | {"revision"}}


def content_of(value: Any) -> Any:
    """A setting's value, with the content of every file or folder that it names in place of its path."""
    match value:
        case str() if value and files.exists(value):
            return files.fingerprint(value)
        case Mapping():
            return {name: content_of(one) for name, one in value.items()}
        case list() | tuple():
            return [content_of(one) for one in value]
    return value
