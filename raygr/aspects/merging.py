"""On a CPU an adapter is added to the base model's weights before vLLM loads them.

vLLM's CPU kernels gather an adapter's matrices for every token, which costs several times the rest of the model.
Shape suffix: `R` the rating tokens.
"""

import shutil
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Merged(NamedTuple):
    """A model with its adapter in its weights, and what it and the bare one answer to one prompt."""

    folder: tempfile.TemporaryDirectory
    """Of the merged model; the engine removes it once vLLM has read it."""
    tuned_R: np.ndarray
    """log-probabilities behind the prompt."""
    bare_R: np.ndarray


def merged_model(model: str, adapter: str, prompt: Sequence[int], rating_ids: Sequence[int]) -> Merged:
    """`model` is a folder or hub name, `adapter` a folder in PEFT's format; fp32: rounding eats small changes.

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
