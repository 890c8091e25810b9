"""All recommenders and losses in the one loop: they learn, resume, split over workers, and their scores split."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_data import cycles, random_scores, walks, write_csv, write_prepared

from raygr.config import ConfigError, check_config
from raygr.models.workers import Share
from raygr.train import loop
from raygr.train.config import TrainConfig
from raygr.train.evaluate import item_scores, target_ranks, user_states
from raygr.train.inputs import load_inputs
from raygr.train.loop import accumulate_gradients, training_rounds
from raygr.train.optimizer import build_optimizers, learning_rate
from raygr.train.state import Training, checkpoint_state, restore, start_training
from raygr.train.step import WholeBatch, epoch_contents, epoch_draws, whole_batch

torch.set_num_threads(1)  # the models are tiny, and threads that wait spin on cores others need

CPU = torch.device("cpu")
ITEMS, ASPECTS = 20, ["pace", "tension"]
RECOMMENDERS = {
    "gru4rec": {"model": "gru4rec"},
    "gru4rec top1": {
        "model": "gru4rec",
        "loss": "top1",
        "final_activation": "tanh",
        "optimizer": "adagrad",
        "learning_rate": 0.05,
    },
    "gru4rec bpr": {"model": "gru4rec", "loss": "bpr"},
    "gru4rec plus": {
        "model": "gru4rec",
        "loss": "bpr_max",
        "negatives": 16,
        "negative_alpha": 0.5,
        "score_penalty": 0.5,
        "final_activation": "elu-0.5",
    },
    "gru4rec sessions": {"model": "gru4rec", "loss": "bpr", "session_parallel": True},
    "sasrec sampled": {"model": "sasrec", "loss": "sampled_cross_entropy", "negatives": 16},
    "sasrec bce": {"model": "sasrec", "loss": "bce", "optimizer": "sparse_adam"},
    "bert4rec": {"model": "bert4rec", "mask_last_rate": 0.3, "learning_rate": 0.005, "schedule": "linear"},
}
EPOCHS = {"bert4rec": 150}  # a history of ten masks two items at a time
EVERY = pytest.mark.parametrize("changes", RECOMMENDERS.values(), ids=RECOMMENDERS.keys())


def settings(folder: Path, **changes: Any) -> TrainConfig:
    small = {"base_width": 16, "batch_size": 8, "max_history": 10, "epochs": 3, "dropout": 0.0, "threads": 1}
    paths = {"output": str(folder / "train"), "data": str(folder / "prepare")}
    return TrainConfig(**(small | {"learning_rate": 0.01} | paths | changes))


def guided(folder: Path, **changes: Any) -> dict[str, Any]:
    """(9b) with profiles, unless `changes` say otherwise."""
    profile = {"user_scores": "profile", "user_side": "add", "fusion": "add"}
    return {"item_scores": str(folder / "scores.csv")} | (profile if "user_scores" not in changes else {}) | changes


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """20 users who walk a cycle of 20 items, and item scores of two aspects."""
    write_prepared(tmp_path / "prepare", cycles(20, ITEMS, 12), items=ITEMS)
    write_scores(tmp_path)
    return tmp_path


def write_scores(folder: Path) -> None:
    scores_IA = random_scores(ITEMS, 2, seed=0)
    write_csv(folder / "scores.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)


def begun(config: TrainConfig, share: Share = Share(), device: torch.device = CPU) -> Training:  # noqa: B008
    return start_training(config, load_inputs(config), device, share)


def finished(config: TrainConfig, device: torch.device = CPU) -> Training:
    training = begun(config, device=device)
    for _ in training_rounds(training):
        pass
    training.model.load_state_dict(training.best_weights)
    return training


def one_epoch(training: Training) -> None:
    next(training_rounds(training))


def stirred(training: Training) -> Training:
    """The training with every learned number moved from its start, so that no term is 0 by accident."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in training.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    training.model.eval()
    return training


@pytest.mark.parametrize("name", RECOMMENDERS)
def test_learns_a_pattern_to_recall_1(toy: Path, name: str):
    epochs = EPOCHS.get(name, 15)
    training = finished(settings(toy, epochs=epochs, evaluate_every=5, **RECOMMENDERS[name]))
    assert target_ranks(training, "test", ["full"])["full"].tolist() == [1.0] * 20


