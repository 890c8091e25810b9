"""Windows, batches and evaluation targets against plain loops; nothing held out gets into training."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raygr.schema import TEST, TRAIN, VALIDATION
from raygr.train.batches import (
    Masking,
    epoch_batches,
    evaluation_targets,
    history_batch,
    is_last_of_user,
    length_groups,
    masked_batch,
    random_share,
    seen_pairs,
    session_batch,
    session_lanes,
    training_batch,
    training_windows,
    worker_part,
)

# user 0: train 11 12 13 14, validation 15, test 16; user 1: train 21, validation 22, test 23; user 2: train 31 32
USER_N = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
ITEM_N = np.array([11, 12, 13, 14, 15, 16, 21, 22, 23, 31, 32])
SPLIT_N = np.array([TRAIN] * 4 + [VALIDATION, TEST] + [TRAIN, VALIDATION, TEST] + [TRAIN, TRAIN])
ITEMS_N = torch.from_numpy(ITEM_N)


def batch_of(*, max_history: int, prompt: int = 0, kept: str = "all"):
    prompt_U = np.full(3, prompt)
    windows = training_windows(USER_N, SPLIT_N == TRAIN, max_history=max_history, prompt_U=prompt_U, kept=kept)
    return windows, training_batch(ITEMS_N, windows, torch.arange(len(windows.user_E)))


def test_training_batch_shifts_by_one_and_pads_on_the_right():
    windows, batch = batch_of(max_history=10)
    assert windows.user_E.tolist() == [0, 2]  # user 1 has one train interaction: nothing to predict
    assert batch.history_BL.tolist() == [[11, 12, 13], [31, 0, 0]]
    assert batch.target_BL.tolist() == [[12, 13, 14], [32, 0, 0]]
    assert batch.in_loss_BL.tolist() == [[True, True, True], [True, False, False]]


def test_no_held_out_item_is_in_a_training_batch():
    _, batch = batch_of(max_history=10)
    held_out = set(ITEM_N[SPLIT_N != TRAIN].tolist())
    assert not held_out & set(batch.history_BL.flatten().tolist() + batch.target_BL.flatten().tolist())


def test_the_last_window_keeps_the_newest_interactions():
    windows, batch = batch_of(max_history=2, kept="last")
    assert batch.history_BL.tolist() == [[12, 13], [31, 0]]
    assert batch.target_BL.tolist() == [[13, 14], [32, 0]]
    assert (windows.targets(), windows.learnable) == (3, 4)


def test_a_long_history_is_cut_into_windows_that_learn_each_target_once():
    """The second window's context is as long as it may be: 13 is learned after 11 and 12, so that 14 sees both."""
    windows, batch = batch_of(max_history=2)
    assert windows.user_E.tolist() == [0, 0, 2]
    assert batch.history_BL.tolist() == [[11, 12], [12, 13], [31, 0]]
    assert batch.target_BL.tolist() == [[12, 13], [13, 14], [32, 0]]
    assert batch.in_loss_BL.tolist() == [[True, True], [False, True], [True, False]]
    assert (windows.targets(), windows.learnable) == (4, 4)


histories = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 3)), min_size=1, max_size=6)


@given(histories, st.integers(2, 12))
def test_every_train_target_behind_the_prompt_is_learned_once(users: list[tuple[int, int, int]], max_history: int):
    """Users are (train, prompt, held-out) counts. No window reaches another user or a held-out interaction."""
    user_N = np.repeat(np.arange(len(users)), [train + held_out for train, _, held_out in users])
    is_train_N = np.concatenate([np.arange(train + held_out) < train for train, _, held_out in users])
    prompt_U = np.array([prompt for _, prompt, _ in users])
    windows = training_windows(user_N, is_train_N, max_history=max_history, prompt_U=prompt_U)
    learned = []
    for user, start, length, first in zip(*(column.tolist() for column in windows[:4]), strict=True):
        assert 1 <= length <= max_history and start < first <= start + length
        window = slice(start, start + length + 1)
        assert (user_N[window] == user).all() and is_train_N[window].all()
        learned += range(first, start + length + 1)
    rank_N = np.arange(len(user_N)) - np.searchsorted(user_N, user_N)
    expected = np.flatnonzero(is_train_N & (rank_N >= np.maximum(prompt_U, 1)[user_N]))
    assert sorted(learned) == expected.tolist()
    assert windows.targets() == windows.learnable == len(expected)
    last = training_windows(user_N, is_train_N, max_history=max_history, prompt_U=prompt_U, kept="last")
    if all(train <= max_history + 1 for train, _, _ in users):
        assert all(torch.equal(*pair) for pair in zip(windows[:4], last[:4], strict=True))
    assert sorted(set(windows.user_E.tolist())) == last.user_E.tolist()


