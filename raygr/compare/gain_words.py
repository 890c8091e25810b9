"""A comparison's gains in words: values with their intervals, what the marks mean, and what is wrong with an arm."""

from collections.abc import Mapping
from typing import Any

from raygr.metrics.ranking import metric_name

SIGNIFICANT = 0.05
ONE_RUN = "°"


def gain_text(gain: Mapping[str, Any]) -> str:
    """Such as `+8.0% [+1.2, +14.9]*`; see `gain_mark`."""
    return interval_text(gain) + gain_mark(gain)


def interval_text(gain: Mapping[str, Any]) -> str:
    """Such as `+8.0% [+1.2, +14.9]`."""
    value, bounds = gain_parts(gain)
    return f"{value} [{bounds[0]}, {bounds[1]}]" if bounds else value


def gain_parts(gain: Mapping[str, Any]) -> tuple[str, tuple[str, str] | None]:
    """A gain and its bounds as text: in percent of the base, or, where base or arm has 0, the difference itself."""
    if gain["difference"] == 0 and gain["relative"] is None:
        return "0 in both", None
    if gain["low"] is None:
        return "one user: no interval", None
    if gain["difference"] == gain["low"] == gain["high"] == 0:
        return "the same for every user", None
    if gain["relative_low"] is None:
        return f"{gain['difference']:+.4f}", (f"{gain['low']:+.4f}", f"{gain['high']:+.4f}")
    return f"{gain['relative']:+.1f}%", (f"{gain['relative_low']:+.1f}", f"{gain['relative_high']:+.1f}")


def gain_mark(gain: Mapping[str, Any]) -> str:
    """An asterisk by the corrected p-value, a ring where one run has an interval over users alone."""
    if gain_parts(gain)[1] is None:
        return ""
    if gain["over"] == "users":
        return ONE_RUN
    return "*" if gain["p_holm"] is not None and gain["p_holm"] < SIGNIFICANT else ""


def mark_notes(comparison: Mapping[str, Any]) -> list[str]:
    """What the marks mean, and what the p-values are corrected for."""
    primary = metric_name(comparison["primary_metric"])
    arms = [arm for arm in comparison["arms"].values() if arm["against_base"]]
    found = [gain for arm in arms for gains in arm["against_base"].values() for gain in gains.values()]
    notes = []
    if any(gain["over"] != "users" for gain in found):
        notes.append(
            f"* p < {SIGNIFICANT} in {primary}, the primary metric, after Holm's correction over the arms of a table. "
            "The p-values of the other metrics (table.csv) are not corrected, and they bear no asterisk."
        )
    if any(gain["over"] == "users" for gain in found):
        notes.append(
            f"{ONE_RUN} one run: users only. What another training would give is not in the interval, so there is no "
            "p-value; two runs or more per arm, with seeds of their own, say something of it."
        )
    return notes


def table_notes(comparison: Mapping[str, Any]) -> list[str]:
    """Those of the marks, and what popularity and chance are where they are shown."""
    is_there = any(arm["is_reference"] for arm in comparison["arms"].values())
    text = "Popularity ranks by train interactions; chance is the mean over all orders of the candidates."
    return mark_notes(comparison) + ([text] if is_there else [])


def remarks(comparison: Mapping[str, Any]) -> list[str]:
    """What is wrong with an arm whatever its gains: next to chance or popularity in the primary metric."""
    primary, found = comparison["primary_metric"], []
    for name, arm in comparison["arms"].items():
        for ranking in arm["metrics"]:
            against = {reference: gains[ranking] for reference, gains in arm["against_references"].items()}
            words = reference_words(against)
            if words:
                reference, text = words
                mean, gain = arm["metrics"][ranking][primary]["mean"], against[reference]
                numbers = f"{metric_name(primary)} {mean:.4f} against {mean - gain['difference']:.4f}"
                found.append(f"“{name}” {text} (candidates: {ranking}): {numbers}.")
    return found


def reference_words(against: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """The worst that the gains over chance and popularity say, and of which; None where both are beaten."""
    if not against:
        return None
    chance, popularity = against["chance"], against["popularity"]
    if chance["high"] is not None and chance["high"] < 0:
        return "chance", "ranks worse than chance"
    if chance["low"] is not None and chance["low"] <= 0:
        return "chance", "cannot be told from chance"
    if popularity["difference"] <= 0:
        return "popularity", "does not beat popularity"
    return None