@EVERY
def test_learns_nothing_where_there_is_nothing_to_learn(tmp_path: Path, changes: dict[str, Any]):
    """Random histories of 12 of 20 items: 9 are left to rank, so chance is rank 5, with a standard error of .3."""
    write_prepared(tmp_path / "prepare", walks(80, ITEMS, 12, seed=0), items=ITEMS)
    training = begun(settings(tmp_path, **changes))
    one_epoch(training)
    assert 4 < target_ranks(training, "test", ["full"])["full"].mean() < 6


def test_bpr_max_leaves_its_starting_value_and_scores_differ(toy: Path):
    """In a collapsed training the loss stays at log 2 and all items have the same score."""
    changes = RECOMMENDERS["gru4rec plus"] | {"score_penalty": 0.0}
    training = finished(settings(toy, epochs=15, evaluate_every=5, **changes))
    losses = [line["loss"] for line in training.progress.lines]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses[-1] < 0.2
    rows_ID = training.model.embedding.item_rows()
    assert item_scores(training, training.inputs.targets["test"], torch.arange(20), rows_ID).std(1).min() > 0.5


@EVERY
@pytest.mark.parametrize(
    "fusion",
    [
        {"fusion": "add"},
        {"fusion": "concat"},
        {"fusion": "concat", "user_side": "concat"},
        *({"fusion": one, "user_scores": "history"} for one in ("add", "concat", "none")),
    ],
    ids=str,
)
def test_the_score_splits_exactly(toy: Path, changes: dict[str, Any], fusion: dict[str, Any]):
    if "user_scores" in fusion and changes.get("session_parallel"):
        pytest.skip("session_parallel has no histories")
    width = {"base_width": 14} if fusion["fusion"] == "concat" else {}
    tuned = {} if "user_scores" in fusion else {"train_user_guided": True}
    training = stirred(begun(settings(toy, **(guided(toy, **fusion, **width, **tuned) | changes))))
    embedding, targets, example_B = training.model.embedding, training.inputs.targets["test"], torch.arange(7)
    with torch.no_grad():
        scores_BI = item_scores(training, targets, example_B, embedding.item_rows())
        states = user_states(training, targets, example_B, embedding.item_rows())
        parts = embedding.split_score(*states, torch.arange(1, ITEMS + 1))
    total_BI = parts.base_BC + parts.encoder_BCA.sum(-1) + parts.user_BCA.sum(-1)
    torch.testing.assert_close(total_BI, scores_BI, rtol=1e-4, atol=1e-4)
    # (9b) to the letter leaves the encoder no guided dimensions
    assert (parts.encoder_BCA.abs().sum() > 0) == ("user_side" not in fusion and fusion["fusion"] != "none")
    assert parts.user_BCA.abs().sum() > 0


HISTORY_STATE = {"user_scores": "history", "fusion": "none"}


@pytest.mark.parametrize("name", [name for name in RECOMMENDERS if name != "gru4rec sessions"])
def test_the_guided_state_learns_what_users_look_for(tmp_path: Path, name: str):
    """Half the users take only items of a high first score, half only of a low one, in random order.

    A user takes 12 of 200 such items, of 400 in all. Few targets occur in training, so that their ids say nothing: the
    mean rank is 194 without knowledge of the taste, and 94 with it.
    """
    generator = torch.Generator().manual_seed(0)
    halves = [1 + 200 * (user % 2) + torch.randperm(200, generator=generator)[:12] for user in range(16)]
    write_prepared(tmp_path / "prepare", [half.tolist() for half in halves], items=400)
    rows = {f"i{item}": [2.0 + 6 * (item > 200), 5.0 + item % 3] for item in range(1, 401)}
    write_csv(tmp_path / "scores.csv", rows, ASPECTS)
    epochs = 30 if name == "bert4rec" else 15
    changes = RECOMMENDERS[name] | {"max_history": 12, "epochs": epochs, "evaluate_every": 5}
    ranks = [
        target_ranks(finished(settings(tmp_path, **changes, **scores)), "test", ["full"])["full"].mean().item()
        for scores in ({}, guided(tmp_path, **HISTORY_STATE))
    ]
    assert ranks[1] < 130 < 140 < ranks[0]


