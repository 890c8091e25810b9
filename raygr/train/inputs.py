"""A prepare run and its scores -> the arrays that training and evaluation use. All checks are here.

Shape letters: `N` interactions, `U` users, `I` items, `A` aspects, `C` candidates.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.interactions import Interactions, NewTargets, read_ids, read_interactions, read_new_targets
from raygr.data.user_profiles import prompt_lengths, user_profiles
from raygr.data.vector_tables import (
    AlignedScores,
    Vectors,
    align_items,
    check_read,
    check_same_data,
    named,
    read_vectors,
    rows_by_id,
)
from raygr.metrics.ranking import AVERAGE, TIE_RULE
from raygr.metrics.z_scores import standardise, standardised_like
from raygr.models.negatives import OwnedItems, owned_items
from raygr.schema import ITEMS, NEW, TEST, TRAIN, USERS, VALIDATION
from raygr.train.batches import (
    Targets,
    Windows,
    evaluation_targets,
    new_item_targets,
    training_windows,
    with_new_before,
)
from raygr.train.candidates import candidate_weights, sample_candidates
from raygr.train.config import TrainConfig

NOTED_MISSING = 0.05  # a warning is given above this share of incomplete subjects; run.json counts all
SHORTEST_HISTORY = 3  # one interaction to train on, one for validation, one for test


class UserVectors(NamedTuple):
    """Standardised guided vectors of users, and how much of the history the training vectors know."""

    training_UA: np.ndarray
    evaluation_UA: np.ndarray
    prompt_U: np.ndarray
    """The number of first train interactions that the training vector was made from; 0 where all may be learned."""
    without_scores: int
    """Users with at least one missing score. A missing score is 0 in the vector, the mean of the others."""


class Inputs(NamedTuple):
    """Everything that one training reads. Every worker holds all of it (ids and numbers only)."""

    items: int
    new: NewTargets | None
    """Interactions with new items, also those without a history; None on data without new items."""
    new_items: int
    """Number of items, the last ones, that training does not know; they are ranked as new items only."""
    items_N: Tensor
    rating_N: Tensor
    """NaN where an interaction has no rating."""
    rating_deviation: float
    """Of all train ratings; 1 where they do not differ."""
    first_U: np.ndarray
    """The first interaction of each user, and as one more entry the end of the last user."""
    windows: Windows
    targets: dict[str, Targets]
    """By part: validation and test, and new on data with new items."""
    repeats: bool
    """Repeat purchases were kept: items of the history may be targets, and are ranked and drawn like any other."""
    owned: OwnedItems
    """Items that are never drawn as negatives of the user. The target of a position is never a negative either."""
    candidates: dict[str, Tensor]
    """(U, 100) item_index by the name of the candidate set; `full` has no entry."""
    train_count_I: np.ndarray
    scores: AlignedScores | None
    list_scores_IA: np.ndarray | None
    """Vectors in which recommended lists are diverse; None for the model's own."""
    user_vectors: UserVectors | None
    protocol: dict[str, Any]
    warnings: list[str]


