"""Examples for fine-tuning from a prepare run, item scores and a teacher: one per user, with prompt and targets.

All inputs are checked here. A user's train part is cut `keep_out` interactions before its end: the prompt holds reviews
before the cut, and the reward uses interactions after it. Validation and test interactions serve one purpose, to keep a
user's own items out of the candidates.
Shape letters: `N` interactions, `U` users, `I` items, `A` aspects, `C` candidates, `S` subjects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.interactions import Interactions, read_ids, read_interactions
from raygr.data.user_profiles import user_profiles
from raygr.data.vector_tables import check_ratings, check_read, check_same_data, named, read_vectors, rows_by_id
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.sampling import AnswerTemplate, answer_template
from raygr.metrics.z_scores import standardised_like
from raygr.schema import ITEMS, REVIEWS, TRAIN, USERS
from raygr.score.prompts import item_from_row
from raygr.score.subjects import PromptSettings, encoder_of, prompt_settings, review_of, stored_table

PROFILE = "profile"
PROFILE_MIDDLE, PROFILE_SPREAD = 5.5, 2.0  # a profile's mean and standard deviation over users, on 1..10
ITEM_COLUMNS = ["item_index", "title", "description", "categories", "details"]
ITEM_COLUMNS += ["train_rating", "train_rating_count", "all_rating", "all_rating_count"]
REVIEW_COLUMNS = ["user_index", "item_index", "position", "rating", "timestamp", "review_title", "review_text"]


class TuningExample(NamedTuple):
    """One user: the prompt, and what the ratings are rewarded for. Items are rows, item_index - 1.

    Or one taught item: its prompt and the teacher's scores; what is rewarded is empty.
    """

    user_index: int
    """Of an item its item_index."""
    user_id: str
    """Of an item its item_id."""
    prompt_ids: tuple[int, ...]
    """The chat prompt up to the start of the answer; of a user with the reviews before the cut."""
    candidate_C: np.ndarray
    """The target (the last train interaction) first, then items that are not the user's own, by `candidate_draw`."""
    judged_N: np.ndarray
    """Train interactions kept out of the prompt, the target last."""
    liked_N: np.ndarray
    """Which judged items the user likes, by `liked_by`."""
    teacher_A: np.ndarray | None
    """The teacher's ratings on 1..10; None where the teacher lacks a rating of this user."""


class TuningData(NamedTuple):
    """The inputs of one fine-tuning run; every worker holds all of them."""

    items_IA: np.ndarray
    """Item scores; NaN where a score is missing."""
    train: list[TuningExample]
    held_out: list[TuningExample]
    names: tuple[str, ...]
    """The aspects, in the order of the answer."""
    model: str
    """The base model's folder."""
    template: AnswerTemplate
    """The whole answer; of items one line per aspect, each asked for on its own."""
    counts: dict[str, int]
    """Users or items by use or by reason why they are left out, and items that lack a score."""


class CutHistories(NamedTuple):
    """Interactions and each user's cut; those of user u are rows `start_U[u]` to `start_U[u + 1]`."""

    data: Interactions
    start_U: np.ndarray
    train_U: np.ndarray
    """Number of train interactions, the first ones of each user."""
    cut_U: np.ndarray
    """Number of train interactions before the cut; 0 or less where a user has too few."""
    liked_N: np.ndarray
    """Which items their users like, by `liked_by`; an unrated item is not liked."""
    popularity_I: np.ndarray
    """Number of train interactions."""

    def judged(self, user: int) -> slice:
        """Rows of the train interactions after the cut."""
        return slice(self.start_U[user] + self.cut_U[user], self.start_U[user] + self.train_U[user])

    def own_items(self, user: int) -> np.ndarray:
        """The user's items of all parts; where repeated items are kept, only those after the cut."""
        first = self.start_U[user] + (self.cut_U[user] if self.data.repeats else 0)
        return self.data.item_N[first : self.start_U[user + 1]] - 1


class TuningUsers(NamedTuple):
    """user_index of the training and of the held-out users, and how many others are left out, by reason."""

    train: np.ndarray
    held_out: np.ndarray
    counts: dict[str, int]


