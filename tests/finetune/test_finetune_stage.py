"""The finetune stage here and on Ray: a tiny model end to end, a killed worker, and what scoring accepts."""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from toy_data import random_scores, walks, write_csv, write_prepared

from raygr import files, runs
from raygr.config import ConfigError
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import load_tuning_data
from raygr.finetune.loop import Tuning, start_tuning, tune
from raygr.finetune.stage import finetune, warn_if_untouched
from raygr.models.workers import Share
from raygr.schema import EVALUATIONS, HELD_OUT_EVALUATIONS, STEPS
from raygr.score.adapters import adapter_folder, check_adapter, read_note
from raygr.score.aspects import load_aspects
from raygr.score.default_model import model_folder
from raygr.score.prompts import PromptEncoder, prompt_sha256

torch.set_num_threads(1)  # the models are tiny, and waiting threads would spin on cores that others need

ITEMS, USERS = 40, 12
pytestmark = pytest.mark.slow
TWO_ASPECTS = """
category: movies
subject: movie
a_subject: a movie
a_critic: a movie critic
a_recommender: a movie recommender
reviews: movie reviews
aspects:
  - {name: pace, description: Slow to fast.}
  - {name: tension level, description: Calm to tense.}
"""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Llama with random weights, two layers of width 32, and SmolLM2's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2"))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=1024, **shape)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    ratings = [[1.0, 5.0, 4.0, 2.0, 3.0, 5.0, 1.0, 4.0, 3.0, 2.0]] * USERS
    write_prepared(tmp_path / "prepare", walks(USERS, ITEMS, 10, seed=0), items=ITEMS, ratings=ratings)
    (tmp_path / "aspects.yaml").write_text(TWO_ASPECTS)
    scores = {f"i{i + 1}": row.tolist() for i, row in enumerate(random_scores(ITEMS, 2, seed=0))}
    write_csv(tmp_path / "items.csv", scores, ["pace", "tension level"])
    return tmp_path


def settings(folder: Path, model: str, **changes: Any) -> FinetuneConfig:
    """Nine training users, three steps per epoch."""
    toy = {"data": str(folder / "prepare"), "item_scores": str(folder / "items.csv")}
    small = {"keep_out": 3, "candidate_items": 10, "held_out_fraction": 0.25, "max_prompt_tokens": 400, "threads": 1}
    small |= {"batch_size": 3, "epochs": 2, "learning_rate": 0.01, "completions": 3, "evaluate_every_steps": 1}
    output, aspects = str(folder / "tuned"), str(folder / "aspects.yaml")
    return FinetuneConfig(output=output, aspects=aspects, llm=model, **(toy | small | changes))


def finished(config: FinetuneConfig) -> Tuning:
    """The loop run to the end without Ray."""
    tuning = start_tuning(config, load_tuning_data(config), torch.device("cpu"), Share())
    for _ in tune(tuning):
        pass
    return tuning


def adapter_tensors(folder: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(folder, "adapter_model.safetensors"))


def assert_is_best(folder: str, tuning: Tuning, *, atol: float = 1e-7) -> None:
    """The saved adapter is the best one; PEFT leaves the adapter's name out of the names in the file."""
    saved = adapter_tensors(folder)
    best = {name.replace(".default", ""): values for name, values in tuning.best_adapter.items()}
    assert saved.keys() == best.keys()
    for name, values in best.items():
        torch.testing.assert_close(saved[name], values, rtol=1e-5, atol=atol)


