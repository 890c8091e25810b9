"""Flat interaction arrays -> padded batches, by tensor indexing.

All interactions lie in one array sorted by (user, position); a history is a window of this array. Histories are padded
on the right, where a causal encoder never looks. Shape letters: `N` interactions, `E` examples, `B` rows of a batch,
`L` history length, or steps of session lanes, `U` users.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raygr.data.interactions import NewTargets
from raygr.schema import NEW_ITEMS

NEW_SHARE = 0.5  # of a window's length: targets that no earlier window has; those before are context


class Windows(NamedTuple):
    """Training examples: windows of train interactions, each with its targets one step later.

    A window is stored as offsets into the flat array. Its targets in the loss are the newest ones, from
    `first_target_E` on; earlier interactions are their context.
    """

    user_E: Tensor
    start_E: Tensor
    length_E: Tensor
    first_target_E: Tensor
    """The place in the flat array of the first target in the loss."""
    learnable: int
    """The number of possible targets: train interactions after a user's first one and after the prompt."""

    def targets(self) -> int:
        """The number of targets in the loss of all windows. No interaction is the target of two windows."""
        return int((self.start_E + self.length_E + 1 - self.first_target_E).sum())


class Targets(NamedTuple):
    """The interactions of one part to evaluate, each ranked after all interactions of the user before it."""

    user_E: Tensor
    start_E: Tensor
    """The begin of the history, a window of at most max_history."""
    length_E: Tensor
    first_seen_E: Tensor
    """The user's first interaction. The items from there to the target are the seen ones."""
    target_at_E: Tensor
    """The place of the target, or of a new item where it would be: right after its history."""
    new_item_E: Tensor | None = None
    """item_index of targets with new items, which are not in the flat array; None for all others."""
    new_before_E: Tensor | None = None
    """The end of the interactions with new items that came before the target, among all of these; None without any."""

    def items(self, items_N: Tensor, example_B: Tensor) -> Tensor:
        """item_index of some targets; `items_N` is the flat array."""
        return items_N[self.target_at_E[example_B]] if self.new_item_E is None else self.new_item_E[example_B]


class Batch(NamedTuple):
    """Histories and their targets as item_index, 0 where padded; `in_loss_BL` marks the targets to learn.

    A masked history holds items + 1 at a [MASK]. `goes_on_B` marks rows that continue the session of the last batch.
    """

    user_B: Tensor
    history_BL: Tensor
    length_B: Tensor
    target_BL: Tensor
    in_loss_BL: Tensor
    goes_on_B: Tensor
    negative_BL: Tensor
    """One negative for each target in the loss, where the loss takes one per target; 0 elsewhere."""
    rating_BL: Tensor
    """The user's ratings of the history; NaN where there is none."""


