"""After retries and sharing, the score store has one row per hash: the best answer, or the last of equal ones."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import TWO, hashes, sha256

from raygr import files, runs
from raygr.data.vector_tables import read_score_table
from raygr.score import stage
from raygr.score import store as store_module
from raygr.score.config import SAME_ANSWERS, ScoreConfig
from raygr.score.store import ScoreStore, StoredScore, binary_hashes, hash_ranges, open_store


def answer(rating: int | None, *, reason: str = "ok", completion: str = "text") -> StoredScore:
    expected = None if rating is None else rating + 0.5
    return StoredScore(ratings=(rating, rating), expected=(expected, expected), reason=reason, completion=completion)


def nothing(reason: str) -> StoredScore:
    return StoredScore((None, None), (None, None), reason, "")


def known(store: ScoreStore, names: Iterable[str], **how: bool) -> set[str]:
    names = list(names)
    return set(itertools.compress(names, store.answered(hashes(*names), **how)))


def write(store: ScoreStore, answers: Mapping[str, StoredScore]) -> None:
    store.write([sha256(name) for name in answers], list(answers.values()))


def test_a_retried_batch_leaves_one_answer_per_hash(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    assert not store.has_answers() and known(store, "abc") == set() and len(store.read()) == 0
    write(store, {"a": answer(1), "b": answer(2)})
    write(store, {"a": answer(1), "b": answer(2)})  # the actor was killed after writing
    write(store, {"b": answer(2), "c": answer(3)})  # another run asked, too
    table = store.read()
    assert sorted(table["prompt_sha256"].to_pylist()) == sorted(map(sha256, "abc"))
    row = next(row for row in table.drop_columns("written").to_pylist() if row["prompt_sha256"] == sha256("c"))
    assert row == {
        "prompt_sha256": sha256("c"),
        "ratings": [3, 3],
        "expected": [3.5, 3.5],
        "reason": "ok",
        "completion": "text",
    }


def test_the_last_good_answer_wins_whatever_failed_before_or_after(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    for score in (nothing("no_aspect_read"), answer(3), answer(7), nothing("length"), nothing("not_finite")):
        write(store, {"a": score})
    write(store, {"b": nothing("no_aspect_read")})
    write(store, {"b": StoredScore((4, None), (4.0, None), "some_aspects_missing", "")})
    for _ in range(2):  # as written, and compacted
        rows = {row["prompt_sha256"]: (row["ratings"], row["reason"]) for row in store.read().to_pylist()}
        assert rows == {sha256("a"): ([7, 7], "ok"), sha256("b"): ([4, None], "some_aspects_missing")}
        store.compact()


def test_what_failed_is_asked_again_and_what_is_no_answer_always(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    failures = ["length", "no_aspect_read", "not_finite", "refused_by_engine"]
    write(store, {reason: nothing(reason) for reason in failures[2:]})
    assert not store.has_answers()
    write(store, {"ok": answer(5)} | {reason: nothing(reason) for reason in failures[:2]})
    write(store, {"half": StoredScore((4, None), (4.0, None), "out_of_range", "")})
    assert store.has_answers()
    asked = ["never asked", "ok", *failures, "half", "ok"]
    assert known(store, asked) == {"ok", "length", "no_aspect_read", "half"}
    assert known(store, asked, retry_failed=True) == {"ok"}
    assert known(store, asked, unread=False) == {"ok", "half"}
    assert store.ratings_known(hashes(*asked)).tolist() == [-1, 2, 0, 0, 0, 0, 1, 2]
    assert known(store, []) == set()


reasons = st.sampled_from(["ok", "length", "not_finite", "refused_by_engine"])
written = st.lists(st.lists(st.tuples(st.integers(0, 7), reasons, st.integers(1, 10)), min_size=1, max_size=5))


@settings(max_examples=12)
@given(batches=written, asked=st.lists(st.integers(0, 9), max_size=12), compact_after=st.sets(st.integers(0, 9)))
def test_the_store_answers_as_a_plain_dict_does(batches, asked, compact_after):
    best: dict[str, tuple[tuple[int, bool], StoredScore]] = {}
    reasons_of: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = ScoreStore(folder)
        for number, batch in enumerate(batches):
            answers = {}
            for prompt, reason, rating in batch:
                answers[str(prompt)] = answer(rating) if reason == "ok" else nothing(reason)
            write(store, answers)
            for prompt, score in answers.items():
                value = sum(one is not None for one in score.ratings), score.reason in ("ok", "length")
                if prompt not in best or value >= best[prompt][0]:
                    best[prompt] = value, score
                reasons_of.setdefault(prompt, set()).add(score.reason)
            if number in compact_after:
                store.compact()
        prompts = [str(one) for one in asked]
        answered_in_words = {one for one, found in reasons_of.items() if found - {"not_finite", "refused_by_engine"}}
        assert store.has_answers() == bool(answered_in_words)
        assert known(store, prompts) == answered_in_words & set(prompts)
        assert store.ratings_known(hashes(*prompts)).tolist() == [
            best[one][0][0] if one in best else -1 for one in prompts
        ]
        rows = [row for low, high in hash_ranges(3) for row in store.read(low, high).to_pylist()]
        assert len(rows) == len(best) == len(store.read())
        found = {row["prompt_sha256"]: (row["ratings"], row["reason"]) for row in rows}
        assert found == {sha256(one): (list(score.ratings), score.reason) for one, (_, score) in best.items()}


def test_hashes_are_32_bytes_in_their_order_and_other_files_are_refused(tmp_path):
    digits = pa.chunked_array([pa.array([sha256(name) for name in "abc"])[1:], pa.array([f"{0:064x}"])])
    assert binary_hashes(digits, "here").tolist() == [*hashes("b", "c").tolist(), b""]  # numpy hides zeros at the end
    store = ScoreStore(str(tmp_path / "store"))
    for wrong in ("short", "x" * 64):
        store.write([wrong], [answer(1)])
        with pytest.raises(ValueError, match="store: prompt_sha256 holds other values than 64 hexadecimal digits"):
            known(store, "a")
        shutil.rmtree(store.path)


def test_many_scores_are_written_in_parts_that_hold_every_subject_once(tmp_path, monkeypatch):
    names = [f"i{number}" for number in range(60)]
    prompts = {"subject_id": names, "prompt_sha256": [sha256(name[:2]) for name in names], "prompt_tokens": range(60)}
    absent = {"cutoff": pa.nulls(60, pa.int64()), "cutoff_position": pa.nulls(60, pa.int32())}
    files.write_table(pa.table(prompts | absent), str(tmp_path / "prompts" / "part-0.parquet"))
    store = ScoreStore(str(tmp_path / "store"))
    distinct = list(dict.fromkeys(prompts["prompt_sha256"]))
    assert len(distinct) == 10  # equal prompts share an answer
    store.write(distinct[:9], [StoredScore((n, 1), (float(n), 1.0), "ok", "") for n in range(9)])
    config = ScoreConfig(output="o", data="d", subjects="items", aspects="a")
    run, settings = runs.Run(str(tmp_path), "score", {}, started=0.0), SimpleNamespace(aspects=TWO)
    monkeypatch.setattr(stage, "PART_ROWS", 20)
    scoring = stage.Scoring(run, config, settings, None, store, True, False, {})
    with pytest.raises(runs.RunError, match="1 prompts were not scored"):
        stage.write_scores(scoring)
    store.write(distinct[9:], [StoredScore((9, 1), (9.0, 1.0), "ok", "")])
    stage.write_scores(scoring)
    assert len(list((tmp_path / "scores").iterdir())) == 4
    scores, aspects = read_score_table(str(tmp_path), ["subject_id", "ratings", "model", "mode"])
    assert aspects == TWO.names and sorted(scores["subject_id"].to_pylist()) == sorted(names)
    assert all(row["ratings"] == [distinct.index(sha256(row["subject_id"][:2])), 1] for row in scores.to_pylist())
    assert {(row["model"], row["mode"]) for row in scores.to_pylist()} == {("smollm2", "probe")}


def test_ranges_of_hashes_leave_no_gap():
    for count in (1, 3, 16):
        ranges = list(hash_ranges(count))
        assert len(ranges) == count and ranges[0][0] == "" and ranges[-1][1] > "f" * 64
        assert all(before[1] == after[0] and before[0] < before[1] for before, after in itertools.pairwise(ranges))


def test_two_thousand_files_of_batches_become_one(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    write(store, {"failed before": nothing("length")})
    batch = next(path for path in Path(store.path).iterdir())
    for number in range(2_000 - 2):
        os.link(batch, f"{store.path}/{number}.parquet")
    write(store, {str(number): answer(1 + number % 10) for number in range(50)})
    store.compact()
    assert [path.name.split("-")[0] for path in Path(store.path).iterdir()] == ["compacted"]
    names = [str(number) for number in range(50)]
    assert len(store.read()) == 51 and known(store, [*names, "failed before"], retry_failed=True) == set(names)
    before = os.listdir(store.path)
    store.compact()  # there is nothing left to do
    assert os.listdir(store.path) == before


def test_small_files_are_merged_in_groups_that_fit_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "MERGED_BYTES", 3 * 2_500)  # of about three files
    store = ScoreStore(str(tmp_path / "store"))
    for number in range(10):
        write(store, {str(number): answer(number + 1)})
    store.compact()
    assert 1 < len(os.listdir(store.path)) < 10
    assert sorted(store.read()["prompt_sha256"].to_pylist()) == sorted(sha256(str(number)) for number in range(10))


def test_a_compaction_that_was_cut_short_loses_and_doubles_nothing(tmp_path, monkeypatch):
    store = ScoreStore(str(tmp_path / "store"))
    for number in range(3):
        write(store, {str(number): answer(number + 1)})
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
    assert len(os.listdir(store.path)) == 1 and store.read().sort_by("prompt_sha256").equals(full)


def test_a_folder_that_is_compacted_while_it_is_read_is_listed_again(tmp_path, monkeypatch):
    store = ScoreStore(str(tmp_path / "store"))
    for number in range(2):
        write(store, {str(number): answer(number + 1)})
    listings = [store.sizes()] * 3
    store.compact()
    real = ScoreStore.sizes
    monkeypatch.setattr(ScoreStore, "sizes", lambda self: listings.pop() if listings else real(self))
    assert sorted(store.read()["prompt_sha256"].to_pylist()) == sorted(map(sha256, "01"))
    assert listings == []
    listings += [{f"{store.path}/gone{number}.parquet": 1 for number in range(2)}]
    store.compact()  # another run has merged these files: that is no error
    assert known(store, "012") == {"0", "1"}


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
