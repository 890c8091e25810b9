"""Gains as text: values with intervals, what their marks mean, and remarks on arms that are no better than chance."""

from collections.abc import Mapping

from raygr.compare.comparison import ArmGain, Comparison
from raygr.metrics.gains import Gain, WayShare
from raygr.metrics.ranking import metric_name

SIGNIFICANT = 0.05
ONE_RUN = "°"


def gain_text(gain: ArmGain, *, in_lines: bool = False) -> str:
    """A gain with its interval and mark: `+8.0% [+1.2, +14.9]*`, or `+8.0%*` above `(+1.2 to +14.9)`."""
    value, bounds = gain_parts(gain)
    if bounds is None:
        return value
    low, high = bounds
    return f"{value}{gain_mark(gain)}\n({low} to {high})" if in_lines else f"{value} [{low}, {high}]{gain_mark(gain)}"


def way_text(way: WayShare | None) -> str:
    """A share of the way with its interval in percent: `43% [+35, +51]`."""
    if way is None:
        return "the truth is no better"
    if way.low is None or way.high is None:
        return f"{way.share:.0%}"
    return f"{way.share:.0%} [{100 * way.low:+.0f}, {100 * way.high:+.0f}]"


def gain_parts(gain: Gain) -> tuple[str, tuple[str, str] | None]:
    """A gain and its bounds in percent of the base; the difference itself where the base or the arm has 0."""
    if gain.difference == 0 and gain.relative is None:
        return "0 in both", None
    if gain.low is None:
        return "one user: no interval", None
    if gain.difference == gain.low == gain.high == 0:
        return "the same for every user", None
    if gain.relative_low is None:
        return f"{gain.difference:+.4f}", (f"{gain.low:+.4f}", f"{gain.high:+.4f}")
    return f"{gain.relative:+.1f}%", (f"{gain.relative_low:+.1f}", f"{gain.relative_high:+.1f}")


def gain_mark(gain: ArmGain) -> str:
    """An asterisk for a small corrected p-value; a ring for an interval over users alone, which has no p-value."""
    if gain_parts(gain)[1] is None:
        return ""
    if gain.over == "users":
        return ONE_RUN
    return "*" if gain.p_holm is not None and gain.p_holm < SIGNIFICANT else ""


def mark_notes(comparison: Comparison) -> list[str]:
    """What the marks mean that the gains of this comparison bear."""
    primary = metric_name(comparison.primary_metric)
    over = {
        gain.over
        for arm in comparison.arms.values()
        for gains in (arm.against_base or {}).values()
        for gain in gains.values()
    }
    notes = []
    if over - {"users"}:
        notes.append(
            f"* p < {SIGNIFICANT} in {primary}, the primary metric, after Holm's correction over the arms of a table. "
            "The p-values of the other metrics (table.csv) are not corrected, so these metrics have no asterisk."
        )
    if "users" in over:
        notes.append(
            f"{ONE_RUN} one run: users only. The interval does not show how another training run would differ, so "
            "there is no p-value; two or more runs per arm with different seeds would show it."
        )
    return notes


def table_notes(comparison: Comparison) -> list[str]:
    """`mark_notes`, and what the references are, where they are shown."""
    notes = mark_notes(comparison)
    if any(arm.is_reference for arm in comparison.arms.values()):
        notes.append("Popularity ranks by train interactions; chance is the mean over all orders of the candidates.")
    chosen = {name: arm.chosen for name, arm in comparison.arms.items() if arm.chosen}
    if chosen:
        settings = (
            f"{name} {', '.join(f'{key} {value:g}' for key, value in one.items())}" for name, one in chosen.items()
        )
        notes.append(
            f"{', '.join(chosen)}: fitted on train interactions; ranked after the items before a target, without their "
            f"order. Chosen on validation: {'; '.join(settings)}."
        )
    if any(arm.way_to_truth for arm in comparison.arms.values()):
        notes.append(
            "The truth ranks by the model that the simulated shoppers choose by, and no ranking is better in "
            "expectation; without tastes, it knows popularity and nearness to the last two items alone."
        )
    return notes


def remarks(comparison: Comparison) -> list[str]:
    """A sentence for each arm and ranking that is not better than chance or popularity in the primary metric."""
    primary, found = comparison.primary_metric, []
    for name, arm in comparison.arms.items():
        for ranking in arm.metrics:
            against = {reference: gains[ranking] for reference, gains in arm.against_references.items()}
            words = reference_words(against)
            if words:
                reference, text = words
                mean, gain = arm.metrics[ranking][primary].mean, against[reference]
                numbers = f"{metric_name(primary)} {mean:.4f} against {mean - gain.difference:.4f}"
                found.append(f"“{name}” {text} (candidates: {ranking}): {numbers}.")
    return found


def reference_words(against: Mapping[str, Gain]) -> tuple[str, str] | None:
    """The worst finding of the gains over chance and popularity, with the name of that reference; None without any."""
    if not against:
        return None
    chance, popularity = against["chance"], against["popularity"]
    if chance.high is not None and chance.high < 0:
        return "chance", "ranks worse than chance"
    if chance.low is not None and chance.low <= 0:
        return "chance", "cannot be told from chance"
    if popularity.difference <= 0:
        return "popularity", "does not beat popularity"
    return None
