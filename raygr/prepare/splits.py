"""The part of an interaction: train, validation or test. Pure functions on numpy arrays.

A part is an index into PARTS. In each split the train interactions of a user come first and the test ones last.
"""

import numpy as np

from raygr.schema import TEST, TRAIN, VALIDATION

PARTS = (TRAIN, VALIDATION, TEST)
TRAIN_PART, VALIDATION_PART, TEST_PART = range(3)
MIN_SPLIT_INTERACTIONS = 3


def leave_one_out(position: np.ndarray, history_length: np.ndarray, tests: int = 1) -> np.ndarray:
    """The last `tests` interactions of a user are test, the one before them validation, the others train.

    Every user keeps a train and a validation interaction, so one with fewer than `tests` + 2 interactions has fewer
    test interactions, and one with fewer than three has train interactions only. `position`, from 0, and
    `history_length` describe each of the N interactions; the parts are (N,) int8.
    """
    left = history_length - 1 - position
    test = np.clip(history_length - MIN_SPLIT_INTERACTIONS + 1, 0, tests)
    part = np.select([left < test, left == test], [TEST_PART, VALIDATION_PART], default=TRAIN_PART).astype(np.int8)
    part[history_length < MIN_SPLIT_INTERACTIONS] = TRAIN_PART
    return part


def temporal(timestamp: np.ndarray, *, quantile: float) -> np.ndarray:
    """Interactions after the quantile of all times are test; the newest tenth of the others is validation.

    `timestamp` is (N,) in the order of the input rows, which orders equal times. Times equal to the quantile are not
    test, so the test part is smaller than 1 - quantile if many times are equal. The parts are (N,) int8.
    """
    part = np.full(len(timestamp), TRAIN_PART, np.int8)
    part[timestamp > np.quantile(timestamp, quantile)] = TEST_PART
    earlier = np.flatnonzero(part != TEST_PART)
    by_time = earlier[np.argsort(timestamp[earlier], kind="stable")]
    part[by_time[len(by_time) - len(by_time) // 10 :]] = VALIDATION_PART
    return part
