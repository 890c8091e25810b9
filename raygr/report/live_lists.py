"""Lists that the page ranks again when a reader moves an aspect: what is embedded, and the first list as a table.

A score after steering is the score of `recommend` plus the move of each aspect times the item's standardised score of
it, so scores and standardised scores of some users and items are all that the page needs. Shape letters: `U` users,
`I` items, `A` aspects.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raygr.compare.tables import Table
from raygr.files import exists, join, read_table
from raygr.recommend.faithfulness import SPEAKS
from raygr.recommend.recommender import Histories, Recommender, load_recommender
from raygr.report.scored_subjects import NEWEST_TITLES, short
from raygr.report.sections import Section
from raygr.schema import ITEMS, SERVING

# 24 users and 4,000 items are about 1 MB of the page.
LIVE_USERS, LIVE_ITEMS, LIST_LENGTH, KEPT_OF_A_USER = 24, 4000, 10, 50
TERMS, LEAST_TERM = 3, 0.01
LEAST_LIMIT = 1.0


def can_steer(path: str, config: Mapping[str, Any]) -> bool:
    """Whether a train run of these settings has a guided user state, and keeps what serving needs."""
    guided = config.get("item_scores") and config.get("user_scores") != "none"
    return bool(guided) and config.get("user_side") == "learned" and exists(join(path, SERVING))


def live_section(run: str, data: str, *, name: str) -> Section:
    """The lists of some users, to be steered in the page; `name` says what the run is."""
    recommender = load_recommender(run)
    rows = read_table(join(data, ITEMS), ["item_id", "title"]).to_pylist()
    live = live_lists(recommender, {row["item_id"]: short(row["title"] or row["item_id"]) for row in rows})
    users, items = len(live["users"]), len(live["items"])
    text = (
        f"Move an aspect, and the list of the model “{name}” ranks again, as the Python call below it does. A value is "
        "what one standard deviation of an item's score adds to the item's score; below each item stand the aspects "
        "that speak most for it."
    )
    if users < len(recommender.user_ids_U):
        text += f" The page holds {users:,} of {len(recommender.user_ids_U):,} users, evenly spaced."
    if items < len(recommender.item_ids_I):
        text += (
            f" It holds {items:,} of {len(recommender.item_ids_I):,} items: the best {KEPT_OF_A_USER} of each of these "
            "users, and the most bought ones. A list that is moved far may lack an item."
        )
    return Section("What if a user looked for something else?", text, [first_list(live)], [], live=live)


@torch.inference_mode()
def live_lists(recommender: Recommender, titles: Mapping[str, str]) -> dict[str, Any]:
    """What the page embeds, as JSON; arrays are little-endian float32 in base64, row by row.

    `scores` (U, I) holds NaN for items that no list of the user may hold, `standard` (I, A) the standardised scores.
    """
    user_U = np.unique(np.linspace(0, len(recommender.user_ids_U) - 1, LIVE_USERS).round().astype(int))
    user_ids = recommender.user_ids_U[user_U].tolist()
    histories = recommender.of_users(user_ids)
    states = recommender.encoded(histories)
    scores_UI, looks_for_UA = recommender.scores(states).clone(), states.guided_BA
    least_U = (SPEAKS * scores_UI.std(dim=1, correction=0)).clamp(min=LEAST_TERM)
    assert looks_for_UA is not None  # `can_steer` was asked, or the configuration was refused
    row_N, item_N = recommender.left_out(histories)
    scores_UI[row_N, item_N - 1] = torch.nan
    kept_I = kept_items(scores_UI.numpy(), recommender.items_N)
    ids = recommender.item_ids_I[kept_I].tolist()
    newest = newest_items(histories, recommender.item_ids_I)
    return {
        "aspects": list(recommender.aspects),
        "length": LIST_LENGTH,
        "limit": max(LEAST_LIMIT, round(2 * looks_for_UA.abs().max().item(), 1)),
        "terms": TERMS,
        "items": [{"id": one, "title": titles.get(one, one)} for one in ids],
        "users": [
            {
                "id": one,
                "newest": [titles.get(item, item) for item in items],
                "looks_for": [round(v, 4) for v in values],
                "least_term": round(least, 4),
            }
            for one, items, values, least in zip(user_ids, newest, looks_for_UA.tolist(), least_U.tolist(), strict=True)
        ],
        "scores": packed(scores_UI.numpy()[:, kept_I]),
        "standard": packed(recommender.model.embedding.standard_rows().numpy()[kept_I]),
    }


def kept_items(scores_UI: np.ndarray, items_N: np.ndarray) -> np.ndarray:
    """Rows of the embedded items: all, or the best of each user, filled up with the most bought ones."""
    items = scores_UI.shape[1]
    if items <= LIVE_ITEMS:
        return np.arange(items)
    best = np.argsort(-np.nan_to_num(scores_UI, nan=-np.inf), axis=1, kind="stable")[:, :KEPT_OF_A_USER]
    bought_I = np.bincount(items_N - 1, minlength=items)
    order = np.concatenate([best.T.ravel(), np.argsort(-bought_I, kind="stable")])
    _, first = np.unique(order, return_index=True)
    return np.sort(order[np.sort(first)][:LIVE_ITEMS])


def newest_items(histories: Histories, item_ids_I: np.ndarray) -> list[list[str]]:
    """The ids of the newest items of each history, newest first."""
    ends = np.cumsum(histories.length_B)
    starts = np.maximum(ends - histories.length_B, ends - NEWEST_TITLES)
    return [
        item_ids_I[histories.items_N[start:end][::-1] - 1].tolist() for start, end in zip(starts, ends, strict=True)
    ]


def packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def unpacked(text: str, columns: int) -> np.ndarray:
    """The inverse of `packed`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(-1, columns)


def first_list(live: Mapping[str, Any]) -> Table:
    """The best items of the first user before any move, each with the aspects that speak for it."""
    user, aspects = live["users"][0], live["aspects"]
    scores_I = unpacked(live["scores"], len(live["items"]))[0]
    standard_IA = unpacked(live["standard"], len(aspects))
    best = [one for one in np.argsort(-scores_I, kind="stable") if not np.isnan(scores_I[one])][:LIST_LENGTH]
    rows = [
        [
            str(rank),
            live["items"][one]["title"],
            reasons(aspects, standard_IA[one] * user["looks_for"], user["least_term"]),
        ]
        for rank, one in enumerate(best, start=1)
    ]
    return Table(f"The best items of user {user['id']}", ["rank", "item", "aspects that speak for it"], rows)


def reasons(aspects: Sequence[str], terms_A: np.ndarray, least: float) -> str:
    """The largest terms of a score in words, of those from `least` on."""
    order = [one for one in np.argsort(-terms_A, kind="stable") if terms_A[one] >= least][:TERMS]
    return ", ".join(f"{aspects[one]} {terms_A[one]:+.2f}" for one in order) or "no aspect speaks for it"
