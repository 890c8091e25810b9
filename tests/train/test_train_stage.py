"""Inputs are checked first; the loop learns, resumes and splits over workers; the stage keeps its contract."""

import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from toy_data import cycles, random_scores, walks, write_csv, write_prepared, write_score_run

from raygr import files, runs
from raygr.config import ConfigError
from raygr.models.workers import Share
from raygr.schema import CANDIDATE_SCHEMA, RANK_SCHEMA
from raygr.train import loop
from raygr.train.config import TrainConfig
from raygr.train.evaluate import score_shares, target_ranks
from raygr.train.inputs import load_inputs
from raygr.train.loop import accumulate_gradients, passes, training_rounds
from raygr.train.outputs import share_warnings
from raygr.train.stage import train
from raygr.train.state import Training, checkpoint_state, restore, start_training
from raygr.train.step import epoch_draws, whole_batch

torch.set_num_threads(1)  # the models are tiny, and threads that wait spin on cores others need

ITEMS, ASPECTS = 20, ["pace", "tension"]


def settings(folder: Path, **changes: Any) -> TrainConfig:
    """A small model that trains in seconds."""
    small = {"base_width": 16, "batch_size": 8, "max_history": 10, "epochs": 4, "dropout": 0.2, "threads": 1}
    return TrainConfig(output=str(folder / "train"), data=str(folder / "prepare"), **(small | changes))


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """20 users who walk a cycle of 20 items, and item scores of two aspects."""
    write_prepared(tmp_path / "prepare", cycles(20, ITEMS, 12), items=ITEMS)
    scores_IA = random_scores(ITEMS, 2, seed=0)
    write_csv(tmp_path / "scores.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
    return tmp_path


def begun(config: TrainConfig) -> Training:
    return start_training(config, load_inputs(config), torch.device("cpu"), Share())


def finished(config: TrainConfig) -> Training:
    training = begun(config)
    for _ in training_rounds(training):
        pass
    training.model.load_state_dict(training.best_weights)
    return training


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "bce"},
        {"item_scores": "scores.csv"},
        {"item_scores": "scores.csv", "user_scores": "none", "fusion": "add"},
        {"item_scores": "scores.csv", "user_scores": "none", "fusion": "concat", "base_width": 14},
        {"item_scores": "scores.csv", "user_scores": "profile", "user_side": "add", "fusion": "add"},
    ],
)
def test_learns_a_pattern_to_recall_1(toy: Path, changes: dict[str, Any]):
    if "item_scores" in changes:
        changes = changes | {"item_scores": str(toy / changes["item_scores"])}
    training = finished(settings(toy, epochs=80, learning_rate=0.01, dropout=0.0, patience=80, **changes))
    rank_E = target_ranks(training, "test", ["full"])["full"]
    assert rank_E.tolist() == [1.0] * 20


def test_patience_stops_and_the_best_weights_are_kept(toy: Path):
    training = finished(settings(toy, epochs=200, learning_rate=0.01, dropout=0.0, patience=3))
    progress = training.progress
    assert progress.epoch == progress.best_epoch + 3 < 200
    rank_E = target_ranks(training, "validation", ["full"])["full"]
    best = progress.lines[progress.best_epoch - 1]["validation"]
    assert np.mean(1 / rank_E.numpy()) == pytest.approx(best["mrr"])


def test_evaluation_every_other_epoch(toy: Path):
    lines = finished(settings(toy, epochs=5, evaluate_every=2)).progress.lines
    assert [line["epoch"] for line in lines if "validation" in line] == [2, 4, 5]