@EVERY
def test_a_resumed_training_equals_the_straight_one(toy: Path, changes: dict[str, Any]):
    """The resumed training must find its place in the warm-up and the falling rate again."""
    form = {"train_user_guided": True} if changes.get("session_parallel") else HISTORY_STATE | {"fusion": "add"}
    changes = guided(toy, **form) | changes | {"schedule": "linear", "warmup_steps": 2, "dropout": 0.2}
    config = settings(toy, max_grad_norm=1.0, **changes)
    straight = finished(config)
    first = begun(config)
    next(training_rounds(first))
    resumed = begun(config)
    restore(resumed, checkpoint_state(first))
    for _ in training_rounds(resumed):
        pass
    losses = [[line["loss"] for line in training.progress.lines] for training in (resumed, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    resumed.model.load_state_dict(resumed.best_weights)
    for name, values in resumed.model.state_dict().items():
        assert torch.equal(values, straight.model.state_dict()[name]), name


def gradient(config: TrainConfig, share: Share) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradient of a batch of eight at a step in mid-session; without all_reduce, the share of this worker."""
    training = stirred(begun(config, share))
    draws = epoch_draws(config.seed, 1, share.rank)
    contents = epoch_contents(config, training.inputs, 1)
    for content in contents[6:8] or contents[:1]:
        whole = whole_batch(config, training.inputs, content, training.popularity_I, draws)
        loss = accumulate_gradients(training, whole)
    learned = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    return loss, [one.grad.to_dense() if one.grad.is_sparse else one.grad for one in learned]


@EVERY
def test_several_threads_have_one_gradient(tmp_path: Path, changes: dict[str, Any]):
    """Threads that add to the same rows in any order would make every run of a seed another one."""
    write_prepared(tmp_path / "prepare", cycles(160, ITEMS, 12), items=ITEMS)
    write_scores(tmp_path)
    form = {"train_user_guided": True} if changes.get("session_parallel") else HISTORY_STATE
    wide = {"base_width": 64, "batch_size": 160} | guided(tmp_path, **form) | changes
    torch.set_num_threads(2)
    try:
        gradients = [gradient(settings(tmp_path, **wide), Share())[1] for _ in range(6)]
    finally:
        torch.set_num_threads(1)
    for parts in zip(*gradients, strict=True):
        assert all(torch.equal(part, parts[0]) for part in parts)


@EVERY
def test_three_workers_have_the_gradient_of_one(toy: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The shares are added here in place of all_reduce; test_train.py does it once with two processes."""
    state = HISTORY_STATE | {"fusion": "concat", "base_width": 14}
    form = {"train_user_guided": True} if changes.get("session_parallel") else state
    config = settings(toy, **(guided(toy, **form) | changes))
    loss, alone = gradient(config, Share())
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None)
    shares = [gradient(config, Share(rank, 3)) for rank in range(3)]
    torch.testing.assert_close(sum(found for found, _ in shares), loss, rtol=1e-5, atol=1e-5)
    for parts in zip(alone, *(found for _, found in shares), strict=True):
        torch.testing.assert_close(sum(parts[1:]), parts[0], rtol=1e-4, atol=1e-6)
    assert all(part.abs().sum() > 0 for part in alone)


@EVERY
def test_after_the_prompt_only_later_interactions_are_learned(toy: Path, changes: dict[str, Any]):
    """10 train interactions, 5 of them in the prompt: none of these is a target, and each model has a target."""
    config = settings(toy, **guided(toy, user_guided_train="after_prompt"), **changes)
    inputs, draws = load_inputs(config), epoch_draws(0, 1, 0)
    learned = {user: set() for user in range(20)}
    for content in epoch_contents(config, inputs, 1):
        batch = whole_batch(config, inputs, content, torch.ones(ITEMS), draws).batch
        for user, targets, is_in_loss in zip(batch.user_B.tolist(), batch.target_BL, batch.in_loss_BL, strict=True):
            learned[user] |= set(targets[is_in_loss].tolist())
    for user, history in enumerate(cycles(20, ITEMS, 12)):
        assert learned[user] and not learned[user] & set(history[:5])


@EVERY
@pytest.mark.parametrize("known", ["all", "after_prompt"])
def test_user_vectors_are_trained_only_where_asked(toy: Path, changes: dict[str, Any], known: str):
    """Trained user vectors start at the scores, so nothing differs before the first step."""
    concat = guided(toy, user_guided_train=known, fusion="concat", base_width=14)
    frozen, tuned = (begun(settings(toy, **concat, **changes, train_user_guided=on)) for on in (False, True))
    targets, rows_ID = tuned.inputs.targets["test"], tuned.model.embedding.item_rows()
    before = [item_scores(one, targets, torch.arange(20), rows_ID) for one in (frozen, tuned)]
    assert torch.equal(*before)
    assert "embedding.users_UA" not in dict(frozen.model.named_parameters())
    one_epoch(tuned), one_epoch(frozen)
    assert (tuned.model.embedding.tuning_UA.abs() > 0).all()
    vectors = [user_states(one, targets, torch.arange(20), rows_ID)[1] for one in (frozen, tuned)]
    assert torch.equal(vectors[0], frozen.model.embedding.users_UA)
    # a step of .01 in units of the table, whose deviation is sqrt(2 / (20 + 16))
    assert 0.001 < (vectors[1] - vectors[0]).abs().mean() < 1


SAMPLED = {"loss": "sampled_cross_entropy", "negatives": 16}


def learned_in_an_epoch(config: TrainConfig) -> list[tuple[int, int]]:
    """Pairs (user, item) of every target in the loss."""
    inputs, draws = load_inputs(config), epoch_draws(0, 1, 0)
    pairs = []
    for content in epoch_contents(config, inputs, 1):
        batch = whole_batch(config, inputs, content, torch.ones(ITEMS), draws).batch
        row_N = batch.in_loss_BL.nonzero()[:, 0]
        pairs += zip(batch.user_B[row_N].tolist(), batch.target_BL[batch.in_loss_BL].tolist(), strict=True)
    return sorted(pairs)


@pytest.mark.parametrize("name", ["gru4rec", "gru4rec sessions", "gru4rec plus", "sasrec sampled"])
@pytest.mark.parametrize("known", ["all", "after_prompt"])
def test_histories_longer_than_a_window_are_learned_whole(toy: Path, name: str, known: str):
    """10 train interactions in windows of 4: each but the first, or each after a prompt of 5, is learned once."""
    changes = guided(toy, user_guided_train=known) | RECOMMENDERS[name]
    learned = learned_in_an_epoch(settings(toy, max_history=4, **changes))
    first = 5 if known == "after_prompt" else 1
    assert learned == sorted((u, i) for u, history in enumerate(cycles(20, ITEMS, 12)) for i in history[first:10])
    newest = learned_in_an_epoch(settings(toy, max_history=4, windows="last", **changes))
    assert newest == sorted((u, i) for u, history in enumerate(cycles(20, ITEMS, 12)) for i in history[6:10])


def test_streams_of_random_numbers_do_not_move_each_other(toy: Path):
    """Masks do not depend on the drawn negatives, nor negatives on the masks. No two streams share a seed."""
    draws = epoch_draws(0, 1, 0)
    seeds = {draws.dropout_seed, draws.masks.initial_seed(), draws.negatives.initial_seed(), *range(20)}
    assert len(seeds) == 23 and epoch_draws(0, 1, 1).dropout_seed != draws.dropout_seed

    def drawn(**changes: Any) -> tuple[list, list]:
        config = settings(toy, model="bert4rec", loss="sampled_cross_entropy", **changes)
        inputs, draws = load_inputs(config), epoch_draws(0, 1, 0)
        contents = epoch_contents(config, inputs, 1)
        found = [whole_batch(config, inputs, one, torch.ones(ITEMS).cumsum(0) / ITEMS, draws) for one in contents]
        return [one.batch.in_loss_BL.tolist() for one in found], [one.shared_K.tolist() for one in found]

    few, more, denser = drawn(negatives=4), drawn(negatives=5), drawn(negatives=4, mask_rate=0.5)
    assert few[0] == more[0] != denser[0]
    assert few[1] == denser[1] != more[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "bce"},
        {"model": "bert4rec", **SAMPLED},
        {"model": "gru4rec", "loss": "bpr_max", "negatives": 16},
        {"fusion": "concat", "base_width": 14, **SAMPLED},
        {"fusion": "add", "optimizer": "sparse_adam", **SAMPLED},
        {**HISTORY_STATE, **SAMPLED},
    ],
    ids=str,
)
def test_a_batchs_items_alone_give_the_gradient_of_the_whole_table(toy: Path, changes: dict, monkeypatch: Any):
    write_prepared(toy / "prepare2", cycles(20, ITEMS, 12), items=ITEMS + 5)  # five that no batch touches
    config = settings(toy, **(guided(toy, **changes) if "fusion" in changes else changes), data=str(toy / "prepare2"))
    loss, gradients = gradient(config, Share())
    everything = torch.arange(1, ITEMS + 6)
    monkeypatch.setattr(loop, "renumbered", lambda whole, items: whole._replace(item_J=everything))
    whole_loss, whole_gradients = gradient(config, Share())
    torch.testing.assert_close(loss, whole_loss)
    for found, expected in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sparse_rows_of_adagrad_learn_what_dense_ones_do(toy: Path):
    config = settings(toy, optimizer="adagrad", max_grad_norm=0.5, **SAMPLED)
    sparse = begun(config)
    one_epoch(sparse)
    assert sparse.model.embedding.base_ID.grad.is_sparse
    dense = begun(config)
    dense.model.embedding.sparse = False
    one_epoch(dense)
    assert not dense.model.embedding.base_ID.grad.is_sparse
    # not those of all weights: the keys' bias changes no score, and Adagrad makes whole steps of its rounding errors
    rows = [training.model.embedding.base_ID for training in (sparse, dense)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)


