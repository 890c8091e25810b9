"""What a LoRA adapter was tuned for: raygr.json beside PEFT's files. Scoring refuses an adapter for anything else.

Read without PEFT; finetuning/adapters.py writes it.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from raygr import runs
from raygr.aspects.small_model import model_folder
from raygr.config import STRICT, ConfigError, check_config

logger = logging.getLogger(__name__)

ADAPTER, NOTE, PEFT_FILE = "adapter", "raygr.json", "adapter_config.json"
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM sets memory aside for
# The scoring modes that ask as the adapter's rollouts did: ratings in one answer, each behind those before it.
MODES = {"free": ("generate-free", "generate"), "slots": ("generate",)}
MODE_SETTINGS = {
    "generate": "mode: generate",
    "generate-free": "mode: generate with structured: false",
    "probe": "mode: probe",
}


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AdapterNote:
    """How an adapter was tuned."""

    shared_prompt_sha256: str
    """Hash of the token ids that all its prompts start with: chat template, task and aspects."""
    rollouts: str
    model: str
    model_sha256: str
    """Fingerprint of the base model's folder; "" for a hub name."""
    aspects: tuple[str, ...]
    normalisation: Mapping[str, Any]
    """Means and deviations that the rewards were computed with."""


def adapter_folder(path: str) -> str:
    """The folder in PEFT's format: `path` itself, or the one inside a finetune run."""
    if runs.exists(runs.join(path, runs.STARTED_FILE)) or runs.is_finished(path):
        runs.read_run(path, job="finetune")
        path = runs.join(path, ADAPTER)
    if not runs.exists(runs.join(path, PEFT_FILE)):
        raise ConfigError(f"adapter: {path} holds no {PEFT_FILE}, so it is no LoRA adapter in PEFT's format")
    return runs.absolute(path)


def copied_adapter(folder: str | None) -> tempfile.TemporaryDirectory | None:
    """A copy on this machine of an adapter behind a URI, which vLLM and PEFT do not read; None where none is needed."""
    if folder is None or "://" not in folder:
        return None
    filesystem, inner = runs.filesystem_of(folder)
    copy = tempfile.TemporaryDirectory(prefix="raygr-adapter-")
    for file in filesystem.ls(inner, detail=False):
        if filesystem.isfile(file):
            filesystem.get_file(file, str(Path(copy.name, file.rpartition("/")[2])))
    return copy


def read_note(folder: str) -> AdapterNote | None:
    """None for an adapter that raygr did not tune."""
    path = runs.join(folder, NOTE)
    return check_config(AdapterNote, runs.read_json(path), source=path) if runs.exists(path) else None


def finetune_record(folder: str) -> dict[str, Any] | None:
    """run.json of the finetune run whose result the adapter in `folder` is; None where it lies by itself."""
    run, _, name = folder.rstrip("/").rpartition("/")
    return runs.read_run(run, job="finetune") if name == ADAPTER and runs.is_finished(run) else None


def check_learned(folder: str) -> None:
    """ConfigError where the best of a finetune run was the fresh adapter that it began with, which changes nothing."""
    record = finetune_record(folder)
    if record is None or record["counts"]["best_step"]:
        return
    if not (record["config"]["warm_start_epochs"] or record["config"]["adapter"]):
        raise ConfigError(
            f"adapter: {folder} is of a run whose reward never rose, so its adapter is the bare model: score without it"
        )


def adapter_rank(folder: str) -> int:
    """The smallest rank that vLLM allows and the adapter fits into; ConfigError where it fits into none."""
    rank = runs.read_json(runs.join(folder, PEFT_FILE))["r"]
    allowed = [one for one in ENGINE_RANKS if one >= rank]
    if not allowed:
        raise ConfigError(f"adapter: {folder} has rank {rank}, and vLLM takes {ENGINE_RANKS[-1]} at most")
    return allowed[0]


def check_adapter(
    folder: str, *, shared_prompt_sha256: str, model: str, mode: str | None = None, force: bool = False
) -> None:
    """ConfigError where the adapter was tuned for another prompt, base model or way of asking; `force` only warns.

    `mode`: the way that scoring asks; None where the adapter is to be tuned on.
    """
    note = read_note(folder)
    if note is None:
        warn_of_base_model(folder, model)
        return
    wrong = []
    if note.shared_prompt_sha256 != shared_prompt_sha256:
        wrong.append(f"another prompt (its aspects: {', '.join(note.aspects)})")
    if model_identity(note.model, note.model_sha256) != model_identity(model, model_sha256(model)):
        wrong.append(f"another base model ({note.model}, not {model})")
    if mode is not None and mode not in MODES[note.rollouts]:
        fitting = " or ".join(MODE_SETTINGS[one] for one in MODES[note.rollouts])
        wrong.append(f"{note.rollouts} rollouts, which {fitting} asks for, not {MODE_SETTINGS[mode]}")
    if not wrong:
        return
    message = f"adapter: {folder} was tuned with {'; '.join(wrong)}"
    if not force:
        raise ConfigError(message if mode is None else f"{message} (force_adapter: true scores all the same)")
    logger.warning("%s: scored all the same, by force_adapter", message)


def warn_of_base_model(folder: str, model: str) -> None:
    """All that can be said of an adapter that raygr did not tune."""
    logger.warning("%s says not what it was tuned for (no %s): nothing was checked", folder, NOTE)
    base = runs.read_json(runs.join(folder, PEFT_FILE)).get("base_model_name_or_path")
    if base and base not in (model, model_folder(model)):
        logger.warning("%s is an adapter of %s, says its %s, and not of %s", folder, base, PEFT_FILE, model)


def model_identity(name: str, sha256: str) -> str:
    return sha256 or name


def model_sha256(name: str) -> str:
    """Fingerprint of a model's folder; "" for a hub name."""
    folder = model_folder(name)
    return runs.fingerprint(folder) if runs.exists(folder) else ""
