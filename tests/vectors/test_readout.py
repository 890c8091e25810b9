"""The readout equals a ridge regression by hand, and its run is a score run that leaves taught scores as they are."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from families import FAMILIES, family_model
from tiny_policy import tiny_llama
from toy_data import walks, write_csv, write_prepared
from transformers import AutoModel, PreTrainedTokenizerBase

from raygr import files, runs
from raygr.config import ConfigError
from raygr.data.vector_tables import read_vectors
from raygr.pipeline import checked_stage, plan_stages
from raygr.report.scored_subjects import compare_scores, read_reference, read_scores
from raygr.schema import ITEM_SCHEMA
from raygr.score.aspects import load_aspects
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.vectors.config import VectorsConfig
from raygr.vectors.readout import PENALTIES, fit_readout, readout_agreement
from raygr.vectors.stage import vectors
from raygr.vectors.text_states import language_model, mean_states, prefilled

ITEMS, TABLE = 60, 40  # items of the data, and those that the table scores
ASPECTS = Path(__file__).parents[2] / "configs/aspects/movies.yaml"
NAMES = load_aspects(str(ASPECTS)).names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random Llama, items whose titles are calm or tense, and a table that scores TABLE of them by this word."""
    path = tmp_path_factory.mktemp("readout")
    tiny_llama().save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    write_prepared(path / "prepare", walks(6, ITEMS, 6, seed=0), items=ITEMS)
    rows = [
        {**dict.fromkeys(ITEM_SCHEMA.names, ""), "item_index": i, "item_id": f"i{i}", "title": title(i)}
        | {"train_rating": None, "train_rating_count": 0, "all_rating": None, "all_rating_count": 0}
        for i in range(1, ITEMS + 1)
    ]
    rows[ITEMS - 1]["title"] = ""  # an item that can neither be read out nor taught
    pq.write_table(pa.Table.from_pylist(rows, schema=ITEM_SCHEMA), path / "prepare/items/part-0.parquet")
    write_csv(path / "table.csv", {f"i{i}": truth(i) for i in range(1, TABLE + 1)}, list(NAMES))
    write_csv(path / "truth.csv", {f"i{i}": truth(i) for i in range(1, ITEMS)}, list(NAMES))
    return path


def title(i: int) -> str:
    return f"{'tense' if i % 3 == 0 else 'calm'} {'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}"


def truth(i: int) -> list[float]:
    return [8.5 if i % 3 == 0 else 2.5] * len(NAMES)


def settings(folder: Path, output: str, **changes: object) -> VectorsConfig:
    paths = {"output": str(folder / output), "data": str(folder / "prepare"), "llm": str(folder / "model")}
    return VectorsConfig(**paths, aspects=str(ASPECTS), **{"readout": str(folder / "table.csv"), **changes})


