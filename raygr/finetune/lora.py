"""LoRA adapters for fine-tuning: makes a fresh one, saves a tuned one, and checks and loads one to start from.

The files are PEFT's, and raygr.json, which tells scoring what the adapter was tuned for.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic_core import to_jsonable_python
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from raygr import files, runs
from raygr.config import ConfigError
from raygr.finetune.config import FinetuneConfig
from raygr.score.adapters import (
    ADAPTER,
    NOTE,
    PEFT_FILE,
    WEIGHTS,
    AdapterNote,
    check_adapter,
    read_weights,
)
from raygr.score.default_model import model_folder


def with_adapter(base: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """The model with a fresh adapter, which changes no output yet; ConfigError where it lacks one of `lora_targets`.

    PEFT itself skips targets that it does not find: in Phi 3, which has `qkv_proj`, it would tune `o_proj` alone.
    """
    layers = {name.rpartition(".")[2] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
    if missing := set(config.lora_targets) - layers:
        found = ", ".join(sorted(layers))
        raise ConfigError(f"lora_targets: {config.llm} has no {', '.join(sorted(missing))}, but {found}")
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT takes fractions, too
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora).eval()


def save_adapter(model: PeftModel, note: AdapterNote, folder: str) -> None:
    """Saves the adapter in `folder`, a local path or any fsspec URI; files of an earlier attempt are overwritten."""
    filesystem, inner = files.filesystem_of(folder)
    with tempfile.TemporaryDirectory() as part:
        model.save_pretrained(part)
        files.write_json(to_jsonable_python(note), str(Path(part, NOTE)))
        filesystem.makedirs(inner, exist_ok=True)
        for file in sorted(Path(part).iterdir()):
            filesystem.put_file(str(file), f"{inner}/{file.name}")


def check_start(config: FinetuneConfig, folder: str, note: AdapterNote) -> None:
    """ConfigError where this run, which writes `note`, cannot start from the adapter in `folder`."""
    check_adapter(folder, subjects=note.subjects, shared_prompt_sha256=note.shared_prompt_sha256, model=note.model)
    check_held_out(config, folder)
    theirs = files.read_json(files.join(folder, PEFT_FILE))
    ours = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    unlike = [f"{name} is {theirs[name]} there and {ours[name]} here" for name in ours if ours[name] != theirs[name]]
    if unlike:
        raise ConfigError(f"adapter: {folder} has another shape: {'; '.join(unlike)}")
    check_weights(config, folder, note.model)


def check_held_out(config: FinetuneConfig, folder: str) -> None:
    """ConfigError where the run that tuned the adapter may have trained on users or items that are held out here.

    Only data, seed and fraction decide which may be held out, and for items the scores: see `choose_users` and
    `split_items`.
    """
    run, _, name = folder.rstrip("/").rpartition("/")
    if name != ADAPTER or not runs.is_finished(run):
        return
    record = runs.read_run(run, job="finetune")
    before = record.config
    ours = {"seed": config.seed, "held_out_fraction": config.held_out_fraction}
    unlike = [f"{name} is {before[name]} there and {ours[name]} here" for name in ours if ours[name] != before[name]]
    for field in ("data", "item_scores") if config.subjects == "items" else ("data",):
        path = vars(config)[field]
        if record.inputs[before[field]] != files.fingerprint(path):
            unlike.append(f"{field} was {before[field]} there, of other content than {path} is here")
    if unlike:
        raise ConfigError(
            f"adapter: {folder} was tuned on {config.subjects} that may be held out here: {'; '.join(unlike)}"
        )


def check_weights(config: FinetuneConfig, folder: str, model: str) -> None:
    """ConfigError unless the adapter has the same weights, by name and shape, as a fresh one of `model`."""
    if not files.exists(files.join(folder, WEIGHTS)):
        raise ConfigError(f"adapter: {folder} holds no {WEIGHTS}: save it again with a newer PEFT")
    with torch.device("meta"):  # shapes without memory
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder(model)))
        fresh = get_peft_model_state_dict(with_adapter(base, config), save_embedding_layers=False)
    ours, theirs = shapes(fresh), shapes(read_weights(folder))
    unlike = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if unlike:
        first = unlike[0]
        raise ConfigError(
            f"adapter: {folder} has other weights than lora_targets of {model}, {len(unlike)} of them: "
            f"{first} is {theirs.get(first, 'missing')} there and {ours.get(first, 'missing')} here"
        )


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def load_start(model: PeftModel, folder: str) -> None:
    """Loads the weights of an adapter that `check_start` has accepted into the model's fresh adapter."""
    set_peft_model_state_dict(model, read_weights(folder))
