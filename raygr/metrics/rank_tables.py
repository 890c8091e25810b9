"""RANK rows -> one ranking per candidate set and choice of targets, and its metrics.

The ranking `full` holds the last test target of each user, ranked in the whole catalogue; `full, every target` holds
all test targets. Names of targets with new items end in `, new targets`.
Shape letters: `E` examples: targets to rank.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr.metrics.ranking import METRICS, chance_values, metric_values, user_means

EVERY = ", every target"
NEW_TARGETS = ", new targets"
SUFFIXES = {"last": "", "every": EVERY, "new": NEW_TARGETS}


class Ranking(NamedTuple):
    """Ranks of the targets in one candidate set, sorted by (user, position). A user may have several targets."""

    user_E: np.ndarray
    position_E: np.ndarray
    rank_E: np.ndarray
    train_count_E: np.ndarray
    """The number of train interactions with the target item."""
    among_E: np.ndarray | None = None
    """Set for chance: the rank is uniform on 1..among, with mean `rank_E`. None: `rank_E` is the rank itself."""


def candidates_of(name: str) -> str:
    """The candidate set in a ranking's name."""
    return name.removesuffix(EVERY).removesuffix(NEW_TARGETS)


def read_rankings(ranks: pa.Table, *, part: str, targets: tuple[str, ...]) -> dict[str, Ranking]:
    """Rankings of one part of the RANK rows, by name. `targets` holds `last`, `every` or both.

    `new` stands for every target of the part of new items.
    """
    rows = ranks.filter(pc.field("part") == part).sort_by([("user_index", "ascending"), ("position", "ascending")])
    found = {}
    for candidates in rows["candidates"].unique().to_pylist():
        ranked = rows.filter(pc.field("candidates") == candidates)
        for which in targets:
            chosen = ranked.filter(pc.field("last")) if which == "last" else ranked
            columns = (chosen[name].to_numpy() for name in ("user_index", "position", "rank", "target_train_count"))
            found[f"{candidates}{SUFFIXES[which]}"] = Ranking(*columns)
    return found


def counted_ranking(ranking: Ranking, *, least: int = 0, below: float) -> Ranking:
    """The targets whose item has `least` or more, and fewer than `below`, train interactions."""
    is_kept_E = (ranking.train_count_E >= least) & (ranking.train_count_E < below)
    columns = {name: column[is_kept_E] for name, column in ranking._asdict().items() if column is not None}
    return ranking._replace(**columns)


def count_edges(ranking: Ranking, bins: int) -> list[int]:
    """Least train counts of at most `bins` groups with about equally many targets; targets without any are apart."""
    count_E = np.sort(ranking.train_count_E)
    bought_E = count_E[count_E > 0]
    starts = [int(part[0]) for part in np.array_split(bought_E, bins) if len(part)]
    return sorted({*starts, *count_E[:1].tolist()})


def user_values(ranking: Ranking, metric: str) -> np.ndarray:
    """The mean metric over each user's targets, (U,), in the order of user_index."""
    if ranking.among_E is not None:
        return user_means(chance_values(metric, ranking.among_E), ranking.user_E)
    return user_means(metric_values(metric, ranking.rank_E), ranking.user_E)


def ranking_metrics(ranking: Ranking) -> dict[str, float] | None:
    """The mean of every metric over users; None without targets."""
    if not len(ranking.user_E):
        return None
    return {metric: float(user_values(ranking, metric).mean()) for metric in METRICS}


def cold_metrics(ranking: Ranking, below: int) -> dict[str, Any]:
    """Counts and metrics of the targets whose item has fewer than `below` train interactions."""
    cold = counted_ranking(ranking, below=below)
    users = len(np.unique(cold.user_E))
    return {"targets": len(cold.user_E), "users": users, "metrics": ranking_metrics(cold)}