def test_sparse_adam_moves_a_batchs_rows_as_adam_does_at_first_and_no_others(toy: Path):
    """Rows that never had a gradient do not move in either. After a first gradient, only Adam keeps moving them."""
    moved = {}
    for optimizer in ("adam", "sparse_adam"):
        config = settings(toy, optimizer=optimizer, batch_size=2, loss="sampled_cross_entropy", negatives=1)
        training = begun(config)
        draws, tables = epoch_draws(0, 1, 0), [training.model.embedding.base_ID.detach().clone()]
        for example, negative in ((0, 20), (10, 1)):  # items 1 to 10 and 20, then 11 to 20 and 1
            whole = whole_batch(config, training.inputs, torch.tensor([example]), training.popularity_I, draws)
            whole = WholeBatch(whole.batch, torch.tensor([negative]), whole.expected_K)
            accumulate_gradients(training, whole)
            loop.take_step(training, 0.01)
            tables.append(training.model.embedding.base_ID.detach().clone())
        moved[optimizer] = [(after != before).any(1) for before, after in itertools.pairwise(tables)]
        moved[optimizer].append(tables[1])
    # of a step of 0.01; the two add their 1e-8 to the root at different places
    torch.testing.assert_close(moved["sparse_adam"][2], moved["adam"][2], atol=5e-4, rtol=0)
    item_I = torch.arange(1, 21)
    assert torch.equal(moved["adam"][0], (item_I <= 10) | (item_I == 20))
    assert torch.equal(moved["sparse_adam"][0], moved["adam"][0])
    assert moved["adam"][1].all() and torch.equal(moved["sparse_adam"][1], (item_I > 10) | (item_I == 1))


