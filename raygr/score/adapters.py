"""LoRA adapters for scoring: find one, check that it fits the run, and merge it into the model on a CPU.

raygr.json beside PEFT's files says how an adapter was tuned; finetune/lora.py writes it. Scoring refuses an adapter
that was tuned for other subjects, another prompt, base model or mode, and one that changes nothing.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic.dataclasses import dataclass

from raygr import files, runs
from raygr.config import STRICT, ConfigError, check_config
from raygr.score.config import ScoreConfig
from raygr.score.default_model import model_folder
from raygr.score.prompts import prompt_sha256
from raygr.score.subjects import PromptSettings, encoder_of

logger = logging.getLogger(__name__)

ADAPTER, NOTE = "adapter", "raygr.json"
PEFT_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENGINE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the ranks that vLLM reserves memory for
# Scoring modes that ask as the adapter's rollouts did: all ratings in one answer, each behind those before it, or each
# on its own (probe).
MODES = {"free": ("generate-free", "generate"), "slots": ("generate",), "probe": ("probe",)}
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
    """Means and standard deviations that the rewards were computed with; empty for items."""
    subjects: Literal["users", "items"] = "users"
    """Whose prompts it was tuned on."""


def adapter_folder(path: str) -> str:
    """The folder in PEFT's format: `path` itself, or the one inside the finetune run at `path`."""
    if files.exists(files.join(path, files.STARTED_FILE)) or runs.is_finished(path):
        runs.read_run(path, job="finetune")
        path = files.join(path, ADAPTER)
    if not files.exists(files.join(path, PEFT_FILE)):
        raise ConfigError(f"adapter: {path} holds no {PEFT_FILE}, so it is no LoRA adapter in PEFT's format")
    return files.absolute(path)


def copied_adapter(folder: str | None) -> tempfile.TemporaryDirectory | None:
    """A local copy of an adapter behind a URI, which vLLM and PEFT cannot read; None where none is needed."""
    if folder is None or "://" not in folder:
        return None
    filesystem, inner = files.filesystem_of(folder)
    copy = tempfile.TemporaryDirectory(prefix="raygr-adapter-")
    for file in filesystem.ls(inner, detail=False):
        if filesystem.isfile(file):
            filesystem.get_file(file, str(Path(copy.name, file.rpartition("/")[2])))
    return copy


def read_note(folder: str) -> AdapterNote | None:
    """The adapter's note; None where raygr did not tune it."""
    path = files.join(folder, NOTE)
    return check_config(AdapterNote, files.read_json(path), source=path) if files.exists(path) else None


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    filesystem, inner = files.filesystem_of(files.join(folder, WEIGHTS))
    return safetensors.torch.load(filesystem.cat_file(inner))


# --- checks ------------------------------------------------------------------------------------


def answer_mode(config: ScoreConfig) -> str:
    """Return probe, generate, or generate-free (generate without a forced format)."""
    return "generate-free" if config.mode == "generate" and not config.structured else config.mode


def fitting_adapter(config: ScoreConfig, settings: PromptSettings) -> str:
    """The folder of the run's adapter; ConfigError where it does not fit the run or vLLM, or changes nothing."""
    assert config.adapter is not None
    folder = adapter_folder(config.adapter)
    check_effect(folder)
    adapter_rank(folder)
    check_adapter(
        folder,
        subjects=settings.subjects,
        shared_prompt_sha256=prompt_sha256(encoder_of(settings).shared),
        model=config.llm,
        mode=answer_mode(config),
        force=config.force_adapter,
    )
    return folder


def check_effect(folder: str) -> None:
    """ConfigError where the adapter changes no score: its weights are those before training, or not numbers.

    LoRA adds B A to a weight matrix, and PEFT starts with B = 0, so some weight besides the A must differ from 0. An
    adapter without safetensors, which older versions of PEFT write, is not checked.
    """
    if not files.exists(files.join(folder, WEIGHTS)):
        return
    moving = [w for name, w in read_weights(folder).items() if "lora_A" not in name and "lora_embedding_A" not in name]
    if any(not weight.isfinite().all() for weight in moving):
        raise ConfigError(f"adapter: {folder} holds weights that are not finite: tune it again")
    if not any(weight.any() for weight in moving):
        raise ConfigError(
            f"adapter: {folder} was never trained, or its finetune run kept the adapter from before its first step, so "
            "it changes no score: score without it"
        )


