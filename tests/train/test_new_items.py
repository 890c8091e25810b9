"""New items: unknown in training, ranked apart and in the whole catalogue against plain loops, and calibrated."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from toy_data import cycles, random_scores, walks, write_csv, write_prepared

from raygr import files
from raygr.compare.comparison import read_comparison
from raygr.compare.config import CompareConfig
from raygr.compare.references import reference_rankings
from raygr.compare.stage import compare
from raygr.config import ConfigError
from raygr.data.interactions import read_interactions
from raygr.metrics.rank_tables import read_rankings
from raygr.models.workers import Share
from raygr.recommend.recommender import load_recommender
from raygr.runs import finish_run, start_run
from raygr.schema import INTERACTIONS, VALIDATION
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.loop import accumulate_gradients, training_rounds
from raygr.train.new_items import calibrated_offset, missing_scores
from raygr.train.outputs import write_outputs
from raygr.train.state import Training, start_training
from raygr.train.step import epoch_draws, whole_batch

torch.set_num_threads(1)

USERS, KNOWN, NEW, LENGTH = 8, 20, 5, 9
ITEMS = KNOWN + NEW
HISTORIES = walks(USERS, KNOWN, LENGTH, seed=4)
# user 0 buys two new items after 3 known ones and one after 8; user 1 one before anything else and one after 5
NEW_ROWS = [(0, 21, 3), (0, 22, 3), (0, 25, 8), (1, 23, 0), (1, 24, 5)]


def begun(folder: Path, *, scored: bool = True, **changes: Any) -> Training:
    if not (folder / "prepare").exists():
        write_prepared(folder / "prepare", HISTORIES, items=ITEMS, new=NEW_ROWS, new_items=0.2)
    vectors = dict(zip([f"i{i}" for i in range(1, ITEMS + 1)], random_scores(ITEMS, 3, seed=1).tolist(), strict=True))
    scores = write_csv(folder / "scores.csv", vectors, ["a", "b", "c"]) if scored else None
    given = {"output": str(folder / "train"), "base_width": 8, "max_history": 6, "batch_size": 4} | changes
    config = TrainConfig(data=str(folder / "prepare"), item_scores=scores, **given)
    return start_training(config, load_inputs(config), torch.device("cpu"), Share())


def written(training: Training) -> tuple[Any, dict[str, Any]]:
    run = start_run(training.config.output, job="train", config=training.config, inputs=[])
    write_outputs(training)
    finish_run(run, inputs=[], counts={})
    return pq.read_table(f"{run.path}/ranks.parquet"), files.read_json(f"{run.path}/metrics.json")


ADD = {"fusion": "add", "user_scores": "none"}  # (9a) alone
LOSSES: list[dict[str, Any]] = [
    {},
    ADD,
    {"model": "bert4rec"},
    {"fusion": "concat", "base_width": 7, "user_scores": "none"},
    {"loss": "bce"},
    {"loss": "sampled_cross_entropy", "negatives": 300},
    {"loss": "bpr_max", "negatives": 300, "model": "gru4rec", "optimizer": "adagrad"},
]


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_training_does_not_know_new_items(tmp_path: Path, settings: dict[str, Any]):
    """No new item is a negative or has a share in the loss: changed scores of new items change no weight."""
    training = begun(tmp_path, epochs=2, **settings)
    other = begun(tmp_path, epochs=2, **settings)
    for name in ("features_IF", "standard_IA"):
        if name in dict(other.model.embedding.named_buffers()):
            other.model.embedding.get_buffer(name)[KNOWN:] = 100.0
    for one in (training, other):
        assert list(training_rounds(one))
        assert not one.model.embedding.base_ID[KNOWN:].any()
    assert training.progress.lines[-1]["loss"] == other.progress.lines[-1]["loss"]
    assert training.progress.lines[-1]["validation"] == other.progress.lines[-1]["validation"]
    for name, weights in training.model.named_parameters():
        assert torch.equal(weights, dict(other.model.named_parameters())[name]), name


def test_ranks_of_new_and_of_other_targets_against_a_loop(tmp_path: Path):
    training = begun(tmp_path, epochs=1, **ADD)
    list(training_rounds(training))
    training.model.load_state_dict(training.best_weights)
    table, metrics = written(training)
    offset = metrics["new"]["offset"]
    rows = [row for row in table.to_pylist() if row["part"] != VALIDATION]
    assert len(rows) == 3 * USERS + 3 * 4  # the new item of user 1 without a history is no target
    new_before = {(0, 21): [], (0, 22): [21], (0, 25): [21, 22], (1, 24): [23]}
    rows_ID = training.model.embedding.item_rows()
    training.model.eval()
    for row in rows:
        user, target, sets = row["user_index"], row["target"], row["candidates"]
        history = HISTORIES[user][: row["position"]]
        bought = new_before.get((user, target), [item for one, item, _ in NEW_ROWS if one == user])
        with torch.inference_mode():
            state_1D = training.model.encode(rows_ID, torch.tensor([history[-6:]]), torch.tensor([len(history[-6:])]))
            scores_I = (state_1D @ rows_ID.T)[0]
            scores_I[KNOWN:] += offset if sets == "whole-calibrated" else 0.0
        ranked = {"full": range(1, KNOWN + 1), "new-items": range(KNOWN + 1, ITEMS + 1)}
        others = set(ranked.get(sets, range(1, ITEMS + 1))) - {*history, *bought, target}
        assert row["rank"] == 1 + sum(bool(scores_I[item - 1] > scores_I[target - 1]) for item in others), row
        assert (row["part"] == "new") == (target > KNOWN) and (target <= KNOWN or row["target_train_count"] == 0)
    assert {row["candidates"] for row in rows if row["part"] == "new"} == {"new-items", "whole", "whole-calibrated"}
    assert metrics["new"] | {"metrics": None} == {
        "items": NEW, "offset": offset, "targets": 4, "users": 2, "metrics": None
    }  # fmt: skip
    # user 0 has three targets and user 1 one: means over users
    found = [row for row in rows if row["candidates"] == "new-items"]
    by_user = [[1 / row["rank"] for row in found if row["user_index"] == user] for user in (0, 1)]
    assert metrics["new"]["metrics"]["new-items"]["mrr"] == pytest.approx(np.mean([np.mean(one) for one in by_user]))
    assert metrics["protocol"]["new_items"] == 0.2


def test_items_that_the_data_set_aside_are_served_with_their_offset(tmp_path: Path):
    training = begun(tmp_path, epochs=1)
    list(training_rounds(training))
    training.model.load_state_dict(training.best_weights)
    metrics, path = written(training)[1], training.config.output
    plain, calibrated = load_recommender(path, new_item_offset=0.0), load_recommender(path)
    assert calibrated.new_item_offset == metrics["new"]["offset"] != 0
    scores_I, plain_I = (one.scores(one.encoded(one.of_users(["u2"])))[0] for one in (calibrated, plain))
    torch.testing.assert_close(scores_I[:KNOWN], plain_I[:KNOWN])
    torch.testing.assert_close(scores_I[KNOWN:], plain_I[KNOWN:] + metrics["new"]["offset"])
    history, item_C = calibrated.of_users(["u2"]), torch.tensor([3, 22])
    base_BC, encoder_BCA, user_BCA = calibrated.split_scores(history, item_C)
    torch.testing.assert_close((base_BC + encoder_BCA.sum(-1) + user_BCA.sum(-1))[0], scores_I[item_C - 1])


def test_an_offset_among_few_items_is_0(tmp_path: Path):
    """Users have seen 27 of 30 items, so the list of 3 places holds a hidden one whatever its score is."""
    write_prepared(tmp_path / "prepare", cycles(USERS, 30, 29), items=30)
    training = begun(tmp_path)
    assert calibrated_offset(training) == 0
    training.inputs.targets[VALIDATION].first_seen_E[:] += 20  # 20 of them count as not seen
    assert calibrated_offset(training) != 0


def test_new_items_are_compared_with_a_base_and_with_chance(tmp_path: Path):
    arms = {"base": begun(tmp_path, scored=False, output=str(tmp_path / "base")), "refined": begun(tmp_path)}
    for one in arms.values():
        one.progress.lines.append({"seconds": 1.0})
        written(one)
    paths = {name: (one.config.output,) for name, one in arms.items()}
    run = compare(CompareConfig(output=str(tmp_path / "compare"), arms=paths))
    comparison = read_comparison(run.path)
    names = {"full", "whole", "whole-calibrated", *(f"{one}, new targets" for one in ("whole", "new-items"))}
    assert names < set(comparison.arms["refined"].metrics)
    # without item scores new items are alike, so the base ranks them as chance does on average
    base = comparison.arms["base"].metrics["new-items, new targets"]["mrr"].mean
    assert comparison.arms["refined"].against_base["new-items, new targets"]["mrr"].difference == pytest.approx(
        comparison.arms["refined"].metrics["new-items, new targets"]["mrr"].mean - base
    )
    rankings = read_rankings(pq.read_table(f"{paths['base'][0]}/ranks.parquet"), part="new", targets=("new",))
    chance = reference_rankings(paths["base"][0], str(tmp_path / "prepare"), rankings)["chance"]
    among = {name: ranking.among_E.tolist() for name, ranking in chance.items()}
    # items that the user had before are not ranked: 0, 1 and 2 new ones of user 0, and 1 of user 1
    assert among["new-items, new targets"] == [5, 4, 3, 4]
    assert among["whole, new targets"] == [25 - 3, 25 - 4, 25 - 10, 25 - 6]
    assert rankings["new-items, new targets"].rank_E.tolist() == [3.0, 2.5, 2.0, 2.5]


def test_sampled_candidates_and_a_new_item_in_a_history_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="uniform-100 would draw"):
        begun(tmp_path, candidates=("full", "uniform-100"))
    path = tmp_path / "prepare" / INTERACTIONS
    table = pq.read_table(path)
    changed = table.set_column(
        1, table.schema.field(1), [np.where(np.arange(len(table)) == 4, 25, table["item_index"])]
    )
    pq.write_table(changed, path)
    with pytest.raises(ValueError, match="a new item in a history"):
        read_interactions(str(tmp_path / "prepare"))


# --- calibration ---------------------------------------------------------------------------------


def test_an_offset_brings_hidden_items_into_the_list_as_the_needs_say():
    generator = torch.Generator().manual_seed(0)
    scores_BI, hidden_BI = torch.randn(6, 40, generator=generator), torch.randn(6, 15, generator=generator) - 2
    needed_BK = missing_scores(scores_BI, hidden_BI)
    for offset in (-1.0, 0.0, 0.7, 2.0, 3.1):
        first_BK = torch.cat([scores_BI, hidden_BI + offset], dim=1).topk(10, dim=1).indices
        assert torch.equal((first_BK >= 40).sum(1), (needed_BK < offset).sum(1))


@pytest.mark.parametrize(("is_new_there", "groups", "size"), [(True, 4, 5), (False, 10, 2)])
def test_the_offset_gives_hidden_items_their_share_of_the_lists(
    tmp_path: Path, is_new_there: bool, groups: int, size: int
):
    """4 groups of 5 of the 20 known items: a quarter of the first five places, counted by a loop.

    Without new items 10 groups of 2, and a tenth of the first two places.
    """
    if not is_new_there:
        write_prepared(tmp_path / "prepare", HISTORIES, items=KNOWN)
    training = begun(tmp_path, epochs=1, **ADD)
    list(training_rounds(training))
    with torch.no_grad():
        training.model.embedding.item_map_FD.normal_(std=0.02)
    offset = calibrated_offset(training)
    embedding, group_I = training.model.embedding, np.random.default_rng(0).permutation(KNOWN) % groups
    rows_ID = embedding.item_rows()
    hidden_in = []
    for group in range(groups):
        hidden = np.flatnonzero(group_I == group)
        changed_ID = rows_ID.clone()
        changed_ID[hidden] -= embedding.base_ID[hidden]
        for history in HISTORIES:
            before = torch.tensor([history[1:-2]])  # max_history 6
            state_1D = training.model.encode(rows_ID, before, torch.tensor([6]))
            scores_I = (state_1D @ changed_ID.T)[0].detach()[:KNOWN]
            scores_I[hidden] += offset
            scores_I[np.array(history[:-2]) - 1] = -np.inf
            hidden_in.append(sum(int(place) in hidden for place in scores_I.topk(size).indices))
    assert np.mean(hidden_in) / size == pytest.approx(1 / groups, abs=0.01)


def test_the_offset_does_not_depend_on_the_test(tmp_path: Path):
    training = begun(tmp_path)
    before = calibrated_offset(training)
    training.inputs.items_N[training.inputs.targets["test"].target_at_E] = 1
    assert calibrated_offset(training) == before


# --- item dropout --------------------------------------------------------------------------------


def test_item_dropout_hides_the_learned_rows_of_a_batch(tmp_path: Path):
    embedding = begun(tmp_path, **ADD).model.embedding
    is_kept_I = torch.arange(ITEMS) % 2 == 0
    with torch.no_grad():
        embedding.item_map_FD.normal_()
        guided_ID = embedding.item_rows() - embedding.base_ID
        rows_ID = embedding.item_rows(None, is_kept_I)
    assert torch.equal(rows_ID[is_kept_I], embedding.item_rows()[is_kept_I])
    assert torch.allclose(rows_ID[~is_kept_I], guided_ID[~is_kept_I], atol=1e-6)
    item_J = torch.tensor([2, 3])
    assert torch.equal(embedding.item_rows(item_J, is_kept_I[item_J - 1]), rows_ID[item_J - 1])


@pytest.mark.parametrize("settings", [{}, {"loss": "bce", "optimizer": "sparse_adam"}], ids=str)
def test_dropped_items_get_no_gradient(tmp_path: Path, settings: dict[str, Any]):
    training = begun(tmp_path, item_dropout=0.5, **settings)
    contents = torch.arange(4)
    whole = whole_batch(
        training.config, training.inputs, contents, training.popularity_I, epoch_draws(training.config.seed, 1, 0)
    )
    assert 0.2 < whole.is_kept_J.float().mean() < 0.8
    accumulate_gradients(training, whole)
    gradient_ID = training.model.embedding.base_ID.grad
    gradient_ID = gradient_ID.to_dense() if gradient_ID.is_sparse else gradient_ID
    moved_I = gradient_ID.abs().sum(1) > 0
    assert moved_I.any() and not moved_I[~whole.is_kept_J].any()


def test_item_dropout_without_scores_is_refused():
    with pytest.raises(ValueError, match="item_dropout: no effect without item_scores"):
        TrainConfig(output="o", data="d", item_dropout=0.2)
