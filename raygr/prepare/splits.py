"""Which part, train, validation or test, an interaction belongs to: pure functions on numpy arrays.

Parts are small integers, places in PARTS. In each split a user's validation interactions come after
the train ones and the test ones last.
"""

import numpy as np

from raygr.schema import TEST, TRAIN, VALIDATION

PARTS = (TRAIN, VALIDATION, TEST)
TRAIN_PART, VALIDATION_PART, TEST_PART = range(3)
MIN_SPLIT_INTERACTIONS = 3


def leave_one_out(position: np.ndarray, history_length: np.ndarray) -> np.ndarray:
    """The last interaction is test, the one before validation; below three interactions all are train.

    Both arguments, and the parts (N,): an interaction's place in its user's history, and the length of that.
    """
    left = history_length - 1 - position
    part = np.select([left == 0, left == 1], [TEST_PART, VALIDATION_PART], default=TRAIN_PART).astype(np.int8)
    part[history_length < MIN_SPLIT_INTERACTIONS] = TRAIN_PART
    return part


def temporal(timestamp: np.ndarray, *, quantile: float) -> np.ndarray:
    """Interactions later than the quantile of all times are test; validation is the newest tenth of the others.

    `timestamp` (N,) in input row order: equal times count as ordered by row. Times equal to the
    quantile are not test, so many ties make the test part smaller than 1 - quantile.
    """
    part = np.full(len(timestamp), TRAIN_PART, np.int8)
    part[timestamp > np.quantile(timestamp, quantile)] = TEST_PART
    earlier = np.flatnonzero(part != TEST_PART)
    by_time = earlier[np.argsort(timestamp[earlier], kind="stable")]
    part[by_time[len(by_time) - len(by_time) // 10 :]] = VALIDATION_PART
    return part
