"""Prompts end before the interactions of the reward; users are drawn by seed; bad inputs are refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_data import interaction_arrays, random_scores, walks, write_csv, write_prepared, write_score_run

from raygr.config import ConfigError, check_config
from raygr.data.interactions import Interactions, read_interactions
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import (
    TuningData,
    TuningExample,
    cut_histories,
    draw_candidates,
    like_threshold,
    load_tuning_data,
)
from raygr.finetune.metrics import tuning_task
from raygr.schema import TRAIN
from raygr.score.aspects import load_aspects
from raygr.score.subjects import encoder_of, prompt_settings

ASPECTS = str(Path(__file__).parents[2] / "configs" / "aspects" / "movies.yaml")
NAMES = list(load_aspects(ASPECTS).names)
ITEMS, USERS, LENGTH = 40, 12, 10  # positions 0..7 are train, 8 validation, 9 test


def settings(folder: Path, **changes: Any) -> FinetuneConfig:
    toy = {"data": str(folder / "prepare"), "item_scores": str(folder / "items.csv"), "aspects": ASPECTS}
    small = {"keep_out": 3, "candidate_items": 10, "held_out_fraction": 0.25, "max_prompt_tokens": 900}
    return FinetuneConfig(output=str(folder / "tuned"), **(toy | small | changes))


def write_toy(folder: Path, *, histories: list[list[int]] | None = None, late_rating: float = 3.0) -> Path:
    """`late_rating`: rating of every interaction after the cut of keep_out 3, test and validation included."""
    histories = histories or walks(USERS, ITEMS, LENGTH, seed=0)
    ratings = [
        [1.0, 5.0, 4.0, 2.0, 3.0, *[late_rating, 5.0, 1.0, late_rating, late_rating]][: len(h)] for h in histories
    ]
    write_prepared(folder / "prepare", histories, items=ITEMS, ratings=ratings)
    scores_IA = random_scores(ITEMS, len(NAMES), seed=0)
    write_csv(folder / "items.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, NAMES)
    return folder


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def texts(config: FinetuneConfig, example: TuningExample) -> str:
    encoder = encoder_of(prompt_settings(config, "users"))
    return encoder.tokenizer.decode(example.prompt_ids)


def users_of(inputs: TuningData) -> tuple[list[int], list[int]]:
    return [one.user_index for one in inputs.train], [one.user_index for one in inputs.held_out]


def test_a_prompt_holds_the_reviews_before_the_cut_and_no_other(toy: Path):
    config = settings(toy)
    inputs = load_tuning_data(config)
    histories = walks(USERS, ITEMS, LENGTH, seed=0)
    for example in inputs.train + inputs.held_out:
        own = histories[example.user_index]
        text = texts(config, example)
        shown = {int(title) for title in re.findall(r"title (\d+)\b", text)}
        assert shown == set(own[:5])
        assert [int(at) for at in re.findall(rf"words of u{example.user_index} at (\d)", text)] == [0, 1, 2, 3, 4]
        assert text.endswith("<|im_start|>assistant\n")
        assert (example.judged_N + 1).tolist() == own[5:8]
        assert example.candidate_C[0] + 1 == own[7]
        assert not shown & set((example.judged_N + 1).tolist())
        assert not set((example.candidate_C[1:] + 1).tolist()) & set(own)
        assert len(set(example.candidate_C.tolist())) == 11


def test_what_happens_behind_the_cut_changes_no_prompt_and_no_teacher(tmp_path: Path):
    found = [
        load_tuning_data(
            settings(write_toy(tmp_path / str(late), late_rating=late), warm_start_epochs=1, teacher="profile")
        )
        for late in (1.0, 5.0)
    ]
    for one, other in zip(*(inputs.train + inputs.held_out for inputs in found), strict=True):
        assert one.prompt_ids == other.prompt_ids
        np.testing.assert_array_equal(one.teacher_A, other.teacher_A)
        assert one.liked_N.tolist() != other.liked_N.tolist()


def test_users_are_drawn_by_seed_and_held_out_for_every_task_alike(toy: Path):
    base = users_of(load_tuning_data(settings(toy)))
    assert users_of(load_tuning_data(settings(toy))) == base
    assert sorted(base[0] + base[1]) == list(range(USERS)) and len(base[1]) == 3
    assert users_of(load_tuning_data(settings(toy, task="classification"))) == base
    assert users_of(load_tuning_data(settings(toy, seed=1))) != base
    few = load_tuning_data(settings(toy, max_users=4))
    assert users_of(few) == (base[0][:3], base[1][:1])
    assert few.counts == {
        "users": 12,
        "train": 3,
        "held_out": 1,
        "too_short": 0,
        "one_class": 0,
        "not_drawn": 8,
        "without_teacher": 4,
        "items_without_score": 0,
    }


def test_short_users_and_users_of_one_class_are_skipped_and_counted(tmp_path: Path):
    histories = walks(USERS, ITEMS, LENGTH, seed=0)
    histories[2], histories[5] = histories[2][:5], histories[5][:5]  # 3 train interactions, all kept out
    inputs = load_tuning_data(settings(write_toy(tmp_path, histories=histories)))
    assert inputs.counts["too_short"] == 2 and inputs.counts["train"] + inputs.counts["held_out"] == 10
    assert not {2, 5} & {one.user_index for one in inputs.train + inputs.held_out}
    # the last two train ratings are 5 and 1, or 5 and 4 of the short users: of one class at 4, all of them at 1
    judged = {"task": "classification", "keep_out": 2}
    assert load_tuning_data(settings(tmp_path, **judged)).counts["one_class"] == 2
    with pytest.raises(ConfigError, match=r"0 users to train on and 0 held out.*12 have no liked or only liked"):
        load_tuning_data(settings(tmp_path, **judged, like_threshold=1.0))


@pytest.mark.parametrize(("low", "high", "threshold"), [(1, 5, 4.0), (0.5, 5, 3.875), (0, 10, 7.5), (0, 1, 0.75)])
def test_what_is_liked_follows_the_rating_range(toy: Path, low: float, high: float, threshold: float):
    assert like_threshold(settings(toy), (low, high)) == threshold
    with pytest.raises(ConfigError, match="like_threshold: 11 lies outside the ratings of"):
        like_threshold(settings(toy, like_threshold=11), (low, high))


def test_liked_is_what_the_user_rates_above_the_train_mean_of_the_item():
    """Item 1 has the train ratings 5, 5 and 2, mean 4; item 2 has 2 and 1; item 3 has one; items 4 and 5 have none."""
    nan = float("nan")
    user_N = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    item_N = np.array([1, 2, 4, 1, 2, 1, 1, 3, 5])
    rating_N = np.array([5.0, 2, 5, 5, 1, 4, 2, 5, nan])
    split_N = np.array(["train", "train", "test", "train", "train", "validation", "train", "train", "train"])
    data = Interactions(user_N, item_N, rating_N, split_N, users=3, items=5)
    config = FinetuneConfig(output="o", data="d", item_scores="s", aspects="a", liked_by="item_mean", keep_out=1)
    found = cut_histories(config, data, (1, 5))
    assert found.liked_N.tolist() == [True, True, False, True, False, False, False, False, False]
    assert found.popularity_I.tolist() == [3, 2, 1, 0, 1]
    by_rating = cut_histories(replace(config, liked_by="rating"), data, (1, 5))
    assert by_rating.liked_N.tolist() == [True, False, True, True, False, True, False, True, False]


def test_candidates_by_popularity_leave_popularity_little_to_gain(toy: Path):
    """The user's own items, often popular ones, are no candidates, so a little is left to gain."""
    generator = np.random.default_rng(0)
    share_I = np.arange(1, 61) ** -0.8
    histories = [(1 + generator.choice(60, 10, replace=False, p=share_I / share_I.sum())).tolist() for _ in range(1500)]
    data = read_interactions(write_prepared(toy / "skewed", histories, items=60))
    for draw, lowest, highest in (("uniform", 0.7, 1.0), ("popularity", 0.45, 0.62)):
        config = settings(toy, candidate_draw=draw, candidate_items=5)
        cut = cut_histories(config, data, (1, 5))
        drawn_UC = np.stack([draw_candidates(config, cut, user) for user in range(1500)])
        count_UC = cut.popularity_I[drawn_UC]
        auc = (np.sign(count_UC[:, :1] - count_UC[:, 1:]) / 2 + 0.5).mean()
        assert lowest < auc < highest, f"{draw}: {auc}"
        assert all(len(set(row)) == 6 for row in drawn_UC.tolist())