def test_a_worker_without_examples_adds_zeros_to_the_same_rows(toy: Path, monkeypatch: Any):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None)
    config = settings(toy, optimizer="sparse_adam", **SAMPLED)
    sizes = []
    for share in (Share(0, 9), Share(8, 9)):  # batches of eight
        training = begun(config, share)
        content, draws = epoch_contents(config, training.inputs, 1)[0], epoch_draws(0, 1, share.rank)
        accumulate_gradients(training, whole_batch(config, training.inputs, content, training.popularity_I, draws))
        rows = training.model.embedding.base_ID.grad
        sizes.append((rows.indices().tolist(), sum(p.grad.numel() for p in training.model.parameters())))
        assert (rows.values() == 0).all() == (share.rank == 8)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "bce"},
        SAMPLED,
        {"model": "gru4rec", "loss": "bpr_max", "negatives": 4},
        {"model": "gru4rec", "loss": "top1", "session_parallel": True},
        {"model": "bert4rec", "loss": "bce"},
    ],
    ids=str,
)
def test_a_user_who_has_every_item_is_trained_beside_others(tmp_path: Path, changes: dict):
    everything = [*range(1, 9), 1, 2]  # all eight, and two again as validation and test
    write_prepared(tmp_path / "prepare", [everything, [1, 2, 3, 4, 5], everything[::-1]], items=8)
    training = begun(settings(tmp_path, **changes))
    one_epoch(training)
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())


def test_published_schedule_by_hand():
    """Four steps of warm-up, then from the top to 0 after step 19."""
    config = TrainConfig(output="a", data="b", learning_rate=0.8, schedule="linear", warmup_steps=4)
    rates = [learning_rate(config, step, 20) for step in (0, 1, 3, 4, 12, 19)]
    assert rates == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.4, 0.05])
    constant = TrainConfig(output="a", data="b", learning_rate=0.8, warmup_steps=4)
    assert [learning_rate(constant, step, 20) for step in (1, 4, 19)] == pytest.approx([0.4, 0.8, 0.8])


