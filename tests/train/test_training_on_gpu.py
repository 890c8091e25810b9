"""The part of training that needs a GPU: fp16 autocast with a loss scaler.

On a machine with one: `pytest -m gpu`. No Ray is needed.
"""

from pathlib import Path

import pytest
import torch
from test_recommenders import EPOCHS, EVERY, RECOMMENDERS, begun, finished, guided, settings, toy  # noqa: F401

from raygr.schema import TEST
from raygr.train.evaluate import target_ranks
from raygr.train.loop import accumulate_gradients, take_step
from raygr.train.optimizer import gradient_values
from raygr.train.state import Training
from raygr.train.step import epoch_contents, epoch_draws, whole_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: fp16 autocast and its scaler"),
]
GPU = torch.device("cuda", 0)


def accumulate_one_batch(training: Training) -> None:
    training.model.train()
    draws = epoch_draws(0, 1, 0)
    contents = epoch_contents(training.config, training.inputs, 1)
    content = (contents[6:] or contents)[0]  # a step of sessions whose users have vectors
    whole = whole_batch(training.config, training.inputs, content, training.popularity_I, draws)
    accumulate_gradients(training, whole)


def first_gradient(training: Training) -> torch.Tensor:
    """The gradient of one batch: flat, unscaled, on the CPU."""
    accumulate_one_batch(training)
    if training.scaler.is_enabled():
        for optimizer in training.optimizers:
            training.scaler.unscale_(optimizer)
    return torch.cat([gradient.flatten().cpu() for gradient in gradient_values(training.model)])


@EVERY
@pytest.mark.parametrize(
    "fusion",
    [{}, {"fusion": "add"}, {"fusion": "concat", "user_side": "concat"}, {"fusion": "none", "user_scores": "history"}],
    ids=str,
)
def test_a_batch_has_the_gradient_of_the_cpu(toy: Path, changes: dict, fusion: dict):  # noqa: F811
    if "user_scores" in fusion and changes.get("session_parallel"):
        pytest.skip("session_parallel has no histories")
    config = settings(toy, **(changes | (guided(toy, **fusion) if fusion else {})))
    on_cpu, on_gpu = first_gradient(begun(config)), first_gradient(begun(config, device=GPU))
    assert torch.linalg.vector_norm(on_gpu - on_cpu) < 0.02 * torch.linalg.vector_norm(on_cpu)


@pytest.mark.parametrize("name", RECOMMENDERS)
def test_learns_a_pattern_to_recall_1(toy: Path, name: str):  # noqa: F811
    config = settings(toy, epochs=EPOCHS.get(name, 15), evaluate_every=5, **RECOMMENDERS[name])
    training = finished(config, GPU)
    assert target_ranks(training, TEST, ["full"])["full"].tolist() == [1.0] * 20


@EVERY
def test_ranks_are_those_of_the_cpu(toy: Path, changes: dict):  # noqa: F811
    """Both sides have the same precision, because evaluation runs without autocast."""
    config = settings(toy, candidates=("full",), **changes)
    on_cpu, on_gpu = begun(config), begun(config, device=GPU)
    ranks = [target_ranks(training, TEST, ["full"])["full"] for training in (on_cpu, on_gpu)]
    assert (ranks[0] - ranks[1]).abs().max() <= 1  # two items of almost one score may change places
    assert (ranks[0] == ranks[1]).float().mean() > 0.9


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_halved(toy: Path):  # noqa: F811
    training = begun(settings(toy), device=GPU)
    training.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**120)
    before = [p.detach().clone() for p in training.model.parameters()]
    accumulate_one_batch(training)
    take_step(training, 0.01)
    assert training.scaler.get_scale() == 2.0**119
    assert all(torch.equal(b, p) for b, p in zip(before, training.model.parameters(), strict=True))
