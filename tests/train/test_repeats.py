"""`keep_duplicate: all`: an item that a user has had can be target, negative, candidate and recommendation."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from toy_data import RUN_METRICS, write_prepared

from raygr import runs
from raygr.compare.arms import ComparedRun, check_protocol
from raygr.compare.references import popularity_ranks
from raygr.config import ConfigError
from raygr.data.interactions import read_interactions
from raygr.metrics.rank_tables import Ranking
from raygr.models.losses import PairLoss, StepNegatives, step_loss
from raygr.models.negatives import owned_pairs
from raygr.models.workers import Share
from raygr.prepare.coded_rows import CodedRows
from raygr.prepare.config import PrepareConfig
from raygr.prepare.selection import assign, from_rows, reduce
from raygr.prepare.stage import HELD
from raygr.recommend.recommender import load_recommender
from raygr.schema import TEST
from raygr.train.config import TrainConfig
from raygr.train.evaluate import item_scores, list_metrics, target_ranks
from raygr.train.inputs import Inputs, load_inputs
from raygr.train.outputs import chance_warnings
from raygr.train.run_metrics import RunMetrics
from raygr.train.serving import write_serving
from raygr.train.state import Training, start_training
from raygr.train.step import epoch_draws, renumbered, summed_loss, whole_batch

torch.set_num_threads(1)

ITEMS = 130
# repeated purchases: each user's last two items are items that the user had before
HISTORIES = [[1, 2, 3, 1, 2, 1], [4, 5, 4, 6, 5, 4], [7, 7, 7, 7, 7], [8, 9, 10, 11, 12]]


def orders() -> CodedRows:
    """HISTORIES as one file."""
    rows = [
        (f"u{user}", f"i{item:03d}", time) for user, found in enumerate(HISTORIES) for time, item in enumerate(found)
    ]
    users, items, times = zip(*rows, strict=True)
    columns = {"user_id": users, "item_id": items, "rating": pa.nulls(len(rows), pa.float32()), "timestamp": times}
    coded = CodedRows(("user_id", "item_id"), HELD)
    coded.add(pa.table({**columns, "row": np.arange(len(rows))}), 0)
    return coded


def test_prepare_keeps_every_purchase_and_the_last_one_is_the_test():
    config = PrepareConfig(
        output="o", reviews=("r",), keep_duplicate="all", min_user_interactions=2, min_item_interactions=1
    )
    reduced, dropped = reduce(from_rows(orders()), config)
    kept, _ = assign(reduced, config)
    assert len(kept.row) == sum(map(len, HISTORIES)) and dropped["duplicate"].interactions == 0
    ids = np.array([int(one.removeprefix("i")) for one in kept.item_ids.to_pylist()])
    found = [ids[kept.item_index[kept.user_index == user] - 1].tolist() for user in range(len(HISTORIES))]
    assert found == HISTORIES


def loaded(folder: Path, *, keep_duplicate: str = "all", **changes: Any) -> tuple[TrainConfig, Inputs]:
    data = write_prepared(folder / keep_duplicate, HISTORIES, items=ITEMS, keep_duplicate=keep_duplicate)
    config = TrainConfig(output=str(folder / "train"), data=data, base_width=8, dropout=0.0, **changes)
    return config, load_inputs(config)


def started(folder: Path, **changes: Any) -> Training:
    config, inputs = loaded(folder, **changes)
    training = start_training(config, inputs, torch.device("cpu"), Share())
    training.model.eval()
    return training


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    return started(tmp_path_factory.mktemp("repeats"), candidates=("full", "uniform-100"))


def test_a_target_competes_with_everything_that_the_user_has_had(training: Training):
    targets = training.inputs.targets[TEST]
    scores_BI = item_scores(training, targets, torch.arange(4), training.model.embedding.item_rows())
    ranks = target_ranks(training, TEST, ["full"])["full"].tolist()
    for user, history in enumerate(HISTORIES):
        own = scores_BI[user, history[-1] - 1]
        assert ranks[user] == 1 + int((scores_BI[user] > own).sum())


def test_the_protocol_says_so_and_is_not_compared_with_filtered_runs(training: Training, tmp_path: Path):
    _, filtered = loaded(tmp_path, keep_duplicate="first")
    stamps = training.inputs.protocol, filtered.protocol
    assert [stamp["seen"] for stamp in stamps] == ["ranked", "filtered"]
    one, other = (
        ComparedRun(str(n), {}, RunMetrics(**RUN_METRICS | {"protocol": stamp}), {}) for n, stamp in enumerate(stamps)
    )
    with pytest.raises(ConfigError, match="seen"):
        check_protocol(one, other)


def test_candidates_hold_what_a_user_has_had_but_never_a_target(tmp_path: Path):
    """108 items: with all own items left out, the user of 12 could not get a hundred."""
    history = [*range(1, 13), 1, 2]
    data = write_prepared(tmp_path / "p", [history] * 3, items=108, keep_duplicate="all")
    config = TrainConfig(output=str(tmp_path / "t"), data=data, base_width=8, candidates=("uniform-100",))
    drawn_UC = load_inputs(config).candidates["uniform-100"].numpy()
    for drawn in drawn_UC:
        assert len(set(drawn)) == 100 and not {1, 2} & set(drawn)
        assert set(range(3, 13)) & set(drawn)


@pytest.mark.parametrize("loss", ["bce", "sampled_cross_entropy"])
def test_negatives_are_anything_but_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str):
    seen: dict[int, set[int]] = {}

    def noted(state_ND, rows_ID, target_N, negative, is_spared_NK=None, *, expected_K=None):
        for place, target in enumerate(target_N.tolist()):
            others = negative[place : place + 1] if is_spared_NK is None else negative[~is_spared_NK[place]]
            seen.setdefault(int(whole.item_J[target - 1]), set()).update(whole.item_J[others - 1].tolist())
        return state_ND.sum()

    monkeypatch.setattr(f"raygr.train.step.{loss}", noted)
    changes = {"negatives": 20} if loss == "sampled_cross_entropy" else {}
    data = write_prepared(tmp_path / "p", [[1, 2, 3, 1, 2, 1, 3, 4]], items=4, keep_duplicate="all")
    config = TrainConfig(output="o", data=data, base_width=8, loss=loss, **changes)
    training = start_training(config, load_inputs(config), torch.device("cpu"), Share())
    draws = epoch_draws(0, 1, 0)
    for _ in range(30 if loss == "bce" else 5):
        whole = whole_batch(config, training.inputs, torch.arange(1), torch.arange(1, 5) / 4, draws)
        whole = renumbered(whole, training.inputs.items)
        summed_loss(config, training.inputs, training.model, whole, whole.batch)
    assert seen == {1: {2, 3, 4}, 2: {1, 3, 4}, 3: {1, 2, 4}}  # 4 is the test's alone


def test_pairwise_negatives_are_anything_but_the_target(training: Training):
    state_LBD, rows_ID = torch.ones(1, 2, 1), torch.tensor([[1.0], [2.0], [3.0]])
    owned = owned_pairs(training.inputs.owned, torch.arange(2), torch.tensor([1, 2, 3]))
    assert len(owned.item_O) == 0  # nothing is owned
    negatives = StepNegatives(torch.tensor([[1, 2]]), torch.tensor([1, 2, 3]), owned)
    found = step_loss(PairLoss("bpr"), state_LBD, rows_ID, torch.tensor([[1, 2]]), negatives)
    log_sigmoid = torch.nn.functional.logsigmoid
    first = -torch.stack([log_sigmoid(torch.tensor(1.0 - other)) for other in (2.0, 2.0, 3.0)]).mean()
    second = -torch.stack([log_sigmoid(torch.tensor(2.0 - other)) for other in (1.0, 1.0, 3.0)]).mean()
    assert float(found) == pytest.approx(float(first + second))


def test_what_was_bought_is_recommended_again(training: Training):
    config = training.config
    run = runs.start_run(config.output, job="train", config=config)
    write_serving(config, training.inputs, training.best_weights, 0.0)
    runs.finish_run(run, inputs=[config.data], counts={})
    recommender = load_recommender(run.path)
    for who in ("u0", ["i1", "i2", "i3"]):
        found = [one.item_id for one in recommender.recommend(who, n=ITEMS)]
        assert sorted(found) == sorted(f"i{item}" for item in range(1, ITEMS + 1))


def test_popularity_and_chance_rank_what_was_seen_too(training: Training):
    """Item 1 is bought less than item 2, which its user has had as well."""
    found = read_interactions(training.config.data)
    last = Ranking(*(np.array([value]) for value in (0, 5, 1.0, 3)))
    train_count_I = np.bincount([1] * 3 + [2] * 4, minlength=ITEMS + 1)[1:]
    rank_E, among_E = popularity_ranks("", found, None, "full", last, train_count_I)
    assert (rank_E.tolist(), among_E.tolist()) == ([2.0], [ITEMS])
    third = {"full": last._replace(rank_E=np.array([3.0]))}  # better than chance among ten, and not among five
    assert [len(chance_warnings(third, items=10, repeats=repeats)) for repeats in (True, False)] == [0, 1]


def test_lists_hold_targets_that_the_user_has_had(tmp_path: Path):
    found = list_metrics(started(tmp_path, list_length=ITEMS))
    assert found.ranked["recall"] == 1.0