def test_the_fit_is_the_ridge_regression_of_the_best_penalty():
    generator = np.random.default_rng(0)
    features_SX = generator.normal(size=(30, 7)) * [9, 1, 5, 1, 0, 3, 1] + 4  # one is constant
    scores_SA = 5 + features_SX[:, :2] @ generator.normal(size=(2, 3)) / 9 + generator.normal(size=(30, 3)) / 2

    def by_hand(rows: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights of centred features on the scale of the whole table, with the mean fitted to these rows."""
        x, y = standard_SX[rows], scores_SA[rows]
        centred = x - x.mean(0)
        weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(7), centred.T @ (y - y.mean(0)))
        return weights, y.mean(0) - x.mean(0) @ weights

    spread_X = features_SX.std(0)
    standard_SX = (features_SX - features_SX.mean(0)) / np.where(spread_X > 0, spread_X, 1)
    unit = np.trace(standard_SX @ standard_SX.T) / 30
    errors = []
    for penalty in PENALTIES:
        left_out = np.empty_like(scores_SA)
        for row in range(30):
            weights, offset = by_hand(np.arange(30) != row, penalty * unit)
            left_out[row] = scores_SA[row] - offset - standard_SX[row] @ weights
        errors.append(((left_out**2).mean(0) / scores_SA.var(0)).mean())
    best = float(PENALTIES[np.argmin(errors)])
    fitted = fit_readout(features_SX, scores_SA)
    assert fitted.penalty == best and PENALTIES[0] < best < PENALTIES[-1]
    weights, offset = by_hand(np.arange(30) >= 0, best * unit)
    np.testing.assert_allclose(fitted.scores(features_SX), np.clip(offset + standard_SX @ weights, 1, 10), rtol=1e-8)


def test_held_out_items_of_no_signal_have_no_agreement_and_constant_aspects_stay():
    generator = np.random.default_rng(1)
    features_SX, scores_SA = generator.normal(size=(200, 20)), generator.normal(5, 1, size=(200, 2))
    scores_SA[:, 1] = 4.0
    noise, constant = readout_agreement(features_SX, scores_SA, seed=0)
    assert noise.spearman is not None and abs(noise.spearman) < 0.2
    assert noise.mean_absolute_error >= 0.95 * noise.mean_guess_error
    assert constant.spearman is None and constant.mean_absolute_error == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(fit_readout(features_SX, np.full((200, 2), 4.0)).scores(features_SX), 4.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_a_model_gives_the_states_of_its_first_layers(name: str, tmp_path: Path):
    family_model(name).save_pretrained(tmp_path)
    whole, half = (
        AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval(),
        language_model(str(tmp_path), half=True),
    )
    text = [5, 9, 7, 11]
    found = mean_states(half, prefilled(half, [1, 2, 3]), [text])
    with torch.inference_mode():
        states = whole(input_ids=torch.tensor([[1, 2, 3, *text]]), output_hidden_states=True).hidden_states
    layers = (whole.config.num_hidden_layers + 1) // 2
    assert found.shape[1] == layers
    expected = [one[0, 3:] for one in states[1:layers]] + [whole.norm(states[layers][0, 3:])]
    for layer, one in enumerate(expected):
        np.testing.assert_allclose(found[0, layer], one.mean(0).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_run_is_a_score_run_with_the_tables_own_scores(folder: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    run = vectors(settings(folder, "scores", readout_items=30))
    rows = {row["subject_id"]: row for row in files.read_table(run.file("scores")).to_pylist()}
    assert list(rows) == [f"i{i}" for i in range(1, ITEMS + 1)]
    taught = [item for item, row in rows.items() if row["mode"] == "taught"]
    assert len(taught) == 30 and all(rows[item]["expected"] == truth(int(item[1:])) for item in taught)
    assert {rows[item]["model"] for item in taught} == {str(folder / "table.csv")}
    last = rows.pop(f"i{ITEMS}")
    assert (last["reason"], last["expected"]) == ("without_text", [None] * len(NAMES))
    read_out = [item for item, row in rows.items() if row["mode"] == "readout"]
    assert len(read_out) == ITEMS - 31 and all(1 <= score <= 10 for i in read_out for score in rows[i]["expected"])
    # the words of the titles decide: untaught items are on the right side of the middle
    assert np.mean([(rows[i]["expected"][0] > 5.5) == (int(i[1:]) % 3 == 0) for i in read_out]) > 0.9
    record = files.read_json(run.file("readout.json"))
    assert record["taught"] == 30 and list(record["aspects"]) == list(NAMES) and record["mean"]["spearman"] > 0.6
    assert record["mean"]["mean_absolute_error"] < record["mean"]["mean_guess_error"]
    assert "30 of 40 kept; left out: 10 not drawn" in caplog.text and "Spearman" in caplog.text
    counts = runs.read_run(run.path, job="score").counts
    assert counts["by_reason"] == {"ok": ITEMS - 1, "without_text": 1} and counts["taught"] == 30
    found = compare_scores(read_scores(run.path), read_reference(str(folder / "truth.csv")))
    assert {one.items for one in found} == {ITEMS - 31}  # the taught ones agree with themselves
    scores = load_inputs(
        TrainConfig(output=str(folder / "t"), data=str(folder / "prepare"), item_scores=run.path, base_width=8)
    ).scores
    assert scores.aspects == NAMES and scores.missing == 1


def test_a_smaller_number_of_items_is_part_of_a_larger_one_and_a_run_is_its_own_table(folder: Path):
    taught = []
    for count in (20, 30):
        run = vectors(settings(folder, f"of-{count}", readout_items=count))
        table = files.read_table(run.file("scores")).to_pylist()
        taught.append({row["subject_id"] for row in table if row["mode"] == "taught"})
    assert taught[0] < taught[1]
    assert len(read_vectors(run.path, subjects="items", column="expected", aspects=None).ids_S) == ITEMS


def test_what_cannot_work_is_refused(folder: Path):
    with pytest.raises(ValueError, match="width: no effect with a readout"):
        settings(folder, "x", width=5)
    with pytest.raises(ValueError, match="readout_items: no effect without a readout"):
        settings(folder, "x", readout=None, readout_items=30)
    few = write_csv(folder / "few.csv", {f"i{i}": truth(i) for i in range(1, 12)}, list(NAMES))
    with pytest.raises(ConfigError, match=r"has all scores of 11 items of .*: at least 20 are needed to learn from"):
        vectors(settings(folder, "x", readout=few))
    high = write_csv(folder / "high.csv", {f"i{i}": [11.0] * len(NAMES) for i in range(1, 30)}, list(NAMES))
    with pytest.raises(ConfigError, match=r"ratings outside 1\.\.10"):
        vectors(settings(folder, "x", readout=high))
    assert not (folder / "x").exists()


def test_a_plan_takes_a_readout_where_it_takes_a_score_run_of_items(folder: Path):
    stage = {"output": str(folder / "planned"), "data": str(folder / "prepare"), "aspects": str(ASPECTS)}
    train = {"output": str(folder / "trained"), "data": str(folder / "prepare"), "item_scores": str(folder / "planned")}
    for readout, state in ((str(folder / "table.csv"), "to run"), (None, "refused")):
        found = {**stage, "readout": readout, "llm": str(folder / "model")}
        plans = plan_stages([checked_stage(1, {"vectors": found}), checked_stage(2, {"train": train})])
        assert [plan.state for plan in plans] == ["to run", state]