@given(st.integers(2, 40), st.integers(0, 20), st.integers(2, 12), st.integers(0, 100))
def test_masks_hide_each_target_in_one_window(train: int, prompt: int, limit: int, seed: int):
    """Each item's index equals its place, so the index identifies the target."""
    windows = training_windows(
        np.zeros(train, np.int64), np.full(train, True), max_history=limit, prompt_U=np.array([prompt])
    )
    if not len(windows.user_E):
        return
    masking = Masking(share=0.999, last=0.0, limit=limit, mask=MASK)
    generator, examples = torch.Generator().manual_seed(seed), torch.arange(len(windows.user_E))
    batch = masked_batch(torch.arange(1, train + 1), windows, examples, masking=masking, generator=generator)
    assert sorted(batch.target_BL[batch.in_loss_BL].tolist()) == list(range(max(prompt, 1) + 1, train + 1))
    assert (batch.history_BL[batch.in_loss_BL] == MASK).all() and batch.history_BL.shape[1] <= limit


def test_after_the_prompt_only():
    """Two prompt interactions: user 0 learns targets 13 and 14; user 2 has none left."""
    windows, batch = batch_of(max_history=10, prompt=2)
    assert windows.user_E.tolist() == [0]
    assert batch.target_BL[batch.in_loss_BL].tolist() == [13, 14]


def test_evaluation_history_is_all_before_the_target():
    targets = evaluation_targets(USER_N, SPLIT_N == TEST, max_history=3)
    assert targets.user_E.tolist() == [0, 1]
    assert ITEMS_N[targets.target_at_E].tolist() == [16, 23]
    assert history_batch(ITEMS_N, targets.start_E, targets.length_E).tolist() == [[13, 14, 15], [21, 22, 0]]
    row_N, item_N = seen_pairs(ITEMS_N, targets, torch.arange(2))
    assert list(zip(row_N.tolist(), item_N.tolist(), strict=True)) == [
        (0, 11),
        (0, 12),
        (0, 13),
        (0, 14),
        (0, 15),
        (1, 21),
        (1, 22),
    ]


def test_validation_sees_train_items_only():
    targets = evaluation_targets(USER_N, SPLIT_N == VALIDATION, max_history=10)
    _, item_N = seen_pairs(ITEMS_N, targets, torch.arange(2))
    assert item_N.tolist() == [11, 12, 13, 14, 21]


def test_the_last_interaction_of_a_part_is_its_target():
    """A temporal split may leave a user several test interactions."""
    is_test_N = np.array([False, True, True, False, True])
    targets = evaluation_targets(np.array([0, 0, 0, 1, 1]), is_test_N, max_history=10)
    assert targets.target_at_E.tolist() == [2, 4]
    assert targets.length_E.tolist() == [2, 1]


def test_every_interaction_of_a_part_as_a_target():
    """The history is all that came before the target, also in its part. User 1's first target has none."""
    user_N, is_test_N = np.array([0, 0, 0, 1, 1]), np.array([False, True, True, True, True])
    targets = evaluation_targets(user_N, is_test_N, max_history=10, every=True)
    assert targets.user_E.tolist() == [0, 0, 1]
    assert targets.target_at_E.tolist() == [1, 2, 4]
    assert targets.length_E.tolist() == [1, 2, 1]
    assert is_last_of_user(targets.user_E.numpy()).tolist() == [False, True, True]
    row_N, item_N = seen_pairs(torch.tensor([11, 12, 13, 21, 22]), targets, torch.arange(3))
    assert list(zip(row_N.tolist(), item_N.tolist(), strict=True)) == [(0, 11), (1, 11), (1, 12), (2, 21)]


def test_a_target_without_a_history_is_no_target():
    targets = evaluation_targets(np.array([0, 1, 1]), np.array([True, False, True]), max_history=10)
    assert targets.user_E.tolist() == [1]
    assert not len(evaluation_targets(np.array([0]), np.array([False]), max_history=10).user_E)


def test_an_epoch_covers_every_example_once_and_each_epoch_differs():
    first, again, second = (epoch_batches(10, batch_size=4, seed=3, epoch=epoch) for epoch in (1, 1, 2))
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(second))


MASK = 99


def masked(*, limit: int = 10, share: float = 0.5, last: float = 0.0, prompt: int = 0, seed: int = 0):
    windows = training_windows(USER_N, SPLIT_N == TRAIN, max_history=limit, prompt_U=np.full(3, prompt), kept="last")
    generator = torch.Generator().manual_seed(seed)
    examples = torch.arange(len(windows.user_E))
    masking = Masking(share=share, last=last, limit=limit, mask=MASK)
    return masked_batch(ITEMS_N, windows, examples, masking=masking, generator=generator)


def test_a_masked_batch_hides_its_targets_and_holds_no_held_out_item():
    for seed in range(20):
        batch = masked(seed=seed)
        assert batch.target_BL.tolist() == [[11, 12, 13, 14], [31, 32, 0, 0]]
        assert batch.length_B.tolist() == [4, 2]
        assert torch.equal(batch.history_BL == MASK, batch.in_loss_BL)
        assert torch.equal(batch.history_BL[~batch.in_loss_BL], batch.target_BL[~batch.in_loss_BL])
        # round(3 * 0.5) = 2 of three maskable ones; one of one
        assert batch.in_loss_BL.sum(1).tolist() == [2, 1]
        assert not batch.in_loss_BL[:, 0].any()