def load_inputs(config: TrainConfig) -> Inputs:
    """Reads and checks everything that `config` names. ConfigError, ValueError or RunError say what is wrong."""
    prepared = runs.read_run(config.data, job="prepare")
    data = read_interactions(config.data)
    scores = read_item_scores(config)
    users = read_user_vectors(config, data, scores)
    check_width(config, len(scores.aspects) if scores else 0)
    is_train_N = data.split_N == TRAIN
    prompt_U = np.zeros(data.users, np.int64) if users is None else users.prompt_U
    windows = training_windows(
        data.user_N, is_train_N, max_history=config.max_history, prompt_U=prompt_U, kept=config.windows
    )
    every = {VALIDATION: False, TEST: "every" in config.targets}
    targets = {
        part: evaluation_targets(data.user_N, data.split_N == part, max_history=config.max_history, every=every[part])
        for part in (VALIDATION, TEST)
    }
    new = read_new_targets(config.data)
    if new is not None:
        targets = {part: with_new_before(found, new) for part, found in targets.items()}
        targets[NEW] = new_item_targets(new, data.user_N, max_history=config.max_history)
        sampled = ", ".join(name for name in config.candidates if name != "full")
        if sampled:
            raise ConfigError(f"{config.data} has new items, which {sampled} would draw: set candidates: [full]")
    check_examples(config, windows, targets)
    train_count_I = np.bincount(data.item_N[is_train_N] - 1, minlength=data.items)
    candidates = sampled_sets(config, data, train_count_I)
    list_scores_IA = None
    if config.list_scores is not None:
        list_scores_IA = read_list_scores(config, config.list_scores, read_ids(config.data, ITEMS, "item"))
    known = data.items - data.new_items  # new items are no negatives
    is_owned_N = is_train_N & (not data.repeats)  # with repeats the train items compete with the target
    return Inputs(
        items=data.items,
        new=new,
        new_items=data.new_items,
        items_N=torch.from_numpy(data.item_N),
        rating_N=torch.tensor(data.rating_N, dtype=torch.float32),
        rating_deviation=rating_deviation(data.rating_N[is_train_N]),
        first_U=np.searchsorted(data.user_N, np.arange(data.users + 1)),
        windows=windows,
        targets=targets,
        repeats=data.repeats,
        owned=owned_items(data.user_N[is_owned_N], data.item_N[is_owned_N], users=data.users, items=known),
        candidates=candidates,
        train_count_I=train_count_I,
        scores=scores,
        list_scores_IA=list_scores_IA,
        user_vectors=users,
        protocol=protocol_stamp(config, prepared, candidates, seen="ranked" if data.repeats else "filtered"),
        warnings=score_warnings(scores) + user_warnings(config, users, windows),
    )


