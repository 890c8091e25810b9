"""The head of a report: the verdict of a comparison in one sentence and one figure, with its warnings."""

from collections.abc import Mapping
from typing import NamedTuple

from raygr.compare.comparison import ArmGain, ArmRecord, Comparison
from raygr.compare.gain_words import SIGNIFICANT, gain_parts
from raygr.metrics.ranking import metric_name
from raygr.report.charts import gain_chart
from raygr.report.sections import Chart, gain_intervals

SMALL_SHARE = 0.01


class Verdict(NamedTuple):
    """What a reader should know first."""

    sentence: str
    charts: list[Chart]
    """One figure, or none where no gain has an interval."""
    warnings: list[str]


def headline_arm(comparison: Comparison) -> str | None:
    """The arm of the verdict: the first one with a base that is no control. None where there is no such arm.

    The order of the configuration decides, because the best arm of a test would be chosen by its luck, too.
    """
    for name in comparison.shown:
        arm = comparison.arms[name]
        if arm.against_base and not arm.is_reference and not is_control(arm):
            return name
    return None


def is_control(arm: ArmRecord) -> bool:
    """Whether the arm's item scores or user vectors are shuffled, random or without aspects."""
    return any(arm.settings.get(name) not in (None, "none") for name in ("control", "user_control"))


def comparison_verdict(comparison: Comparison) -> Verdict | None:
    """The verdict on the first arm of a comparison; None where no arm has a base."""
    name = headline_arm(comparison)
    if name is None:
        return None
    arms, metric = comparison.arms, comparison.primary_metric
    arm = arms[name]
    ranking, gain = next((ranking, gains[metric]) for ranking, gains in (arm.against_base or {}).items())
    controls = {
        other: found.against_base[ranking][metric]
        for other, found in arms.items()
        if is_control(found) and found.base == arm.base and found.against_base and ranking in found.against_base
    }
    sentence = f"“{name}” {against_words(gain)} “{arm.base}”: {metric_name(metric)} {interval_words(gain)}"
    sentence += ", by one training run" if gain.over == "users" else ""
    sentence += "".join(f"; its control “{other}” has {interval_words(found)}" for other, found in controls.items())
    caption = f"Gain in {metric_name(metric)} over “{arm.base}” ({ranking}), with 95% intervals"
    drawn = list(gain_intervals({one: arms[one] for one in (name, *controls)}, ranking, metric))
    axis = f"{metric_name(metric)} against the base, %"
    charts = [Chart(caption, gain_chart(drawn, figure_id="verdict", label=caption, axis=axis))] if drawn else []
    return Verdict(f"{sentence}.", charts, verdict_warnings(name, arm, gain, controls))


def against_words(gain: ArmGain) -> str:
    """How the arm ranks against its base; a gain that Holm's correction makes unsure counts as unsure."""
    if gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
        return "cannot be told from"
    if gain.p_holm is not None and gain.p_holm >= SIGNIFICANT:
        return "cannot be told, after the correction for several arms, from"
    return "ranks better than" if gain.low > 0 else "ranks worse than"


def interval_words(gain: ArmGain) -> str:
    value, bounds = gain_parts(gain)
    return value if bounds is None else f"{value} (95% interval {bounds[0]} to {bounds[1]})"


def verdict_warnings(name: str, arm: ArmRecord, gain: ArmGain, controls: Mapping[str, ArmGain]) -> list[str]:
    """What weakens the verdict: one run, no control, a control that gains, and aspects that hardly move scores."""
    found = []
    if gain.over == "users":
        found.append("The verdict is of one training run per arm: it does not show how another run would differ.")
    if not controls:
        found.append(
            f"No control arm stands beside “{name}”, so a gain may come from its parameters instead of its aspects: "
            "add an arm with “control: shuffled”."
        )
    for other, one in controls.items():
        if one.low is not None and one.low > 0:
            found.append(f"The control “{other}” gains, too: what the aspects mean explains the rest of the gain only.")
    if arm.shares and arm.shares["encoder_guided"] + arm.shares["user_guided"] < SMALL_SHARE:
        found.append(f"Aspects make less than {SMALL_SHARE:.0%} of the spread of the scores of “{name}”.")
    return found