def training_windows(
    user_N: np.ndarray, is_train_N: np.ndarray, *, max_history: int, prompt_U: np.ndarray, kept: str = "all"
) -> Windows:
    """Windows of at most `max_history` steps: `all` that cover a user's targets, or only the `last` one.

    The first `prompt_U` train interactions of a user are never targets (0: all but the first are). A user's first
    window begins with the history and learns all of its targets. Each later window ends `NEW_SHARE` of a window further
    on, the last one at the end of the history, and learns only the targets that no earlier window has.
    """
    step = max(1, int(max_history * NEW_SHARE)) if kept == "all" else len(user_N)
    first_U = np.searchsorted(user_N, np.arange(len(prompt_U)))
    last_U = first_U + np.bincount(user_N[is_train_N], minlength=len(prompt_U)) - 1  # the train part comes first
    before_U = first_U + np.maximum(prompt_U, 1) - 1  # the one before the first target
    user_X = np.flatnonzero(before_U < last_U)
    first_X, last_X, before_X = first_U[user_X], last_U[user_X], before_U[user_X]
    end_X = np.minimum(last_X, np.maximum(first_X + max_history, before_X + step))  # of the first window
    at_E = np.repeat(np.arange(len(user_X)), 1 - (end_X - last_X) // step)
    place_E = np.arange(len(at_E)) - np.searchsorted(at_E, at_E)
    end_E = np.minimum(end_X[at_E] + place_E * step, last_X[at_E])
    before_E = np.where(place_E > 0, end_X[at_E] + (place_E - 1) * step, before_X[at_E])
    start_E = np.maximum(first_X[at_E], end_E - max_history)
    columns = (user_X[at_E], start_E, end_E - start_E, np.maximum(before_E, start_E) + 1)
    learnable = int((last_X - before_X).sum())
    user, start, length, first = (torch.from_numpy(column.astype(np.int64)) for column in columns)
    return Windows(user, start, length, first, learnable)


def evaluation_targets(user_N: np.ndarray, is_part_N: np.ndarray, *, max_history: int, every: bool = False) -> Targets:
    """The last interaction of each user in the part, or every one; only those with a history before them."""
    rows = np.flatnonzero(is_part_N)
    at_E = rows if every else rows[is_last_of_user(user_N[rows])]
    first_E = np.searchsorted(user_N, user_N[at_E])
    kept = at_E > first_E
    at_E, first_E = at_E[kept], first_E[kept]
    start_E = np.maximum(first_E, at_E - max_history)
    columns = (user_N[at_E], start_E, at_E - start_E, first_E, at_E)
    return Targets(*(torch.from_numpy(column.astype(np.int64)) for column in columns))


def new_item_targets(new: NewTargets, user_N: np.ndarray, *, max_history: int) -> Targets:
    """The interactions with new items that have a history before them; `user_N` is of the flat array."""
    at_E = np.flatnonzero(new.position_N > 0)
    user_E, position_E = new.user_N[at_E], new.position_N[at_E]
    first_E = np.searchsorted(user_N, user_E)
    length_E = np.minimum(position_E, max_history)
    columns = (user_E, first_E + position_E - length_E, length_E, first_E, first_E + position_E, new.item_N[at_E], at_E)
    return Targets(*(torch.from_numpy(column.astype(np.int64)) for column in columns))


def with_new_before(targets: Targets, new: NewTargets) -> Targets:
    """Targets of the flat array with `new_before_E`: the user's interactions with new items that came earlier."""
    longest = 1 + max(int(new.position_N.max(initial=0)), int((targets.target_at_E - targets.first_seen_E).max()))
    key_E = targets.user_E.numpy() * longest + (targets.target_at_E - targets.first_seen_E).numpy()
    before_E = np.searchsorted(new.user_N * longest + new.position_N, key_E, side="right")
    return targets._replace(new_before_E=torch.from_numpy(before_E))


def is_last_of_user(user_E: np.ndarray) -> np.ndarray:
    """Marks the last entry of each user, (E,). `user_E` is sorted."""
    return np.append(user_E[1:] != user_E[:-1], True)[: len(user_E)]


def history_batch(values_N: Tensor, start_B: Tensor, length_B: Tensor, *, padding: float = 0) -> Tensor:
    """Windows of a flat array of items or ratings, (B, L), padded to the longest of them."""
    step_L = torch.arange(int(length_B.max()))
    at_BL = (start_B[:, None] + step_L).clamp(max=len(values_N) - 1)
    return torch.where(step_L < length_B[:, None], values_N[at_BL], padding)


def training_batch(items_N: Tensor, rating_N: Tensor, windows: Windows, example_B: Tensor) -> Batch:
    """The windows of these examples with the next item as target at each position."""
    start_B, length_B = windows.start_E[example_B], windows.length_E[example_B]
    history_BL = history_batch(items_N, start_B, length_B)
    target_BL = history_batch(items_N, start_B + 1, length_B)
    target_at_BL = start_B[:, None] + 1 + torch.arange(history_BL.shape[1])
    in_loss_BL = (target_BL > 0) & (target_at_BL >= windows.first_target_E[example_B][:, None])
    goes_on_B = torch.zeros(len(example_B), dtype=torch.bool)
    negative_BL = torch.zeros_like(target_BL)
    rating_BL, user_B = history_batch(rating_N, start_B, length_B, padding=torch.nan), windows.user_E[example_B]
    return Batch(user_B, history_BL, length_B, target_BL, in_loss_BL, goes_on_B, negative_BL, rating_BL)


def session_batch(items_N: Tensor, windows: Windows, example_B: Tensor, step_B: Tensor) -> Batch:
    """One step of each lane of `session_lanes`, as a history of one interaction; 0 where a lane has ended."""
    is_on_B, kept_B = example_B >= 0, example_B.clamp(min=0)
    at_B = windows.start_E[kept_B] + step_B.clamp(min=0)
    item_B, target_B = torch.where(is_on_B, items_N[at_B], 0), torch.where(is_on_B, items_N[at_B + 1], 0)
    in_loss_B = is_on_B & (at_B + 1 >= windows.first_target_E[kept_B])
    user_B, goes_on_B = windows.user_E[kept_B], step_B > 0
    item_B1, target_B1 = item_B[:, None], target_B[:, None]
    negative_B1, rating_B1 = torch.zeros_like(target_B1), torch.full(target_B1.shape, torch.nan)
    return Batch(user_B, item_B1, is_on_B.long(), target_B1, in_loss_B[:, None], goes_on_B, negative_B1, rating_B1)


class Masking(NamedTuple):
    """How the histories of BERT4Rec are masked."""

    share: float
    """The share of a history's maskable interactions that is masked; at least one."""
    last: float
    """The share of histories in which only the last interaction is masked, as in evaluation."""
    limit: int
    """The most interactions of a history, masked ones included."""
    mask: int
    """The number that replaces an item_index."""


def masked_batch(
    items_N: Tensor,
    rating_N: Tensor,
    windows: Windows,
    example_B: Tensor,
    *,
    masking: Masking,
    generator: torch.Generator,
) -> Batch:
    """The newest train interactions of each window; some are masked, and these are the targets.

    Masks start where a causal model's targets start: after the window's oldest interaction and after the prompt.
    """
    last_B = (windows.start_E + windows.length_E)[example_B]
    start_B = torch.maximum(windows.start_E[example_B], last_B + 1 - masking.limit)
    length_B = last_B + 1 - start_B
    item_BL = history_batch(items_N, start_B, length_B)
    step_L = torch.arange(item_BL.shape[1])
    is_maskable_BL = (item_BL > 0) & (start_B[:, None] + step_L >= windows.first_target_E[example_B][:, None])
    is_masked_BL = random_share(is_maskable_BL, masking.share, generator)
    is_last_only_B = torch.rand(len(example_B), generator=generator) < masking.last
    is_masked_BL = torch.where(is_last_only_B[:, None], step_L == length_B[:, None] - 1, is_masked_BL)
    history_BL = torch.where(is_masked_BL, masking.mask, item_BL)
    goes_on_B = torch.zeros(len(example_B), dtype=torch.bool)
    negative_BL = torch.zeros_like(item_BL)
    rating_BL, user_B = history_batch(rating_N, start_B, length_B, padding=torch.nan), windows.user_E[example_B]
    return Batch(user_B, history_BL, length_B, item_BL, is_masked_BL, goes_on_B, negative_BL, rating_BL)


def random_share(is_eligible_BL: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Marks round(share * eligible) random eligible places in each row, at least one."""
    wanted_B = (is_eligible_BL.sum(1) * share).round().clamp(min=1)
    key_BL = torch.rand(is_eligible_BL.shape, generator=generator).masked_fill(~is_eligible_BL, 2.0)
    return (key_BL.argsort(1).argsort(1) < wanted_B[:, None]) & is_eligible_BL


def worker_part(batch: Batch, rank: int, workers: int) -> Batch:
    """Takes every `workers`-th history from `rank` on, cut to the width of the longest of them."""
    return narrowed(Batch(*(column[rank::workers] for column in batch)))


def narrowed(batch: Batch) -> Batch:
    """Cuts the batch to the width of its longest history."""
    longest = max(1, int(batch.length_B.max())) if len(batch.length_B) else 1
    return Batch(*(column[:, :longest] if column.dim() == 2 else column for column in batch))


def length_groups(batch: Batch, positions: int) -> list[Batch]:
    """Sorts histories by length and cuts them into batches of at most `positions` positions (or one history)."""
    rows = max(1, positions // batch.history_BL.shape[1])
    if rows >= len(batch.length_B):
        return [batch]
    order_B = batch.length_B.argsort(descending=True, stable=True)
    return [narrowed(Batch(*(column[row_B] for column in batch))) for row_B in order_B.split(rows)]


def epoch_batches(examples: int, *, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The examples of an epoch in random order, in batches; the same for every worker and after a restart."""
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return list(torch.from_numpy(order).split(batch_size))


def session_lanes(length_E: Tensor, *, lanes: int, seed: int, epoch: int) -> Tensor:
    """The sessions of an epoch in random order, one after another in lanes of about equal length, (L, B, 2).

    Row t is one session-parallel batch (Hidasi et al. 2016): the example of each lane and the step in it, -1 after the
    lane's end. A lane's next session follows at once, so lanes differ at their ends only.
    """
    order_E = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(length_E)))
    length_E = length_E[order_E]
    before_E = length_E.cumsum(0) - length_E
    lane_E = before_E * lanes // length_E.sum()
    first_of_lane_E = before_E[torch.searchsorted(lane_E, lane_E)]
    session_N = torch.repeat_interleave(torch.arange(len(length_E)), length_E)
    row_N = torch.arange(len(session_N)) - first_of_lane_E[session_N]
    found_LB2 = torch.full((int(row_N.max()) + 1, lanes, 2), -1)
    step_N = torch.arange(len(session_N)) - before_E[session_N]
    found_LB2[row_N, lane_E[session_N]] = torch.stack([order_E[session_N], step_N], dim=1)
    return found_LB2


