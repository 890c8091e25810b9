"""After retries and sharing, the score store has one row per hash: the best answer, or the last of equal ones."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raygr.score import store as store_module
from raygr.score.config import SAME_ANSWERS, ScoreConfig
from raygr.score.store import ScoreStore, StoredScore, open_store


def answer(rating: int | None, *, reason: str = "ok", completion: str = "text") -> StoredScore:
    expected = None if rating is None else rating + 0.5
    return StoredScore(ratings=(rating, rating), expected=(expected, expected), reason=reason, completion=completion)


def nothing(reason: str) -> StoredScore:
    return StoredScore((None, None), (None, None), reason, "")


def test_a_retried_batch_leaves_one_answer_per_hash(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    assert store.known() == set()
    store.write(["a", "b"], [answer(1), answer(2)])
    store.write(["a", "b"], [answer(1), answer(2)])  # the actor was killed after writing
    store.write(["b", "c"], [answer(2), answer(3)])  # another run asked, too
    table = store.read()
    assert sorted(table["prompt_sha256"].to_pylist()) == ["a", "b", "c"]
    row = next(row for row in table.drop_columns("written").to_pylist() if row["prompt_sha256"] == "c")
    assert row == {
        "prompt_sha256": "c",
        "ratings": [3, 3],
        "expected": [3.5, 3.5],
        "reason": "ok",
        "completion": "text",
    }


def test_the_last_good_answer_wins_whatever_failed_before_or_after(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    for score in (nothing("no_aspect_read"), answer(3), answer(7), nothing("length"), nothing("not_finite")):
        store.write(["a"], [score])
    store.write(["b"], [nothing("no_aspect_read")])
    store.write(["b"], [StoredScore((4, None), (4.0, None), "some_aspects_missing", "")])
    for _ in range(2):  # as written, and compacted
        rows = {row["prompt_sha256"]: (row["ratings"], row["reason"]) for row in store.read().to_pylist()}
        assert rows == {"a": ([7, 7], "ok"), "b": ([4, None], "some_aspects_missing")}
        store.compact()


def test_what_failed_is_asked_again_and_what_is_no_answer_always(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    reasons = ["ok", "length", "no_aspect_read", "not_finite", "refused_by_engine"]
    store.write(reasons, [answer(5), *(nothing(reason) for reason in reasons[1:])])
    store.write(["half"], [StoredScore((4, None), (4.0, None), "out_of_range", "")])
    assert store.known() == {"ok", "length", "no_aspect_read", "half"}
    assert store.known(retry_failed=True) == {"ok"}
    assert store.known(unread=False) == {"ok", "half"}
    assert store.ratings_known() == {"ok": 2, "half": 1} | dict.fromkeys(reasons[1:], 0)


def test_twenty_thousand_files_of_batches_become_one(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    store.write(["failed before"], [nothing("length")])
    batch = next(path for path in Path(store.path).iterdir())
    for number in range(20_000 - 2):
        os.link(batch, f"{store.path}/{number}.parquet")
    store.write([str(number) for number in range(50)], [answer(1 + number % 10) for number in range(50)])
    begun = time.monotonic()
    store.compact()
    assert time.monotonic() - begun < 60  # 4 s on two idle cores; 20 s with one read_table per file
    assert [path.name.split("-")[0] for path in Path(store.path).iterdir()] == ["compacted"]
    assert len(store.read()) == 51 and len(store.known(retry_failed=True)) == 50
    before = os.listdir(store.path)
    store.compact()  # there is nothing left to do
    assert os.listdir(store.path) == before


def test_a_compaction_that_was_cut_short_loses_and_doubles_nothing(tmp_path, monkeypatch):
    store = ScoreStore(str(tmp_path / "store"))
    for number in range(3):
        store.write([str(number)], [answer(number + 1)])
    full = store.read().sort_by("prompt_sha256")

    def killed(self, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(store.filesystem()), "rm_file", killed)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert len(os.listdir(store.path)) == 4
    assert store.read().sort_by("prompt_sha256").equals(full)
    store.compact()
    assert len(os.listdir(store.path)) == 1 and store.read().equals(full)


def test_a_folder_that_is_compacted_while_it_is_read_is_listed_again(tmp_path, monkeypatch):
    store = ScoreStore(str(tmp_path / "store"))
    for number in range(2):
        store.write([str(number)], [answer(number + 1)])
    listings = [sorted(store.sizes())]
    store.compact()
    real = ScoreStore.sizes
    monkeypatch.setattr(ScoreStore, "sizes", lambda self: dict.fromkeys(listings.pop(), 1) if listings else real(self))
    assert sorted(store.read()["prompt_sha256"].to_pylist()) == ["0", "1"]


def test_scores_from_probabilities_are_the_mode_and_the_mean():
    probabilities = np.zeros((2, 10))
    probabilities[0, [6, 9]] = 0.75, 0.25  # 7 and 10
    probabilities[1] = np.nan
    score = StoredScore.from_probabilities(probabilities)
    assert score.ratings == (7, None)
    assert score.expected == (7.75, None)
    assert score.reason == "not_finite"


# --- the key -----------------------------------------------------------------------------------


def key(model: str = "some/model", adapter: str | None = None, *, on_gpu: bool = False, **settings) -> str:
    config = ScoreConfig(output="o", data="d", subjects="items", aspects="a", llm=model, adapter=adapter, **settings)
    return open_store(config, on_gpu=on_gpu).path


def test_everything_that_changes_an_answer_is_in_the_key():
    engine = [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"revision": "v2"},
        {"logprobs_mode": "processed_logprobs"},
        {"kv_cache_dtype": "fp8"},
        {"hf_overrides": {"rope_theta": 1}},
        {"a_setting_that_nobody_knows": 1},
    ]
    ways = [{"engine_kwargs": one} for one in engine] + [{"mode": "generate"}, {"on_gpu": True}, {"model": "another"}]
    ways += [{"mode": "generate", "temperature": 1.0}, {"mode": "generate", "temperature": 1.0, "seed": 1}]
    ways += [{"mode": "generate", "structured": False}, {"mode": "generate", "structured": False, "answered_by": "big"}]
    keys = [key(), *(key(**way) for way in ways)]
    assert len(set(keys)) == len(keys)


def test_what_changes_no_answer_is_not_in_the_key():
    assert key() == key(seed=1, actors=4, batch_size=2, tensor_parallel_size=2, retry_failed=True)
    assert key() == key(engine_kwargs={"dtype": "float32"})  # raygr's default on a CPU
    assert key() == key(engine_kwargs={name: 1 for name in SAME_ANSWERS})


def test_a_model_or_adapter_goes_by_its_content(tmp_path, monkeypatch):
    model, adapter = tmp_path / "home" / "model", tmp_path / "tuned" / "adapter"
    for folder in (model, adapter):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"one")
    (adapter / "adapter_config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    spellings = ["home/model", "home/model/", "./home/model", str(model), "~/model"]
    assert len({key(one, str(adapter)) for one in spellings}) == 1
    assert len({key(str(model), one) for one in ("tuned/adapter", "tuned/adapter/", str(adapter))}) == 1
    before = key(str(model), str(adapter), engine_kwargs={"speculative_config": {"model": "home/model"}})
    (adapter / "weights").write_bytes(b"two")
    tuned_on = key(str(model), str(adapter), engine_kwargs={"speculative_config": {"model": str(model)}})
    (model / "weights").write_bytes(b"two")
    other = key(str(model), str(adapter), engine_kwargs={"speculative_config": {"model": str(model)}})
    assert len({before, tuned_on, other}) == 3


def test_a_model_of_the_hub_goes_by_its_commit(monkeypatch):
    commits = SimpleNamespace(now="c1")
    monkeypatch.setattr(
        store_module, "try_to_load_from_cache", lambda name, file, revision: f"/hub/snapshots/{commits.now}/{file}"
    )
    first = key("some/model")
    assert first == key("some/model", engine_kwargs={"revision": "main"})
    commits.now = "c2"
    assert key("some/model") != first
