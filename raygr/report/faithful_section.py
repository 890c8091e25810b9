"""The report's section on explanations: whether they say what decides the lists, what users like, and the same again.

A column of `X` is a number of removed aspects, from 0 to all. Shape letters: `U` users, `E` targets.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from raygr.compare.tables import NOTHING, Table
from raygr.data.interactions import read_interactions
from raygr.files import exists, join
from raygr.metrics.agreement import spearman, spearman_interval
from raygr.recommend.faithfulness import Deletion, RatedTargets, Stability, deletion, rated_targets, stability
from raygr.recommend.recommender import load_recommender
from raygr.report.charts import Curve, curve_chart
from raygr.report.finetune_section import UserMean, user_mean
from raygr.report.sections import Chart, Section
from raygr.schema import SERVING

ASKED_USERS = 1000
FIRST_PLACES = 10
SHOWN_REMOVALS = (1, 2, 3, 5)


def can_explain(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a train run of these settings has aspects of its own items, and keeps what serving needs."""
    is_control = any(config.get(name, "none") != "none" for name in ("control", "user_control"))
    return bool(config.get("item_scores")) and not is_control and exists(join(path, SERVING))


def faithfulness_section(runs: Sequence[str], data: str, *, name: str) -> Section:
    """What holds of the explanations of an arm: `runs` are its train runs, `name` says which arm it is."""
    recommenders = [load_recommender(run) for run in runs]
    first, found = recommenders[0], read_interactions(data)
    user_U = np.flatnonzero(np.diff(first.first_U) > 0)
    user_U = user_U[np.unique(np.linspace(0, len(user_U) - 1, ASKED_USERS).round().astype(int))]
    removed = deletion(first, user_U)
    is_same_data = np.array_equal(found.item_N, first.items_N)
    rated = rated_targets(first, found, user_U) if is_same_data else None
    same = stability(recommenders, user_U) if len(runs) > 1 else None
    text = (
        "An explanation names the aspects that lift an item's score most above an average item's. Measured on "
        f"“{name}” and {len(user_U):,} users: {deletion_words(removed)} {agreement_words(rated)} "
        f"{stability_words(same, runs=len(runs))}"
    )
    tables = [deletion_table(removed), *agreement_tables(rated), *stability_tables(same, aspects=len(first.aspects))]
    remarks = list(doubts(removed, rated, name=name))
    return Section("Can the explanations be trusted?", text, tables, deletion_curves(removed), remarks)


# --- removed aspects ----------------------------------------------------------------------------


def deletion_words(removed: Deletion) -> str:
    aspects = removed.strongest_UX.shape[1] - 1
    count = min(3, aspects)
    strongest, chance = (user_mean(one[:, count]) for one in (removed.strongest_UX, removed.random_UX))
    return (
        f"Does it name what decides? Without what its {count} strongest aspects add, a user's best item falls to rank "
        f"{interval(strongest, '.1f')} of the user's list on average; without {count} random aspects it falls to rank "
        f"{interval(chance, '.1f')}. The terms add up to the score, so the strongest must cost more than random ones: "
        "what counts is how far the item falls."
    )


def deletion_table(removed: Deletion) -> Table:
    """Mean ranks, and shares of users whose item is still among the first places."""
    aspects = removed.strongest_UX.shape[1] - 1
    rows = []
    for count in sorted({*(one for one in SHOWN_REMOVALS if one < aspects), aspects}):
        ranks = [one[:, count] for one in (removed.strongest_UX, removed.random_UX)]
        cells = [interval(user_mean(rank_U), ".1f") for rank_U in ranks]
        kept = interval(user_mean((ranks[0] <= FIRST_PLACES) * 1.0), ".0%")
        rows.append([f"{count} of {aspects}" if count == aspects else str(count), *cells, kept])
    header = ["aspects removed", "rank without the strongest", "rank without random ones"]
    header.append(f"still in the first {FIRST_PLACES} without the strongest")
    return Table("The rank of users' best items without some aspects, with 95% intervals over users", header, rows)