def test_candidates_by_popularity_are_items_with_train_interactions(toy: Path):
    config = settings(toy, candidate_draw="popularity", candidate_items=3)
    cut = cut_histories(config, read_interactions(config.data), (1, 5))
    own = set(cut.own_items(0).tolist())
    others = [item for item in range(ITEMS) if item not in own]
    cut = cut._replace(popularity_I=np.where(np.isin(np.arange(ITEMS), others[:3]), 1, 0))
    assert set(draw_candidates(config, cut, 0)[1:].tolist()) == set(others[:3])
    with pytest.raises(ConfigError, match=r"candidate_items: 4 are more than the 3 items .*candidate_draw: popularity"):
        draw_candidates(replace(config, candidate_items=4), cut, 0)


def test_a_teacher_table_may_miss_users_and_they_are_counted(toy: Path):
    train, held_out = users_of(load_tuning_data(settings(toy)))
    ratings = {f"u{user}": [float(1 + user % 10)] * len(NAMES) for user in [*train[1:], *held_out]}
    inputs = load_tuning_data(
        settings(toy, warm_start_epochs=1, teacher=write_csv(toy / "teacher.csv", ratings, NAMES))
    )
    assert inputs.counts["without_teacher"] == 1 and inputs.train[0].teacher_A is None
    assert inputs.train[1].teacher_A.tolist() == [1.0 + train[1] % 10] * len(NAMES)