def rating_deviation(rating_N: np.ndarray) -> float:
    rated_N = rating_N[~np.isnan(rating_N)]
    return float(rated_N.std()) or 1.0 if len(rated_N) else 1.0


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Makes paths absolute for workers, which run in a folder of their own, and for serving."""
    return dataclasses.replace(
        config,
        output=files.absolute(config.output),
        data=files.absolute(config.data),
        item_scores=config.item_scores and files.absolute(config.item_scores),
        user_score_run=config.user_score_run and files.absolute(config.user_score_run),
        user_table=config.user_table and files.absolute(config.user_table),
        list_scores=config.list_scores and files.absolute(config.list_scores),
    )


def protocol_stamp(
    config: TrainConfig, prepared: runs.RunRecord, candidates: dict[str, Tensor], *, seen: str
) -> dict[str, Any]:
    """The evaluation protocol; runs with the same stamp may be compared."""
    drawn = {name: hashlib.sha256(items_UC.numpy().tobytes()).hexdigest()[:12] for name, items_UC in candidates.items()}
    kept = {name: prepared.config.get(name) for name in ("test_interactions", "new_items", "new_items_by")}
    if not kept["new_items"]:
        kept |= {"new_items": None, "new_items_by": None}
    return {
        "split": prepared.config["split"],
        # 1 is the published leave-one-out, whose stamp stays as it was before the setting
        **{name: value for name, value in kept.items() if value not in (None, 1)},
        "targets": sorted(config.targets),
        "average": AVERAGE,
        "candidates": sorted(config.candidates),
        "seen": seen,
        "ties": TIE_RULE,
        "data": files.fingerprint(config.data),
        # sampled sets by their content: another version of numpy may draw others from the same seed
        **({"candidate_sets": drawn} if drawn else {}),
    }


def check_width(config: TrainConfig, aspects: int) -> None:
    guided = aspects if config.fusion == "concat" else 0
    width = config.base_width + guided
    if config.model != "gru4rec" and width % config.heads:
        sum_text = f"base_width {config.base_width} + {guided} aspects"
        raise ConfigError(f"total width {width} ({sum_text}) is no multiple of heads {config.heads}: set heads=1")


def check_examples(config: TrainConfig, windows: Windows, targets: dict[str, Targets]) -> None:
    if not len(windows.user_E):
        needed = "two train interactions, one of them after the prompt"
        raise ConfigError(f"{config.data}: no user has a target to train on ({needed})")
    for part, found in targets.items():
        if not len(found.user_E):
            needed = f"{SHORTEST_HISTORY} in all"
            raise ConfigError(f"{config.data}: no user has a {part} interaction with a history before it ({needed})")


def read_item_scores(config: TrainConfig) -> AlignedScores | None:
    if config.item_scores is None:
        return None
    vectors = read_vectors(
        config.item_scores, subjects="items", column=config.score_column, aspects=config.aspect_names
    )
    ids_I = read_ids(config.data, ITEMS, "item")
    return align_items(vectors, ids_I, missing=config.missing_scores, control=config.control, seed=config.seed)


def read_list_scores(config: TrainConfig, list_scores: str, ids_I: np.ndarray) -> np.ndarray:
    """Vectors of items 1..I in which recommended lists are diverse; NaN where a score is missing."""
    vectors = read_vectors(list_scores, subjects="items", column=config.score_column, aspects=None)
    return align_items(vectors, ids_I, missing=config.missing_scores, control="none", seed=0).scores_IA


def score_warnings(scores: AlignedScores | None) -> list[str]:
    if scores is None:
        return []
    items = len(scores.scores_IA)
    flat = [name for name, is_flat in zip(scores.aspects, standardise(scores.scores_IA)[1], strict=True) if is_flat]
    notes = {
        f"aspects without any spread, which add nothing: {', '.join(flat)}": len(flat),
        f"{scores.missing} of {items} items ({scores.missing / items:.0%}) have no complete scores: what is missing "
        "adds nothing to them": scores.missing > NOTED_MISSING * items,
        f"{scores.unknown} scored ids are not in the data": scores.unknown,
    }
    return [text for text, count in notes.items() if count]


def user_warnings(config: TrainConfig, users: UserVectors | None, windows: Windows) -> list[str]:
    if users is None:
        return []
    count, missing = len(users.prompt_U), users.without_scores
    untrained = count - len(np.unique(windows.user_E))
    notes = {
        f"the user vectors of {config.user_table} are an oracle: nobody checked what they know, and they may know the "
        "targets, so this run shows what user vectors could gain at most, not what they gain": (
            config.user_table is not None
        ),
        f"{missing} of {count} users ({missing / count:.0%}) have no complete scores: what is missing adds nothing to "
        "them": missing > NOTED_MISSING * count,
        f"{untrained} of {count} users have no interaction to train on after their prompt": (
            users.prompt_U.any() and untrained > NOTED_MISSING * count
        ),
    }
    return [text for text, is_worth_it in notes.items() if is_worth_it]


def read_user_vectors(config: TrainConfig, data: Interactions, scores: AlignedScores | None) -> UserVectors | None:
    if config.user_side == "off" or scores is None:
        return None
    match config.user_scores:
        case "profile":
            users = profile_vectors(config, data, scores)
        case _ if config.user_score_run:
            users = llm_vectors(config, scores)
        case _ if config.user_table:
            users = table_vectors(config, scores)
        case _:
            return None
    return shuffled_users(users, config.seed) if config.user_control == "shuffled" else users


def shuffled_users(users: UserVectors, seed: int) -> UserVectors:
    """The vectors permuted over the users that have one; each user keeps the positions that are trained on."""
    known_U = np.flatnonzero(users.evaluation_UA.any(axis=1))
    source_U = np.arange(len(users.evaluation_UA))
    source_U[known_U] = np.random.default_rng(seed).permutation(known_U)
    return users._replace(training_UA=users.training_UA[source_U], evaluation_UA=users.evaluation_UA[source_U])


def profile_vectors(config: TrainConfig, data: Interactions, scores: AlignedScores) -> UserVectors:
    """Profiles of all train interactions for evaluation, and of the prompt part only for training."""
    is_train_N = data.split_N == TRAIN
    count_U = np.bincount(data.user_N[is_train_N], minlength=data.users)
    full_UA = profiles_of(is_train_N, data, scores)
    missing = int(np.isnan(full_UA).any(axis=1).sum())
    vectors_UA, _ = standardise(full_UA)
    if config.user_guided_train == "all":
        return UserVectors(vectors_UA, vectors_UA, np.zeros(data.users, np.int64), missing)
    prompt_U = prompt_lengths(count_U, config.prompt_fraction)
    rank_N = np.arange(len(data.user_N)) - np.searchsorted(data.user_N, data.user_N)
    prompt_UA = profiles_of(is_train_N & (rank_N < prompt_U[data.user_N]), data, scores)
    # standardised by the full profiles, so that training and evaluation share one scale
    return UserVectors(standardised_like(prompt_UA, full_UA)[0], vectors_UA, prompt_U, missing)


def profiles_of(kept_N: np.ndarray, data: Interactions, scores: AlignedScores) -> np.ndarray:
    rows = (data.user_N[kept_N], data.item_N[kept_N], data.rating_N[kept_N])
    return user_profiles(*rows, scores_IA=scores.scores_IA, users=data.users)


def llm_vectors(config: TrainConfig, scores: AlignedScores) -> UserVectors:
    """LLM scores of the user prompts; ConfigError where a prompt holds interactions to be predicted."""
    assert config.user_score_run is not None  # by the configuration's validator
    vectors = read_vectors(config.user_score_run, subjects="users", column=config.score_column, aspects=scores.aspects)
    users = files.read_table(files.join(config.data, USERS)).sort_by("user_index")
    ids_U = users["user_id"].to_numpy().astype(str)
    values_UA, _ = rows_by_id(vectors, ids_U)
    check_read(values_UA, vectors.aspects, "user")
    cutoff_U = checked_cutoffs(vectors, users, config)
    if config.user_guided_train == "all":
        return static_vectors(values_UA, np.zeros(len(ids_U), np.int64))
    scored_U = cutoff_U >= 0
    if (cutoff_U >= users["cutoff_position"].to_numpy())[scored_U].all():
        raise ConfigError(
            "the user prompts hold the whole train part, so nothing is left to train on after them: "
            "set user_guided_train: all, or score users with an earlier cut-off (cutoff_fraction of score)"
        )
    return static_vectors(values_UA, cutoff_U + 1)


def table_vectors(config: TrainConfig, scores: AlignedScores) -> UserVectors:
    """Vectors of an unchecked table of users, for training and evaluation alike."""
    assert config.user_table is not None  # by the configuration's validator
    vectors = read_vectors(config.user_table, subjects="users", column=config.score_column, aspects=scores.aspects)
    if vectors.cutoffs_S is not None:
        raise ConfigError(
            f"user_table: {config.user_table} is a score run, which says what each prompt has seen: "
            "set user_score_run instead, so that this is checked"
        )
    values_UA, _ = rows_by_id(vectors, read_ids(config.data, USERS, "user"))
    return static_vectors(values_UA, np.zeros(len(values_UA), np.int64))


def static_vectors(values_UA: np.ndarray, prompt_U: np.ndarray) -> UserVectors:
    """The same vectors for training and evaluation."""
    standardised_UA, _ = standardise(values_UA)
    return UserVectors(standardised_UA, standardised_UA, prompt_U, int(np.isnan(values_UA).any(axis=1).sum()))


def checked_cutoffs(vectors: Vectors, users: pa.Table, config: TrainConfig) -> np.ndarray:
    """The position of the newest interaction in each user's prompt; -1 for users without scores.

    ConfigError where it lies after the train part, or where the scores belong to other data.
    """
    if vectors.cutoffs_S is None or vectors.cutoff_times_S is None:
        raise ConfigError(
            f"{config.user_score_run}: user scores must be a score run, which says what each prompt has seen"
        )
    check_same_data(vectors, config.data, source=str(config.user_score_run))
    ids = users["user_id"].to_pylist()
    rows = dict(zip(vectors.ids_S.tolist(), zip(vectors.cutoffs_S, vectors.cutoff_times_S, strict=True), strict=True))
    cutoff_U, time_U = np.array([rows.get(user, (-1, -1)) for user in ids], dtype=np.int64).T
    late_U = (cutoff_U > users["cutoff_position"].to_numpy()) | (time_U > users["cutoff"].fill_null(-1).to_numpy())
    if late_U.any():
        ids_U = np.array(ids)
        raise ConfigError(
            f"the prompts of {late_U.sum()} users hold interactions after the train part ({named(ids_U[late_U])}): "
            "their scores know what is to be predicted; score the users of this very prepare run"
        )
    return cutoff_U


def sampled_sets(config: TrainConfig, data: Interactions, train_count_I: np.ndarray) -> dict[str, Tensor]:
    """Candidate sets (U, 100) by name, without the user's own items; in data with repeats, without the targets only."""
    is_own_N = (data.split_N != TRAIN) | (not data.repeats)
    user_N, item_N = data.user_N[is_own_N], data.item_N[is_own_N]
    sets: dict[str, Tensor] = {}
    for name in config.candidates:
        if name != "full":
            weight_I = candidate_weights(name, train_count_I)
            seed = [config.candidate_seed, *name.encode()]  # a random stream for each set
            drawn_UC = sample_candidates(user_N, item_N, weight_I=weight_I, users=data.users, seed=seed)
            sets[name] = torch.from_numpy(drawn_UC)
    return sets
