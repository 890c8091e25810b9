"""The gain of one arm over another with its 95% interval and p-value, over users and training runs.

Users and runs are both random, and they are crossed: every run ranks the same users. The variance of a mean over R runs
and U users is the variance of the users' own means over U, plus the variance of the run means over R:

    users: (variance of the users' means - residual / R) / U        U - 1 degrees of freedom
    runs:  variance of the run means / R, the residual within it    R - 1 degrees of freedom

(the random effects of Searle, Casella, McCulloch 1992, chapter 5). With two or three runs the second component has one
or two degrees of freedom, for which the normal distribution and even Satterthwaite's approximation are too narrow. The
critical value is therefore Cochran and Cox's (1950): the mean of the components' own t quantiles, weighted by their
variances. Simulated coverage of 95% intervals without a true effect, 400 users, standard error over users .05
(test_gains.py):

    seed deviation                              0     .1     .3
    this, 2 runs / 3 runs                 .95/.95  .96/.97  .94/.95
    Satterthwaite's t, 2 runs / 3 runs    .95/.95  .91/.94  .87/.92
    bootstrap of users and runs, 2 / 3    .95/.95  .89/.90  .71/.80

Where runs differ by no more than the residual, the coverage is up to .98, because one degree of freedom cannot tell the
two apart. One run does not show how a repetition would differ: its interval is over users alone, without a p-value.
Intervals of few users (below about 30) assume a nearly normal mean, which skewed metrics do not have there.

Shape letters: `M` metrics, `Z` runs of an arm, `U` users.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

CONFIDENCE = 0.95
LEAST_P = 1e-12


@dataclass
class Gain:
    """The difference arm - base and its interval, absolute and in percent of the base; no bounds for one user."""

    difference: float
    low: float | None
    high: float | None
    relative: float | None
    """None where the base is 0."""
    relative_low: float | None
    """None, like `relative_high`, where the base or the arm is 0."""
    relative_high: float | None
    p: float | None
    """Two-sided, against no difference: below 1 - CONFIDENCE if the interval excludes 0. None for one run."""
    over: Literal["users", "users and runs"]
    """What varies in the interval; `users` if one of the arms has a single run."""


class Component(NamedTuple):
    """One part of the variance of a mean, with its degrees of freedom; arrays have an entry per metric."""

    variance: np.ndarray
    freedom: np.ndarray | int

    def of_metric(self, m: int) -> "Component":
        return Component(self.variance[m], np.broadcast_to(self.freedom, self.variance.shape)[m])


def gains(arm_MZU: np.ndarray, base_MZU: np.ndarray, *, paired: bool) -> list[Gain]:
    """The gain of `arm` over `base` on the same users, for each metric; metrics are in [0, 1].

    `paired`: run r of both arms had the same seed. Otherwise the runs are independent, and their numbers may differ.
    An arm without training (popularity) is paired: repeat it for each run of the base.
    """
    arm_M, base_M = arm_MZU.mean(axis=(1, 2)), base_MZU.mean(axis=(1, 2))
    found = components(arm_MZU, base_MZU, paired=paired)
    half_M = half_width(found, 1 - CONFIDENCE)
    # of log(arm) - log(base), because a ratio's interval is lopsided and ends at -100%
    arm_unit_M, base_unit_M = (np.where(mean_M > 0, mean_M, 1.0)[:, None, None] for mean_M in (arm_M, base_M))
    log_half_M = half_width(components(arm_MZU / arm_unit_M, base_MZU / base_unit_M, paired=paired), 1 - CONFIDENCE)
    has_runs = min(arm_MZU.shape[1], base_MZU.shape[1]) > 1
    made = []
    for m, (arm, base) in enumerate(zip(arm_M.tolist(), base_M.tolist(), strict=True)):
        p = two_sided_p(arm - base, [one.of_metric(m) for one in found])
        relative, relative_low, relative_high = map(known, percents(arm, base, log_half_M[m]))
        made.append(
            Gain(
                difference=arm - base,
                low=known(arm - base - half_M[m]),
                high=known(arm - base + half_M[m]),
                relative=relative,
                relative_low=relative_low,
                relative_high=relative_high,
                p=known(p) if has_runs else None,
                over="users and runs" if has_runs else "users",
            )
        )
    return made


def components(arm_MZU: np.ndarray, base_MZU: np.ndarray, *, paired: bool) -> list[Component]:
    """Parts of the variance of `mean(arm) - mean(base)`: of users, and of runs if both arms have two or more runs."""
    users_MU = arm_MZU.mean(axis=1) - base_MZU.mean(axis=1)
    users = users_MU.shape[1]
    if users == 1:
        return [Component(np.full(len(users_MU), np.nan), 1)]
    whole_M = users_MU.var(axis=1, ddof=1) / users
    if min(arm_MZU.shape[1], base_MZU.shape[1]) == 1:
        return [Component(whole_M, users - 1)]
    trained = [arm_MZU - base_MZU] if paired else [arm_MZU, base_MZU]
    runs = [Component(one.mean(axis=2).var(axis=1, ddof=1) / one.shape[1], one.shape[1] - 1) for one in trained]
    own_M = np.maximum(whole_M - sum(residual_variance(one) for one in trained), 0.0)
    return [Component(own_M, users - 1), runs[0] if paired else merged(*runs)]


def merged(one: Component, other: Component) -> Component:
    """Adds two independent parts, with Welch's degrees of freedom."""
    total = one.variance + other.variance
    each = one.variance**2 / one.freedom + other.variance**2 / other.freedom
    least = min(one.freedom, other.freedom)
    return Component(total, np.where(each > 0, total**2 / np.where(each > 0, each, 1.0), least))


def residual_variance(values_MZU: np.ndarray) -> np.ndarray:
    """(M,): the part of a mean's variance that neither users nor runs explain, such as ranks that training moves."""
    _, runs, users = values_MZU.shape
    rest_MZU = values_MZU - values_MZU.mean(axis=1, keepdims=True)
    rest_MZU -= rest_MZU.mean(axis=2, keepdims=True)
    return (rest_MZU**2).sum(axis=(1, 2)) / ((users - 1) * (runs - 1)) / (users * runs)


def half_width(found: list[Component], level: float) -> np.ndarray:
    """Half the width of the interval with confidence 1 - level."""
    total = sum(one.variance for one in found)
    weighted = sum(one.variance * -stdtrit(one.freedom, level / 2) for one in found)
    return weighted / np.sqrt(np.where(total == 0, 1.0, total))


def two_sided_p(difference: float, found: list[Component]) -> float:
    """The level whose interval ends at 0; at least LEAST_P, and NaN where the variance is unknown."""
    if difference == 0:
        return 1.0

    def excess(log_level: float) -> float:
        return float(half_width(found, math.exp(log_level))) - abs(difference)

    least = excess(math.log(LEAST_P))
    if math.isnan(least):
        return math.nan
    return LEAST_P if least < 0 else math.exp(brentq(excess, math.log(LEAST_P), 0.0))


def percents(arm: float, base: float, log_half: float) -> tuple[float, float, float]:
    """The gain in percent of the base, and its bounds; NaN where a value does not exist."""
    if base == 0:
        return math.nan, math.nan, math.nan
    relative = 100 * (arm - base) / base
    if arm == 0 or log_half > 700:  # math.exp would overflow
        return relative, math.nan, math.nan
    return relative, 100 * (arm / base * math.exp(-log_half) - 1), 100 * (arm / base * math.exp(log_half) - 1)


def known(value: float) -> float | None:
    """None for NaN, which JSON cannot hold."""
    return None if math.isnan(value) else float(value)
