"""Gains over users and runs: coverage by simulation, hand-worked numbers, and properties on inputs of hypothesis."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raygr.metrics.gains import LEAST_P, Component, Gain, components, gains, half_width, two_sided_p

USERS, DATA_SETS = 400, 2000


def gain_of(arm_ZU: np.ndarray, base_ZU: np.ndarray, *, paired: bool = True) -> Gain:
    return gains(np.asarray(arm_ZU)[None], np.asarray(base_ZU)[None], paired=paired)[0]


def coverage(arm_MZU: np.ndarray, base_MZU: np.ndarray, *, true: float = 0.0, paired: bool = True) -> float:
    """Share of the data sets whose interval holds the true difference."""
    half_M = half_width(components(arm_MZU, base_MZU, paired=paired), 0.05)
    difference_M = arm_MZU.mean(axis=(1, 2)) - base_MZU.mean(axis=(1, 2))
    return float((np.abs(difference_M - true) <= half_M).mean())


# --- coverage: 2,000 data sets each, so a standard error of half a percent ----------------------


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("seed_deviation", [0.0, 0.1, 0.3])
def test_95_percent_intervals_hold_the_truth_95_times_in_100(runs: int, seed_deviation: float):
    """The standard error over users is .05. A bootstrap over users and two runs held the truth 89 and 71 times."""
    generator = np.random.default_rng([runs, int(10 * seed_deviation)])
    user_MZU = generator.standard_normal((DATA_SETS, 1, USERS), dtype=np.float32)
    run_MZU = seed_deviation * generator.standard_normal((DATA_SETS, runs, 1), dtype=np.float32)
    gain_MZU = user_MZU + run_MZU
    assert 0.93 <= coverage(gain_MZU, np.zeros_like(gain_MZU)) <= 0.97


@pytest.mark.parametrize(("runs", "seed_deviation"), [(2, 0.0), (2, 0.3), (3, 0.1)])
def test_skewed_reciprocal_ranks_are_covered_too(runs: int, seed_deviation: float):
    """Half the users' ranks are below 20; each training moves the ranks, and whole runs are better or worse."""
    generator = np.random.default_rng([7, runs, int(10 * seed_deviation)])
    user_MZU = generator.standard_normal((DATA_SETS, 1, USERS), dtype=np.float32)

    def reciprocal_ranks() -> np.ndarray:
        noise_MZU = 1.5 * generator.standard_normal((DATA_SETS, runs, USERS), dtype=np.float32)
        run_MZU = seed_deviation * generator.standard_normal((DATA_SETS, runs, 1), dtype=np.float32)
        return 1 / (1 + np.floor(np.exp(3 + user_MZU + noise_MZU + run_MZU)))

    arm_MZU, base_MZU = reciprocal_ranks(), reciprocal_ranks()
    assert 0.93 <= coverage(arm_MZU, base_MZU) <= 0.97
    # the ratio in percent, of an arm that is 1.3 times as good
    means = [one.mean(axis=(1, 2), keepdims=True) for one in (arm_MZU, base_MZU)]
    half_M = half_width(components(arm_MZU / means[0], base_MZU / means[1], paired=True), 0.05)
    assert 0.93 <= (np.abs(np.log(means[0] / means[1]))[:, 0, 0] <= half_M).mean() <= 0.97


def test_runs_without_a_partner_are_covered_and_rather_wide():
    """Three runs are compared with two."""
    generator = np.random.default_rng(3)
    user_MZU = generator.standard_normal((DATA_SETS, 1, USERS), dtype=np.float32)
    sides = [
        user_MZU * sign / 2
        + 0.5 * generator.standard_normal((DATA_SETS, runs, USERS), dtype=np.float32)
        + 0.07 * generator.standard_normal((DATA_SETS, runs, 1), dtype=np.float32)
        for sign, runs in ((1, 3), (-1, 2))
    ]
    assert 0.93 <= coverage(*sides, paired=False) <= 0.985


# --- by hand ------------------------------------------------------------------------------------


