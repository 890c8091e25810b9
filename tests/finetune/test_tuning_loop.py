"""The loop on a tiny random Llama learns what can be learned, and its result does not depend on how it is run."""

import io
import logging
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_policy import (
    NAMES,
    SMALL_VOCABULARY,
    SPLIT,
    aspect_set,
    save_terse_llama,
    save_tiny_llama,
    template,
    terse_tokenizer,
    tokenizer,
    toy_config,
    toy_inputs,
)

from raygr.config import ConfigError
from raygr.finetune.loop import (
    Tuning,
    checkpoint_state,
    learning_rate_at,
    restore,
    start_tuning,
    step_examples,
    tune,
)
from raygr.finetune.lora import check_start, save_adapter
from raygr.finetune.losses import free_loss
from raygr.finetune.metrics import METRICS, advantages_of, keep_best_by, rewards_of, standardised_users
from raygr.finetune.policy import (
    adapter_state,
    adapter_weights,
    load_adapter_state,
    loss_weights,
    reference_logits,
    rollout_logits,
    sample_rollouts,
)
from raygr.finetune.rewards import log_prob, reciprocal_rank
from raygr.finetune.sampling import answer_template, free_rollouts
from raygr.models.workers import Share
from raygr.score.adapters import AdapterNote, model_sha256, read_note

CPU = torch.device("cpu")
BASE = {"task": "base", "reward": "log_prob", "lora_alpha": 16, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), vocabulary=SMALL_VOCABULARY)


@pytest.fixture(scope="module")
def wordy_folder(tmp_path_factory) -> str:
    """A tiny Llama with the tokenizer's whole vocabulary, whose completions can be read as text."""
    return save_tiny_llama(tmp_path_factory.mktemp("wordy"))


def tuning_of(folder: str, *, reward=None, share=None, users: int = 8, device=CPU, **changes) -> Tuning:
    config = toy_config(**(BASE | changes))
    answer = template() if config.rollouts == "free" else SPLIT
    return start_tuning(config, toy_inputs(folder, answer, users=users), device, share or Share(), reward)


def run(tuning: Tuning) -> Tuning:
    for _ in tune(tuning):
        pass
    return tuning


def assert_same_adapter(first: dict, second: dict, *, atol: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol)


def without_times(lines: list[dict]) -> list[dict]:
    return [{n: v for n, v in line.items() if n not in ("seconds", "tokens_per_second")} for line in lines]


def saved_checkpoints(tuning: Tuning) -> list[io.BytesIO]:
    """Saves a checkpoint at every place where the loop may be interrupted."""
    files = []
    for is_checkpoint in tune(tuning):
        if is_checkpoint:
            files.append(io.BytesIO())
            torch.save(checkpoint_state(tuning), files[-1])
    return files


def assert_resumes(straight: Tuning, resumed: Tuning, file: io.BytesIO) -> None:
    file.seek(0)
    restore(resumed, torch.load(file, weights_only=True))
    run(resumed)
    assert_same_adapter(adapter_state(resumed.model), adapter_state(straight.model))
    assert_same_adapter(resumed.best_adapter, straight.best_adapter)
    assert without_times(resumed.progress.lines) == without_times(straight.progress.lines)
    assert resumed.progress.evaluations == straight.progress.evaluations


def test_a_run_interrupted_after_any_round_equals_the_straight_one(folder):
    settings = {"warm_start_epochs": 2, "epochs": 2, "evaluate_every_steps": 1, "batch_size": 4}
    settings |= {"lora_dropout": 0.1, "kl_weight": 0.1}
    straight = tuning_of(folder, users=6, **settings)
    files = saved_checkpoints(straight)
    assert len(files) == 1 + 2 + 4  # before, two epochs of SFT warm-up, four steps
    for file in files:
        assert_resumes(straight, tuning_of(folder, users=6, **settings), file)


def test_an_interrupted_run_of_free_rollouts_equals_the_straight_one(wordy_folder):
    settings = {"rollouts": "free", "epochs": 2, "completions": 2}
    straight = tuning_of(wordy_folder, users=4, **settings)
    files = saved_checkpoints(straight)
    assert len(files) == 1 + 2  # before, two epochs
    assert_resumes(straight, tuning_of(wordy_folder, users=4, **settings), files[1])


def saved_sft(folder: str, path: Path) -> Tuning:
    """An adapter of the SFT warm-up alone, saved."""
    taught = run(tuning_of(folder, warm_start_epochs=5, epochs=0))
    load_adapter_state(taught.model, taught.best_adapter)
    names = {"shared_prompt_sha256": "p", "rollouts": "slots", "model": folder}
    names["model_sha256"] = model_sha256(folder)
    save_adapter(taught.model, AdapterNote(**names, aspects=NAMES, normalisation={}), str(path))
    return taught


