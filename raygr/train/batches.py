"""Flat interaction arrays -> padded batches, by tensor indexing alone.

All interactions lie in one array sorted by (user, position); a history is a window of it. Histories are padded
on the right: a causal encoder never looks there. Shape suffixes: `N` interactions, `E` examples or targets
of a part, `B` those of a batch, `L` history length, `U` users, `W` those with a target to learn.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEW_SHARE = 0.5  # of a window's length for targets that no earlier one has; what lies before is their context


class Windows(NamedTuple):
    """Training examples: windows of train interactions, each with its targets one step later.

    A window is offsets into the flat array, never a copy. Its targets in the loss are the newest of it, from
    `first_target_E` on; what lies before them is their context.
    """

    user_E: Tensor
    start_E: Tensor
    length_E: Tensor
    first_target_E: Tensor
    """Index in the flat array of the first target that is in the loss."""
    learnable: int
    """Targets that there are: train interactions with one before them, behind the prompts."""

    def targets(self) -> int:
        """Targets in the loss of all windows; no interaction is the target of two."""
        return int((self.start_E + self.length_E + 1 - self.first_target_E).sum())


class Targets(NamedTuple):
    """One part's evaluation: users' interactions in it, each ranked after all that came before."""

    user_E: Tensor
    start_E: Tensor
    """Where the history's window of at most max_history begins."""
    length_E: Tensor
    first_seen_E: Tensor
    """Where the user's interactions begin; up to the target they are the seen items."""
    target_at_E: Tensor


class Batch(NamedTuple):
    """`history_BL` and `target_BL` are item_index, 0 where padded; `in_loss_BL` marks the targets to learn.

    A masked history holds items + 1 at [MASK]. `goes_on_B`: the row continues where the last batch left it.
    """

    user_B: Tensor
    history_BL: Tensor
    length_B: Tensor
    target_BL: Tensor
    in_loss_BL: Tensor
    goes_on_B: Tensor
    negative_BL: Tensor
    """A negative of each target in the loss, of losses with one per target; 0 elsewhere."""