def seen_pairs(
    items_N: Tensor, targets: Targets, example_B: Tensor, new: NewTargets | None = None
) -> tuple[Tensor, Tensor]:
    """(row in the batch, item_index) pairs of all items that came before the target, of `new` only with it."""
    found = [pairs_between(items_N, targets.first_seen_E[example_B], targets.target_at_E[example_B])]
    if new is not None and targets.new_before_E is not None:
        first_B = torch.searchsorted(torch.from_numpy(new.user_N), targets.user_E[example_B])
        found.append(pairs_between(torch.from_numpy(new.item_N), first_B, targets.new_before_E[example_B]))
    row_N, item_N = (torch.cat(column) for column in zip(*found, strict=True))
    return row_N, item_N


def ranked_items(candidates: str, items: int, new_items: int) -> tuple[int, int]:
    """The first place and the end of the items that are ranked, in a catalogue whose last items are new.

    `candidates` is full (without new items), NEW_ITEMS, WHOLE or CALIBRATED.
    """
    known = items - new_items
    return known if candidates == NEW_ITEMS else 0, known if candidates == "full" else items


def pairs_between(items_N: Tensor, first_B: Tensor, end_B: Tensor) -> tuple[Tensor, Tensor]:
    """(row, item_index) pairs of the items from `first_B` to before `end_B` of an array."""
    count_B = end_B - first_B
    row_N = torch.repeat_interleave(torch.arange(len(first_B)), count_B)
    step_N = torch.arange(len(row_N)) - torch.repeat_interleave(count_B.cumsum(0) - count_B, count_B)
    return row_N, items_N[first_B[row_N] + step_N]