def test_reinforcement_goes_on_from_a_saved_adapter(folder, tmp_path):
    taught = saved_sft(folder, tmp_path / "warm")
    assert [one["stage"] for one in taught.progress.evaluations] == ["before", "warm_start"]
    assert {line["stage"] for line in taught.progress.lines} == {"warm_start"}
    tuning = tuning_of(folder, adapter=str(tmp_path / "warm"))
    assert_same_adapter(adapter_state(tuning.model), taught.best_adapter)
    run(tuning)
    assert tuning.progress.evaluations[0]["metrics"] == taught.progress.evaluations[-1]["metrics"]
    assert tuning.progress.lines[0]["step"] == 1 and tuning.progress.lines[0]["stage"] == "reinforcement"


def test_an_adapter_of_another_shape_is_refused(folder, tmp_path):
    saved_sft(folder, tmp_path / "warm")
    note = read_note(str(tmp_path / "warm"))
    fitting = toy_config(**BASE)
    check_start(fitting, str(tmp_path / "warm"), note)
    with pytest.raises(ConfigError, match="another shape: r is 4 there and 8 here"):
        check_start(replace(fitting, lora_rank=8), str(tmp_path / "warm"), note)
    with pytest.raises(ConfigError, match="tuned with another prompt") as caught:
        check_start(fitting, str(tmp_path / "warm"), replace(note, shared_prompt_sha256="q"))
    assert "force" not in str(caught.value)


def two_workers(rank: int, folder: str, meeting: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    tuning = run(tuning_of(folder, users=5, share=Share(rank, 2), warm_start_epochs=1))
    if rank == 0:
        lines = without_times(tuning.progress.lines)
        torch.save({"adapter": adapter_state(tuning.model), "lines": lines, "e": tuning.progress.evaluations}, results)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_get_the_result_of_one(folder, tmp_path):
    results = str(tmp_path / "results.pt")
    torch.multiprocessing.spawn(two_workers, (folder, str(tmp_path / "meeting"), results), nprocs=2)
    two = torch.load(results, weights_only=True)
    # five users: the last step has one user, so the second worker has none
    one = run(tuning_of(folder, users=5, warm_start_epochs=1))
    # Adam divides by the gradient's size, so rounding errors of tiny gradients become large
    assert_same_adapter(two["adapter"], adapter_state(one.model), atol=2e-3)
    for ours, theirs in zip(two["lines"], without_times(one.progress.lines), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-2)
    assert two["e"][-1]["metrics"] == pytest.approx(one.progress.evaluations[-1]["metrics"], rel=1e-2)


def test_gradient_checkpointing_and_accumulation_change_no_step(folder):
    line = run(tuning_of(folder, batch_size=4)).progress.lines[0]
    assert line["gradient_norm"] > 0
    for changes in ({"gradient_checkpointing": True, "batch_size": 4}, {"batch_size": 2, "accumulation": 2}):
        other_line = run(tuning_of(folder, **changes)).progress.lines[0]
        assert other_line["gradient_norm"] == pytest.approx(line["gradient_norm"], rel=1e-3)
        assert other_line["loss"] == pytest.approx(line["loss"], rel=1e-4, abs=1e-6)


def mixed_up(reward):
    """The same rewards in a random order, which is always the same for the same completions."""

    def shuffled(user_GA, items_CA, relevant_C):
        order = np.random.default_rng(zlib.crc32(user_GA.numpy().tobytes())).permutation(len(user_GA))
        return reward(user_GA, items_CA, relevant_C)[torch.as_tensor(order)]

    return shuffled


def rise(folder: str, *, reward, seed: int) -> tuple[float, float]:
    """Increase of the sampled reward from the first five to the last five steps, and its standard error."""
    tuning = run(tuning_of(folder, reward=reward, seed=seed, epochs=15, completions=8, evaluate_every_steps=1000))
    rewards = np.array([line["reward"] for line in tuning.progress.lines])
    first, last = rewards[:5], rewards[-5:]
    return last.mean() - first.mean(), np.sqrt(first.var(ddof=1) / 5 + last.var(ddof=1) / 5)


def test_the_mean_reward_rises_and_does_not_with_shuffled_rewards(folder):
    rises, errors = np.array([rise(folder, reward=log_prob, seed=seed) for seed in range(3)]).T
    assert (rises > 3 * errors).all()
    # chance moves one run by a large part of what can be learned, so the test takes several seeds
    shuffled, noise = np.array([rise(folder, reward=mixed_up(log_prob), seed=seed) for seed in range(6)]).T
    assert shuffled.mean() < 0.25 * rises.mean()
    assert (shuffled > 3 * noise).sum() <= 2


@pytest.mark.parametrize("per_aspect_credit", [False, True])
def test_users_of_opposite_tastes_are_told_apart_by_their_prompts(folder, per_aspect_credit: bool):
    """One answer for all users has no value here, so whatever is learned is personal."""
    for seed in range(2):
        config = toy_config(**BASE, completions=8, epochs=40, evaluate_every_steps=1000, seed=seed)
        config = replace(config, per_aspect_credit=per_aspect_credit)
        inputs = toy_inputs(folder, users=16, held_out=8, kinds=2)
        first, *_, last = run(start_tuning(config, inputs, CPU, Share())).progress.evaluations
        assert first["metrics"]["personal_auc"] <= 0.6
        assert last["metrics"]["personal_auc"] > 0.9
        assert 0.3 < last["metrics"]["common_auc"] < 0.7


def test_the_warm_start_learns_the_teachers_ratings(folder):
    tuning = run(tuning_of(folder, warm_start_epochs=15, epochs=1))
    warm = [line["loss"] for line in tuning.progress.lines if line["stage"] == "warm_start"]
    assert warm[-1] < 0.5 * warm[0]
    stages = [one["stage"] for one in tuning.progress.evaluations]
    assert stages == ["before", "warm_start", "reinforcement"]
    assert tuning.progress.normalisation.user_mean == pytest.approx((7.5, 2.0), abs=1.0)


def test_reinforcement_starts_without_the_moments_of_the_warm_start(folder):
    tuning = run(tuning_of(folder, warm_start_epochs=2, epochs=1))
    assert {int(state["step"]) for state in tuning.optimizer.state.values()} == {tuning.progress.step}


@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "the model's own structured answer"])
def test_free_rollouts_that_nothing_is_read_from_learn_the_teachers_answer(wordy_folder, taught: bool):
    tuning = tuning_of(wordy_folder, rollouts="free", epochs=3, completions=2, format_reward=False)
    if not taught:
        tuning.data = tuning.data._replace(train=[one._replace(teacher_A=None) for one in tuning.data.train])
    lines = run(tuning).progress.lines
    assert len(tuning.policy.base_answers) == (0 if taught else 8)
    assert all(line["aspects_read"] < 0.5 and line["losses"]["value"] == 0 for line in lines)
    assert lines[-1]["losses"]["teacher"] < 0.9 * lines[0]["losses"]["teacher"]


