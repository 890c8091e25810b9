"""A model with the adapter merged into its weights answers as the model with the adapter beside them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_policy import save_tiny_llama, tiny_llama, tiny_policy
from transformers import AutoModelForCausalLM

from raygr.score.adapters import check_room, merged_model

PROMPT, RATING_IDS = [20, 21, 22, 23], [1, 2, 3, 10]


def log_probs(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)[RATING_IDS].numpy()


def test_the_merged_model_answers_as_the_adapter(tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base")
    policy = tiny_policy()
    policy.save_pretrained(tmp_path / "adapter")
    folder = merged_model(base, str(tmp_path / "adapter"))
    merged_L = log_probs(AutoModelForCausalLM.from_pretrained(folder.name))
    np.testing.assert_allclose(merged_L, log_probs(policy), atol=1e-5)
    assert np.abs(merged_L - log_probs(tiny_llama())).max() > 0.01


def test_a_temporary_folder_without_room_is_named(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10**9))
    check_room(10**9)
    with pytest.raises(OSError, match=r"has 1\.0 GB free, .* takes 2\.0 GB .*: set TMPDIR to a larger disk"):
        check_room(2 * 10**9)