def deletion_curves(removed: Deletion) -> list[Chart]:
    """One figure, or none for a single user, who has no interval."""
    curves = []
    for name, rank_UX in (("strongest first", removed.strongest_UX), ("in random order", removed.random_UX)):
        means = [user_mean(rank_UX[:, count]) for count in range(rank_UX.shape[1])]
        values, lows, highs = ([one[place] for one in means if one is not None] for place in range(3))
        if len(values) == len(means):
            curves.append(Curve(name, range(len(means)), values, lows, highs))
    caption = "Mean rank of users' best items as their aspects are removed, with 95% intervals over users"
    if not curves:
        return []
    svg = curve_chart(curves, figure_id="deletion", label=caption, axis="aspects removed")
    return [Chart(caption, svg)]


# --- ratings ------------------------------------------------------------------------------------


def agreement_words(rated: RatedTargets | None) -> str:
    if rated is None:
        return "Does it go with ratings? The data hold no held-out ratings to ask."
    return (
        "Does it go with ratings? What aspects add to an item's score and the user's own rating of it correlate by "
        f"{correlation_text(rated.aspects_E, rated)}, over {len(rated.user_E):,} held-out ratings: 1 is the same "
        "order, 0 is none. Scores and ratings are less the user's own mean."
    )


def agreement_tables(rated: RatedTargets | None) -> Iterable[Table]:
    if rated is None:
        return
    parts = (("all aspects", rated.aspects_E), ("base part", rated.base_E), ("whole score", rated.score_E))
    rows = [[name, correlation_text(values_E, rated)] for name, values_E in parts]
    caption = "Rank correlation with held-out ratings (Spearman), with 95% intervals over users"
    yield Table(caption, ["part of the score", "correlation"], rows)


def correlation_text(values_E: np.ndarray, rated: RatedTargets) -> str:
    value, bounds = spearman(values_E, rated.rating_E), spearman_interval(values_E, rated.rating_E, rated.user_E)
    if value is None or bounds is None:
        return NOTHING
    return interval(UserMean(value, *bounds), "+.2f")


# --- training runs ------------------------------------------------------------------------------


def stability_words(same: Stability | None, *, runs: int) -> str:
    if same is None:
        return "Does another training say the same? There is one run, so this cannot be told."
    return (
        f"Does another training say the same? Between {'the two' if runs == 2 else f'two of the {runs}'} runs, which "
        "differ in their seed, what aspects "
        f"add to the same item for the same user correlates by {interval(user_mean(same.correlation_U), '+.2f')}."
    )


def stability_tables(same: Stability | None, *, aspects: int) -> Iterable[Table]:
    if same is None:
        return
    rows = [
        ["correlation of the aspects' parts", interval(user_mean(same.correlation_U), "+.2f")],
        ["the same between two users, for the same item", interval(user_mean(same.other_user_U), "+.2f")],
        [f"share of the {same.named} strongest aspects that both name", interval(user_mean(same.shared_U), ".0%")],
        ["the same for two random choices", f"{same.named / aspects:.0%}"],
    ]
    yield Table("Two training runs explain the same item, with 95% intervals over users", ["", "mean"], rows)


# --- what to doubt ------------------------------------------------------------------------------


def doubts(removed: Deletion, rated: RatedTargets | None, *, name: str) -> Iterable[str]:
    """A sentence for each finding that makes explanations worthless."""
    aspects = removed.strongest_UX.shape[1] - 1
    lost = user_mean(removed.strongest_UX[:, min(3, aspects)] - 1)
    if lost is not None and lost.high < 1:
        yield f"Aspects decide little in “{name}”: without its strongest ones, a user's best item stays near the top."
    bounds = None if rated is None else spearman_interval(rated.aspects_E, rated.rating_E, rated.user_E)
    if bounds is not None and bounds[0] <= 0:
        yield f"What aspects add to the scores of “{name}” does not show in users' held-out ratings."


def interval(mean: UserMean | None, spec: str) -> str:
    if mean is None:
        return NOTHING
    value, low, high = (format(one, spec) for one in mean)
    return f"{value} ({low} to {high})"