def test_a_rating_that_is_read_later_counts_though_none_was_at_first(wordy_folder, caplog):
    tuning = tuning_of(wordy_folder, rollouts="free", warm_start_epochs=1, epochs=1, reward=reciprocal_rank)
    with caplog.at_level(logging.WARNING, logger="raygr.finetune.loop"):
        for _ in tune(tuning):
            if tuning.progress.evaluations[-1]["stage"] == "warm_start":
                break
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "tension level: mean 5.5, spread 2; humor: mean 5.5, spread 2" in said[0]
    assert tuning.progress.evaluations[-1]["metrics"]["valid"] == 0
    # users like the first aspect high and the second low
    texts = ["tension level: 9\nhumor: 2<|im_end|>", "tension level: 2\nhumor: 9<|im_end|>"]
    completions = [[tokenizer().encode(text) for text in texts]]
    examples, policy, task = tuning.data.train[:1], tuning.policy, tuning.task
    rollouts = free_rollouts(tokenizer(), completions, NAMES, policy.template, CPU)
    users_BGA = standardised_users(tuning.progress.normalisation, rollouts.ratings_BGA)
    reward_BG = rewards_of(task, examples, users_BGA)
    assert reward_BG[0, 0] > reward_BG[0, 1]
    advantage_BGA = advantages_of(task, examples, users_BGA, reward_BG)
    logits, targets = rollout_logits(policy, examples, rollouts)
    parts = free_loss(logits, rollouts, advantage_BGA, policy.template, loss_weights(policy.config), None, targets)
    assert parts.value.abs().item() > 0.01


def free_run(folder: str, **changes) -> Tuning:
    """Free rollouts of a model that has not learned the format, with a teacher that rates all aspects alike."""
    config = toy_config(
        **(BASE | {"rollouts": "free", "epochs": 35, "completions": 8, "evaluate_every_steps": 1000} | changes)
    )
    inputs = toy_inputs(folder, answer_template(terse_tokenizer(), aspect_set()))
    train = [example._replace(teacher_A=np.array([5.5, 5.5])) for example in inputs.train]
    return run(start_tuning(config, inputs._replace(train=train), CPU, Share()))


def test_free_rollouts_learn_the_format_from_the_teacher_and_the_ratings_from_the_task(tmp_path):
    folder = save_terse_llama(tmp_path)
    lines, others = (free_run(folder, value_reward=on).progress.lines for on in (True, False))
    for one in (lines, others):
        assert one[0]["valid"] == 0 and np.mean([line["valid"] for line in one[-10:]]) > 0.8
    rewards, without = (np.array([line["reward"] for line in one[-10:]]) for one in (lines, others))
    error = np.sqrt(rewards.var(ddof=1) / 10 + without.var(ddof=1) / 10)
    assert rewards.mean() - without.mean() > 5 * error


