"""LoRA adapters for scoring: what one was tuned for (raygr.json beside PEFT's files), and merging one on a CPU.

Scoring refuses an adapter that was tuned for another prompt, base model or mode. finetune/lora.py writes adapters.
Shape suffix: `R` rating tokens.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic.dataclasses import dataclass

from raygr import files, runs
from raygr.config import STRICT, ConfigError, check_config
from raygr.score.default_model import model_folder

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
    if files.exists(files.join(path, files.STARTED_FILE)) or runs.is_finished(path):
        runs.read_run(path, job="finetune")
        path = files.join(path, ADAPTER)
    if not files.exists(files.join(path, PEFT_FILE)):
        raise ConfigError(f"adapter: {path} holds no {PEFT_FILE}, so it is no LoRA adapter in PEFT's format")
    return files.absolute(path)


def copied_adapter(folder: str | None) -> tempfile.TemporaryDirectory | None:
    """A copy on this machine of an adapter behind a URI, which vLLM and PEFT do not read; None where none is needed."""
    if folder is None or "://" not in folder:
        return None
    filesystem, inner = files.filesystem_of(folder)
    copy = tempfile.TemporaryDirectory(prefix="raygr-adapter-")
    for file in filesystem.ls(inner, detail=False):
        if filesystem.isfile(file):
            filesystem.get_file(file, str(Path(copy.name, file.rpartition("/")[2])))
    return copy


def read_note(folder: str) -> AdapterNote | None:
    """None for an adapter that raygr did not tune."""
    path = files.join(folder, NOTE)
    return check_config(AdapterNote, files.read_json(path), source=path) if files.exists(path) else None


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
    rank = files.read_json(files.join(folder, PEFT_FILE))["r"]
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
    base = files.read_json(files.join(folder, PEFT_FILE)).get("base_model_name_or_path")
    if base and base not in (model, model_folder(model)):
        logger.warning("%s is an adapter of %s, says its %s, and not of %s", folder, base, PEFT_FILE, model)


def model_identity(name: str, sha256: str) -> str:
    return sha256 or name


def model_sha256(name: str) -> str:
    """Fingerprint of a model's folder; "" for a hub name."""
    folder = model_folder(name)
    return files.fingerprint(folder) if files.exists(folder) else ""


class Merged(NamedTuple):
    """A model with its adapter in its weights, and what it and the bare one answer to one prompt."""

    folder: tempfile.TemporaryDirectory
    """Of the merged model; the engine removes it once vLLM has read it."""
    tuned_R: np.ndarray
    """log-probabilities behind the prompt."""
    bare_R: np.ndarray


def merged_model(model: str, adapter: str, prompt: Sequence[int], rating_ids: Sequence[int]) -> Merged:
    """Adds an adapter to the base model's weights: vLLM's CPU kernels are several times slower with adapters.

    `model` is a folder or hub name, `adapter` a folder in PEFT's format; fp32, because rounding loses small changes.

    OSError where the temporary folder has no room for it.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def log_probs() -> np.ndarray:
        with torch.inference_mode():
            logits_V = loaded(torch.tensor([list(prompt)]), logits_to_keep=1).logits[0, -1]
        return logits_V.float().log_softmax(-1)[list(rating_ids)].numpy()

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    bare_R = log_probs()
    loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    check_room(sum(weight.numel() * weight.element_size() for weight in loaded.parameters()))
    folder = tempfile.TemporaryDirectory(prefix="raygr-merged-")
    loaded.save_pretrained(folder.name)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder.name)
    return Merged(folder, log_probs(), bare_R)


def check_room(needed: int) -> None:
    """Bytes of one actor's model; several actors of a machine each write their own."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"{place} has {free / 1e9:.1f} GB free, and the model with its adapter takes {needed / 1e9:.1f} GB for "
            "each actor while it starts: set TMPDIR to a larger disk"
        )