def training_windows(
    user_N: np.ndarray, is_train_N: np.ndarray, *, max_history: int, prompt_U: np.ndarray, kept: str = "all"
) -> Windows:
    """Windows of at most `max_history` steps: `all` that a user's targets need, or the `last` one alone.

    The first `prompt_U` train interactions of a user are never targets (0: all but the first are). A user's first
    window begins with the history and learns all of its targets; each later one ends `NEW_SHARE` of a window further
    on, the last one with the history, and learns only the targets that no earlier one has.
    """
    step = max(1, int(max_history * NEW_SHARE)) if kept == "all" else len(user_N)
    first_U = np.searchsorted(user_N, np.arange(len(prompt_U)))
    last_U = first_U + np.bincount(user_N[is_train_N], minlength=len(prompt_U)) - 1  # train interactions come first
    before_U = first_U + np.maximum(prompt_U, 1) - 1  # the one before the first target
    user_W = np.flatnonzero(before_U < last_U)
    first_W, last_W, before_W = first_U[user_W], last_U[user_W], before_U[user_W]
    end_W = np.minimum(last_W, np.maximum(first_W + max_history, before_W + step))  # of the first window
    at_E = np.repeat(np.arange(len(user_W)), 1 - (end_W - last_W) // step)
    place_E = np.arange(len(at_E)) - np.searchsorted(at_E, at_E)
    end_E = np.minimum(end_W[at_E] + place_E * step, last_W[at_E])
    before_E = np.where(place_E > 0, end_W[at_E] + (place_E - 1) * step, before_W[at_E])
    start_E = np.maximum(first_W[at_E], end_E - max_history)
    columns = (user_W[at_E], start_E, end_E - start_E, np.maximum(before_E, start_E) + 1)
    learnable = int((last_W - before_W).sum())
    return Windows(*(torch.from_numpy(column.astype(np.int64)) for column in columns), learnable)


def evaluation_targets(user_N: np.ndarray, is_part_N: np.ndarray, *, max_history: int, every: bool = False) -> Targets:
    """The last, or every, interaction in the part of each user, as far as it has a history before it."""
    rows = np.flatnonzero(is_part_N)
    at_E = rows if every else rows[is_last_of_user(user_N[rows])]
    first_E = np.searchsorted(user_N, user_N[at_E])
    kept = at_E > first_E
    at_E, first_E = at_E[kept], first_E[kept]
    start_E = np.maximum(first_E, at_E - max_history)
    columns = (user_N[at_E], start_E, at_E - start_E, first_E, at_E)
    return Targets(*(torch.from_numpy(column.astype(np.int64)) for column in columns))


def is_last_of_user(user_E: np.ndarray) -> np.ndarray:
    """(E,) whether no later one is the same user's; `user_E` is sorted."""
    return np.append(user_E[1:] != user_E[:-1], True)[: len(user_E)]


def history_batch(items_N: Tensor, start_B: Tensor, length_B: Tensor) -> Tensor:
    """Windows of the flat array, (B, L) with L the longest of them."""
    step_L = torch.arange(int(length_B.max()))
    at_BL = (start_B[:, None] + step_L).clamp(max=len(items_N) - 1)
    return torch.where(step_L < length_B[:, None], items_N[at_BL], 0)


def training_batch(items_N: Tensor, windows: Windows, example_B: Tensor) -> Batch:
    start_B, length_B = windows.start_E[example_B], windows.length_E[example_B]
    history_BL = history_batch(items_N, start_B, length_B)
    target_BL = history_batch(items_N, start_B + 1, length_B)
    target_at_BL = start_B[:, None] + 1 + torch.arange(history_BL.shape[1])
    in_loss_BL = (target_BL > 0) & (target_at_BL >= windows.first_target_E[example_B][:, None])
    goes_on_B = torch.zeros(len(example_B), dtype=torch.bool)
    negative_BL = torch.zeros_like(target_BL)
    return Batch(windows.user_E[example_B], history_BL, length_B, target_BL, in_loss_BL, goes_on_B, negative_BL)


def session_batch(items_N: Tensor, windows: Windows, example_B: Tensor, step_B: Tensor) -> Batch:
    """One step of each lane of `session_lanes`, as histories of one interaction; 0 where a lane has ended."""
    is_on_B, kept_B = example_B >= 0, example_B.clamp(min=0)
    at_B = windows.start_E[kept_B] + step_B.clamp(min=0)
    item_B, target_B = torch.where(is_on_B, items_N[at_B], 0), torch.where(is_on_B, items_N[at_B + 1], 0)
    in_loss_B = is_on_B & (at_B + 1 >= windows.first_target_E[kept_B])
    user_B, goes_on_B = windows.user_E[kept_B], step_B > 0
    item_B1, target_B1 = item_B[:, None], target_B[:, None]
    negative_B1 = torch.zeros_like(target_B1)
    return Batch(user_B, item_B1, is_on_B.long(), target_B1, in_loss_B[:, None], goes_on_B, negative_B1)


class Masking(NamedTuple):
    """How BERT4Rec's histories are masked."""

    share: float
    """Of a history's maskable interactions; at least one is masked."""
    last: float
    """Share of histories whose last interaction alone is masked, as in evaluation."""
    limit: int
    """Interactions of a history, the masked ones among them."""
    mask: int
    """What stands in a history in place of an item_index."""


def masked_batch(
    items_N: Tensor, windows: Windows, example_B: Tensor, *, masking: Masking, generator: torch.Generator
) -> Batch:
    """The newest train interactions of each window, some of them masked; those are the targets.

    Where a causal model's targets begin, masks may: not at a window's oldest interaction nor inside a prompt.
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
    return Batch(windows.user_E[example_B], history_BL, length_B, item_BL, is_masked_BL, goes_on_B, negative_BL)


def random_share(is_eligible_BL: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Marks round(share * eligible) of each row's eligible places at random, one at least."""
    wanted_B = (is_eligible_BL.sum(1) * share).round().clamp(min=1)
    key_BL = torch.rand(is_eligible_BL.shape, generator=generator).masked_fill(~is_eligible_BL, 2.0)
    return (key_BL.argsort(1).argsort(1) < wanted_B[:, None]) & is_eligible_BL


def worker_part(batch: Batch, rank: int, workers: int) -> Batch:
    """Every `workers`-th history from `rank` on, no wider than the longest of them."""
    return narrowed(Batch(*(column[rank::workers] for column in batch)))


def narrowed(batch: Batch) -> Batch:
    """No wider than the longest history."""
    longest = max(1, int(batch.length_B.max())) if len(batch.length_B) else 1
    return Batch(*(column[:, :longest] if column.dim() == 2 else column for column in batch))


def length_groups(batch: Batch, positions: int) -> list[Batch]:
    """The histories by length, cut into batches of at most so many positions, or of one history: less padding."""
    rows = max(1, positions // batch.history_BL.shape[1])
    if rows >= len(batch.length_B):
        return [batch]
    order_B = batch.length_B.argsort(descending=True, stable=True)
    return [narrowed(Batch(*(column[row_B] for column in batch))) for row_B in order_B.split(rows)]


def epoch_batches(examples: int, *, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The epoch's examples in random order, cut into batches; the same for every worker and after a restart."""
    order = np.random.default_rng([seed, epoch]).permutation(examples)
    return list(torch.from_numpy(order).split(batch_size))


def session_lanes(length_E: Tensor, *, lanes: int, seed: int, epoch: int) -> Tensor:
    """The epoch's sessions in random order, one after another in lanes of about equal length: (T, B, 2).

    Row t is one session-parallel batch (Hidasi et al. 2016): each lane's example and the step in it, -1 once the lane
    has ended. A lane's next session follows at once, so only the ends of the lanes differ.
    """
    order_E = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(length_E)))
    length_E = length_E[order_E]
    before_E = length_E.cumsum(0) - length_E
    lane_E = before_E * lanes // length_E.sum()
    first_of_lane_E = before_E[torch.searchsorted(lane_E, lane_E)]
    session_N = torch.repeat_interleave(torch.arange(len(length_E)), length_E)
    row_N = torch.arange(len(session_N)) - first_of_lane_E[session_N]
    found_TB2 = torch.full((int(row_N.max()) + 1, lanes, 2), -1)
    step_N = torch.arange(len(session_N)) - before_E[session_N]
    found_TB2[row_N, lane_E[session_N]] = torch.stack([order_E[session_N], step_N], dim=1)
    return found_TB2


def seen_pairs(items_N: Tensor, targets: Targets, example_B: Tensor) -> tuple[Tensor, Tensor]:
    """(row in the batch, item_index) of every item that came before the target."""
    first_B, count_B = targets.first_seen_E[example_B], (targets.target_at_E - targets.first_seen_E)[example_B]
    row_N = torch.repeat_interleave(torch.arange(len(example_B)), count_B)
    step_N = torch.arange(len(row_N)) - torch.repeat_interleave(count_B.cumsum(0) - count_B, count_B)
    return row_N, items_N[first_B[row_N] + step_N]