def test_components_by_hand():
    """Users' differences -0.1 and 0.3 under one seed, 0.1 and 0.5 under the other: no residual."""
    arm_ZU = np.array([[0.4, 0.8], [0.6, 1.0]])
    users, runs = components(arm_ZU[None], np.full((1, 2, 2), 0.5), paired=True)
    assert (users.variance[0], users.freedom) == (pytest.approx(0.08 / 2), 1)
    assert (runs.variance[0], runs.freedom) == (pytest.approx(0.02 / 2), 1)
    gain = gain_of(arm_ZU, np.full((2, 2), 0.5))
    half = scipy.stats.t.ppf(0.975, 1) * math.sqrt(0.05)  # both have one degree of freedom
    assert (gain.low, gain.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert gain.over == "users and runs"


def test_the_residual_is_in_one_component_only():
    """Users who gain under one seed lose under the other: all of it is residual, and the run means agree."""
    gain_MZU = np.array([[[0.1, -0.1, 0.1, -0.1], [-0.1, 0.1, -0.1, 0.1]]])
    users, runs = components(gain_MZU, np.zeros((1, 2, 4)), paired=True)
    assert users.variance[0] == runs.variance[0] == 0


def test_one_run_has_an_interval_over_users_only_and_no_p_value():
    generator = np.random.default_rng(1)
    base_1U, noise_1U = generator.random((1, 2000)), generator.normal(0.02, 0.3, (1, 2000))
    gain = gain_of(base_1U + noise_1U, base_1U)
    expected = scipy.stats.ttest_1samp(noise_1U[0], 0).confidence_interval()
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    assert (gain.over, gain.p) == ("users", None)
    three = np.repeat(base_1U, 3, axis=0) + generator.normal(0, 0.1, (3, 1))
    assert gain_of(base_1U, three, paired=False).over == "users"


def test_two_equal_runs_have_the_interval_of_one_and_a_p_value():
    """The unit of the interval is a user, not a pair of user and run."""
    generator = np.random.default_rng(4)
    base_1U, noise_1U = generator.random((1, 500)), generator.normal(0.02, 0.3, (1, 500))
    one = gain_of(base_1U + noise_1U, base_1U)
    two = gain_of(*(np.repeat(values, 2, axis=0) for values in (base_1U + noise_1U, base_1U)))
    assert astuple(two)[:6] == pytest.approx(astuple(one)[:6])
    assert two.p == pytest.approx(scipy.stats.ttest_1samp(noise_1U[0], 0).pvalue)


def test_p_can_be_small_enough_for_holms_correction():
    """Earlier p-values were at least 2 / 10,001, or .0500 after correction for 250 gains, so none could pass."""
    generator = np.random.default_rng(2)
    base_ZU = generator.random((5, 1000))
    gain = gain_of(base_ZU + generator.normal(0.2, 0.1, (1, 1000)) + generator.normal(0, 0.002, (5, 1)), base_ZU)
    assert 0 < gain.p < 1e-8


def test_no_difference_and_a_constant_one():
    base_ZU = np.random.default_rng(0).random((2, 50))
    same = gain_of(base_ZU, base_ZU)
    assert astuple(same)[:6] == (0, 0, 0, 0, 0, 0) and same.p == 1
    constant = gain_of(base_ZU + 0.1, base_ZU)
    assert (constant.low, constant.high) == pytest.approx((0.1, 0.1)) and constant.p == pytest.approx(LEAST_P)
    assert constant.relative_low < constant.relative < constant.relative_high


def test_a_base_of_0_has_no_percents_and_an_arm_of_0_no_bounds():
    nothing, some = np.zeros((2, 4)), np.array([[0.0, 0.5, 0.0, 1.0]] * 2)
    assert astuple(gain_of(some, nothing))[3:6] == (None, None, None)
    assert astuple(gain_of(nothing, some))[3:6] == (-100.0, None, None)
    assert astuple(gain_of(nothing, nothing))[:4] == (0.0, 0.0, 0.0, None)


def test_one_user_has_no_interval():
    gain = gain_of([[1.0], [0.2]], [[0.5], [0.25]])
    assert gain.difference == pytest.approx(0.225) and gain.low is gain.relative_low is gain.p is None


# --- properties ---------------------------------------------------------------------------------


@st.composite
def two_arms(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = (draw(st.integers(1, 4)), draw(st.integers(2, 8)))
    values = arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 1.0]))
    return draw(values), draw(values)


@settings(max_examples=100, deadline=None)
@given(two_arms())
def test_an_interval_holds_its_estimate_and_p_agrees_with_it(sides: tuple[np.ndarray, np.ndarray]):
    gain = gain_of(*sides)
    assert gain.low <= gain.difference <= gain.high
    if gain.relative_low is not None:
        assert gain.relative_low - 1e-9 <= gain.relative <= gain.relative_high + 1e-9
        assert gain.relative_low >= -100
    if gain.p is not None and abs(gain.p - 0.05) > 1e-6:
        assert (gain.p < 0.05) == (gain.low > 0 or gain.high < 0)


@settings(max_examples=100, deadline=None)
@given(two_arms(), st.randoms(use_true_random=False))
def test_no_order_of_users_or_runs_moves_a_gain(sides: tuple[np.ndarray, np.ndarray], random):
    arm_ZU, base_ZU = sides
    runs, users = (random.sample(range(n), n) for n in arm_ZU.shape)
    assert gain_of(arm_ZU[runs][:, users], base_ZU[runs][:, users]) == about(gain_of(arm_ZU, base_ZU))
    assert gain_of(arm_ZU[runs], base_ZU, paired=False) == about(gain_of(arm_ZU, base_ZU, paired=False))


@settings(max_examples=100, deadline=None)
@given(two_arms())
def test_swapped_arms_mirror_the_gain_and_equal_ones_have_none(sides: tuple[np.ndarray, np.ndarray]):
    arm_ZU, base_ZU = sides
    gain, mirrored = gain_of(arm_ZU, base_ZU), gain_of(base_ZU, arm_ZU)
    assert (mirrored.difference, mirrored.low, mirrored.high) == pytest.approx(
        (-gain.difference, -gain.high, -gain.low), abs=1e-12
    )
    assert mirrored.p == (None if gain.p is None else pytest.approx(gain.p, rel=1e-6))
    assert astuple(gain_of(arm_ZU, arm_ZU))[:3] == (0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(1, 9), st.floats(0.01, 5))
def test_p_is_the_level_whose_interval_ends_at_0(users: float, runs: float, freedom: int, difference: float):
    found = [Component(np.array(users), 399), Component(np.array(runs), freedom)]
    p = two_sided_p(difference, found)
    if p > LEAST_P:
        assert float(half_width(found, p)) == pytest.approx(difference, rel=1e-6)


def about(gain: Gain) -> Gain:
    """The same gain with numbers that equal all numbers within rounding."""
    numbers = [None if number is None else pytest.approx(number, rel=1e-6, abs=1e-9) for number in astuple(gain)[:7]]
    return Gain(*numbers, over=gain.over)