def test_a_resumed_training_equals_the_straight_one(toy: Path):
    config = settings(toy, item_scores=str(toy / "scores.csv"), loss="bce")
    straight = finished(config)
    first = begun(config)
    rounds = training_rounds(first)
    next(rounds), next(rounds)
    resumed = begun(config)
    restore(resumed, checkpoint_state(first))
    assert resumed.progress.epoch == 2
    for _ in training_rounds(resumed):
        pass
    resumed.model.load_state_dict(resumed.best_weights)
    assert_same_weights(resumed.model.state_dict(), straight.model.state_dict())
    losses = [[line["loss"] for line in training.progress.lines] for training in (resumed, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_seeds_differ_and_one_seed_repeats(toy: Path):
    losses = [finished(settings(toy, epochs=2, seed=seed)).progress.lines[-1]["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_user_profile_in_training_knows_the_prompt_part_only(tmp_path: Path):
    """Changing the rating of a train interaction after the prompt changes the evaluation vector alone."""
    histories, scores_IA = walks(6, ITEMS, 10, seed=0), random_scores(ITEMS, 2, seed=0)
    path = write_csv(tmp_path / "s.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
    vectors = []
    for name, late_rating in (("a", 1.0), ("b", 5.0)):
        ratings = [[5, 1, 3, 2, 4, 3, late_rating, 3, 3, 3] for _ in histories]
        write_prepared(tmp_path / name / "prepare", histories, items=ITEMS, ratings=ratings)
        after = {"item_scores": path, "user_scores": "profile", "user_guided_train": "after_prompt"}
        vectors.append(load_inputs(settings(tmp_path / name, **after)).user_vectors)
    assert vectors[0].prompt_U.tolist() == [4] * 6  # half of the 8 train interactions
    raw = [found.training_UA - found.training_UA.mean(0) for found in vectors]
    scale_A = raw[0][0] / raw[1][0]  # only the common scale, fitted on the whole train part, may differ
    np.testing.assert_allclose(raw[0], raw[1] * scale_A)
    assert not np.allclose(vectors[0].evaluation_UA, vectors[1].evaluation_UA)


def test_held_out_ratings_change_no_user_vector(tmp_path: Path):
    histories, scores_IA = walks(6, ITEMS, 10, seed=0), random_scores(ITEMS, 2, seed=0)
    path = write_csv(tmp_path / "s.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
    vectors = []
    for name, held_out in (("a", 1.0), ("b", 5.0)):
        ratings = [[5, 1, 3, 2, 4, 3, 1, 3, held_out, held_out] for _ in histories]
        write_prepared(tmp_path / name / "prepare", histories, items=ITEMS, ratings=ratings)
        after = {"item_scores": path, "user_scores": "profile", "user_guided_train": "after_prompt"}
        vectors.append(load_inputs(settings(tmp_path / name, **after)).user_vectors)
    np.testing.assert_array_equal(vectors[0].evaluation_UA, vectors[1].evaluation_UA)


def user_run(toy: Path, *, cutoff: int, users: int = 20, data: str = "prepare", time: int | None = None) -> str:
    """A score run of the first users of `data`, whose prompts know everything up to position `cutoff`."""
    scores = {f"u{u}": [float(u % 10 + 1), 5.0 + u % 2] for u in range(users)}
    cutoffs, times = dict.fromkeys(scores, cutoff), dict.fromkeys(scores, time if time is not None else cutoff)
    folder = toy / f"users-{cutoff}-{users}-{data}-{time}"
    return write_score_run(folder, scores, aspects=ASPECTS, cutoffs=cutoffs, times=times, data=str(toy / data))


def llm_settings(toy: Path, run: str, **changes: Any) -> TrainConfig:
    llm = {"item_scores": str(toy / "scores.csv"), "user_scores": "llm", "user_score_run": run}
    return settings(toy, **llm | changes)


def test_user_scores_that_know_a_held_out_interaction_are_refused(toy: Path):
    """12 interactions: positions 0..9 are train, 10 is validation; times are the positions here."""
    for run in (user_run(toy, cutoff=10), user_run(toy, cutoff=9, time=10)):
        with pytest.raises(ConfigError, match="20 users hold interactions after the train part"):
            load_inputs(llm_settings(toy, run))
    inputs = load_inputs(llm_settings(toy, user_run(toy, cutoff=9)))
    assert inputs.windows.first_target_E.min() == 1


def test_user_scores_of_other_data_are_refused(toy: Path):
    """Positions alone do not show this: a prompt of another split may hold interactions that are predicted here."""
    write_prepared(toy / "other", cycles(20, ITEMS, 14), items=ITEMS)
    with pytest.raises(ConfigError, match=r"scored from other data than .*/prepare"):
        load_inputs(llm_settings(toy, user_run(toy, cutoff=9, data="other")))


def test_a_score_run_of_the_other_kind_is_refused(toy: Path):
    users = user_run(toy, cutoff=9)
    with pytest.raises(ValueError, match="has scores of users: name a score run of items here"):
        load_inputs(settings(toy, item_scores=users))
    items = write_score_run(toy / "items", {f"u{u}": [1.0, 2.0] for u in range(20)}, aspects=ASPECTS)
    with pytest.raises(ValueError, match="has scores of items: name a score run of users here"):
        load_inputs(llm_settings(toy, items))


@pytest.mark.parametrize("users", [20, 15])
def test_after_the_prompt_scored_users_are_trained_or_it_is_refused(toy: Path, users: int):
    """With scores of whole histories, only users without scores would be left to train on."""
    whole = user_run(toy, cutoff=9, users=users)
    with pytest.raises(ConfigError, match="nothing is left to train on after them"):
        load_inputs(llm_settings(toy, whole, user_guided_train="after_prompt"))
    half = load_inputs(llm_settings(toy, user_run(toy, cutoff=4, users=users), user_guided_train="after_prompt"))
    assert half.windows.user_E.tolist() == list(range(20))
    first = half.windows.first_target_E - half.windows.start_E
    assert first.tolist() == [5] * users + [1] * (20 - users)


def test_users_without_scores_are_counted_and_have_no_vector(toy: Path):
    """5 of 20 users have no scores. The others are standardised without them."""
    inputs = load_inputs(llm_settings(toy, user_run(toy, cutoff=9, users=15)))
    vectors_UA = inputs.user_vectors.evaluation_UA
    assert vectors_UA[15:].tolist() == [[0, 0]] * 5
    assert vectors_UA[:15].std(axis=0) == pytest.approx([1, 1])
    assert inputs.user_vectors.without_scores == 5
    assert any("5 of 20 users (25%) have no complete scores" in text for text in inputs.warnings)


def test_a_table_of_user_vectors_is_an_oracle_and_says_so(toy: Path):
    vectors = {f"u{u}": [float(u), float(u % 3)] for u in reversed(range(20))}
    path = write_csv(toy / "tastes.csv", vectors, ASPECTS)
    oracle = {"item_scores": str(toy / "scores.csv"), "user_scores": "table", "user_table": path}
    inputs = load_inputs(settings(toy, **oracle))
    by_hand_UA = np.array([[u, u % 3] for u in range(20)], float)
    by_hand_UA = (by_hand_UA - by_hand_UA.mean(axis=0)) / by_hand_UA.std(axis=0)
    np.testing.assert_allclose(inputs.user_vectors.evaluation_UA, by_hand_UA)
    np.testing.assert_array_equal(inputs.user_vectors.training_UA, inputs.user_vectors.evaluation_UA)
    assert any("tastes.csv are an oracle: nobody checked what they know" in text for text in inputs.warnings)
    in_the_state = load_inputs(settings(toy, **oracle | {"user_scores": "history"}))
    np.testing.assert_array_equal(in_the_state.user_vectors.evaluation_UA, inputs.user_vectors.evaluation_UA)
    with pytest.raises(ConfigError, match=r"is a score run, .*: set user_score_run instead"):
        load_inputs(settings(toy, **oracle | {"user_table": user_run(toy, cutoff=9)}))


@pytest.mark.parametrize("guided_train", ["all", "after_prompt"])
def test_shuffled_users_have_the_vectors_of_others_and_learn_at_their_own_positions(toy: Path, guided_train: str):
    """5 of 20 users have no scores, and stay without."""
    run = user_run(toy, cutoff=4, users=15)
    plain, shuffled, other = (
        load_inputs(llm_settings(toy, run, user_guided_train=guided_train, **changes))
        for changes in ({}, {"user_control": "shuffled"}, {"user_control": "shuffled", "seed": 1})
    )
    before_UA, after_UA = plain.user_vectors.evaluation_UA, shuffled.user_vectors.evaluation_UA
    np.testing.assert_array_equal(after_UA[:15], before_UA[np.random.default_rng(0).permutation(15)])
    assert not after_UA[15:].any() and (after_UA != before_UA).any() and (after_UA != other.user_vectors[1]).any()
    np.testing.assert_array_equal(shuffled.user_vectors.training_UA, after_UA)
    assert shuffled.windows.first_target_E.tolist() == plain.windows.first_target_E.tolist()
    assert shuffled.scores.scores_IA.tolist() == plain.scores.scores_IA.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_width": 15}, "total width 15 .* is no multiple of heads 2"),
        ({"control": "shuffled"}, "control: no effect without item_scores"),
        ({"item_scores": "s", "fusion": "add", "linear_map": True}, "linear_map: no effect on fusion: add"),
        (
            {"item_scores": "s", "user_scores": "profile", "fusion": "add", "user_side": "concat"},
            "needs fusion: concat",
        ),
        ({"item_scores": "s", "user_scores": "profile", "user_side": "add"}, "is \\(9b\\), which joins \\(9a\\)"),
        (
            {"item_scores": "s", "user_scores": "none"},
            "fusion: none without user_scores would leave",
        ),
        ({"item_scores": "s", "user_side": "add", "fusion": "add"}, "user_scores: history needs user_side: learned"),
        ({"item_scores": "s", "user_score_run": "u", "user_scores": "profile"}, "profile reads no user_score_run"),
        ({"item_scores": "s", "model": "gru4rec", "session_parallel": True}, "needs whole histories"),
        ({"item_scores": "s", "user_scores": "llm"}, "belong together"),
        ({"item_scores": "s", "user_scores": "table"}, "user_scores: table and user_table belong together"),
        ({"item_scores": "s", "user_scores": "profile", "user_table": "t"}, "user_scores: profile reads no user_table"),
        ({"item_scores": "s", "user_score_run": "u", "user_table": "t"}, "two sources of users' vectors"),
        (
            {"item_scores": "s", "user_scores": "table", "user_table": "t", "user_guided_train": "after_prompt"},
            "a user_table has none",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_runs(toy: Path, changes: dict[str, Any], message: str):
    with pytest.raises((ConfigError, ValueError), match=message):
        train(settings(toy, **changes))
    assert not (toy / "train").exists()


def test_histories_too_short_to_train_on_are_refused(tmp_path: Path):
    write_prepared(tmp_path / "prepare", cycles(4, ITEMS, 3), items=ITEMS)
    with pytest.raises(ConfigError, match="no user has a target to train on"):
        load_inputs(settings(tmp_path))


def test_interactions_against_the_contract_are_refused(toy: Path):
    path = toy / "prepare" / "interactions.parquet"
    pq.write_table(pq.read_table(path).take(list(range(239, -1, -1))), path)
    with pytest.raises(ValueError, match="rows not sorted by user_index and position"):
        load_inputs(settings(toy))


def test_a_user_side_that_decides_nothing_is_warned_of(toy: Path):
    changes = {"item_scores": str(toy / "scores.csv"), "user_scores": "history"}
    training = begun(settings(toy, **changes))  # the state's maps start at 0
    shares = score_shares(training)
    assert shares == {"base": pytest.approx(1.0), "encoder_guided": 0.0, "user_guided": 0.0}
    assert "decides next to nothing" in share_warnings(training.inputs, training.config, shares)[0]
    assert share_warnings(training.inputs, training.config, shares | {"user_guided": 0.2}) == []


def test_the_first_losses_are_those_of_the_golden_curve(toy: Path):
    """A refactor must reproduce these losses; a change of behaviour records new ones."""
    losses = [line["loss"] for line in finished(settings(toy, epochs=4)).progress.lines]
    golden = json.loads((Path(__file__).parents[1] / "golden_losses.json").read_text(encoding="utf-8"))
    assert losses == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
def test_histories_grouped_by_length_have_the_gradient_of_the_whole_batch(model: str, tmp_path: Path, monkeypatch: Any):
    histories = [walk[:length] for walk, length in zip(walks(7, ITEMS, 12, seed=0), range(5, 12), strict=True)]
    write_prepared(tmp_path / "prepare", histories, items=ITEMS)
    config = settings(tmp_path, model=model, dropout=0.0)
    gradients, losses = [], []
    for positions in (1000, 20):  # all at once; two histories of nine or ten, later more
        monkeypatch.setattr(loop, "POSITIONS_AT_ONCE", positions)
        training = begun(config)
        draws = epoch_draws(config.seed, 1, 0)
        whole = whole_batch(config, training.inputs, torch.arange(7), training.popularity_I, draws)
        assert (len(passes(training, whole.batch)) > 1) == (positions == 20)
        losses.append(accumulate_gradients(training, whole))
        gradients.append([p.grad for p in training.model.parameters() if p.requires_grad])
    torch.testing.assert_close(losses[1], losses[0])
    for grouped, together in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(grouped, together, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_workers_have_the_gradient_of_one(toy: Path, local_ray: Any):
    import ray.train
    from ray.train.torch import TorchTrainer

    config = settings(toy, item_scores=str(toy / "scores.csv"), dropout=0.0)

    def add_first_gradient(training: Training) -> None:
        draws = epoch_draws(config.seed, 1, training.share.rank)
        whole = whole_batch(config, training.inputs, torch.arange(7), training.popularity_I, draws)
        accumulate_gradients(training, whole)

    def first_gradient(_: dict[str, Any]) -> None:
        context = ray.train.get_context()
        share = Share(context.get_world_rank(), context.get_world_size())
        training = start_training(config, load_inputs(config), torch.device("cpu"), share)
        add_first_gradient(training)  # 4 examples here, 3 there
        gradient = [p.grad for p in training.model.parameters() if p.requires_grad]
        torch.save(gradient, f"{config.data}/gradient-{share.rank}.pt")

    scaling = ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    run = ray.train.RunConfig(name="gradient", storage_path=str(toy / "ray"))
    TorchTrainer(first_gradient, train_loop_config={}, scaling_config=scaling, run_config=run).fit()
    alone = begun(config)
    add_first_gradient(alone)
    expected = [p.grad for p in alone.model.parameters() if p.requires_grad]
    for rank in (0, 1):
        for found, wanted in zip(torch.load(toy / "prepare" / f"gradient-{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def worker_of_this_process() -> int | None:
    """Process id of a Ray Train worker below this test, from /proc."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
    for pid, name in names.items():
        ancestor = pid
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid() and "RayTrainWorker" in name:
            return pid
    return None


def kill_worker_after_two_evaluations(history: Path, killed: list[int]) -> None:
    while not history.exists() or len(history.read_text().splitlines()) < 2:
        time.sleep(0.02)
    pid = worker_of_this_process()
    if pid is not None:
        os.kill(pid, 9)
        killed.append(pid)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(toy: Path, local_ray: Any):
    """The folder is named by a URI."""
    config = settings(toy, epochs=20, patience=20, item_scores=str(toy / "scores.csv"), ray="always")
    config = dataclasses.replace(config, output=f"file://{toy}/train")
    killed: list[int] = []
    killer = threading.Thread(
        target=kill_worker_after_two_evaluations, args=(toy / "train/epochs.jsonl", killed), daemon=True
    )
    killer.start()
    run = train(config)
    assert len(killed) == 1
    assert run.path == config.output
    weights = safetensors.torch.load_file(toy / "train/model.safetensors")
    straight = finished(config)
    assert_same_weights(weights, straight.best_weights)
    lines = [json.loads(line) for line in (toy / "train/epochs.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in straight.progress.lines]


@pytest.mark.slow
def test_a_diverged_training_says_what_to_do_as_it_would_without_ray(toy: Path, local_ray: Any):
    with pytest.raises(ValueError, match="lower the learning rate"):
        train(settings(toy, learning_rate=1e30, epochs=1, ray="always"))


def test_a_run_keeps_the_contract(tmp_path: Path):
    write_prepared(tmp_path / "prepare", walks(40, 130, 12, seed=0), items=130)
    scores_IA = random_scores(130, 2, seed=0)
    path = write_csv(tmp_path / "s.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
    config = settings(
        tmp_path,
        epochs=2,
        item_scores=path,
        user_scores="profile",
        candidates=("full", "uniform-100", "popularity-100"),
    )
    run = train(config)
    record = runs.read_run(run.path, job="train")
    assert record.inputs.keys() == {config.data, path}
    assert record.counts["train_targets"] == record.counts["train_targets_used"] == 40 * 9
    table = pq.read_table(run.file("ranks.parquet"))
    assert table.schema.equals(RANK_SCHEMA)
    assert table.num_rows == 40 * 2 * 3
    metrics = files.read_json(run.file("metrics.json"))
    stamp = {"split", "targets", "average", "candidates", "candidate_sets", "seen", "ties", "data"}
    assert metrics["protocol"].keys() == stamp
    assert metrics["test"].keys() == {"full", "uniform-100", "popularity-100"}
    stored = pq.read_table(run.file("candidates.parquet"))
    assert stored.schema.equals(CANDIDATE_SCHEMA) and stored.num_rows == 40 * 2
    assert metrics["epochs"] == 2 and metrics["best_epoch"] in (1, 2)
    assert sum(metrics["shares"].values()) == pytest.approx(1, abs=1e-3)
    ranks = table.to_pandas().query("part == 'test' and candidates == 'full'")["rank"]
    assert metrics["test"]["full"]["mrr"] == pytest.approx((1 / ranks).mean())
    with pytest.raises(runs.RunError, match="finished run"):
        train(config)