def test_item_statistics_are_of_the_items_that_have_scores(toy: Path):
    """Half of the items have no scores; filled with the mean they would shrink the deviation by a factor of .71."""
    scored = {f"i{i}": [float(1 + i % 2 * 8)] * len(NAMES) for i in range(1, ITEMS // 2 + 1)}  # 9 and 1 in turn
    half = write_csv(toy / "half.csv", scored, NAMES)
    config = settings(toy, item_scores=half, warm_start_epochs=1, teacher="profile")
    inputs = load_tuning_data(config)
    assert inputs.counts["items_without_score"] == 20
    task = tuning_task(config, inputs.items_IA, None)
    assert (task.item_mean, task.item_std) == ((5.0,) * len(NAMES), (4.0,) * len(NAMES))
    assert task.items_IA[:, 0].tolist() == [1.0, -1.0] * 10 + [0.0] * 20
    assert all(np.isfinite(one.teacher_A).all() for one in inputs.train)


def test_an_aspect_without_any_score_is_refused(toy: Path):
    scores = {f"i{i}": [None, *[5.0] * (len(NAMES) - 1)] for i in range(1, ITEMS + 1)}
    unread = write_score_run(toy / "unread", scores, aspects=NAMES)
    with pytest.raises(ValueError, match=f"no item has a score of {NAMES[0]}"):
        load_tuning_data(settings(toy, item_scores=unread))


def test_a_profile_teacher_rates_what_the_user_likes_high(toy: Path):
    inputs = load_tuning_data(settings(toy, warm_start_epochs=1, teacher="profile"))
    ratings_UA = np.stack([one.teacher_A for one in inputs.train])
    assert ratings_UA.min() >= 1 and ratings_UA.max() <= 10
    # user 0 rates item histories[0][1] with 5 and histories[0][0] with 1: its profile leans from one to the other
    own = walks(USERS, ITEMS, LENGTH, seed=0)[inputs.train[0].user_index]
    rated = np.array([1.0, 5.0, 4.0, 2.0, 3.0]) - 3
    scores_A = inputs.items_IA[np.array(own[:5]) - 1]
    scaled = (scores_A - inputs.items_IA.mean(0)) / inputs.items_IA.std(0)
    assert np.corrcoef((rated[:, None] * scaled).mean(0), ratings_UA[0])[0, 1] > 0.5


def test_a_teacher_that_saw_held_out_interactions_is_refused(toy: Path):
    scores = {f"u{user}": [5.0] * len(NAMES) for user in range(USERS)}

    def teacher(cutoff: int, data: str = "prepare") -> str:
        folder, cutoffs = toy / f"users-{cutoff}-{data}", dict.fromkeys(scores, cutoff)
        return write_score_run(folder, scores, aspects=NAMES, cutoffs=cutoffs, data=str(toy / data))

    assert load_tuning_data(settings(toy, warm_start_epochs=1, teacher=teacher(7))).counts["without_teacher"] == 0
    with pytest.raises(ConfigError, match="seen interactions after the train part"):
        load_tuning_data(settings(toy, warm_start_epochs=1, teacher=teacher(8)))
    write_prepared(toy / "other", walks(USERS, ITEMS, LENGTH + 1, seed=0), items=ITEMS)
    with pytest.raises(ConfigError, match="scored from other data"):
        load_tuning_data(settings(toy, warm_start_epochs=1, teacher=teacher(7, "other")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "auc"}, "reward: auc is not one of task: base"),
        ({"task": "classification", "reward": "log_prob"}, "reward: log_prob is not one of task: classification"),
        ({"task": "classification", "keep_out": 1}, "needs keep_out of 2 or more"),
        ({"warm_start_epochs": 1}, "warm_start_epochs needs a teacher"),
        ({"epochs": 0}, "epochs and warm_start_epochs are both 0"),
        ({"rollouts": "free", "value_reward": False, "format_reward": False}, "nothing to learn from"),
        ({"value_reward": False}, "slots always keep the format"),
        ({"lambda_format_unread": 0.5}, "lambda_format_unread: no effect on rollouts: slots"),
        ({"teacher": "profile"}, "teacher: no effect on rollouts: slots without warm_start_epochs"),
        ({"format_reward": False, "lambda_format_read": 0.5}, "lambda_format_read: no effect without format_reward"),
        ({"liked_by": "item_mean", "like_threshold": 3.0}, "like_threshold: no effect on liked_by: item_mean"),
        (
            {"rollouts": "free", "value_reward": False, "contrast_weight": 1.0},
            "contrast_weight: no effect without value_reward",
        ),
        (
            {"teacher": "profile", "warm_start_epochs": 1, "epochs": 0, "contrast_weight": 1.0, "entropy_weight": 0.1},
            "contrast_weight, entropy_weight: no effect without epochs of reinforcement",
        ),
        ({"contrast_weight": 1.0, "batch_size": 1}, "batch_size * accumulation must be 2 or more"),
    ],
)
def test_contradictions_are_refused_in_one_line(changes: dict[str, Any], message: str):
    needed = {"output": "o", "data": "d", "item_scores": "s", "aspects": "a"}
    with pytest.raises(ConfigError) as caught:
        check_config(FinetuneConfig, needed | changes, source="test")
    assert message in str(caught.value).splitlines()[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidate_items": 35}, "candidate_items: 35 are more than the 30 items"),
        ({"keep_out": 8}, "0 users to train on and 0 held out.*12 of 12 have no train interaction before the last 8"),
        ({"max_prompt_tokens": 64}, "max_prompt_tokens=64 is too small"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(toy: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError if "tokens" in message else ConfigError, match=message) as caught:
        load_tuning_data(settings(toy, **changes))
    assert "\n" not in str(caught.value)


def test_scores_and_teachers_of_other_aspects_or_scales_are_refused(toy: Path):
    other = write_csv(toy / "other.csv", {"i1": [1.0]}, ["pace"])
    with pytest.raises(ValueError, match="no aspect story complexity"):
        load_tuning_data(settings(toy, item_scores=other))
    outside = write_csv(toy / "teacher.csv", {"u0": [11.0] * len(NAMES)}, NAMES)
    with pytest.raises(ConfigError, match=r"ratings outside 1\.\.10 of u0"):
        load_tuning_data(settings(toy, warm_start_epochs=1, teacher=outside))
    with pytest.raises(FileNotFoundError):
        load_tuning_data(settings(toy, warm_start_epochs=1, teacher=str(toy / "none.csv")))


def test_candidates_of_the_fine_tune_hold_what_came_before_the_cut():
    config = FinetuneConfig(output="o", data="d", item_scores="s", aspects="a", keep_out=2)
    data = interaction_arrays([(0, item, 4.0, TRAIN) for item in (1, 2, 3, 1)])
    histories = cut_histories(config, data, (1, 5))
    assert histories.own_items(0).tolist() == [0, 1, 2, 0]
    repeated = histories._replace(data=histories.data._replace(repeats=True))
    assert repeated.own_items(0).tolist() == [2, 0]  # the judged ones