def load_tuning_data(config: FinetuneConfig) -> TuningData:
    """Reads and checks all inputs that `config` names, before anything is trained."""
    prepared = runs.read_run(config.data, job="prepare")
    settings = prompt_settings(config, "users")
    aspects = settings.aspects
    template = answer_template(encoder_of(settings).tokenizer, aspects)
    histories = cut_histories(config, read_interactions(config.data), prepared.config["rating_range"])
    chosen = choose_users(config, histories)
    items_IA = read_item_scores(config, aspects.names)
    users = np.concatenate([chosen.train, chosen.held_out])
    user_ids_U = read_ids(config.data, USERS, "user")
    teachers_UA = read_teachers(config, histories, chosen, items_IA=items_IA, ids_U=user_ids_U, names=aspects.names)
    prompts = user_prompts(config, settings, histories, users)

    def example(user: int) -> TuningExample:
        judged = histories.judged(user)
        teacher_A = None if teachers_UA is None or np.isnan(teachers_UA[user]).any() else teachers_UA[user]
        return TuningExample(
            user_index=user,
            user_id=str(user_ids_U[user]),
            prompt_ids=prompts[user],
            candidate_C=draw_candidates(config, histories, user),
            judged_N=histories.data.item_N[judged] - 1,
            liked_N=histories.liked_N[judged],
            teacher_A=teacher_A,
        )

    train, held_out = ([example(user) for user in part.tolist()] for part in (chosen.train, chosen.held_out))
    without_teacher = sum(one.teacher_A is None for one in train + held_out)
    without_score = int(np.isnan(items_IA).any(axis=1).sum())
    if config.teacher and all(one.teacher_A is None for one in train):
        raise ConfigError(f"teacher: {config.teacher} has complete ratings of none of the {len(train)} users")
    return TuningData(
        items_IA=items_IA,
        train=train,
        held_out=held_out,
        names=aspects.names,
        model=settings.model,
        template=template,
        counts=chosen.counts | {"without_teacher": without_teacher, "items_without_score": without_score},
    )


def cut_histories(config: FinetuneConfig, data: Interactions, rating_range: Sequence[float]) -> CutHistories:
    by_item = config.liked_by == "item_mean"
    least_N = item_means(data) if by_item else np.full(len(data.rating_N), like_threshold(config, rating_range))
    # the mean holds the user's own rating, which moves it towards the rating, but never past it
    liked_N = data.rating_N > least_N if by_item else data.rating_N >= least_N
    start_U = np.searchsorted(data.user_N, np.arange(data.users + 1))
    train_U = np.bincount(data.user_N[data.split_N == TRAIN], minlength=data.users)
    popularity_I = np.bincount(data.item_N[data.split_N == TRAIN] - 1, minlength=data.items)
    return CutHistories(data, start_U, train_U, train_U - config.keep_out, liked_N, popularity_I)


def item_means(data: Interactions) -> np.ndarray:
    """Mean train rating of each interaction's item, (N,); NaN for an item without one."""
    rated_N = (data.split_N == TRAIN) & ~np.isnan(data.rating_N)
    item_N, rating_N = data.item_N[rated_N], data.rating_N[rated_N]
    sum_I, number_I = (np.bincount(item_N, weights, minlength=data.items + 1) for weights in (rating_N, None))
    mean_I = np.divide(sum_I, number_I, out=np.full(len(sum_I), np.nan), where=number_I > 0)
    return mean_I[data.item_N]


def like_threshold(config: FinetuneConfig, rating_range: Sequence[float]) -> float:
    """The lowest rating of a liked item; by default three quarters up the data's range."""
    low, high = rating_range
    threshold = low + 0.75 * (high - low) if config.like_threshold is None else config.like_threshold
    if not low <= threshold <= high:
        raise ConfigError(
            f"like_threshold: {threshold:g} lies outside the ratings of {config.data}, {low:g} to {high:g}: set one "
            "among them, or leave it out"
        )
    return threshold


def choose_users(config: FinetuneConfig, histories: CutHistories) -> TuningUsers:
    """Draws the training and the held-out users.

    Only data, `seed` and `held_out_fraction` decide who may be held out: no task trains on another's held-out users.
    """
    users = histories.data.users
    is_long_U = histories.cut_U >= 1
    is_split_U = np.ones(users, bool)
    if config.task == "classification":
        liked_U = [histories.liked_N[histories.judged(user)] for user in range(users)]
        is_split_U = np.array([liked_N.any() and not liked_N.all() for liked_N in liked_U])
    order_U = np.random.default_rng(config.seed).permutation(users)
    pool = round(config.held_out_fraction * users)
    held_out, train = (part[(is_long_U & is_split_U)[part]] for part in (order_U[:pool], order_U[pool:]))
    usable = len(held_out) + len(train)
    if config.max_users:
        wanted = max(1, round(config.held_out_fraction * config.max_users))
        held_out, train = held_out[:wanted], train[: max(1, config.max_users - wanted)]
    counts = {
        "users": users,
        "train": len(train),
        "held_out": len(held_out),
        "too_short": int((~is_long_U).sum()),
        "one_class": int((is_long_U & ~is_split_U).sum()),
        "not_drawn": usable - len(train) - len(held_out),
    }
    if not (len(train) and len(held_out)):
        raise ConfigError(
            f"{config.data}: {len(train)} users to train on and {len(held_out)} held out, need one of each at least "
            f"({counts['too_short']} of {users} have no train interaction before the last {config.keep_out}, "
            f"{counts['one_class']} have no liked or only liked items among these)"
        )
    return TuningUsers(train, held_out, counts)


def draw_candidates(config: FinetuneConfig, histories: CutHistories, user: int) -> np.ndarray:
    """The target and `candidate_items` other items; reward and number of users do not affect them."""
    others = np.setdiff1d(np.arange(histories.data.items), histories.own_items(user))
    share = None
    if config.candidate_draw == "popularity":
        others = others[histories.popularity_I[others] > 0]
        share = histories.popularity_I[others] / histories.popularity_I[others].sum()
    if len(others) < config.candidate_items:
        raise ConfigError(
            f"candidate_items: {config.candidate_items} are more than the {len(others)} items that the user with "
            f"{len(histories.own_items(user))} interactions has not (candidate_draw: {config.candidate_draw})"
        )
    drawn = np.random.default_rng([config.seed, user]).choice(
        others, size=config.candidate_items, replace=False, p=share
    )
    target = histories.data.item_N[histories.judged(user).stop - 1] - 1
    return np.concatenate([[target], drawn])


