"""The figure of an explanation: values and gaps on 1..10, levels to recommend, and the parts of each score."""

import textwrap

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from raygr.explain.sentences import Explanation, UserExplanation
from raygr.report.charts import BLUE, GREEN, GREY, LIGHT, ORANGE, STYLE

COLORS = (BLUE, ORANGE, GREEN, "#8a4f9e")  # one for each user that ExplainConfig allows
WIDTH_INCHES, LANE_INCHES, ROW_GAP_INCHES, MARGIN_INCHES = 10.5, 0.2, 0.14, 1.75
ROW = 0.84  # height of a row, as a share of the distance between rows
PALE, SHADE = 0.4, "#f4f5f7"
TITLE_LETTERS, NOTE_LETTERS = 70, 205


@matplotlib.rc_context(STYLE)
def explanation_figure(explanation: Explanation) -> Figure:
    """A row per aspect, with a lane for each user, in three columns: values, levels, terms of the score."""
    users = explanation.users
    names = [plain(term.aspect) for term in users[0].terms]
    names += [f"{users[0].other_aspects} other aspects"] if users[0].other_aspects else []
    row_inches = ROW_GAP_INCHES + LANE_INCHES * len(users)
    height = MARGIN_INCHES + LANE_INCHES * len(users) + row_inches * len(names)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    values, levels, terms = figure.subplots(1, 3, sharey=True, width_ratios=[1.25, 0.33, 1])
    values.set_yticks(range(len(names)), names)
    values.set_ylim(len(names) - 0.5, -0.5)
    for axes in (values, levels, terms):
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for row in range(0, len(names), 2):
            axes.axhspan(row - 0.5, row + 0.5, color=SHADE, linewidth=0, zorder=0)
    draw_values(values, users)
    draw_levels(levels, users)
    draw_terms(terms, users)
    figure.legend(handles=handles(explanation), loc="outside upper left", frameon=False, fontsize=9, handlelength=1)
    figure.supxlabel(note(explanation), x=0.01, ha="left", fontsize=7.5, color=GREY)
    return figure


def lane(row: int, user: int, users: int) -> float:
    """The vertical place of a user's lane in a row."""
    return row + ROW / users * (user - (users - 1) / 2)


def draw_values(axes: Axes, users: tuple[UserExplanation, ...]) -> None:
    """Draws the item's value as a vertical bar, and users' values as dots that gaps join to the bar."""
    for row, term in enumerate(users[0].terms):
        axes.vlines(term.item_value, row - ROW / 2, row + ROW / 2, color="black", linewidth=3, zorder=3)
    for k, user in enumerate(users):
        for row, term in enumerate(user.terms):
            y = lane(row, k, len(users))
            low, high = sorted((term.item_value, term.user_value))
            axes.hlines(y, low, high, color=COLORS[k], alpha=PALE, linewidth=3)
            axes.scatter(term.user_value, y, s=34, color=COLORS[k], zorder=4)
            side = -1 if term.gap > 0 else 1
            at, align = term.user_value + 0.22 * side, "left" if side > 0 else "right"
            axes.text(at, y, f"{term.gap:+z.1f}", ha=align, va="center_baseline", fontsize=7.5, color=COLORS[k])
    axes.set_xlim(0.2, 10.9)
    axes.set_xticks(range(1, 11))
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("values, and gaps (item less user)", fontsize=9)


def draw_levels(axes: Axes, users: tuple[UserExplanation, ...]) -> None:
    for k, user in enumerate(users):
        for row, term in enumerate(user.terms):
            words = f"{term.level} {term.user_value:.1f}"
            axes.text(0.5, lane(row, k, len(users)), words, ha="center", va="center", fontsize=8, color=COLORS[k])
    axes.set_xticks([])
    axes.set_title("to recommend", fontsize=9)


def draw_terms(axes: Axes, users: tuple[UserExplanation, ...]) -> None:
    """The encoder's and the user's part of each term, stacked by sign, and a mark at the average item's term."""
    height = ROW / len(users) * 0.8
    for k, user in enumerate(users):
        parts = [(term.encoder_term, term.user_term, term.average_term) for term in user.terms]
        if user.other_aspects:
            parts.append((user.other_encoder_terms, user.other_user_terms, user.other_average_terms))
        for row, (encoder, own, average) in enumerate(parts):
            y = lane(row, k, len(users))
            start = encoder if encoder * own > 0 else 0.0
            axes.barh(y, encoder, height=height, color=COLORS[k])
            axes.barh(y, own, left=start, height=height, color=COLORS[k], alpha=PALE)
            axes.scatter(average, y, marker="|", s=60, color="black", linewidth=1, zorder=4)
            total, ends = encoder + own, (0.0, encoder, start + own, average)
            at, align = (max(ends), "left") if total >= 0 else (min(ends), "right")
            axes.text(at, y, f" {total:+z.2f} ", ha=align, va="center_baseline", fontsize=7.5, color=COLORS[k])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.16)
    axes.set_title("terms of the score:\nencoder's share full, user's share pale", fontsize=9)


def handles(explanation: Explanation) -> list[Line2D]:
    """Legend entries of the item and of each user, with outcome, rank and score."""
    title = textwrap.shorten(explanation.title, TITLE_LETTERS, placeholder=" ...")
    label = plain(f"item {explanation.item_id}: {title}")
    found = [Line2D([], [], color="black", marker="|", markersize=10, markeredgewidth=3, linestyle="", label=label)]
    for user, color in zip(explanation.users, COLORS, strict=False):
        rated = "chosen, without a rating" if user.rating is None else f"rated {user.rating:g}"
        outcome = "not seen yet" if user.part is None else f"{rated} ({user.part})"
        words = (
            f"{user.user_id}: {outcome}; rank {user.rank:g} of {user.ranked}; "
            f"score {user.score:.2f} = base part {user.base_part:.2f} and all aspects {user.aspect_part():+z.2f}"
        )
        found.append(Line2D([], [], color=color, marker="o", markersize=6, linestyle="", label=plain(words)))
    return found


def note(explanation: Explanation) -> str:
    moved = [user.base_moved for user in explanation.users]
    change = " and ".join(f"{one:.0%}" for one in moved)
    lines = [
        f"Users' values: {explanation.user_values}.",
        "Scored after the history before the user's interaction with the item, or the whole one where unseen.",
        "Thin mark: the term's average over all items.",
        f"The base part depends on the history's aspects, too: without them it changes by {change} of its spread."
        if any(moved)
        else "The base part depends on no aspect.",
    ]
    if not explanation.user_side:
        lines.append("The model has no user side: it does not see the users' values.")
    trained = [user.user_id for user in explanation.users if user.part == "train"]
    if trained:
        lines.append(f"The model was trained on the interaction of {', '.join(trained)}, so this score is no forecast.")
    lines.append(f"Choice: {explanation.chosen}.")
    return plain(textwrap.fill(" ".join(lines), NOTE_LETTERS))


def plain(text: str) -> str:
    """Text in which matplotlib reads no dollar sign as the start of a formula."""
    return text.replace("$", r"\$")