def adapter_rank(folder: str) -> int:
    """The smallest rank of vLLM that the adapter fits into; ConfigError where it fits into none."""
    rank = files.read_json(files.join(folder, PEFT_FILE))["r"]
    allowed = [one for one in ENGINE_RANKS if one >= rank]
    if not allowed:
        raise ConfigError(f"adapter: {folder} has rank {rank}, and vLLM takes {ENGINE_RANKS[-1]} at most")
    return allowed[0]


def check_adapter(
    folder: str,
    *,
    subjects: str,
    shared_prompt_sha256: str,
    model: str,
    mode: str | None = None,
    force: bool = False,
) -> None:
    """ConfigError where the adapter was tuned for other subjects, another prompt, base model or mode.

    `force` only warns.

    `mode`: the scoring mode, as `answer_mode` names it; None where fine-tuning continues from the adapter.
    """
    note = read_note(folder)
    if note is None:
        warn_of_base_model(folder, model)
        return
    wrong = []
    if note.subjects != subjects:
        wrong.append(f"prompts of {note.subjects}, not of {subjects}")
    elif note.shared_prompt_sha256 != shared_prompt_sha256:
        wrong.append(f"another prompt (its aspects: {', '.join(note.aspects)})")
    # a model folder is compared by its content, a hub name as it is
    if (note.model_sha256 or note.model) != (model_sha256(model) or model):
        wrong.append(f"another base model ({note.model}, not {model})")
    if mode is not None and mode not in MODES[note.rollouts]:
        fitting = " or ".join(MODE_SETTINGS[one] for one in MODES[note.rollouts])
        wrong.append(f"{note.rollouts} rollouts, which need {fitting}, not {MODE_SETTINGS[mode]}")
    if not wrong:
        return
    message = f"adapter: {folder} was tuned with {'; '.join(wrong)}"
    if not force:
        raise ConfigError(message if mode is None else f"{message} (force_adapter: true scores with it anyway)")
    logger.warning("%s: used anyway, because of force_adapter", message)


def warn_of_base_model(folder: str, model: str) -> None:
    """Warn of an adapter without a note, and of another base model in PEFT's file."""
    logger.warning("%s has no %s, so prompt, base model and mode were not checked", folder, NOTE)
    base = files.read_json(files.join(folder, PEFT_FILE)).get("base_model_name_or_path")
    if base and base not in (model, model_folder(model)):
        logger.warning("%s is an adapter of %s according to its %s, not of %s", folder, base, PEFT_FILE, model)


def model_sha256(name: str) -> str:
    """Fingerprint of a model's folder; "" for a hub name."""
    folder = model_folder(name)
    return files.fingerprint(folder) if files.exists(folder) else ""


# --- merging -----------------------------------------------------------------------------------


def merged_model(model: str, adapter: str) -> tempfile.TemporaryDirectory:
    """Write the model with the adapter added to its weights: vLLM's CPU kernels are several times slower with LoRA.

    `model` is a folder or hub name, `adapter` a local folder in PEFT's format. Weights are fp32, because rounding loses
    small changes. OSError where the temporary folder lacks room.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    check_room(sum(weight.numel() * weight.element_size() for weight in loaded.parameters()))
    folder = tempfile.TemporaryDirectory(prefix="raygr-merged-")
    loaded.save_pretrained(folder.name)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder.name)
    return folder


def check_room(needed: int) -> None:
    """OSError where the temporary folder cannot hold `needed` bytes, the merged model of one actor."""
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"{place} has {free / 1e9:.1f} GB free, and the model with its adapter takes {needed / 1e9:.1f} GB for "
            "each actor while it starts: set TMPDIR to a larger disk"
        )
