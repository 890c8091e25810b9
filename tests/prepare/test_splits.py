"""Splits against numbers worked out by hand and against a plain loop."""

import numpy as np

from raygr.prepare.splits import PARTS, TEST_PART, TRAIN_PART, VALIDATION_PART, leave_one_out, temporal


def names(part: np.ndarray) -> list[str]:
    return [PARTS[p] for p in part]


def test_last_interaction_is_test_and_the_one_before_validation():
    part = leave_one_out(np.array([0, 1, 2, 3]), np.array([4, 4, 4, 4]))
    assert names(part) == ["train", "train", "validation", "test"]


def test_users_below_three_interactions_are_all_train():
    part = leave_one_out(np.array([0, 0, 1, 0, 1, 2]), np.array([1, 2, 2, 3, 3, 3]))
    assert names(part) == ["train", "train", "train", "train", "validation", "test"]


def test_the_last_interactions_are_test_and_short_histories_have_fewer():
    length = np.repeat([6, 4, 3, 2], [6, 4, 3, 2])
    position = np.concatenate([np.arange(count) for count in (6, 4, 3, 2)])
    parts = np.split(leave_one_out(position, length, 3), [6, 10, 13])
    letters = {TRAIN_PART: ".", VALIDATION_PART: "v", TEST_PART: "T"}
    assert ["".join(letters[part] for part in of_user) for of_user in parts] == ["..vTTT", ".vTT", ".vT", ".."]
    assert np.array_equal(leave_one_out(position, length, 1), leave_one_out(position, length))


def test_temporal_split_by_hand():
    # The 0.5 quantile of 1..20 is 10.5: 11..20 are test, and of the ten others the newest one is validation.
    time = np.random.default_rng(0).permutation(np.arange(1, 21))
    part = temporal(time, quantile=0.5)
    assert sorted(time[part == TEST_PART].tolist()) == list(range(11, 21))
    assert time[part == VALIDATION_PART].tolist() == [10]
    assert sorted(time[part == TRAIN_PART].tolist()) == list(range(1, 10))


def test_equal_times_keep_the_input_order():
    part = temporal(np.array([5] * 20 + [9]), quantile=0.9)
    assert names(part) == ["train"] * 18 + ["validation"] * 2 + ["test"]


def test_temporal_split_against_a_loop():
    time = np.random.default_rng(1).integers(0, 40, 500)
    part = temporal(time, quantile=0.8)
    threshold = float(np.quantile(time, 0.8))
    early = sorted((t, row) for row, t in enumerate(time) if t <= threshold)
    validation = {row for _, row in early[-(len(early) // 10) :]}
    for row, t in enumerate(time):
        expected = "test" if t > threshold else "validation" if row in validation else "train"
        assert PARTS[part[row]] == expected