def test_a_run_keeps_the_contract(toy: Path, tiny_model: str):
    config = settings(toy, tiny_model, teacher="profile", warm_start_epochs=1, evaluate_every_steps=3)
    run = finetune(config)
    record = runs.read_run(run.path, job="finetune")
    assert record.inputs.keys() == {config.data, config.item_scores, config.aspects, config.llm}
    assert record.counts["users"]["train"] == 9 and record.counts["steps"] == 6
    lines = [json.loads(line) for line in Path(run.file(STEPS)).read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["warm_start"] * 3 + ["reinforcement"] * 6
    assert all(np.isfinite(line["loss"]) for line in lines)
    evaluations = files.read_json(run.file(EVALUATIONS))
    stages = [(one["stage"], one["step"]) for one in evaluations["evaluations"]]
    assert stages == [("before", 0), ("warm_start", 0), ("reinforcement", 3), ("reinforcement", 6)]
    assert evaluations["best_step"] in (0, 3, 6)
    users = files.read_table(run.file(HELD_OUT_EVALUATIONS)).to_pandas()
    assert len(users) == 4 * 3 and set(users["user_index"]) == {p.user_index for p in load_tuning_data(config).held_out}
    last = users[(users["stage"] == "reinforcement") & (users["step"] == 6)]
    assert last["mrr"].mean() == pytest.approx(evaluations["evaluations"][-1]["metrics"]["mrr"], abs=1e-6)
    with pytest.raises(runs.RunError, match="finished run"):
        finetune(config)


def test_the_adapter_is_for_the_user_prompt_it_was_tuned_with(toy: Path, tiny_model: str):
    run = finetune(settings(toy, tiny_model, epochs=0, teacher="profile", warm_start_epochs=1))
    folder, aspects = adapter_folder(run.path), load_aspects(str(toy / "aspects.yaml"))
    note = read_note(folder)
    assert (note.rollouts, note.aspects, note.model) == ("slots", ("pace", "tension level"), tiny_model)
    assert len(note.normalisation["user_mean"]) == 2
    assert max(values.abs().max() for name, values in adapter_tensors(folder).items() if "lora_B" in name) > 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for subjects, is_same in (("users", True), ("items", False)):
        encoder = PromptEncoder(tokenizer, aspects, subjects, max_prompt_tokens=300)
        shared = prompt_sha256(encoder.shared)
        checks = {"subjects": subjects, "shared_prompt_sha256": shared, "model": tiny_model, "mode": "generate"}
        if is_same:
            check_adapter(folder, **checks)
        else:
            with pytest.raises(ConfigError, match="tuned with prompts of users, not of items"):
                check_adapter(folder, **checks)


def test_ones_own_reward(toy: Path, tiny_model: str):
    def first_aspect(user_GA: torch.Tensor, items_CA: torch.Tensor, relevant_C: torch.Tensor) -> torch.Tensor:
        assert len(items_CA) == len(relevant_C) == 11
        return user_GA[:, 0].clamp(-1, 1)

    run = finetune(settings(toy, tiny_model, epochs=1), reward=first_aspect)
    assert runs.read_run(run.path, job="finetune").counts["reward"].endswith("first_aspect")
    lines = [json.loads(line) for line in Path(run.file(STEPS)).read_text().splitlines()]
    assert all(-1 <= line["reward"] <= 1 for line in lines)


def test_an_adapter_that_never_got_better_is_said_to_be_untouched(toy: Path, tiny_model: str, caplog):
    def nothing(user_GA: torch.Tensor, items_CA: torch.Tensor, relevant_C: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(user_GA))

    with caplog.at_level(logging.WARNING, logger="raygr.finetune.stage"):
        run = finetune(settings(toy, tiny_model, epochs=1, keep_best_by="reward"), reward=nothing)
    assert runs.read_run(run.path, job="finetune").counts["best_step"] == 0
    assert all((values == 0).all() for name, values in adapter_tensors(run.file("adapter")).items() if "lora_B" in name)
    [said] = [record.getMessage() for record in caplog.records]
    assert "untouched" in said and "SFT warm-up" in said and run.path in said


@pytest.mark.parametrize(
    ("changes", "best_step", "is_untouched"),
    [
        ({}, 0, True),
        ({}, 3, False),
        ({"teacher": "profile", "warm_start_epochs": 1}, 0, False),
        ({"adapter": "earlier"}, 0, False),
    ],
    ids=["fresh", "better later", "warm start", "went on"],
)
def test_only_a_fresh_adapter_can_be_untouched(toy: Path, caplog, changes: dict, best_step: int, is_untouched: bool):
    warn_if_untouched(settings(toy, "model", **changes), best_step)
    assert len(caplog.records) == is_untouched


def test_two_ray_workers_get_the_result_of_one(toy: Path, tiny_model: str, local_ray: Any):
    config = settings(toy, tiny_model, epochs=1, workers=2, teacher="profile", warm_start_epochs=1)
    run = finetune(config)
    alone = finished(config)
    lines = [json.loads(line) for line in Path(run.file(STEPS)).read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["warm_start"] * 3 + ["reinforcement"] * 3
    for line, other in zip(lines, alone.progress.lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-2)
    users = files.read_table(run.file(HELD_OUT_EVALUATIONS)).to_pandas()
    last = users[(users["stage"] == "reinforcement") & (users["step"] == 3)]
    assert last["mrr"].tolist() == pytest.approx(alone.progress.evaluations[-1]["users"]["mrr"], rel=1e-5)
    # Adam divides by the gradient's size, so rounding errors of tiny gradients become large
    assert_is_best(run.file("adapter"), alone, atol=2e-3)


def train_worker() -> psutil.Process | None:
    """A Ray Train worker that this test has started."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


def kill_after_two_steps(history: Path, killed: list[int]) -> None:
    deadline = time.monotonic() + 480
    while time.monotonic() < deadline and not (history.exists() and len(history.read_text().splitlines()) >= 2):
        time.sleep(0.02)
    worker = train_worker()
    if worker is not None:
        os.kill(worker.pid, 9)
        killed.append(worker.pid)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(toy: Path, tiny_model: str, local_ray: Any):
    config = settings(toy, tiny_model, epochs=8, ray="always")
    killed: list[int] = []
    killer = threading.Thread(target=kill_after_two_steps, args=(toy / "tuned" / STEPS, killed), daemon=True)
    killer.start()
    run = finetune(config)
    assert len(killed) == 1
    straight = finished(config)
    assert_is_best(run.file("adapter"), straight)
    lines = [json.loads(line) for line in Path(run.file(STEPS)).read_text().splitlines()]
    assert len(lines) == 24
    for line, other in zip(lines, straight.progress.lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