def test_the_last_interaction_alone_is_masked_at_its_rate():
    assert masked(last=1.0).in_loss_BL.tolist() == [[False, False, False, True], [False, True, False, False]]


def test_a_masked_history_keeps_the_newest_interactions_within_the_limit():
    """Limit 3: 11 drops out, so 12 is not the oldest of the user but of the window, and stays maskable."""
    batches = [masked(limit=3, seed=seed) for seed in range(30)]
    assert batches[0].target_BL[0].tolist() == [12, 13, 14]
    assert torch.stack([batch.in_loss_BL[0] for batch in batches]).any(0).tolist() == [True, True, True]


def test_masks_begin_after_the_prompt():
    for seed in range(20):
        batch = masked(prompt=2, share=0.9, seed=seed)
        assert batch.in_loss_BL.tolist() == [[False, False, True, True]]


def test_random_share_is_uniform_over_the_eligible_places():
    is_eligible_BL = torch.tensor([[True, True, False, True, True]]).expand(4000, -1)
    marked_BL = random_share(is_eligible_BL, 0.5, torch.Generator().manual_seed(0))
    assert marked_BL.sum(1).tolist() == [2] * 4000
    assert not marked_BL[:, 2].any()
    assert marked_BL.float().mean(0).tolist() == pytest.approx([0.5, 0.5, 0, 0.5, 0.5], abs=0.04)


def test_the_workers_parts_make_up_the_batch():
    _, batch = batch_of(max_history=10)
    first, second = worker_part(batch, 0, 2), worker_part(batch, 1, 2)
    assert first.history_BL.tolist() == [[11, 12, 13]]
    assert second.history_BL.tolist() == [[31]] and second.target_BL.tolist() == [[32]]
    assert len(worker_part(batch, 2, 3).user_B) == 0


def test_groups_hold_every_history_once_and_no_needless_padding():
    lengths = [2, 7, 1, 7, 3, 5, 2]
    user_N = np.repeat(np.arange(7), np.array(lengths) + 1)
    items_N = torch.arange(1, len(user_N) + 1)
    windows = training_windows(user_N, np.full(len(user_N), True), max_history=10, prompt_U=np.zeros(7, np.int64))
    batch = training_batch(items_N, windows, torch.arange(7))
    groups = length_groups(batch, 21)  # three histories of seven
    assert [group.length_B.tolist() for group in groups] == [[7, 7, 5], [3, 2, 2], [1]]
    assert [group.history_BL.shape for group in groups] == [(3, 7), (3, 3), (1, 1)]
    for group in groups:
        for row, user in enumerate(group.user_B.tolist()):
            for column, whole in zip(group[1:5], batch[1:5], strict=True):
                width = group.history_BL.shape[1]
                assert torch.equal(column[row], whole[user][:width] if whole.dim() == 2 else whole[user])
    assert sorted(torch.cat([group.user_B for group in groups]).tolist()) == list(range(7))
    assert sum(int(group.in_loss_BL.sum()) for group in groups) == sum(lengths)


def test_a_batch_within_the_limit_stays_as_it_is():
    _, batch = batch_of(max_history=10)
    assert length_groups(batch, batch.history_BL.numel()) == [batch]
    assert len(length_groups(batch, 1)) == len(batch.user_B)  # one history at least


def test_lanes_hold_every_session_once_from_its_first_step_to_its_last_without_a_gap():
    lengths = [3, 1, 5, 2, 4, 1, 2]
    found = []
    for epoch in (1, 1, 2):
        lanes_TB2 = session_lanes(torch.tensor(lengths), lanes=3, seed=0, epoch=epoch)
        found.append(lanes_TB2)
        held = []
        for lane in lanes_TB2.unbind(1):
            pairs = [tuple(pair) for pair in lane.tolist()]
            held += [pair for pair in pairs if pair != (-1, -1)]
            assert pairs == [pair for pair in pairs if pair != (-1, -1)] + [(-1, -1)] * pairs.count((-1, -1))
        assert sorted(held) == [(one, step) for one, length in enumerate(lengths) for step in range(length)]
        for (one, step), (after, step_after) in itertools.pairwise(held):
            assert (after, step_after) == (one, step + 1) or (step_after == 0 and step == lengths[one] - 1)
        assert len(lanes_TB2) < 18 / 3 + max(lengths)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_session_batch_is_one_step_of_each_lane():
    """User 0 at its second step, user 2 at its first, a lane that has ended."""
    windows, _ = batch_of(max_history=10)
    batch = session_batch(ITEMS_N, windows, torch.tensor([0, 1, -1]), torch.tensor([1, 0, -1]))
    assert batch.history_BL.tolist() == [[12], [31], [0]]
    assert batch.target_BL.tolist() == [[13], [32], [0]]
    assert batch.in_loss_BL.tolist() == [[True], [True], [False]]
    assert batch.length_B.tolist() == [1, 1, 0] and batch.user_B.tolist()[:2] == [0, 2]
    assert batch.goes_on_B.tolist() == [True, False, False]
    late, _ = batch_of(max_history=10, prompt=3)
    assert session_batch(ITEMS_N, late, torch.tensor([0]), torch.tensor([1])).in_loss_BL.tolist() == [[False]]
