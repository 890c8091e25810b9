"""The console says: rows read = rows kept + rows left out by reason."""

import itertools
from pathlib import Path

import pyarrow as pa
import pytest
from toy_data import walks, write_prepared, write_score_run

from raygr import files
from raygr.data.row_counts import log_rows
from raygr.report.scored_subjects import read_scores
from raygr.schema import USER_SCHEMA, USERS
from raygr.score.config import ScoreConfig
from raygr.score.subjects import chosen_subjects, subjects_left_out
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.stage import log_users, row_counts


def test_a_line_has_the_reasons_and_a_fault_is_a_warning(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    log_rows("reviews", read=10, kept=7, dropped={"no_text": 2, "late": 0, "duplicate": 1})
    log_rows("users", read=3, kept=3, dropped={})
    assert caplog.messages == ["reviews: 7 of 10 kept; left out: 2 no text, 1 duplicate", "users: 3 of 3 kept"]
    log_rows("items", read=10, kept=7, dropped={"late": 1})
    assert caplog.messages[-1] == "items: 2 rows are unaccounted for: this is a fault in raygr"


def test_users_who_are_not_asked_about_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = write_prepared(tmp_path / "p", walks(5, 20, 6, seed=0), items=20)
    users = files.read_table(f"{data}/{USERS}").to_pydict()
    users["cutoff_position"] = [3, -1, 3, 3, -1]
    files.write_table(pa.table(users, schema=USER_SCHEMA), f"{data}/{USERS}")
    caplog.set_level("INFO")
    config = ScoreConfig(output="o", data=data, subjects="users", aspects="a", max_subjects=4)
    left_out = {"beyond_max_subjects": 1, "not_sampled": 0, "without_train_interaction": 1}
    assert subjects_left_out(config, asked=3) == left_out
    assert caplog.messages == ["users: 3 of 5 kept; left out: 1 beyond max subjects, 1 without train interaction"]
    config = ScoreConfig(output="o", data=data, subjects="users", aspects="a", sample_subjects=2)
    left_out = {"beyond_max_subjects": 0, "not_sampled": 1, "without_train_interaction": 2}
    assert subjects_left_out(config, asked=2) == left_out
    caplog.clear()
    config = ScoreConfig(output="o", data=data, subjects="items", aspects="a")
    subjects_left_out(config, asked=19)
    assert caplog.messages[-1] == "items: 1 rows are unaccounted for: this is a fault in raygr"


def test_a_smaller_sample_is_part_of_a_larger_one(tmp_path: Path):
    data = write_prepared(tmp_path / "p", walks(5, 40, 6, seed=0), items=40)
    settings = {"output": "o", "data": data, "subjects": "items", "aspects": "a"}
    samples = [chosen_subjects(ScoreConfig(**settings, sample_subjects=count)) for count in (5, 12, 40, 100)]
    assert [len(one) for one in samples] == [5, 12, 40, 40]
    for small, large in itertools.pairwise(samples):
        assert set(small) < set(large) or len(small) == 40
    assert samples[0].tolist() == sorted(samples[0]) != list(range(1, 6))
    assert set(chosen_subjects(ScoreConfig(**settings, sample_subjects=5, seed=1))) != set(samples[0])
    with pytest.raises(ValueError, match="max_subjects and sample_subjects are two ways to choose subjects"):
        ScoreConfig(**settings, sample_subjects=5, max_subjects=5)


def test_training_says_who_has_no_target(tmp_path: Path, caplog):
    histories = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 1, 2]]
    data = write_prepared(tmp_path / "p", histories, items=12)
    config = TrainConfig(output="o", data=data, base_width=8)
    caplog.set_level("INFO")
    log_users(row_counts(load_inputs(config)))
    assert (
        "users of the training: 2 of 3 kept; left out: 1 without a training target behind a history" in caplog.messages
    )
    assert "users of the test: 3 of 3 kept" in caplog.messages


def test_the_report_says_which_subjects_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = write_score_run(tmp_path / "s", {"i1": [4.0], "i2": [5.0], "i3": [6.0]}, aspects=["a"])
    part = f"{run}/scores/part-0.parquet"
    table = files.read_table(part)
    reasons = pa.array(["ok", "no_aspect_read", "ok"])
    files.write_table(table.set_column(table.column_names.index("reason"), "reason", reasons), part)
    caplog.set_level("INFO")
    assert read_scores(run).ids == ["i1", "i3"]
    assert caplog.messages == [f"subjects of {run}: 2 of 3 kept; left out: 1 not read in full"]
