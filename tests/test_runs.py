"""Run folders: unfinished until run.json, resumed with the same configuration only, never overwritten.

No file of others is removed: a run starts in an empty folder, and two processes never work in one folder.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic_core import to_jsonable_python

from raygr import files, locks, records, runs
from raygr.prepare.config import PrepareConfig
from raygr.prepare.stage import prepare
from raygr.records import changed_inputs
from raygr.score.config import ScoreConfig
from raygr.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 60


def test_a_finished_run_is_refused_and_names_the_folder(tmp_path):
    folder = str(tmp_path / "run")
    run = runs.start_run(folder, job="train", config=Settings())
    assert not runs.is_finished(folder)
    runs.finish_run(run, inputs=[], counts={"rows": 3})
    assert runs.read_run(folder, job="train").counts == {"rows": 3}
    with pytest.raises(runs.RunError, match=f"{folder} is a finished run"):
        runs.start_run(folder, job="train", config=Settings())


def begun(folder: str, *, job: str = "train", config: object, inputs: Sequence[str] = ()) -> runs.Run:
    """A run that was interrupted after it had written a file."""
    run = runs.start_run(folder, job=job, config=config, inputs=inputs)
    files.write_text("", run.file("epochs.jsonl"))
    locks.unlock(folder)
    return run


def test_an_unfinished_run_resumes_with_the_same_configuration_only(tmp_path):
    folder = str(tmp_path / "run")
    begun(folder, config=Settings())
    assert runs.start_run(folder, job="train", config=Settings()).path == folder
    with pytest.raises(runs.RunError, match="width: 60 -> 48"):
        runs.start_run(folder, job="train", config=Settings(width=48))


def test_an_unfinished_run_is_not_gone_on_with_from_other_inputs(tmp_path):
    folder, scores = str(tmp_path / "run"), tmp_path / "scores.csv"
    scores.write_text("a")
    begun(folder, config=Settings(), inputs=[str(scores)])
    assert runs.start_run(folder, job="train", config=Settings(), inputs=[str(scores)]).path == folder
    scores.write_text("b")
    with pytest.raises(runs.RunError, match=r"started from other content of .*scores\.csv: choose another output"):
        runs.start_run(folder, job="train", config=Settings(), inputs=[str(scores)])
    scores.unlink()
    with pytest.raises(runs.RunError, match="other content"):
        runs.start_run(folder, job="train", config=Settings())


def test_a_job_writes_nowhere_in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.start_run("here", job="train", config=Settings())  # no job
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(runs.RunError, match="output: outputs/raw would lie in the job's own folder"):
        runs.start_run("outputs/raw", job="train", config=Settings())
    runs.start_run(f"{tmp_path}/run", job="train", config=Settings())
    runs.start_run("memory://in-a-job", job="train", config=Settings())


def test_reading_an_unfinished_or_foreign_run_says_what_to_do(tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(runs.RunError, match="no such run folder; run `raygr prepare` first"):
        runs.read_run(folder, job="prepare")
    run = runs.start_run(folder, job="train", config=Settings())
    with pytest.raises(runs.RunError, match="did not finish there"):
        runs.read_run(folder, job="train")
    runs.finish_run(run, inputs=[], counts={})
    with pytest.raises(runs.RunError, match="is a run of `train`: name the output of `raygr score` here"):
        runs.read_run(folder, job="score")


def test_a_fingerprint_follows_the_content(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("a" * 10)
    before = files.fingerprint(str(file))
    assert files.fingerprint(str(file)) == before
    file.write_text("a" * 9 + "b")
    assert files.fingerprint(str(file)) != before


def test_inputs_that_are_runs_are_fingerprinted_by_their_record(tmp_path):
    data = runs.start_run(str(tmp_path / "data"), job="prepare", config=Settings())
    runs.finish_run(data, inputs=[], counts={})
    run = runs.start_run(str(tmp_path / "train"), job="train", config=Settings())
    runs.finish_run(run, inputs=[data.path], counts={})
    record = runs.read_run(run.path, job="train")
    assert record.inputs == {data.path: files.fingerprint(data.path)}
    assert record.packages["torch"] and record.seconds >= 0


def test_tables_and_json_live_on_any_fsspec_file_system():
    table = pa.table({"a": [1, 2]})
    files.write_table(table, "memory://runs-test/part.parquet")
    assert files.read_table("memory://runs-test/part.parquet").equals(table)
    files.write_json({"x": (1, 2)}, "memory://runs-test/x.json")
    assert files.read_json("memory://runs-test/x.json") == {"x": [1, 2]}


# --- nobody's files ------------------------------------------------------------------------------

REVIEW = {"rating": 5, "title": "", "text": "", "asin": "a", "parent_asin": "a", "user_id": "u", "timestamp": 1}


def files_below(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_somebodys_files_is_refused_and_left_as_it_is(tmp_path):
    for name in ("items/own.csv", "prompts/own.txt", "recommendations/own.parquet", "a", "b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = files_below(tmp_path)
    words = r"output: .* holds files that are not of a run \(a, b, items and 2 more\): name a folder that is empty"
    with pytest.raises(runs.RunError, match=words):
        runs.start_run(str(tmp_path), job="prepare", config=Settings())
    assert files_below(tmp_path) == before
    with pytest.raises(runs.RunError, match=r"output: .*/a is a file: name a folder"):
        runs.start_run(f"{tmp_path}/a", job="prepare", config=Settings())


def test_prepare_leaves_raw_data_in_its_output_alone(tmp_path):
    raw = tmp_path / "data/reviews/Games.jsonl"
    raw.parent.mkdir(parents=True)
    raw.write_text(json.dumps(REVIEW))
    before = files_below(tmp_path)
    with pytest.raises(runs.RunError, match=r"reviews: .*Games\.jsonl lies inside the output .*/data: choose another"):
        prepare(PrepareConfig(output=f"{tmp_path}/data", reviews=(str(raw),)))
    (tmp_path / "copy.jsonl").write_text(json.dumps(REVIEW))
    with pytest.raises(runs.RunError, match=r"holds files that are not of a run \(reviews\)"):
        prepare(PrepareConfig(output=f"{tmp_path}/data", reviews=(f"{tmp_path}/copy.jsonl",)))
    (tmp_path / "copy.jsonl").unlink()
    assert files_below(tmp_path) == before


def test_a_resumed_run_removes_its_parts_and_nothing_else(tmp_path):
    run = begun(str(tmp_path / "run"), config=Settings())
    items = tmp_path / "run/items"
    items.mkdir()
    (items / "part-0.parquet").write_text("")
    (items / "part-1.parquet.part").write_text("")
    (items / "notes.txt").write_text("mine")
    with pytest.raises(runs.RunError, match=r"items holds files that no run wrote \(notes\.txt\): move them"):
        runs.remove_parts(run, "items")
    assert len(list(items.iterdir())) == 3
    (items / "notes.txt").unlink()
    runs.remove_parts(run, "items")
    assert not items.exists()
    runs.remove_parts(run, "items")  # nothing there is no error


def test_hidden_files_do_not_block_a_run(tmp_path):
    (tmp_path / ".gitkeep").write_text("")
    runs.start_run(str(tmp_path), job="train", config=Settings())
    assert (tmp_path / ".gitkeep").exists()


def test_an_own_store_inside_the_output_is_no_input(tmp_path):
    config = ScoreConfig(
        output=f"{tmp_path}/s", data=f"{tmp_path}/p", subjects="items", aspects="a", store=f"{tmp_path}/s/store"
    )
    run = runs.start_run(config.output, job="score", config=config)
    assert run.path == config.output and run.config["store"] == config.store
    inside = dataclasses.replace(config, output=f"{tmp_path}/t", data=f"{tmp_path}/t/p")
    with pytest.raises(runs.RunError, match=r"data: .*/t/p lies inside the output .*/t: choose another"):
        runs.start_run(inside.output, job="score", config=inside)


# --- again, otherwise, aside ---------------------------------------------------------------------


def test_a_start_that_wrote_nothing_does_not_block_the_corrected_one(tmp_path):
    folder, scores = str(tmp_path / "run"), tmp_path / "scores.csv"
    scores.write_text("a")
    runs.start_run(folder, job="train", config=Settings(), inputs=[str(scores)])
    scores.write_text("b")
    runs.start_run(folder, job="train", config=Settings(width=48), inputs=[str(scores)])
    started = files.read_json(f"{folder}/started.json")
    assert started["config"] == {"width": 48} and started["inputs"] == {str(scores): files.fingerprint(str(scores))}


def scoring(folder: Path, **changes: Any) -> ScoreConfig:
    named = {"output": f"{folder}/s", "data": f"{folder}/p", "subjects": "items", "aspects": f"{folder}/a.yaml"}
    return ScoreConfig(**named, **changes)


def test_what_changes_no_answer_may_change_on_resume(tmp_path):
    begun(f"{tmp_path}/s", job="score", config=scoring(tmp_path, engine_kwargs={"dtype": "bfloat16"}))
    small = {"dtype": "bfloat16", "gpu_memory_utilization": 0.8, "max_num_seqs": 4}
    fitting = scoring(tmp_path, actors=2, batch_size=4, tensor_parallel_size=2, engine_kwargs=small)
    assert runs.start_run(f"{tmp_path}/s", job="score", config=fitting).config["batch_size"] == 4
    for other, words in (
        ({"engine_kwargs": {"dtype": "float16"}}, "engine_kwargs: .*'bfloat16'.* -> .*'float16'"),
        ({"max_prompt_tokens": 512}, "max_prompt_tokens: 1024 -> 512"),
    ):
        with pytest.raises(runs.RunError, match=words):
            runs.start_run(f"{tmp_path}/s", job="score", config=scoring(tmp_path, **{"engine_kwargs": small} | other))


def test_a_folder_set_aside_is_renamed_and_kept(tmp_path):
    folder = str(tmp_path / "run")
    for number in (1, 2):
        runs.finish_run(runs.start_run(folder, job="train", config=Settings()), inputs=[], counts={"n": number})
        assert runs.set_aside(folder, "train") == f"{folder}.{number}"
    assert not Path(folder).exists()
    assert [runs.read_run(f"{folder}.{n}", job="train").counts["n"] for n in (1, 2)] == [1, 2]


# --- one process at a time -----------------------------------------------------------------------

WORKING = """
import sys, time
from raygr import runs
runs.start_run(sys.argv[1], job="prepare", config={})
print("started", flush=True)
time.sleep(60)
"""


def test_two_processes_never_work_in_one_folder_and_a_killed_one_leaves_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ENDING_SECONDS", 0.2)
    folder = str(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", WORKING, folder], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "started\n"
        words = rf"another raygr prepare \(pid {first.pid} on {socket.gethostname()}, since .*\) is working in {folder}"
        with pytest.raises(runs.RunError, match=words):
            runs.start_run(folder, job="prepare", config={})
        with pytest.raises(runs.RunError, match=words):
            runs.set_aside(folder, "prepare")
        first.send_signal(signal.SIGKILL)
        first.wait()
    run = runs.start_run(folder, job="prepare", config={})
    runs.finish_run(run, inputs=[], counts={})
    assert sorted(os.listdir(folder)) == ["run.json", "started.json"]


@pytest.mark.parametrize(
    ("holder", "is_free"),
    [
        ({"host": "elsewhere", "pid": 1, "renewed": 0}, False),
        ({"host": "elsewhere", "pid": 1, "renewed": -2 * locks.STALE_AFTER}, True),
        ({"host": socket.gethostname(), "pid": os.getpid(), "renewed": 0}, False),
        ({"host": socket.gethostname(), "pid": 2**22 + 1, "renewed": 0}, True),  # above the highest that Linux gives
    ],
)
def test_where_nothing_can_be_locked_a_holder_that_renews_no_more_is_gone(holder, is_free, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "ENDING_SECONDS", 0)
    folder = f"memory://{tmp_path.name}"
    now = {"job": "train", "since": time.time()} | holder | {"renewed": time.time() + holder["renewed"]}
    files.write_json(now, f"{folder}/.lock")
    if is_free:
        run = runs.start_run(folder, job="train", config={})
        assert files.read_json(f"{folder}/.lock")["pid"] == os.getpid()
        runs.finish_run(run, inputs=[], counts={})
        assert not files.exists(f"{folder}/.lock")
    else:
        with pytest.raises(runs.RunError, match=f"another raygr train .pid {holder['pid']} on {holder['host']}"):
            runs.start_run(folder, job="train", config={})


# --- places --------------------------------------------------------------------------------------


def written_before(folder: Path, *, output: str, data: str) -> None:
    """A train run of an earlier version, which recorded paths as they were typed."""
    config = to_jsonable_python(TrainConfig(output=output, data=data)) | {"output": output, "data": data}
    inputs = {data: files.fingerprint(f"{folder}/p")}
    for file in ("run.json", "started.json"):
        files.write_json({"job": "train", "config": config, "inputs": inputs}, f"{folder}/out/t/{file}")


def prepared(folder: Path) -> str:
    path = f"{folder}/p"
    runs.finish_run(runs.start_run(path, job="prepare", config={}), inputs=[], counts={})
    return path


def test_relative_paths_of_old_records_mean_places_beside_the_run(tmp_path, monkeypatch):
    data = prepared(tmp_path)
    written_before(tmp_path, output="out/t", data="p")
    monkeypatch.chdir("/")
    record = runs.read_run(f"{tmp_path}/out/t", job="train")
    assert (record.config["data"], list(record.inputs)) == (data, [data])
    assert not changed_inputs(record.inputs)
    config = TrainConfig(output=f"{tmp_path}/out/t", data=data)
    settings = to_jsonable_python(config)
    assert records.unlike(config.output, "run.json", "train", settings, frozenset()) == ""
    other = settings | {"data": f"{tmp_path}/q"}
    assert "data: " in records.unlike(config.output, "run.json", "train", other, frozenset())


def test_a_project_that_was_moved_reads_its_own_runs(tmp_path):
    (tmp_path / "here").mkdir()
    data = prepared(tmp_path / "here")
    config = TrainConfig(output=f"{tmp_path}/here/t", data=data)
    run = runs.start_run(config.output, job="train", config=config, inputs=[data])
    runs.finish_run(run, inputs=[data], counts={})
    (tmp_path / "here").rename(tmp_path / "there")
    record = runs.read_run(f"{tmp_path}/there/t", job="train")
    assert list(record.inputs) == [f"{tmp_path}/there/p"] and not changed_inputs(record.inputs)
    now = TrainConfig(output=f"{tmp_path}/there/t", data=f"{tmp_path}/there/p")
    settings = to_jsonable_python(now)
    assert records.unlike(now.output, "run.json", "train", settings, frozenset()) == ""


def test_a_run_resumes_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = TrainConfig(output="t", data="p")
    begun(first.output, config=first)
    started = files.read_json(f"{tmp_path}/t/started.json")
    assert (started["config"]["output"], started["config"]["data"]) == (f"{tmp_path}/t", f"{tmp_path}/p")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    again = TrainConfig(output="../t", data="../p")
    assert runs.start_run(again.output, job="train", config=again).path == f"{tmp_path}/t"


def test_a_model_is_an_input_by_its_content_or_its_commit(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("a")
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra llm")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    reference = tmp_path / "hub/models--org--name/refs/main"
    reference.parent.mkdir(parents=True)
    reference.write_text("1234")
    inputs = {name: files.fingerprint(name) for name in (str(model), "org/name", "smollm2")}
    assert (inputs["org/name"], inputs["smollm2"]) == ("1234", "")
    assert changed_inputs(inputs) == []
    (model / "tokenizer.json").write_text("b")
    reference.write_text("5678")
    assert changed_inputs(inputs) == [str(model), "org/name"]
    reference.unlink()  # a cache that lacks it says nothing
    assert changed_inputs(inputs) == [str(model)]


def test_ray_gets_any_fsspec_file_system(tmp_path):
    for folder in (f"memory://{tmp_path.name}", f"file://{tmp_path}"):
        filesystem, inner = files.arrow_filesystem(folder)
        with filesystem.open_output_stream(f"{inner}/a.txt") as file:
            file.write(b"a")
        assert files.exists(f"{folder}/a.txt")
    assert files.arrow_filesystem(str(tmp_path)) == (None, str(tmp_path))