def test_the_learning_rate_of_each_epoch_is_on_record(toy: Path):
    """20 examples in batches of 8 are three steps an epoch, six in all: the last are steps 2 and 5."""
    lines = finished(settings(toy, epochs=2, learning_rate=0.6, schedule="linear")).progress.lines
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.4, 0.1])


def test_weight_decay_is_for_matrices_only(toy: Path):
    config = settings(toy, model="bert4rec", weight_decay=0.01)
    (optimizer,) = build_optimizers(begun(config).model, config)
    decays = {
        parameter.dim() > 1: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert isinstance(optimizer, torch.optim.AdamW) and decays == {True: 0.01, False: 0.0}


def test_gradients_are_clipped_to_the_norm(toy: Path):
    """Adagrad's sums after the first step show the size of the gradient, whatever the rate is."""
    config = settings(toy, model="gru4rec", optimizer="adagrad", max_grad_norm=1e-3, batch_size=20)
    training = begun(config)
    one_epoch(training)
    sums = [state["sum"].sum() for state in training.optimizers[0].state.values()]
    assert math.sqrt(float(sum(sums))) == pytest.approx(1e-3, rel=1e-3)


NEEDS_TARGETS = "needs every position's target, so it is not for model: bert4rec"
FEW_ITEMS = "is for losses that touch few items, not for cross_entropy"
NO_NEGATIVES = "has no negatives in a batch of one history: raise batch_size, or set negatives"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert4rec", "loss": "bpr"}, f"loss: bpr {NEEDS_TARGETS}"),
        ({"loss": "sampled_cross_entropy"}, "loss: sampled_cross_entropy needs negatives: 1 or more"),
        ({"loss": "top1", "batch_size": 1}, f"loss: top1 {NO_NEGATIVES}"),
        ({"negatives": 5}, "negatives: no effect on loss: cross_entropy"),
        ({"final_activation": "tanh"}, "final_activation: no effect on loss: cross_entropy"),
        ({"loss": "bpr", "score_penalty": 1.0}, "score_penalty: no effect on loss: bpr"),
        ({"optimizer": "adagrad", "weight_decay": 0.1}, "weight_decay: no effect on optimizer: adagrad"),
        ({"negative_alpha": 0.5}, "negative_alpha: no effect without negatives"),
        (
            {"optimizer": "sparse_adam"},
            "optimizer: sparse_adam is for losses that touch few items, not for cross_entropy",
        ),
        ({"mask_rate": 0.6}, "mask_rate: no effect on model: sasrec"),
        ({"fusion": "concat", "add_map": "linear", "item_scores": "s"}, "add_map: no effect on fusion: concat"),
        ({"prompt_fraction": 0.7}, "prompt_fraction: no effect without item_scores"),
        ({"hidden_width": 5}, "hidden_width: no effect on model: sasrec"),
        ({"session_parallel": True}, "session_parallel: no effect on model: sasrec"),
        ({"train_user_guided": True}, "train_user_guided: no effect without item_scores"),
    ],
)
def test_what_cannot_go_together_is_refused_in_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as refusal:
        check_config(TrainConfig, {"output": "o", "data": "d"} | changes, source="test")
    assert str(refusal.value).splitlines()[1].strip() == message


def test_a_width_that_heads_do_not_divide_is_refused_in_one_line(toy: Path):
    with pytest.raises(ConfigError, match=r"^total width 15 .*is no multiple of heads 2.*$"):
        load_inputs(settings(toy, model="bert4rec", base_width=15))


def test_a_gru_needs_no_heads(toy: Path):
    assert finished(settings(toy, model="gru4rec", base_width=15, epochs=1)).progress.epoch == 1


@pytest.mark.parametrize(("left_out", "warned"), [(1, False), (2, True)])
def test_items_without_scores_are_warned_of_above_one_in_twenty(toy: Path, left_out: int, warned: bool):
    path = toy / "scores.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-left_out]))
    inputs = load_inputs(settings(toy, item_scores=str(path)))
    assert inputs.scores.missing == left_out
    assert any("items (" in text and "no complete scores" in text for text in inputs.warnings) == warned


def test_an_item_outside_the_table_is_refused_with_its_row(toy: Path):
    histories = cycles(20, ITEMS, 12)
    histories[1][3] = 21
    write_prepared(toy / "broken" / "prepare", histories, items=ITEMS)
    with pytest.raises(ValueError, match=r"interactions\.parquet: an item_index outside 1\.\.20 in row 16"):
        load_inputs(settings(toy / "broken"))
