"""Why an item suits some users and others not (Figure 5): a train run -> figure, JSON and sentences.

    recommender = load_recommender("outputs/quickstart/train/shipped")
    print(explain_item(recommender, "F0182", ["S00288", "S00358"]).sentences())

The split is exact, and one of the score's last product, not of causes: the encoder reads the aspects of a history, so
the base part depends on them too; how far is measured with all of them at the catalogue's mean.

Scores are forecasts wherever they can be: an item that a user has interacted with is scored after the history before
that interaction, an unseen one after the whole history. Shape suffixes: `A` aspects, `C` items at once.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from raygr import files, runs
from raygr.data.interactions import Interactions, read_interactions
from raygr.explain.cases import choose_case
from raygr.explain.config import ExplainConfig
from raygr.explain.drawing import explanation_figure
from raygr.explain.explanation import AspectTerm, Explanation, UserExplanation, level_word
from raygr.explain.raw_scores import Values, read_values, user_values
from raygr.models.inference import relative_change
from raygr.recommend.recommender import Histories, Recommender, check_known, load_recommender
from raygr.report.charts import save_figure
from raygr.schema import EXPLANATION, ITEMS
from raygr.train.serving import check_sources

logger = logging.getLogger(__name__)

ITEMS_AT_ONCE = 1024


def explain(config: ExplainConfig) -> runs.Run:
    """Writes explanation.json, .svg and .png; what cannot be explained is said before anything is written."""
    explanation = explain_item(
        load_recommender(config.train_run), config.item, config.users, aspects=config.aspect_names
    )
    run = runs.start_run(config.output, job="explain", config=config)
    sentences = explanation.sentences()
    files.write_json(dataclasses.asdict(explanation) | {"sentences": sentences}, run.file(f"{EXPLANATION}.json"))
    save_figure(explanation_figure(explanation), run.file(EXPLANATION), dots_per_inch=100)
    runs.finish_run(run, inputs=[config.train_run], counts={"users": len(explanation.users)})
    for text in sentences:
        logger.info("%s", text)
    return run


def explain_item(
    recommender: Recommender,
    item_id: str | None = None,
    user_ids: Sequence[str] = (),
    *,
    aspects: Sequence[str] | None = None,
) -> Explanation:
    """Compares an item with users aspect by aspect, and splits its scores; `choose_case` picks what is not given.

    `aspects` are shown one by one, the others as one sum. ValueError for unknown ids and aspects, for a model without
    scores of its own items on 1..10, and for an item or a user without values or without a history.
    """
    config = recommender.config
    check_sources(recommender.run, config)
    check_known([] if item_id is None else [item_id], recommender.index_of_item, "item", config.data)
    check_known(user_ids, recommender.index_of_user, "user", config.data)
    found = read_interactions(config.data)
    values = read_values(recommender, found)
    columns = shown_columns(values.aspects, aspects)
    item = None if item_id is None else recommender.index_of_item[item_id]
    if item is not None and not values.scored_I[item - 1]:
        raise ValueError(f"item {item_id} lacks a score in {config.item_scores}: the mean of all would be explained")
    users = [recommender.index_of_user[one] for one in dict.fromkeys(user_ids)]
    case = choose_case(found, item, users, scored_I=values.scored_I, valued_U=values.valued_U)
    item_id = str(recommender.item_ids_I[case.item - 1])
    return Explanation(
        item_id=item_id,
        title=read_title(config.data, case.item) or item_id,
        chosen=case.chosen,
        user_values=values.meaning,
        user_side=recommender.model.embedding.has_user_side,
        users=tuple(
            explain_user(recommender, values, found, item=case.item, user=user, columns=columns) for user in case.users
        ),
    )


def explain_user(
    recommender: Recommender, values: Values, found: Interactions, *, item: int, user: int, columns: Sequence[int]
) -> UserExplanation:
    """Of item_index `item` for user_index `user`; `columns` are the aspects shown one by one."""
    user_id, item_id = str(recommender.user_ids_U[user]), str(recommender.item_ids_I[item - 1])
    value_A, item_A = user_values(values, found, user, item), values.items_IA[item - 1]
    if np.isnan(value_A).any():
        raise ValueError(f"user {user_id} has no values to compare with item {item_id}: they would be {values.meaning}")
    first, end = np.searchsorted(found.user_N, [user, user + 1])
    at = next(
        reversed(first + np.flatnonzero(found.item_N[first:end] == item)), None
    )  # the last, where items come back
    histories = recommender.up_to(np.array([user]), np.array([end if at is None else at]))
    history = int(histories.length_B[0])
    if not history:
        raise ValueError(f"item {item_id} is the first of user {user_id}: there is no history to score it after")
    score_1, rank_1 = recommender.score_and_rank(histories, item)
    parts = recommender.split_scores(histories, torch.tensor([item]))
    encoder_A, user_A = parts.encoder_BCA[0, 0].tolist(), parts.user_BCA[0, 0].tolist()
    average_A = average_terms(recommender, histories)
    at_mean_1I, as_is_1I = recommender.base_parts(histories)
    others = [a for a in range(len(values.aspects)) if a not in columns]
    return UserExplanation(
        user_id=user_id,
        part=None if at is None else str(found.split_N[at]),
        rating=None if at is None or np.isnan(found.rating_N[at]) else float(found.rating_N[at]),
        history=history,
        score=float(score_1),
        rank=float(rank_1),
        ranked=len(recommender.item_ids_I) - (0 if found.repeats else history),
        base_part=float(parts.base_BC),
        base_part_at_mean=float(at_mean_1I[0, item - 1]),
        base_moved=relative_change(at_mean_1I, as_is_1I),
        terms=tuple(
            AspectTerm(
                aspect=values.aspects[a],
                item_value=float(item_A[a]),
                user_value=float(value_A[a]),
                gap=float(item_A[a] - value_A[a]),
                level=level_word(value_A[a]),
                encoder_term=encoder_A[a],
                user_term=user_A[a],
                average_term=average_A[a],
            )
            for a in columns
        ),
        other_aspects=len(others),
        other_encoder_terms=sum(encoder_A[a] for a in others),
        other_user_terms=sum(user_A[a] for a in others),
        other_average_terms=sum(average_A[a] for a in others),
    )


def average_terms(recommender: Recommender, histories: Histories) -> list[float]:
    """Each aspect's encoder and user term together after one history, averaged over all items."""
    items = len(recommender.item_ids_I)
    total_A = torch.zeros(recommender.model.embedding.aspects, dtype=torch.float64)
    for item_C in torch.arange(1, items + 1).split(ITEMS_AT_ONCE):
        parts = recommender.split_scores(histories, item_C)
        total_A += (parts.encoder_BCA + parts.user_BCA)[0].double().sum(0).cpu()
    return (total_A / items).tolist()


def shown_columns(names: Sequence[str], aspects: Sequence[str] | None) -> list[int]:
    """Places of `aspects`, in their order; all where they are None."""
    wanted = list(names if aspects is None else dict.fromkeys(aspects))
    absent = [name for name in wanted if name not in names]
    if absent or not wanted:
        raise ValueError(f"no aspect {', '.join(absent)}; the model has: {', '.join(names)}")
    return [list(names).index(name) for name in wanted]


def read_title(data: str, item: int) -> str:
    filesystem, inner = files.filesystem_of(files.join(data, ITEMS))
    is_item = pc.field("item_index") == item
    return pq.read_table(inner, columns=["title"], filters=is_item, filesystem=filesystem)["title"][0].as_py()