def test_every_step_says_how_it_went(folder):
    tuning = run(tuning_of(folder, reward=reciprocal_rank, epochs=6, per_aspect_credit=True))
    assert len(tuning.progress.lines) == 12
    for line in tuning.progress.lines:
        assert -1 <= line["reward"] <= 1
        assert line["valid"] == 1
        assert 0 < line["entropy"] <= np.log(10) + 1e-6
        assert line["loss"] == pytest.approx(sum(line["losses"].values()))
    assert [line["step"] for line in tuning.progress.lines if line["kl"] is not None] == [1, 11]
    assert tuning.progress.lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert tuning.progress.lines[10]["kl"] > 1e-6
    best = max(tuning.progress.evaluations, key=lambda one: one["metrics"]["personal_mrr"])
    assert (tuning.progress.best_step, tuning.progress.best_value) == (best["step"], best["metrics"]["personal_mrr"])
    assert [len(best["users"][name]) for name in METRICS] == [4] * len(METRICS)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["behind the prefill", "a pass of its own"])
def test_kl_is_to_the_policy_at_the_start_of_reinforcement(folder, dropout: float):
    """The reference is the policy after the SFT warm-up, not the bare model, so the divergence starts at 0."""
    tuning = run(
        tuning_of(folder, warm_start_epochs=10, epochs=1, value_reward=True, kl_weight=1.0, lora_dropout=dropout)
    )
    [first, *_] = [line for line in tuning.progress.lines if line["stage"] == "reinforcement"]
    assert first["kl"] < (1e-6 if not dropout else 0.1)
    before = adapter_state(tuning.model)
    examples = tuning.data.train[:2]
    rollouts = sample_rollouts(tuning.policy, examples, (0,), completions=1, learn=False)
    to_itself = reference_logits(tuning.policy, examples, rollouts.rows)
    assert_same_adapter(adapter_state(tuning.model), before)
    tuning.policy.reference.clear()
    assert (to_itself - reference_logits(tuning.policy, examples, rollouts.rows)).abs().max() > 0.1


def test_the_personal_metric_chooses_the_adapter_unless_told_otherwise():
    assert keep_best_by(toy_config(task="base", reward="log_prob")) == "personal_mrr"
    assert keep_best_by(toy_config(task="classification", reward="auc")) == "personal_auc"
    assert keep_best_by(toy_config(task="base", reward="log_prob", keep_best_by="reward")) == "reward"


@pytest.mark.parametrize("metric", ["personal_mrr", "reward"])
def test_an_adapter_that_answers_alike_for_all_is_not_kept_for_its_reward(folder, monkeypatch, metric: str):
    """The later evaluation has the higher reward and the lower personal metric."""
    values = iter([{"personal_mrr": 0.3, "reward": 0.1}, {"personal_mrr": 0.2, "reward": 0.5}])
    monkeypatch.setattr("raygr.finetune.loop.evaluate", lambda tuning, examples: {"metrics": next(values)})
    tuning = run(tuning_of(folder, epochs=1, keep_best_by=metric))
    assert tuning.progress.best_step == (0 if metric == "personal_mrr" else tuning.progress.step)


@pytest.mark.parametrize("stage", ["reinforcement", "warm_start"])
def test_logits_that_are_not_numbers_stop_the_run_with_the_step_and_what_to_try(folder, stage: str):
    tuning = tuning_of(folder, warm_start_epochs=int(stage == "warm_start"), epochs=2, learning_rate=0.5)
    steps = tune(tuning)
    while not any(line["stage"] == stage for line in tuning.progress.lines):
        next(steps)
    with torch.no_grad():
        next(iter(adapter_weights(tuning.model).values())).fill_(float("nan"))
    with pytest.raises(ConfigError) as caught:
        list(steps)
    name, rate = ("learning_rate", 0.5) if stage == "reinforcement" else ("warm_start_learning_rate", 0.01)
    assert str(caught.value) == (
        f"{name}: the model's logits are NaN or infinite in step 2 of {stage}, in float32, so the tuning stops "
        f"before it loses the adapter: set {name} below {rate:g}"
    )


def test_an_epoch_sees_every_user_once_in_its_own_order(folder):
    config = toy_config(batch_size=2)
    examples = toy_inputs(folder, users=5).train
    epochs = [
        [p.user_index for step in range(3) for p in step_examples(config, examples, 3 * e + step, 0)] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(5))
    assert epochs[0] != epochs[1]


def test_the_learning_rate_rises_then_falls_and_never_is_zero():
    rates = [learning_rate_at(step, 10, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[3:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
