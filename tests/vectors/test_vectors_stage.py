"""Mean hidden states behind a shared prefix equal one pass per item; components equal those of an SVD."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_policy import aspect_set, tiny_llama
from toy_data import walks, write_prepared
from transformers import PreTrainedTokenizerBase

from raygr import files, runs
from raygr.config import ConfigError
from raygr.schema import ITEM_SCHEMA
from raygr.score.prompts import Item, PromptEncoder
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.vectors import text_states
from raygr.vectors.config import VectorsConfig
from raygr.vectors.stage import principal_components, vectors
from raygr.vectors.text_states import mean_states, prefilled

ITEMS = 12
ASPECTS = Path(__file__).parents[2] / "configs/aspects/movies.yaml"
WORDS = tuple("abcdefghijklmno")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer, and a prepare run of items with texts."""
    path = tmp_path_factory.mktemp("vectors")
    tiny_llama().save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    write_prepared(path / "prepare", walks(6, ITEMS, 6, seed=0), items=ITEMS)
    rows = [
        {**dict.fromkeys(ITEM_SCHEMA.names, ""), "item_index": i, "item_id": f"i{i}", "title": " ".join(WORDS[: i + 1])}
        | {"train_rating": None, "train_rating_count": 0, "all_rating": None, "all_rating_count": 0}
        for i in range(1, ITEMS + 1)
    ]
    rows[3]["title"] = ""  # an item without any text
    pq.write_table(pa.Table.from_pylist(rows, schema=ITEM_SCHEMA), path / "prepare/items/part-0.parquet")
    return path


def settings(folder: Path, output: str, **changes: object) -> VectorsConfig:
    paths = {"output": str(folder / output), "data": str(folder / "prepare"), "llm": str(folder / "model")}
    return VectorsConfig(**paths, aspects=str(ASPECTS), width=3, **changes)


def test_means_behind_the_shared_prefix_are_those_of_one_pass_per_item(tokenizer: PreTrainedTokenizerBase):
    encoder = PromptEncoder(tokenizer, aspect_set(), "items", max_prompt_tokens=400, best_rating=5.0)
    model = tiny_llama().model
    prompts = [encoder.item_prompt(Item(title=" ".join(WORDS[:count]))) for count in (1, 9, 4)]
    texts = [encoder.subject_ids(prompt.prefix_ids) for prompt in prompts]
    assert tokenizer.decode(texts[0]).strip() == "title: a"
    together = mean_states(model, prefilled(model, encoder.shared), texts)[:, -1]
    for row, text in enumerate(texts):
        ids = torch.tensor([[*encoder.shared, *text]])
        with torch.inference_mode():
            states_TD = model(input_ids=ids).last_hidden_state[0, len(encoder.shared) :]
        np.testing.assert_allclose(together[row], states_TD.mean(0).numpy(), rtol=1e-4, atol=1e-5)
        alone = mean_states(model, prefilled(model, encoder.shared), [text])[:, -1]
        np.testing.assert_allclose(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_components_are_those_of_the_svd():
    rows_ID = np.random.default_rng(0).normal(size=(40, 7)) * [9, 1, 5, 1, 1, 3, 1] + 4
    found = principal_components(rows_ID, 3)
    _, singular, axes = np.linalg.svd(rows_ID - rows_ID.mean(0), full_matrices=False)
    expected = (rows_ID - rows_ID.mean(0)) @ axes[:3].T
    np.testing.assert_allclose(np.abs(found.scores_IA), np.abs(expected), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.explained_A, singular[:3] ** 2 / (singular**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(principal_components(rows_ID[::-1], 3).scores_IA[::-1], found.scores_IA, atol=1e-8)


def test_the_stage_writes_what_training_takes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    run = vectors(settings(folder, "one", batch_size=1))
    monkeypatch.setattr(text_states, "ITEMS_READ", 5)
    again = vectors(settings(folder, "five", batch_size=5))
    tables = [files.read_table(found.file("vectors.parquet")).sort_by("item_id") for found in (run, again)]
    assert tables[0].column_names == ["item_id", "pc1", "pc2", "pc3"]
    assert set(tables[0]["item_id"].to_pylist()) == {f"i{i}" for i in range(1, ITEMS + 1)} - {"i4"}
    for name in ("pc1", "pc2", "pc3"):
        np.testing.assert_allclose(*(table[name].to_numpy() for table in tables), rtol=1e-3, atol=1e-4)
    counts = runs.read_run(run.path, job="vectors").counts
    assert (counts["items"], counts["without_text"]) == (ITEMS - 1, 1) and 0.3 < sum(counts["explained"]) < 1
    config = TrainConfig(
        output=str(folder / "t"), data=str(folder / "prepare"), item_scores=run.file("vectors.parquet"), base_width=8
    )
    scores = load_inputs(config).scores
    assert scores.aspects == ("pc1", "pc2", "pc3") and scores.missing == 1


def test_more_components_than_items_are_refused(folder: Path):
    with pytest.raises(ConfigError, match="12 components of 12 items and hidden size 32: at most 11"):
        vectors(VectorsConfig(**vars(settings(folder, "wide")) | {"width": 12}))
    assert not (folder / "wide").exists()
