"""Fine-tuning on a GPU, with fp16 autocast and a loss scaler.

Run with `pytest -m gpu` on a machine with a GPU; neither Ray nor vLLM is needed.
"""

import math

import pytest
import torch
from test_tuning_loop import folder, run, tuning_of, wordy_folder  # noqa: F401

from raygr.finetune.loop import tune
from raygr.finetune.policy import adapter_state, likeliest_ratings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: fp16 autocast and its scaler"),
]
GPU = torch.device("cuda", 0)


def test_likeliest_ratings_are_those_of_the_cpu(folder: str):  # noqa: F811
    on_cpu, on_gpu = tuning_of(folder), tuning_of(folder, device=GPU)
    examples = on_cpu.data.train
    expected, found = (likeliest_ratings(tuning.policy, examples).cpu() for tuning in (on_cpu, on_gpu))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"kl_weight": 0.1}], ids=str)
def test_the_reward_of_slots_rises(folder: str, changes: dict):  # noqa: F811
    tuning = run(tuning_of(folder, device=GPU, users=16, epochs=8, **changes))
    rewards = [one["metrics"]["reward"] for one in tuning.progress.evaluations]
    assert rewards[-1] > rewards[0]
    assert all(math.isfinite(line["gradient_norm"]) for line in tuning.progress.lines)
    assert all(weight.dtype == torch.float32 for weight in adapter_state(tuning.model).values())


def test_free_rollouts_take_their_steps(wordy_folder: str):  # noqa: F811
    """The first steps may overflow until the scaler has found its scale."""
    tuning = tuning_of(wordy_folder, device=GPU, rollouts="free", epochs=6, warm_start_epochs=1)
    for _ in tune(tuning):
        if tuning.progress.step == 0:
            taught = adapter_state(tuning.model)  # the last time after the SFT warm-up, which moves the weights too
    assert tuning.progress.sft_step == 2 and tuning.progress.step == 12
    assert any(not torch.equal(taught[name], weight) for name, weight in adapter_state(tuning.model).items())
    assert all(math.isfinite(line["gradient_norm"]) for line in tuning.progress.lines[-6:])
