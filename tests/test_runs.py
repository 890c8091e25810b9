"""Run folders: unfinished until run.json, resumed with the same configuration only, never overwritten."""

import dataclasses
from collections.abc import Sequence

import pyarrow as pa
import pytest

from raygr import runs


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 60


def test_a_finished_run_is_refused_and_names_the_folder(tmp_path):
    folder = str(tmp_path / "run")
    run = runs.start_run(folder, job="train", config=Settings())
    assert not runs.is_finished(folder)
    runs.finish_run(run, inputs=[], counts={"rows": 3})
    assert runs.read_run(folder, job="train")["counts"] == {"rows": 3}
    with pytest.raises(runs.RunError, match=f"{folder} is a finished run"):
        runs.start_run(folder, job="train", config=Settings())


def begun(folder: str, *, job: str = "train", config: object, inputs: Sequence[str] = ()) -> runs.Run:
    """A run that was interrupted after it had written a file."""
    run = runs.start_run(folder, job=job, config=config, inputs=inputs)
    runs.write_text("", run.file("epochs.jsonl"))
    runs.unlock(folder)
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
    before = runs.fingerprint(str(file))
    assert runs.fingerprint(str(file)) == before
    file.write_text("a" * 9 + "b")
    assert runs.fingerprint(str(file)) != before


def test_inputs_that_are_runs_are_fingerprinted_by_their_record(tmp_path):
    data = runs.start_run(str(tmp_path / "data"), job="prepare", config=Settings())
    runs.finish_run(data, inputs=[], counts={})
    run = runs.start_run(str(tmp_path / "train"), job="train", config=Settings())
    runs.finish_run(run, inputs=[data.path], counts={})
    record = runs.read_run(run.path, job="train")
    assert record["inputs"] == {data.path: runs.fingerprint(data.path)}
    assert record["packages"]["torch"] and record["seconds"] >= 0


def test_tables_and_json_live_on_any_fsspec_file_system():
    table = pa.table({"a": [1, 2]})
    runs.write_table(table, "memory://runs-test/part.parquet")
    assert runs.read_table("memory://runs-test/part.parquet").equals(table)
    runs.write_json({"x": (1, 2)}, "memory://runs-test/x.json")
    assert runs.read_json("memory://runs-test/x.json") == {"x": [1, 2]}