def read_item_scores(config: FinetuneConfig, names: tuple[str, ...]) -> np.ndarray:
    """Item scores, (I, A), NaN where one is missing; ValueError where an aspect has none at all."""
    vectors = read_vectors(config.item_scores, subjects="items", column=config.score_column, aspects=names)
    items_IA, _ = rows_by_id(vectors, read_ids(config.data, ITEMS, "item"))
    check_read(items_IA, names)
    return items_IA


def read_teachers(
    config: FinetuneConfig,
    histories: CutHistories,
    chosen: TuningUsers,
    *,
    items_IA: np.ndarray,
    ids_U: np.ndarray,
    names: tuple[str, ...],
) -> np.ndarray | None:
    """The teacher's ratings of every user on 1..10, (U, A), NaN where missing; None without a teacher."""
    if config.teacher is None:
        return None
    if config.teacher == PROFILE:
        return profile_ratings(histories, chosen, items_IA)
    vectors = read_vectors(config.teacher, subjects="users", column=config.score_column, aspects=names)
    check_ratings(vectors, config.teacher)
    if vectors.cutoffs_S is not None:
        check_same_data(vectors, config.data, source=config.teacher)
        check_teacher_cutoffs(config, vectors.ids_S, vectors.cutoffs_S)
    return rows_by_id(vectors, ids_U)[0]


def profile_ratings(histories: CutHistories, chosen: TuningUsers, items_IA: np.ndarray) -> np.ndarray:
    """Profiles of the interactions before the cut as ratings on 1..10, (U, A); scaled by the training users' profiles.

    NaN where a user has no interaction whose item has the score.
    """
    data = histories.data
    rank_N = np.arange(len(data.user_N)) - histories.start_U[data.user_N]
    before_N = rank_N < histories.cut_U[data.user_N]
    rows = (data.user_N[before_N], data.item_N[before_N], data.rating_N[before_N])
    profile_UA = user_profiles(*rows, scores_IA=items_IA, users=data.users)
    ratings_UA = PROFILE_MIDDLE + PROFILE_SPREAD * standardised_like(profile_UA, profile_UA[chosen.train])[0]
    return np.where(np.isnan(profile_UA), np.nan, np.clip(ratings_UA, 1, 10))


def check_teacher_cutoffs(config: FinetuneConfig, ids_S: np.ndarray, cutoff_S: np.ndarray) -> None:
    """ConfigError where the teacher's prompts held interactions after the train part."""
    users = files.read_table(files.join(config.data, USERS), ["user_id", "cutoff_position"])
    allowed = dict(zip(users["user_id"].to_pylist(), users["cutoff_position"].to_pylist(), strict=True))
    pairs = zip(ids_S.tolist(), cutoff_S.tolist(), strict=True)
    late = np.array([user for user, cutoff in pairs if cutoff > allowed.get(user, cutoff)])
    if len(late):
        raise ConfigError(f"{config.teacher}: the teacher has seen interactions after the train part ({named(late)})")


def user_prompts(
    config: FinetuneConfig, settings: PromptSettings, histories: CutHistories, users: np.ndarray
) -> dict[int, tuple[int, ...]]:
    """Token ids of the prompts by user_index, from the reviews before each user's cut.

    Only the texts of these users are read. ValueError where reviews and interactions disagree.
    """
    wanted = pa.array(users, pa.int32())
    found = pc.is_in(pc.field("user_index"), value_set=wanted) & (pc.field("split") == TRAIN)
    reviews = stored_table(config.data, REVIEWS).to_table(columns=REVIEW_COLUMNS, filter=found)
    reviews = reviews.sort_by([("user_index", "ascending"), ("position", "ascending")])
    is_reviewed = pc.is_in(pc.field("item_index"), value_set=reviews["item_index"].unique())
    item_rows = stored_table(config.data, ITEMS).to_table(columns=ITEM_COLUMNS, filter=is_reviewed).to_pylist()
    items = {row["item_index"]: item_from_row(row, config.item_rating) for row in item_rows}
    user_N = reviews["user_index"].to_numpy()
    prompts = {}
    for user in users.tolist():
        first, last = np.searchsorted(user_N, [user, user + 1])
        if last - first != histories.train_U[user]:
            raise ValueError(
                f"{config.data}/{REVIEWS}: user_index {user} has {last - first} train reviews, not as in "
                f"the interactions {histories.train_U[user]}"
            )
        rows = reviews.slice(first, histories.cut_U[user]).to_pylist()
        history = [review_of(row, items[row["item_index"]]) for row in rows]
        prompts[user] = encoder_of(settings).user_prompt(history).prefix_ids
    return prompts
