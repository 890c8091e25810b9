"""Writes a tuned adapter, and reads one to go on from.

PEFT's files, and raygr.json, which says what scoring may use it for.
"""

import tempfile
from pathlib import Path

import safetensors.torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic_core import to_jsonable_python

from raygr import runs
from raygr.aspects.adapters import NOTE, PEFT_FILE, AdapterNote, check_adapter
from raygr.config import ConfigError, FinetuneConfig

WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: PeftModel, note: AdapterNote, folder: str) -> None:
    """`folder` is a local path or any fsspec URI; what an earlier attempt left there goes."""
    runs.remove_folder(folder)
    filesystem, inner = runs.filesystem_of(folder)
    with tempfile.TemporaryDirectory() as part:
        model.save_pretrained(part)
        runs.write_json(to_jsonable_python(note), str(Path(part, NOTE)))
        filesystem.makedirs(inner, exist_ok=True)
        for file in sorted(Path(part).iterdir()):
            filesystem.put_file(str(file), f"{inner}/{file.name}")


def check_start(config: FinetuneConfig, folder: str, note: AdapterNote) -> None:
    """ConfigError where the adapter in `folder` is not one that this fine-tune, which writes `note`, can go on from."""
    check_adapter(folder, shared_prompt_sha256=note.shared_prompt_sha256, model=note.model)
    shape = runs.read_json(runs.join(folder, PEFT_FILE))
    ours = {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.lora_targets)}
    theirs = {"r": shape["r"], "lora_alpha": shape["lora_alpha"], "target_modules": sorted(shape["target_modules"])}
    unlike = [f"{name} is {theirs[name]} there and {ours[name]} here" for name in ours if ours[name] != theirs[name]]
    if unlike:
        raise ConfigError(f"adapter: {folder} has another shape: {'; '.join(unlike)}")


def load_start(model: PeftModel, folder: str) -> None:
    """Puts the weights of an adapter in PEFT's format into the fresh one of `model`."""
    filesystem, inner = runs.filesystem_of(runs.join(folder, WEIGHTS))
    outcome = set_peft_model_state_dict(model, safetensors.torch.load(filesystem.cat_file(inner)))
    if outcome.unexpected_keys:
        raise ConfigError(f"adapter: {folder} has weights that the model has not, such as {outcome.unexpected_keys[0]}")
